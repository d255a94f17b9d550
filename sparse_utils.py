"""Sparse training in one file: copy it into your project; it needs torch and nothing else.

    pruner = Pruner(model, final_rate=0.99, nbatches=len(loader), epochs=epochs)
    ...                                       # each step: pruner.update_thresh(), then forward, backward, optimizer.step()
    pruner.update_thresh(end_of_batch=True)   # after the last step
    pruner.desparsify()                       # plain layers with exact zeros

Feather: "Feather: An Elegant Solution to Effective DNN Sparsification", Glentis Georgoulakis, Retsinas and Maragos,
BMVC 2023, arXiv 2310.02448. Pruned layers keep a dense weight underneath and compute with the thresholded one.
Deviations from the authors' code, none of which changes the mathematics:
- the weight is parametrized (torch.nn.utils.parametrize) where the authors wrap the layer, so that dilation, padding modes,
  groups, transposed, subclassed and shared layers compute what the plain layer would with the thresholded weight;
- the operator is written w (1 - (T/|w|)^p)^(1/p): exact at T = 0, and no overflow or underflow for large p;
- the threshold is selected in O(n) instead of by a full sort, and is a buffer, so it travels in the model's state_dict.

Sparsity is the fraction of weights that are exactly zero, never the density. MACs are multiply-accumulates of one example.
"""

import contextlib
import fnmatch
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

# --------------------------------------------------------------------------------------------------------- the operator


def feather_formula(weight: torch.Tensor, threshold: torch.Tensor | float, p: float = 3) -> torch.Tensor:
    """The operator as the paper writes it: sign(w) (|w|^p - T^p)^(1/p) where |w| > T, else 0. feather() computes it faster."""
    if p == math.inf:
        return torch.where(weight.abs() > threshold, weight, 0)
    return weight.sign() * (weight.abs() ** p - threshold**p).clamp(min=0) ** (1 / p)


def gradient_mask(sparse: torch.Tensor, theta: float) -> torch.Tensor:
    """What the gradient is multiplied by: 1 where the weight is kept (`sparse` is not zero), theta where it is pruned."""
    return sparse.sign().abs_().clamp_min_(theta)


class _Feather(torch.autograd.Function):
    """feather_formula() in fewer passes over memory, which is what it costs: w f, f = (1 - r^p)^(1/p), r = T / max(|w|, T).

    Where |w| <= T, r is 1 and f is exactly 0; elsewhere the division rounds below 1, so that no kept weight becomes zero; at
    T = 0, f is 1. Powers of large or small weights neither overflow nor underflow.
    """

    @staticmethod
    def forward(weight, threshold, p, theta):
        magnitude = weight.abs().clamp_min_(torch.threshold(threshold, 0, 1))  # 1 in place of T = 0: no division by zero
        if p == math.inf:
            factor = torch.div(threshold, magnitude).lt_(1)
        elif p == 1:
            factor = torch.div(-threshold, magnitude).add_(1)
        else:
            if p % 2 == 1:  # (-r)^p is -(r^p): a pass less
                minus_power = torch.div(-threshold, magnitude).pow_(p)
            else:
                minus_power = torch.div(threshold, magnitude).pow_(p).neg_()
            factor = minus_power.log1p_().mul_(1 / (p * math.log(2))).exp2_()  # half of what another pow costs
        return factor.mul_(weight)

    @staticmethod
    def vmap(info, in_dims, weight, threshold, p, theta):
        """Of torch.func.vmap: all is element by element, so that one call does for the whole batch."""
        if in_dims[0] is None:
            weight = weight.expand(info.batch_size, *weight.shape)
        else:
            weight = weight.movedim(in_dims[0], 0)
        if in_dims[1] is not None:
            threshold = threshold.reshape(info.batch_size, *[1] * (weight.dim() - 1))
        return _Feather.apply(weight, threshold, p, theta), 0

    @staticmethod
    def setup_context(ctx, inputs, output):
        weight, threshold, _, theta = inputs
        ctx.theta = theta
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(output, weight, threshold)
        elif theta != 1:
            ctx.save_for_backward(output)  # which the layer keeps anyway

    @staticmethod
    def backward(ctx, grad):
        if ctx.needs_input_grad[1]:  # of a trained threshold, see adaptive_formula()
            sparse, weight, threshold = ctx.saved_tensors
            kept = gradient_mask(sparse, 0)
            to_threshold = -(grad * weight * (1 - kept)).sum_to_size(threshold.shape) / threshold
            return grad * kept.clamp_min_(ctx.theta), to_threshold, None, None
        if ctx.theta == 1:
            return grad, None, None, None
        (sparse,) = ctx.saved_tensors
        return grad * gradient_mask(sparse, ctx.theta), None, None, None


_Feather.forward.__signature__ = inspect.signature(_Feather.forward)  # autograd asks for it in each call: found once


def feather(weight: torch.Tensor, threshold: torch.Tensor | float, p: float = 3, theta: float = 1.0) -> torch.Tensor:
    """Feather's thresholding operator with its scaled straight-through gradient (BMVC 2023, section 3).

    forward:  sign(w) (|w|^p - T^p)^(1/p) where |w| > T, else 0
    backward: dL/dw = m * dL/dw~, with m = 1 where |w| > T, else theta

    weight: tensor of any shape. threshold: T >= 0, a 0-d tensor on the weight's device or a float; 0 returns the weight
    unchanged. p: 1 is soft thresholding, 3 the paper's choice, math.inf hard thresholding. theta: gradient scale of the
    pruned weights, 1.0 at moderate sparsity, 0.5 above 95 % in the paper. Returns a tensor of the weight's shape and dtype.
    """
    if not p >= 1:
        raise ValueError(f'p must be 1 or more, got {p}')
    if not 0 <= theta <= 1:
        raise ValueError(f'theta must lie in [0, 1], got {theta}')
    if not torch.is_tensor(threshold):
        threshold = torch.tensor(threshold, dtype=weight.dtype, device=weight.device)
    return _Feather.apply(weight, threshold, p, theta)


# ------------------------------------------------------------------------------------------------- the global threshold


@torch.no_grad()
def global_threshold(
    weights: list[torch.Tensor],
    ratio: float,
    previous: torch.Tensor | float | None = None,
    between: Callable[[list[torch.Tensor], float, float], tuple[int, torch.Tensor]] | None = None,
) -> torch.Tensor:
    """The threshold T that prunes a share `ratio` of all weights: the quantile of all |w|, linearly interpolated.

    weights: list of tensors, any shapes, one device. ratio in [0, 1]. The n absolute values are ranked together and T lies at
    position (n-1)*ratio, so |w| <= T holds for floor((n-1)*ratio) + 1 weights (more only where magnitudes tie with T).
    previous: a guess of T, such as the last one, or the line through the last two; it only saves time.
    between: what does the work of count_between() on a CPU, where there is something faster.
    Returns a 0-d tensor on the weights' device. Exact. O(n) on a CPU, a few passes over pieces that fit the cache; on a GPU a
    sort, which the host does not wait for.
    Raises ValueError for no weights, a ratio outside [0, 1], and (on a CPU, without `previous`) NaN or infinite weights.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f'ratio must lie in [0, 1], got {ratio}')
    dtype = weights[0].dtype if weights else None
    exact = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype  # which cannot count to 300 and 3,000
    weights = [_flat(weight) if dtype == exact else _flat(weight).to(exact) for weight in weights]
    n = sum(weight.numel() for weight in weights)
    if n == 0:
        raise ValueError('there are no weights to threshold')
    position = (n - 1) * ratio
    k = math.floor(position)
    low, high = _neighbours(weights, n, k, min(k + 1, n - 1), previous, between or count_between)
    threshold = (low + (high - low) * (position - k)).to(dtype)
    return torch.where(threshold < high, threshold, low.to(dtype))  # rounded up to `high` it would prune one too many


def next_threshold(threshold: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
    """A guess for global_threshold: the line through the last two thresholds, one step on. before: None at the first step."""
    return threshold if before is None else before.to(threshold).lerp(threshold, 2)


def _flat(tensor):
    """All elements as a vector, without a copy for the usual memory layouts; their order does not matter here."""
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.reshape(-1)


def _neighbours(weights, n, k, next_k, previous, between):
    """The magnitudes at ranks k and next_k (from 0): bracket them narrowly, then select inside the bracket."""
    if weights[0].device.type != 'cpu':
        ordered = torch.cat(weights).abs_().sort().values
        return ordered[k], ordered[next_k]
    for low, high in _brackets(weights, n, k, previous):
        below, inside = between(weights, low, high)
        if k >= below and next_k - below < inside.numel():
            return _select(inside, k - below, next_k - below)
    return _select(torch.cat(weights).abs_(), k, next_k)


def _select(magnitude, k, next_k):
    """The values at ranks k and next_k, which is k or k + 1, of a vector."""
    low = magnitude.kthvalue(k + 1).values
    above = magnitude[magnitude > low]
    tied = magnitude.numel() - above.numel() > next_k  # the next one is as large, or the same
    return low, low if tied else above.min()


def _brackets(weights, n, k, previous):
    """Ever wider (low, high) that should hold ranks k and k + 1: around the guess, then from a sample."""
    guess = 0.0 if previous is None else float(previous)
    if guess > 0:
        for reach in (0.0015, 0.03):  # a training step leaves T within 0.15 % of its course, nearly always
            yield (1 - reach) * guess, (1 + reach) * guess
    yield _sampled_bracket(weights, n, k)


CHUNK = 2**18  # weights: a chunk and its temporaries stay in the cache
BLOCK = 64  # weights that are skipped at once


def _chunks(weights):
    """The weights as pieces of whole blocks, [blocks, BLOCK]; what is small or does not fill a block is put together."""
    rest = []
    for weight in weights:
        for piece in weight.split(CHUNK):
            if piece.numel() % BLOCK == 0 and piece.numel() >= CHUNK // 2:
                yield piece.view(-1, BLOCK)
            else:
                rest.append(piece)
            if sum(piece.numel() for piece in rest) >= CHUNK // 2:
                yield _whole_blocks(rest)
                rest = []
    if rest:
        yield _whole_blocks(rest)


def _whole_blocks(pieces):
    """One [blocks, BLOCK] of them, filled up with infinity, which is above all magnitudes."""
    padding = -sum(piece.numel() for piece in pieces) % BLOCK
    return torch.cat([*pieces, pieces[0].new_full((padding,), math.inf)]).view(-1, BLOCK)


def count_between(weights: list[torch.Tensor], low: float, high: float) -> tuple[int, torch.Tensor]:
    """(how many magnitudes lie below `low`, those in [low, high]), in few passes of float arithmetic, which is fast."""
    middle = (low + high) / 2
    reach = 0.51 * (high - low) + 1e-6 * high
    total = 0
    balance = []
    groups = []
    inside = []
    for blocks in _chunks(weights):
        offset = blocks.abs().sub_(middle)
        balance.append(offset.sign().sum())  # magnitudes above the middle minus those below it
        distance = offset.abs_()
        near = _places(distance.amin(1) <= reach)  # blocks that may hold a magnitude of the bracket
        if 2 * len(near) <= len(blocks):
            groups.append(blocks.index_select(0, near).view(-1, 8))
        else:  # most of them do, as the bracket is wide: eight weights at a time, by columns, which is the fastest
            near = _places(distance.view(8, -1).amin(0) <= reach)
            inside.append(blocks.view(8, -1).index_select(1, near).view(-1))
        total += blocks.numel()
    if groups:  # smaller blocks first: comparing single values is slow
        groups = torch.cat(groups)
        near = _places(groups.abs().sub_(middle).abs_().amin(1) <= reach)
        inside.append(groups.index_select(0, near).view(-1))
    inside = torch.cat(inside).abs_()
    inside = inside.index_select(0, _places((inside >= low) & (inside <= high)))
    below_middle = (total - int((inside == middle).sum()) - int(torch.stack(balance).sum(dtype=torch.float64))) // 2
    return below_middle - int((inside < middle).sum()), inside


def _places(mask):
    """Where a vector of bools is True; with index_select() twice as fast as an index of bools."""
    return mask.nonzero().view(-1)


def _sampled_bracket(weights, n, k):
    """(low, high) that very probably hold ranks k and k + 1: a sample's quantile is off by about sqrt(q (1 - q) / size)."""
    stride = max(n // min(max(n // 64, 2**14), 2**16), 1)  # small samples are cheap, and large nets want narrow brackets
    sample = torch.cat([weight[::stride] for weight in weights]).abs_()
    ends = [end for weight in weights if weight.numel() for end in weight.aminmax()]
    largest = torch.stack(ends).abs().max()
    if not torch.isfinite(largest):
        raise ValueError('the weights hold NaN or infinity')
    size = sample.numel()
    q = k / n
    margin = 2 + 3 * math.sqrt(q * (1 - q) * size)
    first = math.floor(q * size - margin)
    last = math.ceil(q * size + margin)
    low = sample.kthvalue(first + 1).values if first > 0 else 0.0
    high = sample.kthvalue(last + 1).values if last < size else largest
    return float(low), float(high)


# ------------------------------------------------------------------------------------------------ which weights are pruned

PRUNABLE = (nn.modules.conv._ConvNd, nn.Linear)  # Conv1d to Conv3d, the transposed ones, and subclasses of all these


def prunable_layers(model: nn.Module, pthres: int = 0) -> dict[str, nn.Module]:
    """{name: layer} of all convolutions and linear layers with at least `pthres` weights (biases not counted)."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PRUNABLE)}
    return {name: layer for name, layer in layers.items() if dense_weight(layer).numel() >= pthres}


def layers_to_prune(model: nn.Module, pthres: int = 0) -> dict[str, nn.Module]:
    """prunable_layers(), of which there must be one, all with plain weights. Raises ValueError, before anything is changed."""
    layers = prunable_layers(model, pthres)
    if not layers:
        raise ValueError(f'the model has no convolution or linear layer with at least {pthres} weights')
    for name, layer in layers.items():
        _check_plain(name, layer)
    return layers


def weights_to_prune(
    model: nn.Module, pthres: int = 0, include: str | list[str] = (), exclude: str | list[str] = ()
) -> tuple[dict[str, list], dict[str, tuple[str, int]]]:
    """({name: [(module, attribute), ...]}, {name: (why not, size)}): the weights to be pruned, and the matrices left out.

    Pruned are the weights of convolutions and linear layers with at least `pthres` elements that are trained (requires_grad).
    A tied weight has one name and several places (module, attribute). It is left out when one of them is something else, such
    as an embedding. include, exclude: names or patterns (as of a shell: 'blocks.*.fc1') of layers or parameters. What `include`
    names is pruned in any case, also a frozen, small or tied weight, and any other matrix: 'h.*.attn.c_attn' (transformers'
    Conv1D), '*.in_proj_weight' (nn.MultiheadAttention). exclude='*' with include='layer4.*' prunes those of layer4 alone.
    Raises ValueError for a pattern that names nothing, when nothing is left, and for a layer that computes its weight from
    other parameters (weight_norm, spectral_norm, torch.nn.utils.prune, standardized convolutions).
    """
    include = [include] if isinstance(include, str) else list(include)
    exclude = [exclude] if isinstance(exclude, str) else list(exclude)
    seen = set()  # patterns that name something
    chosen = {}
    left_out = {}
    for name, module in model.named_modules():
        if isinstance(module, PRUNABLE) and 'weight' not in module._parameters:  # it computes its weight
            excluded = _named(exclude, [name], seen)
            small = module.weight.numel() < pthres or not any(parameter.requires_grad for parameter in module.parameters())
            if _named(include, [name], seen) or not (excluded or small):
                _check_plain(name, module)
            left_out[name] = ('computed from other parameters', module.weight.numel())
    owners = {}  # {id of a parameter: [(name, module, attribute), ...]}
    for name, module, attribute in matrices(model):
        owners.setdefault(id(dense_weight(module, attribute)), []).append((place_name(name, attribute), module, attribute))
    for places in owners.values():
        names = [name for name, _, _ in places]
        excluded = _named(exclude, names, seen)
        included = _named(include, names, seen)
        name, why = _reason(places, pthres, included, excluded)
        if why is None:
            chosen[name] = [(module, attribute) for _, module, attribute in places]
        else:
            left_out[name] = (why, dense_weight(*places[0][1:]).numel())
    for pattern in [*include, *exclude]:
        if pattern not in seen:
            raise ValueError(f'{pattern!r} is the name of no layer and of no matrix among the parameters of this model')
    if not chosen:
        raise ValueError(
            f'the model has no convolution or linear layer with at least {pthres} weights to be pruned' + _left(left_out)
        )
    for name, places in chosen.items():
        for module, attribute in places:
            if _is_prunable(module, attribute):
                _check_plain(name, module)
    return chosen, left_out


def _is_prunable(module, attribute):
    return isinstance(module, PRUNABLE) and attribute == 'weight'


def _reason(places, pthres, included, excluded):
    """(name, why a parameter with these (name, module, attribute) is not pruned, or None)."""
    strangers = [name for name, module, attribute in places if not _is_prunable(module, attribute)]
    name = next((name for name, _, _ in places if name not in strangers), places[0][0])
    kind = type(places[0][1]).__name__
    parameter = dense_weight(*places[0][1:])
    if any(isinstance(module, nn.RNNBase) for _, module, _ in places):
        why = f'{kind}, which cannot be pruned as it keeps its weights under other names too'
    elif any(operator_of(module, attribute) is not None for _, module, attribute in places):
        why = 'attached already'
    elif included:
        why = None
    elif excluded:
        why = 'excluded'
    elif len(strangers) == len(places):
        why = f'{kind}.{places[0][2]}'
    elif strangers:
        why = f'{name} tied to {strangers[0]}'
    elif not parameter.requires_grad:
        why = 'frozen'
    elif parameter.numel() < pthres:
        why = f'smaller than {pthres}'
    else:
        why = None
    return name, why


def matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(name of the module, module, attribute) of each parameter with two dimensions or more, attached or not, all its places.

    Raises ValueError for parameters without a shape (of lazy modules).
    """
    for name, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList):
            continue
        for attribute in [*module._parameters, *_plain_names(module)]:
            parameter = dense_weight(module, attribute)
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise ValueError(f'{name}.{attribute} has no shape yet: run the model once first')
            if parameter is not None and parameter.dim() > 1:
                yield name, module, attribute


def place_name(name: str, attribute: str) -> str:
    """A layer's weight goes by the name of the layer, any other parameter by its own."""
    if attribute == 'weight':
        return name
    return f'{name}.{attribute}' if name else attribute


def _named(patterns, names, seen):
    """Whether a pattern fits one of the names, or that name with .weight; adds those that do to the set `seen`."""
    names = [*names, *(f'{name}.weight' if name else 'weight' for name in names)]
    fitting = [pattern for pattern in patterns if any(fnmatch.fnmatchcase(name, pattern) for name in names)]
    seen.update(fitting)
    return bool(fitting)


def _check_plain(name, layer):
    """Raise ValueError unless the layer computes with its own parameter `weight`, or so that zeros of it stay zeros."""
    if 'weight' in layer._parameters:
        if type(layer).forward in _FORWARDS or keeps_zeros(layer):
            return
        how = f'is computed anew by {type(layer).__name__}.forward'
    elif parametrize.is_parametrized(layer, 'weight'):
        how = f'is parametrized already, by {type(layer.parametrizations.weight[0]).__name__}'
    else:
        how = f'is computed from {", ".join(layer._parameters)} (torch.nn.utils.weight_norm, spectral_norm or prune)'
    name = name or type(layer).__name__
    raise ValueError(f'the weight of layer {name} {how}: make it a plain layer first, or leave it out with exclude={name!r}')


_FORWARDS = {kind.forward for kind in vars(nn.modules.conv).values() if isinstance(kind, type) and issubclass(kind, nn.Module)}
_FORWARDS.add(nn.Linear.forward)


def _kernel(layer):
    """The tensor that a layer with a forward() of its own hands to torch's convolution or product, in a trial call on zeros.

    None where the trial fails or hands over none.
    """
    if isinstance(layer, nn.Linear):
        shape = [1, layer.in_features]
    else:
        shape = [1, layer.in_channels]
        shape += [2 * dilation * (size - 1) + 1 for dilation, size in zip(layer.dilation, layer.kernel_size, strict=True)]
    weight = layer.weight
    kernels = []
    try:
        with torch.no_grad(), evaluation(layer), _Products(lambda kernel, uses: kernels.append(kernel)):
            type(layer).forward(layer, torch.zeros(shape, dtype=weight.dtype, device=weight.device))
    except Exception:  # the forward of others may ask for anything
        return None
    return next((kernel for kernel in kernels if kernel.numel() == weight.numel()), None)


def keeps_zeros(layer: nn.Module) -> bool:
    """Whether what a convolution or linear layer computes with is zero where its weight is; True where that cannot be tried."""
    plain = layer.weight
    if plain.is_meta:
        return True
    odd = torch.arange(plain.numel(), device=plain.device).view(plain.shape) % 2
    half = plain.detach() * odd
    layer._parameters['weight'] = nn.Parameter(half, requires_grad=False)
    try:
        kernel = _kernel(layer)
    finally:
        layer._parameters['weight'] = plain
    return kernel is None or int((kernel == 0).sum()) >= int((half == 0).sum())


def summary(model: nn.Module, chosen: dict[str, list], left_out: dict[str, tuple[str, int]]) -> str:
    """One line of what weights_to_prune() chose and left out: n of N parameters, and the other matrices by kind."""
    pruned = sum(dense_weight(*places[0]).numel() for places in chosen.values())
    total = sum(parameter.numel() for parameter in model.parameters())
    return f'{pruned:,} of {total:,} parameters are pruned, those of {len(chosen)} weights' + _left(left_out)


def _left(left_out):
    """The end of that line."""
    kinds = {}
    for why, size in left_out.values():
        kinds.setdefault(why, []).append(size)
    parts = [f'{len(sizes)} x {why} ({sum(sizes):,})' for why, sizes in kinds.items()]
    return f'; left out: {"; ".join(parts)}; include= prunes matrices by name' if parts else ''


SHARDED = 'the weight of {} is sharded (FSDP, DTensor), so no process sees what it has to rank: use DistributedDataParallel'


def _refuse_sharded(chosen):
    """Raise ValueError for weights of weights_to_prune() that are parts of a tensor."""
    for name, places in chosen.items():
        if _is_sharded(getattr(*places[0])):
            raise ValueError(SHARDED.format(name))


def _is_sharded(weight):
    return hasattr(weight, 'full_tensor') or not isinstance(weight, nn.Parameter)


# ------------------------------------------------------------------------------------------- sparse layers and plain ones


def attach(layer: nn.Module, operator: nn.Module, attribute: str = 'weight') -> None:
    """Let the layer compute with operator(weight); the weight underneath stays the same Parameter, dense and trained.

    attribute: the name of the parameter. The layer goes on to load state dicts with its plain names. Raises ValueError for a
    layer whose weight is parametrized already, by another method or otherwise.
    """
    if parametrize.is_parametrized(layer, attribute):
        raise ValueError(f'the {attribute} of {layer} is parametrized already: make it a plain layer first')
    parameter = layer._parameters[attribute]
    hook = _PlainNames(attribute, list(layer._parameters))
    # What register_parametrization finds, it writes to with set_(), and DistributedDataParallel loses sight of the parameter.
    layer._parameters[attribute] = nn.Parameter(parameter.detach(), parameter.requires_grad)
    parametrize.register_parametrization(layer, attribute, operator, unsafe=True)  # no trial call: some operators act
    layer.parametrizations[attribute].original = parameter
    layer.register_load_state_dict_pre_hook(hook)


class _PlainNames:
    """Lets an attached layer load a state dict of the plain layer; knows the order of the plain layer's parameters."""

    def __init__(self, attribute, order):
        self.attribute = attribute
        self.order = order

    def __call__(self, layer, state, prefix, *_):
        plain = f'{prefix}{self.attribute}'
        inside = f'{prefix}parametrizations.{self.attribute}.'
        if plain not in state:
            return
        weight = state.pop(plain)
        state[f'{inside}original'] = weight
        for name, tensor in layer.parametrizations[self.attribute].state_dict().items():
            if name != 'original':  # the threshold stays what it is
                tensor = torch.zeros_like(tensor, device=weight.device) if tensor.is_meta else tensor
                state.setdefault(inside + name, tensor)


def _plain_names(layer):
    """{attribute: (key of the hook, the _PlainNames)} of the attached parameters of a layer."""
    hooks = {key: hook.hook for key, hook in layer._load_state_dict_pre_hooks.items()}
    return {hook.attribute: (key, hook) for key, hook in hooks.items() if isinstance(hook, _PlainNames)}


def dense_weight(layer: nn.Module, attribute: str = 'weight') -> torch.Tensor:
    """The trained weight: under the parametrization while there is one. Of a layer that computes its weight, its kernel."""
    if not parametrize.is_parametrized(layer, attribute):
        return getattr(layer, attribute)
    parametrized = layer.parametrizations[attribute]
    return parametrized.original if parametrized.is_tensor else getattr(layer, attribute)


@torch.no_grad()
def computed_weight(layer: nn.Module, attribute: str = 'weight') -> torch.Tensor:
    """What the layer computes with in evaluation: the thresholded weight, or the kernel it makes of its parameters."""
    with evaluation(layer):
        kernel = None
        if attribute == 'weight' and isinstance(layer, PRUNABLE) and operator_of(layer) is None:
            for hook in layer._forward_pre_hooks.values():
                if type(hook).__module__.startswith('torch.nn.utils.'):  # the old weight_norm and spectral_norm, and prune
                    hook(layer, ())
            if type(layer).forward not in _FORWARDS and not layer.weight.is_meta:
                kernel = _kernel(layer)
        return getattr(layer, attribute) if kernel is None else kernel


@contextlib.contextmanager
def evaluation(model: nn.Module):
    """The model in evaluation mode; afterwards each module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def bake(layers: Iterable[nn.Module]) -> None:
    """Turn the layers into plain ones that hold the weights they computed with; names and order as before."""
    _bake([(layer, 'weight') for layer in dict.fromkeys(layers)])


@torch.no_grad()
def _bake(places):
    places = [(layer, attribute) for layer, attribute in places if attribute in _plain_names(layer)]
    baked = {id(dense_weight(*place)): computed_weight(*place).clone() for place in places}  # all first: weights may be tied
    for layer, attribute in places:
        key, hook = _plain_names(layer)[attribute]
        del layer._load_state_dict_pre_hooks[key]
        # Copies of a layer share its class, and removing the parametrization deletes the weight's property from the class.
        kind = type(layer)
        layer.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
        parametrize.remove_parametrizations(layer, attribute, leave_parametrized=False)
        weight = layer._parameters[attribute]
        weight.copy_(baked[id(weight)])
        for name in hook.order:  # removing a parametrization puts its parameter last
            if name in layer._parameters:  # another attached one comes later
                layer._parameters[name] = layer._parameters.pop(name)


def operator_of(layer: nn.Module, attribute: str = 'weight') -> nn.Module | None:
    """What attach() put on the layer, or None."""
    return layer.parametrizations[attribute][0] if parametrize.is_parametrized(layer, attribute) else None


def attached_places(model: nn.Module, kind: type) -> dict[str, tuple[nn.Module, str]]:
    """{name: (module, attribute)} of all that computes with an operator of this kind, tied ones too."""
    places = {}
    for name, layer in model.named_modules():
        for attribute in _plain_names(layer):
            if isinstance(operator_of(layer, attribute), kind):
                places[place_name(name, attribute)] = (layer, attribute)
    return places


DDP_IGNORES = '_ddp_params_and_buffers_to_ignore'  # DistributedDataParallel reads it from the module that it wraps


def _threshold_names(model):
    kinds = (Feather, AdaptiveThreshold)
    operators = [(name, module) for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, kinds)]
    return [f'{name}.{buffer}' for name, operator in operators for buffer in operator._buffers]


def _hide_from_ddp(model):
    """DDP need not send the thresholds, as all ranks compute the same; and it fails once all its buffers are baked in."""
    setattr(model, DDP_IGNORES, [*getattr(model, DDP_IGNORES, []), *_threshold_names(model)])


def _show_to_ddp(model):
    """Undo _hide_from_ddp(), before the thresholds are baked in; also where the model is a part of `model`."""
    for module in model.modules():
        if DDP_IGNORES in vars(module):
            hidden = set(_threshold_names(module))
            left = [name for name in getattr(module, DDP_IGNORES) if name not in hidden]
            if left:
                setattr(module, DDP_IGNORES, left)
            else:
                delattr(module, DDP_IGNORES)


def dense_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """model.state_dict() as if nothing were attached: plain names in plain order, the dense weights, no thresholds."""
    state = dict(model.state_dict())
    for name, layer in model.named_modules(remove_duplicate=False):
        prefix = f'{name}.' if name else ''
        attached = {attribute: hook.order for attribute, (_, hook) in _plain_names(layer).items()}
        if attached:
            order = max(attached.values(), key=len)  # that from before the first one was attached
            state = _with_plain_names(state, prefix, list(attached), order)
    return state


def _with_plain_names(state, prefix, attached, order):
    """A state dict in which the parameters of one layer have their plain names, in their order."""
    own = {}
    for attribute in order:
        inside = f'{prefix}parametrizations.{attribute}.original'
        key = inside if attribute in attached else f'{prefix}{attribute}'
        if key in state:
            own[f'{prefix}{attribute}'] = state[key]
    hidden = tuple(f'{prefix}parametrizations.{attribute}.' for attribute in attached)
    renamed = {}
    for key, tensor in state.items():
        if key.startswith(prefix):
            renamed.update(own)  # before what else the layer has
        if key not in own and not key.startswith(hidden):
            renamed[key] = tensor
    return renamed


def load_dense_state_dict(model: nn.Module, state: dict[str, torch.Tensor], strict: bool = True):
    """Load plain names into a model, attached or not; its thresholds stay. Returns what model.load_state_dict() returns.

    Raises ValueError when no name fits, which load_state_dict(strict=False) passes over, and else as load_state_dict() does.
    """
    known = dense_state_dict(model)
    if not any(name in known for name in state):
        raise ValueError(
            f'none of the {len(state)} names of the state dict, such as {next(iter(state), None)!r}, is known to the model, '
            f'whose first is {next(iter(known), None)!r}: rename them'
        )
    return model.load_state_dict(state, strict=strict)


# ------------------------------------------------------------------------------------------------------------ the pruner


class Feather(nn.Module):
    """The operator as a parametrization of one weight, with its threshold as a buffer."""

    def __init__(self, p: float = 3, theta: float = 1.0):
        super().__init__()
        self.p = p
        self.theta = theta
        self.register_buffer('threshold', torch.zeros(()))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return _Feather.apply(weight, self.threshold, self.p, self.theta)


class Pruner:
    """Feather-Global: one magnitude threshold for all layers, raised along a cubic ramp, under Feather's operator.

    model: an nn.Module; its convolutions and linear layers with at least `pthres` weights are pruned, in place.
    device: the model is moved there when given. final_rate: sparsity at the end, in (0, 1).
    nbatches, epochs: calls of update_thresh() an epoch and epochs, which set the ramp; without both, the full rate holds from
    the first step. With gradient accumulation and one call an optimizer step, nbatches is len(loader) / accumulation steps.
    t1: epoch at which the ramp starts. Keywords beyond the authors' code, with the paper's values as defaults:
    p: the operator's exponent; theta: gradient scale of pruned weights (None: 0.5 above 95 % sparsity, else 1);
    ramp_end: share of all steps after which the ramp has reached final_rate;
    backbone: 'global' (one threshold over all layers), 'layerwise' (the same ratio in each layer), or 'asl': thresholds trained
    by Adaptive Sparsity Loss, which then has to be in the loss (see adaptive_loss) and reaches the target approximately;
    include, exclude: names or patterns of weights, see weights_to_prune(); say: prints one line of what is pruned and what is
    left out; None is quiet.
    Raises ValueError for settings that cannot work, before the model is changed. Works before or after the optimizer is made,
    and before or after DistributedDataParallel wraps the model: parameters stay the same. FSDP is refused.
    """

    OPERATOR = Feather  # a subclass may have a faster one

    def __init__(
        self,
        model: nn.Module,
        device: torch.device | str | None = None,
        final_rate: float = 0.9,
        nbatches: int | None = None,
        epochs: int | None = None,
        pthres: int = 0,
        t1: float = 0,
        *,
        p: float = 3,
        theta: float | None = None,
        ramp_end: float = 0.5,
        backbone: str = 'global',
        include: str | list[str] = (),
        exclude: str | list[str] = (),
        say: Callable[[str], None] | None = print,
    ):
        if not 0 < final_rate < 1:
            raise ValueError(f'final_rate is the fraction of zeros and must lie between 0 and 1, got {final_rate}')
        if not p >= 1:
            raise ValueError(f'p must be 1 or more, got {p}')
        if theta is not None and not 0 <= theta <= 1:
            raise ValueError(f'theta must lie in [0, 1], got {theta}')
        if (nbatches is None) != (epochs is None):
            raise ValueError('nbatches and epochs set the ramp together: give both or neither')
        if nbatches is not None and not (nbatches >= 1 and epochs >= 1):
            raise ValueError(f'nbatches and epochs must be 1 or more, got {nbatches} and {epochs}')
        if not 0 < ramp_end <= 1:
            raise ValueError(f'ramp_end must lie in (0, 1], got {ramp_end}')
        if nbatches is not None and not 0 <= t1 < ramp_end * epochs:
            raise ValueError(f'the ramp ends at epoch {ramp_end * epochs:g}, so t1 must lie in [0, that), got {t1}')
        if backbone not in ('global', 'layerwise', 'asl'):
            raise ValueError(f"backbone must be 'global', 'layerwise' or 'asl', got {backbone!r}")
        chosen, left_out = weights_to_prune(model, pthres, include, exclude)
        _refuse_sharded(chosen)
        self.model = model if device is None else model.to(device)
        self.final_rate = final_rate
        self.p = p
        self.theta = theta
        if theta is None:
            self.theta = 0.5 if final_rate > 0.95 else 1.0
        self.backbone = backbone
        self.total_steps = None if nbatches is None else nbatches * epochs
        self.ramp = None if nbatches is None else (t1 * nbatches, ramp_end * nbatches * epochs)
        self.step = 0
        self._ratio = 0.0
        self._places = chosen  # {name: [(module, attribute), ...]}
        devices = {str(dense_weight(*places[0]).device) for places in chosen.values()}
        if backbone == 'global' and len(devices) > 1:
            raise ValueError(f"the weights lie on {', '.join(sorted(devices))}: one threshold needs one device, or 'layerwise'")
        if say is not None:
            say(summary(model, chosen, left_out))
        self._attach()

    def _attach(self):
        self._groups = []  # lists of names whose weights share a threshold; none where thresholds are trained
        self._members = []  # what a step looks up, kept at hand: the operators of each group
        self._holders = []  # and what holds its weights
        if self.backbone == 'asl':
            _attach_adaptive(self.model, self._places, initial_thresh(self.final_rate), True, self.p, self.theta)
            return
        for places in self._places.values():
            for place in places:
                attach(place[0], self.OPERATOR(self.p, self.theta).to(dense_weight(*place)), place[1])
        names = list(self._places)
        self._groups = [names] if self.backbone == 'global' else [[name] for name in names]
        self._sizes = {name: dense_weight(*places[0]).numel() for name, places in self._places.items()}
        self._before = [None] * len(self._groups)  # the threshold before, of each group
        self._members = [self._operators(group) for group in self._groups]
        self._holders = [[self._holder(name) for name in group] for group in self._groups]
        _hide_from_ddp(self.model)

    @property
    def layers(self) -> dict[str, nn.Module]:
        """{name: module} of all that are pruned; a tied weight has one name."""
        return {name: module for name, places in self._places.items() for module, _ in places[:1]}

    @property
    def ratio(self) -> float:
        """Target share of zeros at the current step."""
        return self._ratio

    @property
    def threshold(self) -> float | list[float] | None:
        """Current threshold; a list, one a weight, unless the backbone is 'global'; None once they are baked in.

        Reading it waits for the GPU.
        """
        places = [places[0] for places in self._places.values()]
        if operator_of(*places[0]) is None:
            return None
        if self.backbone == 'asl':
            return [operator_of(*place).threshold(dense_weight(*place)).item() for place in places]
        values = [self._operators(group)[0].threshold.item() for group in self._groups]
        return values[0] if self.backbone == 'global' else values

    def _operators(self, names):
        return [operator_of(*place) for name in names for place in self._places[name]]

    def _holder(self, name):
        layer, attribute = self._places[name][0]
        return layer.parametrizations[attribute]

    def _weights(self, number):
        """The dense weights of a group. Raises ValueError when they are parts of tensors, as under FSDP."""
        weights = [holder.original for holder in self._holders[number]]
        for name, weight in zip(self._groups[number], weights, strict=True):
            sharded = type(weight) is not nn.Parameter and _is_sharded(weight)
            if sharded or weight.numel() != self._sizes[name]:
                raise ValueError(SHARDED.format(name))
        return weights

    def update_thresh(self, end_of_batch: bool = False) -> None:
        """Raise the threshold: call before each forward, and once with end_of_batch=True after the last step.

        end_of_batch=True recomputes the threshold for the current weights without advancing; once all nbatches * epochs steps
        are done it uses final_rate itself. Further calls keep final_rate: there is no end to run over.
        Raises ValueError for weights that are sharded (FSDP).
        """
        if torch.compiler.is_compiling():  # data-dependent: the compiler leaves it out as a whole
            torch.compiler.disable(self._update)(end_of_batch)
        else:
            self._update(end_of_batch)

    def _update(self, end_of_batch):
        if not end_of_batch:
            self._ratio = self._cubic(self.step)
            self.step += 1
        elif self.total_steps is None or self.step >= self.total_steps:
            self._ratio = self.final_rate
        self._recompute()

    def _recompute(self):
        """The thresholds for the current weights and ratio."""
        for number, operators in enumerate(self._members):
            buffers = [operator.threshold for operator in operators]
            if self._ratio == 0:
                torch._foreach_zero_(buffers)
                continue
            guess = next_threshold(buffers[0], self._before[number])
            self._before[number] = buffers[0].clone()
            threshold = self.find_threshold(self._weights(number), self._ratio, guess)
            torch._foreach_copy_(buffers, [threshold] * len(buffers))

    def find_threshold(self, weights: list[torch.Tensor], ratio: float, guess: torch.Tensor | float | None) -> torch.Tensor:
        """global_threshold(), which a subclass may have faster."""
        return global_threshold(weights, ratio, guess)

    def _cubic(self, step):
        """k(t) = kf - kf (1 - (t - t1)/(t2 - t1))^3 between t1 and t2, in steps; 0 before, kf after."""
        if self.ramp is None:
            return self.final_rate
        t1, t2 = self.ramp
        progress = min(max((step - t1) / (t2 - t1), 0.0), 1.0)
        return self.final_rate * (1 - (1 - progress) ** 3)

    def print_sparsity(self) -> float:
        """Print a line a weight and the total; return the overall sparsity of the pruned weights in percent."""
        counts = {name: _count(computed_weight(*places[0])) for name, places in self._places.items()}
        counts['all pruned layers'] = _total(counts)
        width = max(len(name) for name in counts)
        for name, (zeros, weights) in counts.items():
            print(f'{name:<{width}} {zeros:>10,} of {weights:>10,} weights are zero  {100 * zeros / weights:6.2f} %')
        return 100 * zeros / weights

    def desparsify(self) -> nn.Module:
        """Bake the thresholded weights into plain layers of the original types, names and order; returns the model.

        The threshold is recomputed for the weights as they are, so that the count is exact: at final_rate when the ramp has
        ended, else at the ratio it has reached. Warns when update_thresh() was called more or less often than announced.
        Before the first call, thresholds that were loaded with the model are used as they are.
        """
        if self.backbone == 'asl':
            return iter_desparsify(self.model)
        if self.threshold is not None:
            if not self._loaded(self._operators(self._places)):
                self._warn()
                self._ratio = self._end_ratio()
                self._recompute()
            _show_to_ddp(self.model)
            _bake([place for places in self._places.values() for place in places])
            self._members = []
            self._holders = []
        return self.model

    def _end_ratio(self):
        """final_rate once the ramp has ended, else the ratio of the last step."""
        if self.ramp is None or self.step >= min(self.total_steps, self.ramp[1]):
            return self.final_rate
        return self._ratio

    def _loaded(self, operators):
        """Whether the thresholds were loaded with the model, and not this pruner's state: then they stay as they are."""
        return self.step == 0 and any(operator.threshold > 0 for operator in operators)

    def _warn(self):
        if self.total_steps is None or self.total_steps - self.total_steps / 10 <= self.step <= 1.1 * self.total_steps + 1:
            return
        reached = f'the ramp reached {100 * self._end_ratio():.4g} % of the {100 * self.final_rate:g} % asked for'
        warnings.warn(
            f'update_thresh() was called {self.step:,} times where nbatches * epochs announced {self.total_steps:,}: '
            f'{reached}. With gradient accumulation, nbatches is the number of calls an epoch. To prune to final_rate all the '
            'same, set pruner.step = pruner.total_steps first.',
            stacklevel=3,
        )

    @torch.no_grad()
    def bake(self, other: nn.Module) -> nn.Module:
        """Make a copy of the model sparse, with thresholds of its own, and plain; returns it. The model itself stays attached.

        other: a deep copy, torch.optim.swa_utils.AveragedModel, an exponential moving average; attached, or plain with the same
        names (of it or of its `.module`). Its count of zeros is as exact as that of desparsify(), at the same ratio.
        Raises ValueError when it has other weights.
        """
        if self.backbone == 'asl':
            return iter_desparsify(other)
        paths = {id(module): path for path, module in self.model.named_modules()}
        paths = {
            name: [(paths[id(module)], attribute) for module, attribute in places] for name, places in self._places.items()
        }
        copies = self._same_places(paths, other)
        if copies is None:
            raise ValueError(f'{type(other).__name__} is no copy of the model: it lacks some of {", ".join(paths)}')
        operators = [operator_of(*place) for places in copies.values() for place in places]
        ratio = self._end_ratio()
        if ratio > 0 and not (None not in operators and self._loaded(operators)):
            for names in self._groups:
                self._threshold_copies({name: copies[name] for name in names}, ratio)
        _show_to_ddp(other)
        _bake([place for places in copies.values() for place in places])
        return other

    def _threshold_copies(self, copies, ratio):
        """Give weights that share a threshold that of this ratio; what has no operator is thresholded in place."""
        weights = [dense_weight(*places[0]) for places in copies.values()]
        threshold = global_threshold(weights, ratio)
        for weight, places in zip(weights, copies.values(), strict=True):
            operators = [operator_of(*place) for place in places]
            if operators[0] is None:
                weight.copy_(feather(weight, threshold, self.p))
            else:
                for operator in operators:
                    operator.threshold.copy_(threshold)

    @staticmethod
    def _same_places(paths, other):
        """{name: [(module, attribute), ...]} in `other`, or in its .module; None when some are missing in both."""
        for root in (other, getattr(other, 'module', None)):
            modules = {} if root is None else dict(root.named_modules())
            wanted = [place for places in paths.values() for place in places]
            if all(path in modules and hasattr(modules[path], attribute) for path, attribute in wanted):
                return {name: [(modules[path], attribute) for path, attribute in places] for name, places in paths.items()}
        return None

    def state_dict(self) -> dict:
        """What is not in the model's state_dict, and the thresholds, to resume from."""
        attached = self._groups and self.threshold is not None
        thresholds = [self._operators(names)[0].threshold.clone() for names in self._groups] if attached else []
        return {'step': self.step, 'ratio': self._ratio, 'thresholds': thresholds}

    def load_state_dict(self, state: dict) -> None:
        """Continue where state_dict() was taken. Raises ValueError for another number of thresholds."""
        if len(state['thresholds']) != len(self._groups):
            raise ValueError(f'the state has {len(state["thresholds"])} thresholds, this pruner {len(self._groups)}')
        self.step = state['step']
        self._ratio = state['ratio']
        for names, threshold in zip(self._groups, state['thresholds'], strict=True):
            for operator in self._operators(names):
                operator.threshold.copy_(threshold)


# ------------------------------------------------------------------------------------------------ adaptive sparsity loss


def adaptive_formula(weight: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """w where |w| > b = r std(w) + 1e-6, else 0, as Adaptive Sparsity Loss writes it: b hardshrink(w / b), straight through.

    Autograd gives dL/dw = dL/dw~ and dL/dr = -std(w) * (sum over |w| <= b of dL/dw~ w / b).
    """
    b = r.clamp(0, 5) * weight.detach().std() + 1e-6
    ratio = weight / b
    return b * (ratio + (nn.functional.hardshrink(ratio, 1.0) - ratio).detach())


class AdaptiveThreshold(nn.Module):
    """Adaptive Sparsity Loss as a parametrization: prune |w| <= b = r std(w) + 1e-6, with r in [0, 5] trained.

    r: a 0-d Parameter, or a buffer when it is not trainable. p, theta: the operator, hard and straight-through in the paper;
    other values give Feather on this backbone. A forward in training mode computes with the weight moved to zero mean, as the
    analytic sparsity assumes. Evaluation does not, so that the weight itself is moved too: after the backward pass, before the
    optimizer's step. (The authors move it in the forward pass; then a second forward before the backward, checkpointing and
    compilation go wrong.)
    """

    def __init__(self, r: float, trainable: bool = True, p: float = math.inf, theta: float = 1.0):
        super().__init__()
        self.p = p
        self.theta = theta
        r = torch.as_tensor(r, dtype=torch.get_default_dtype()).detach().clone()
        if trainable:
            self.r = nn.Parameter(r)
        else:
            self.register_buffer('r', r)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        if self.training:
            if not torch.compiler.is_compiling():
                self.move_after_backward(weight)  # again, for copies of the model have no hooks on their parameters
            weight = weight - weight.detach().mean()
        return _Feather.apply(weight, self.threshold(weight), self.p, self.theta)

    def move_after_backward(self, weight: torch.Tensor) -> None:
        """Let a trained parameter be moved to zero mean whenever its gradient is complete."""
        if isinstance(weight, nn.Parameter) and weight.requires_grad and not _moving(weight):
            weight.register_post_accumulate_grad_hook(self.move)

    @torch.no_grad()
    def move(self, weight: torch.Tensor) -> None:
        """Subtract the mean, in place; not in evaluation mode."""
        if self.training:
            weight.sub_(weight.mean())

    def threshold(self, weight: torch.Tensor) -> torch.Tensor:
        """b, differentiable in r; the standard deviation is a constant to the gradient."""
        return self.r.clamp(0, 5) * weight.detach().std() + 1e-6

    def sparsity(self) -> torch.Tensor:
        """The share of a Gaussian's weights with |w| <= r std: erf(r / sqrt 2), differentiable."""
        return torch.erf(self.r.clamp(0, 5) / math.sqrt(2))


def _moving(weight):
    """The keys of the hooks by which an AdaptiveThreshold moves the parameter."""
    hooks = weight._post_accumulate_grad_hooks or {}
    return [key for key, hook in hooks.items() if isinstance(getattr(hook, '__self__', None), AdaptiveThreshold)]


def iter_sparsify(
    model: nn.Module,
    thresh: float,
    trainable: bool = True,
    pthres: int = 1000,
    *,
    p: float = math.inf,
    theta: float = 1.0,
    include: str | list[str] = (),
    exclude: str | list[str] = (),
    say: Callable[[str], None] | None = print,
) -> nn.Module:
    """Adaptive Sparsity Loss ("Weight Pruning via Adaptive Sparsity Loss", Retsinas et al., ICIP 2021, arXiv 2006.02768).

    Every convolution and linear layer with at least `pthres` weights gets a threshold of `thresh` standard deviations of its
    weights, trained unless `trainable` is False. The thresholds are parameters of the model: make the optimizer afterwards.
    p, theta: the operator as in feather(), the paper's hard straight-through one by default. include, exclude, say: as Pruner
    has them. Works in place and returns the model. Raises ValueError for a thresh outside [0, 5], when no layer is large
    enough, and as weights_to_prune() does; then the model is as it was.

    Deviations from the authors' code: the loss, the forward pass and the report use the same clamped r; evaluation does not
    move weights, and training moves them after the backward pass; trainable=False freezes r also for the sparsity loss; a
    layer's size is its real number of weights.
    """
    if not 0 <= float(thresh) <= 5:
        raise ValueError(f'thresh is in standard deviations and must lie in [0, 5], got {thresh}')
    chosen, left_out = weights_to_prune(model, pthres, include, exclude)
    _refuse_sharded(chosen)
    if say is not None:
        say(summary(model, chosen, left_out))
    _attach_adaptive(model, chosen, thresh, trainable, p, theta)
    return model


def _attach_adaptive(model, chosen, thresh, trainable, p, theta):
    for places in chosen.values():
        weight = dense_weight(*places[0])
        operator = AdaptiveThreshold(thresh, trainable, p, theta).to(weight.device)  # a tied weight has one threshold
        operator.move_after_backward(weight)
        for layer, attribute in places:
            attach(layer, operator, attribute)
    _hide_from_ddp(model)


def initial_thresh(target: float, share: float = 0.6) -> float:
    """The threshold, in standard deviations, that prunes a share of the target of a Gaussian; the authors start at 0.6."""
    return math.sqrt(2) * torch.erfinv(torch.tensor(share * target, dtype=torch.float64)).item()


def iter_desparsify(model: nn.Module) -> nn.Module:
    """Remove the thresholds: plain layers with exact zeros. Works in place and returns the model."""
    places = list(attached_places(model, AdaptiveThreshold).values())
    _show_to_ddp(model)
    for place in places:
        weight = dense_weight(*place)
        for key in _moving(weight):
            del weight._post_accumulate_grad_hooks[key]
    _bake(places)
    for layer, attribute in places:
        layer.sparsified = (*getattr(layer, 'sparsified', ()), attribute)  # so that sparsity() goes on to count the same ones
    return model


def sparsity(model: nn.Module, print_per_layer: bool = False) -> tuple[float, int]:
    """(percent of zeros over the sparsified layers, number of zeros), counted on the weights the layers compute with.

    The same before and after desparsifying; for a model that was never sparsified, over all convolutions and linear layers.
    Prints the overall figure, and with print_per_layer a line a layer.
    """
    places = attached_places(model, AdaptiveThreshold)
    for name, layer in model.named_modules():
        for attribute in getattr(layer, 'sparsified', ()):
            places[place_name(name, attribute)] = (layer, attribute)
    if not places:
        places = {name: (layer, 'weight') for name, layer in prunable_layers(model).items()}
    counts = {name: _count(computed_weight(*place)) for name, place in _untied(places).items()}
    if print_per_layer:
        for name, (zeros, weights) in counts.items():
            print(f'{name}: {100 * zeros / weights:.2f} % of {weights:,} weights are zero')
    zeros, weights = _total(counts)
    print(f'overall sparsity: {100 * zeros / weights:.2f} % ({zeros:,} of {weights:,} weights)')
    return 100 * zeros / weights, zeros


def adaptive_loss(model: nn.Module, reduce: bool = True) -> torch.Tensor:
    """The analytic sparsity erf(r / sqrt 2) of the sparsified layers, differentiable in their thresholds r.

    reduce=False: one value a layer, shape [layers], in the order of named_modules; reduce=True: their mean weighted by layer
    size, 0-d. (The authors' code returns one minus this.) Add for example lv * (starget - adaptive_loss(model)) ** 2 to the
    task loss. Raises ValueError for a model without thresholds.
    """
    layers = adaptive_layers(model)
    if not layers:
        raise ValueError('the model has no adaptive thresholds: call iter_sparsify first')
    values = torch.stack([operator.sparsity() for operator, _ in layers.values()])
    if not reduce:
        return values
    sizes = torch.tensor([weights for _, weights in layers.values()], dtype=values.dtype, device=values.device)
    return (values * sizes).sum() / sizes.sum()


def adaptive_layers(model: nn.Module) -> dict[str, tuple[AdaptiveThreshold, int]]:
    """{layer name: (its AdaptiveThreshold, number of weights)}; a tied weight counts once."""
    places = _untied(attached_places(model, AdaptiveThreshold))
    return {name: (operator_of(*place), dense_weight(*place).numel()) for name, place in places.items()}


# -------------------------------------------------------------------------------------------------------------- counting


def _count(tensor):
    """(zeros, elements)."""
    return tensor.numel() - int(torch.count_nonzero(tensor)), tensor.numel()


def _total(counts):
    """The sums of {name: (zeros, weights)}."""
    return sum(zeros for zeros, _ in counts.values()), sum(weights for _, weights in counts.values())


def _untied(places):
    """Of {name: (module, attribute)} those with a weight that none before them has."""
    first = {}
    for name, place in places.items():
        first.setdefault(_identity(*place), (name, place))
    return dict(first.values())


def _identity(layer, attribute='weight'):
    """What tells a layer's weight from others: of one that is computed, a parameter it is computed from."""
    if parametrize.is_parametrized(layer, attribute):
        return id(next(layer.parametrizations[attribute].parameters()))
    return id(getattr(layer, attribute))


def count_zeros(model: nn.Module, pthres: int = 0, include: str | list[str] = ()) -> dict[str, tuple[int, int]]:
    """{layer name: (zeros, weights)} over prunable_layers, of the weights the layers compute with; tied weights count once.

    include: names or patterns of other matrices that are counted too, as weights_to_prune() has them.
    """
    include = [include] if isinstance(include, str) else list(include)
    places = {name: (layer, 'weight') for name, layer in prunable_layers(model, pthres).items()}
    for module_name, module, attribute in matrices(model) if include else []:
        name = place_name(module_name, attribute)
        if _named(include, [name], set()):
            places[name] = (module, attribute)
    return {name: _count(computed_weight(*place)) for name, place in _untied(places).items()}


@torch.no_grad()
def count_macs(model: nn.Module, example_input: torch.Tensor | tuple | list | dict) -> dict[str, tuple[int, int]]:
    """{layer name: (dense, nonzero)}: multiply-accumulates of each convolution and linear layer for one example.

    example_input: a batch [B, ...] that the model accepts, or a tuple or dict of several inputs; counts are divided by B. They
    come from the convolutions and matrix products that the forward pass really makes, so stride, padding, dilation, groups and
    repeated use are right, and a weight that the model hands to torch.nn.functional itself counts too. So does any other
    parameter that is multiplied with, under its own name, such as 'attention.in_proj_weight'. `nonzero` counts weights that
    are not zero. Batch norm, activation, bias and products of two activations are not counted. What the forward pass does not
    reach is missing.
    """
    inputs = [example_input] if torch.is_tensor(example_input) else example_input
    named = inputs if isinstance(inputs, dict) else {}
    unnamed = [] if named else list(inputs)
    batch = next(value for value in [*unnamed, *named.values()] if torch.is_tensor(value)).shape[0]
    macs = {}
    running = []  # names of the layers whose forward is under way
    names = {}  # {address of a weight: names of those that have it}
    layers = prunable_layers(model)

    def record(kernel, uses):
        known = names.get(kernel.untyped_storage().data_ptr(), [])
        name = known[0] if known else None
        if running and (running[-1] in known or not known and kernel.numel() == layers[running[-1]].weight.numel()):
            name = running[-1]  # of tied layers this one, and a kernel that the layer computed from its weight
        if name is None:
            return
        dense, nonzero = macs.get(name, (0, 0))
        used = int(torch.count_nonzero(kernel)) * uses // batch
        macs[name] = (dense + kernel.numel() * uses // batch, nonzero + used)

    def enter(name):
        def hook(layer, inputs):
            running.append(name)

        return hook

    def leave(layer, inputs, output):
        running.pop()

    handles = [layer.register_forward_pre_hook(enter(name)) for name, layer in layers.items()]
    handles += [layer.register_forward_hook(leave, always_call=True) for layer in layers.values()]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operation for a whole block would hide its products
    try:
        with evaluation(model), parametrize.cached():  # the thresholded weights are the same tensors at each use
            places = {name: (layer, 'weight') for name, layer in layers.items()}
            for name, module, attribute in matrices(model):
                if not isinstance(module, PRUNABLE):  # of those, what their weight may be computed from
                    places[place_name(name, attribute)] = (module, attribute)
            weights = {name: getattr(*place) for name, place in places.items()}  # kept, or others could get their addresses
            for name, weight in weights.items():
                names.setdefault(weight.untyped_storage().data_ptr(), []).append(name)
            with _Products(record):
                model(*unnamed, **named)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in handles:
            handle.remove()
    return macs


class _Products(TorchDispatchMode):
    """Calls record(kernel, uses) for each convolution and matrix product: every element of the kernel is used that often.

    Either factor of a product may be the kernel, so both are recorded; in a transposed convolution a weight is used once at
    each input position, else once at each output position.
    """

    def __init__(self, record):
        super().__init__()
        self.record = record

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name == 'convolution':
            places = args[0] if args[6] else result
            self.record(args[1], places.numel() // places.shape[1])
        elif name == 'linear':
            self.record(args[1], result.numel() // result.shape[-1])
        elif name in ('mm', 'bmm', 'mv', 'addmm', 'baddbmm', 'addmv'):
            left, right = args[-2:]
            self.record(left, right.shape[-1] if right.dim() > 1 else 1)
            self.record(right, left.shape[-2])
        return result
