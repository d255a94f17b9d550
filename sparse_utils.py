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

import math

import torch
from torch import nn
from torch.nn.utils import parametrize

PRUNABLE = (nn.modules.conv._ConvNd, nn.Linear)  # Conv1d to Conv3d, the transposed ones, and subclasses of all these


# --------------------------------------------------------------------------------------------------------- the operator


def feather_formula(weight: torch.Tensor, threshold: torch.Tensor | float, p: float = 3) -> torch.Tensor:
    """The operator as the paper writes it: sign(w) (|w|^p - T^p)^(1/p) where |w| > T, else 0. feather() computes it faster."""
    if p == math.inf:
        return torch.where(weight.abs() > threshold, weight, 0)
    return weight.sign() * (weight.abs() ** p - threshold**p).clamp(min=0) ** (1 / p)


def gradient_mask(sparse: torch.Tensor, theta: float) -> torch.Tensor:
    """What the gradient is multiplied by: 1 where the weight is kept (`sparse` is not zero), theta where it is pruned."""
    return sparse.sign().abs_().clamp_(min=theta)


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
    def setup_context(ctx, inputs, output):
        weight, threshold, _, theta = inputs
        ctx.theta = theta
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(output, weight, threshold)
        elif theta != 1:
            ctx.save_for_backward(output)  # which the layer keeps anyway

    @staticmethod
    def backward(ctx, grad):
        if ctx.needs_input_grad[
            1
        ]:  # of a trained threshold, as adaptive_formula() has it: - sum over pruned weights of g w / b
            sparse, weight, threshold = ctx.saved_tensors
            kept = gradient_mask(sparse, 0)
            to_threshold = -torch.sum(grad * weight * (1 - kept)) / threshold
            return grad * kept.clamp_(min=ctx.theta), to_threshold, None, None
        if ctx.theta == 1:
            return grad, None, None, None
        (sparse,) = ctx.saved_tensors
        return gradient_mask(sparse, ctx.theta).mul_(grad), None, None, None


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


class Feather(nn.Module):
    """The operator as a parametrization: register it on as many layers as share one threshold."""

    def __init__(self, p=3, theta=1.0):
        super().__init__()
        self.p, self.theta = p, theta
        self.register_buffer('threshold', torch.zeros(()))
        self.register_buffer('before', torch.zeros(()), persistent=False)  # the threshold before; for speed alone

    def forward(self, weight):
        return _Feather.apply(weight, self.threshold, self.p, self.theta)


# ------------------------------------------------------------------------------------------------- the global threshold


@torch.no_grad()
def global_threshold(weights: list[torch.Tensor], ratio: float, previous: torch.Tensor | float | None = None) -> torch.Tensor:
    """The threshold T that prunes a share `ratio` of all weights: the quantile of all |w|, linearly interpolated.

    weights: list of tensors, any shapes, one device. ratio in [0, 1]. The n absolute values are ranked together and T lies at
    position (n-1)*ratio, so |w| <= T holds for floor((n-1)*ratio) + 1 weights (more only where magnitudes tie with T).
    previous: a guess of T, such as the last one, or the line through the last two; it only saves time.
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
    low, high = _neighbours(weights, n, k, min(k + 1, n - 1), previous)
    threshold = (low + (high - low) * (position - k)).to(dtype)
    return torch.where(threshold < high, threshold, low.to(dtype))  # rounded up to `high` it would prune one too many


def next_threshold(operator: nn.Module) -> torch.Tensor:
    """A guess for global_threshold: the line through the last two thresholds, one step on. Call it once a step."""
    guess = operator.before.lerp(operator.threshold, 2)
    operator.before.copy_(operator.threshold)
    return guess


def _flat(tensor):
    """All elements as a vector, without a copy for the usual memory layouts; their order does not matter here."""
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.reshape(-1)


def _neighbours(weights, n, k, next_k, previous):
    """The magnitudes at ranks k and next_k (from 0): bracket them narrowly, then select inside the bracket."""
    if weights[0].device.type != 'cpu':
        ordered = torch.cat(weights).abs_().sort().values
        return ordered[k], ordered[next_k]
    for low, high in _brackets(weights, n, k, previous):
        below, inside = _between(weights, low, high)
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


def _between(weights, low, high):
    """(how many magnitudes lie below `low`, those in [low, high]), in few passes of float arithmetic, which is fast."""
    middle = (low + high) / 2
    reach = 0.51 * (high - low) + 1e-6 * high
    total = 0
    balance = []
    inside = []
    for blocks in _chunks(weights):
        offset = blocks.abs().sub_(middle)
        balance.append(offset.sign().sum())  # magnitudes above the middle minus those below it
        inside.append(blocks[offset.abs_().amin(1) <= reach])  # all blocks that may hold a magnitude of the bracket
        total += blocks.numel()
    inside = torch.cat(inside).abs_().view(-1, BLOCK // 8)
    inside = inside[(inside - middle).abs_().amin(1) <= reach]  # smaller blocks first: comparing single values is slow
    inside = inside[(inside >= low) & (inside <= high)]
    below_middle = (total - int((inside == middle).sum()) - int(torch.stack(balance).sum(dtype=torch.float64))) // 2
    return below_middle - int((inside < middle).sum()), inside


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


# ------------------------------------------------------------------------------------------- sparse layers and plain ones


def attach(layer, operator):
    """Let the layer compute with operator(weight); the weight underneath stays the same Parameter, dense and trained.

    Raises ValueError for a layer whose weight is parametrized already, by another method or otherwise.
    """
    if parametrize.is_parametrized(layer, 'weight'):
        raise ValueError(f'the weight of {layer} is parametrized already: make it a plain layer first')
    order = list(layer._parameters)
    parametrize.register_parametrization(layer, 'weight', operator, unsafe=True)  # no trial call: some operators act
    layer.parametrizations.weight.order = order  # baking restores it, as the order of state_dict depends on it


@torch.no_grad()
def bake(layers):
    """Turn the layers (an iterable) into plain ones that hold the weights they computed with; names and order as before."""
    layers = [layer for layer in dict.fromkeys(layers) if parametrize.is_parametrized(layer, 'weight')]
    baked = {id(_dense_weight(layer)): layer.weight.clone() for layer in layers}  # all first: a weight may be tied to another
    for layer in layers:
        order = layer.parametrizations.weight.order
        parametrize.remove_parametrizations(layer, 'weight', leave_parametrized=False)
        layer.weight.copy_(baked[id(layer.weight)])
        for key in order:  # removing a parametrization puts its parameter last
            layer._parameters[key] = layer._parameters.pop(key)


# ------------------------------------------------------------------------------------------------------------ the pruner


class Pruner:
    """Feather-Global: one magnitude threshold for all layers, raised along a cubic ramp, under Feather's operator.

    model: an nn.Module; its convolutions and linear layers with at least `pthres` weights are pruned, in place.
    device: the model is moved there when given. final_rate: sparsity at the end, in (0, 1).
    nbatches, epochs: steps an epoch and epochs, which set the ramp; without both, the full rate holds from the first step.
    t1: epoch at which the ramp starts. Keywords beyond the authors' code, with the paper's values as defaults:
    p: the operator's exponent; theta: gradient scale of pruned weights (None: 0.5 above 95 % sparsity, else 1);
    ramp_end: share of all steps after which the ramp has reached final_rate;
    backbone: 'global' (one threshold over all layers), 'layerwise' (the same ratio in each layer), or 'asl': thresholds trained
    by Adaptive Sparsity Loss, which then has to be in the loss (see adaptive_loss) and reaches the target approximately.
    Raises ValueError for settings that cannot work. Works before or after the optimizer is made: parameters stay the same.
    """

    def __init__(
        self,
        model,
        device=None,
        final_rate=0.9,
        nbatches=None,
        epochs=None,
        pthres=0,
        t1=0,
        *,
        p=3,
        theta=None,
        ramp_end=0.5,
        backbone='global',
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
        self.model = model if device is None else model.to(device)
        self.final_rate, self.p, self.backbone = final_rate, p, backbone
        self.theta = theta if theta is not None else 0.5 if final_rate > 0.95 else 1.0
        self.total_steps = None if nbatches is None else nbatches * epochs
        self.ramp = None if nbatches is None else (t1 * nbatches, ramp_end * nbatches * epochs)
        self.step, self._ratio = 0, 0.0
        self._attach(pthres, backbone)

    def _attach(self, pthres, backbone):
        self.layers = layers = layers_to_prune(self.model, pthres)
        self._groups = []  # (operator, whose weights share its threshold); none where thresholds are trained
        if backbone == 'asl':
            iter_sparsify(self.model, initial_thresh(self.final_rate), pthres=pthres, p=self.p, theta=self.theta)
            return
        owners = list({id(_dense_weight(layer)): layer for layer in layers.values()}.values())  # a tied weight counts once
        for group in [owners] if backbone == 'global' else [[layer] for layer in owners]:
            operator = Feather(self.p, self.theta).to(group[0].weight)
            shared = {id(_dense_weight(layer)) for layer in group}
            members = [layer for layer in layers.values() if id(_dense_weight(layer)) in shared]
            for layer in members:
                attach(layer, operator)
            self._groups.append((operator, [layer.parametrizations.weight for layer in group]))

    @property
    def ratio(self):
        """Target share of zeros at the current step, a float."""
        return self._ratio

    @property
    def threshold(self):
        """Current threshold, a float; a list, one a layer, unless the backbone is 'global'; None once they are baked in.

        Reading it waits for the GPU.
        """
        if not any(parametrize.is_parametrized(layer, 'weight') for layer in self.layers.values()):
            return None
        values = [operator.threshold.item() for operator, _ in self._groups]
        if not self._groups:
            values = [_adaptive(layer).threshold(_dense_weight(layer)).item() for layer in self.layers.values()]
        return values[0] if self.backbone == 'global' else values

    def update_thresh(self, end_of_batch=False):
        """Raise the threshold: call before each forward, and once with end_of_batch=True after the last step.

        end_of_batch=True recomputes the threshold for the current weights without advancing; once all nbatches * epochs steps
        are done it uses final_rate itself. Further calls keep final_rate: there is no end to run over.
        """
        if end_of_batch:
            if self.total_steps is None or self.step >= self.total_steps:
                self._ratio = self.final_rate
        else:
            self._ratio = self._cubic(self.step)
            self.step += 1
        for operator, parametrized in self._groups:
            if self._ratio == 0:
                operator.threshold.zero_()
            else:
                guess = next_threshold(operator)
                operator.threshold.copy_(global_threshold([weight.original for weight in parametrized], self._ratio, guess))

    def _cubic(self, step):
        """k(t) = kf - kf (1 - (t - t1)/(t2 - t1))^3 between t1 and t2, in steps; 0 before, kf after."""
        if self.ramp is None:
            return self.final_rate
        t1, t2 = self.ramp
        progress = min(max((step - t1) / (t2 - t1), 0.0), 1.0)
        return self.final_rate * (1 - (1 - progress) ** 3)

    def print_sparsity(self):
        """Print a line a layer and the total; return the overall sparsity of the pruned layers in percent."""
        counts = {name: _count(layer.weight) for name, layer in self.layers.items()}
        width = max(len(name) for name in [*counts, 'all pruned layers'])
        for name, (zeros, weights) in counts.items():
            print(f'{name:<{width}} {zeros:>10,} of {weights:>10,} weights are zero  {100 * zeros / weights:6.2f} %')
        owners = {id(_dense_weight(layer)): layer for layer in self.layers.values()}.values()  # a tied weight counts once
        zeros, weights = (sum(column) for column in zip(*(_count(layer.weight) for layer in owners), strict=True))
        print(f'{"all pruned layers":<{width}} {zeros:>10,} of {weights:>10,} weights are zero  {100 * zeros / weights:6.2f} %')
        return 100 * zeros / weights

    def desparsify(self):
        """Bake the thresholded weights into plain layers of the original types, names and order; returns the model."""
        bake(self.layers.values())
        self._groups = []
        return self.model

    def state_dict(self):
        """What is not in the model's state_dict, and the thresholds, to resume from."""
        return {'step': self.step, 'ratio': self._ratio, 'thresholds': [op.threshold.clone() for op, _ in self._groups]}

    def load_state_dict(self, state):
        """Continue where state_dict() was taken. Raises ValueError for another number of thresholds."""
        if len(state['thresholds']) != len(self._groups):
            raise ValueError(f'the state has {len(state["thresholds"])} thresholds, this pruner {len(self._groups)}')
        self.step, self._ratio = state['step'], state['ratio']
        for (operator, _), threshold in zip(self._groups, state['thresholds'], strict=True):
            operator.threshold.copy_(threshold)


def _dense_weight(layer):
    """The trained weight: under the parametrization while there is one."""
    return layer.parametrizations.weight.original if parametrize.is_parametrized(layer, 'weight') else layer.weight


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
    other values give Feather on this backbone. In training forwards the weight is moved to zero mean, as the analytic
    sparsity assumes; evaluation, and anything else without gradients, leaves it as it is.
    """

    def __init__(self, r, trainable=True, p=math.inf, theta=1.0):
        super().__init__()
        self.p, self.theta = p, theta
        r = torch.as_tensor(r, dtype=torch.get_default_dtype()).detach().clone()
        if trainable:
            self.r = nn.Parameter(r)
        else:
            self.register_buffer('r', r)

    def forward(self, weight):
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                weight.sub_(weight.mean())
        return _Feather.apply(weight, self.threshold(weight), self.p, self.theta)

    def threshold(self, weight):
        """b, differentiable in r; the standard deviation is a constant to the gradient."""
        return self.r.clamp(0, 5) * weight.detach().std() + 1e-6

    def sparsity(self):
        """The share of a Gaussian's weights with |w| <= r std: erf(r / sqrt 2), differentiable."""
        return torch.erf(self.r.clamp(0, 5) / math.sqrt(2))


def iter_sparsify(model, thresh, trainable=True, pthres=1000, *, p=math.inf, theta=1.0):
    """Adaptive Sparsity Loss ("Weight Pruning via Adaptive Sparsity Loss", Retsinas et al., ICIP 2021, arXiv 2006.02768).

    Every convolution and linear layer with at least `pthres` weights gets a threshold of `thresh` standard deviations of its
    weights, trained unless `trainable` is False. The thresholds are parameters of the model: make the optimizer afterwards.
    p, theta: the operator as in feather(), the paper's hard straight-through one by default. Works in place and returns the
    model. Raises ValueError for a thresh outside [0, 5], and when no layer is large enough.

    Deviations from the authors' code: the loss, the forward pass and the report use the same clamped r; evaluation does not
    move weights; trainable=False freezes r also for the sparsity loss; a layer's size is its real number of weights.
    """
    if not 0 <= float(thresh) <= 5:
        raise ValueError(f'thresh is in standard deviations and must lie in [0, 5], got {thresh}')
    layers = layers_to_prune(model, pthres)
    operators = {}  # a tied weight has one threshold
    for layer in layers.values():
        operators.setdefault(id(_dense_weight(layer)), AdaptiveThreshold(thresh, trainable, p, theta).to(layer.weight.device))
    owners = {name: operators[id(_dense_weight(layer))] for name, layer in layers.items()}
    for name, layer in layers.items():
        attach(layer, owners[name])
    return model


def initial_thresh(target, share=0.6):
    """The threshold, in standard deviations, that prunes a share of the target of a Gaussian; the authors start at 0.6."""
    return math.sqrt(2) * torch.erfinv(torch.tensor(share * target, dtype=torch.float64)).item()


def iter_desparsify(model):
    """Remove the thresholds: plain layers with exact zeros. Works in place and returns the model."""
    layers = [layer for layer in prunable_layers(model).values() if _adaptive(layer)]
    bake(layers)
    for layer in layers:
        layer.sparsified = True  # so that sparsity() goes on to count the same layers
    return model


def sparsity(model, print_per_layer=False):
    """(percent of zeros over the sparsified layers, number of zeros), counted on the weights the layers compute with.

    The same before and after desparsifying; for a model that was never sparsified, over all convolutions and linear layers.
    Prints the overall figure, and with print_per_layer a line a layer.
    """
    layers = prunable_layers(model)
    sparsified = {name for name, layer in layers.items() if _adaptive(layer) or getattr(layer, 'sparsified', False)}
    counts = {name: count for name, count in count_zeros(model).items() if name in sparsified or not sparsified}
    if print_per_layer:
        for name, (zeros, weights) in counts.items():
            print(f'{name}: {100 * zeros / weights:.2f} % of {weights:,} weights are zero')
    zeros, weights = (sum(column) for column in zip(*counts.values(), strict=True))
    print(f'overall sparsity: {100 * zeros / weights:.2f} % ({zeros:,} of {weights:,} weights)')
    return 100 * zeros / weights, zeros


def adaptive_loss(model, reduce=True):
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


def adaptive_layers(model):
    """{layer name: (its AdaptiveThreshold, number of weights)}; a tied weight counts once."""
    found = {name: (_adaptive(layer), _dense_weight(layer)) for name, layer in prunable_layers(model).items()}
    unique = {id(weight): name for name, (operator, weight) in reversed(found.items()) if operator}
    return {name: (found[name][0], found[name][1].numel()) for name in found if name in unique.values()}


def _adaptive(layer):
    """The layer's AdaptiveThreshold, or None."""
    operators = layer.parametrizations.weight if parametrize.is_parametrized(layer, 'weight') else []
    return next((operator for operator in operators if isinstance(operator, AdaptiveThreshold)), None)


# -------------------------------------------------------------------------------------------------------------- counting


def prunable_layers(model, pthres=0):
    """{name: layer} of all convolutions and linear layers with at least `pthres` weights (biases not counted)."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PRUNABLE)}
    return {name: layer for name, layer in layers.items() if _dense_weight(layer).numel() >= pthres}


def layers_to_prune(model, pthres=0):
    """prunable_layers(), of which there must be one. Raises ValueError."""
    layers = prunable_layers(model, pthres)
    if not layers:
        raise ValueError(f'the model has no convolution or linear layer with at least {pthres} weights')
    return layers


def _count(tensor):
    return tensor.numel() - int(torch.count_nonzero(tensor)), tensor.numel()


@torch.no_grad()
def count_zeros(model, pthres=0):
    """{layer name: (zeros, weights)} over prunable_layers, of the weights the layers compute with; tied weights count once."""
    seen, counts = set(), {}
    for name, layer in prunable_layers(model, pthres).items():
        if id(_dense_weight(layer)) not in seen:
            seen.add(id(_dense_weight(layer)))
            counts[name] = _count(layer.weight)
    return counts


@torch.no_grad()
def count_macs(model, example_input):
    """{layer name: (dense, nonzero)}: multiply-accumulates of each convolution and linear layer for one example.

    example_input: a batch [B, ...] that the model accepts; counts are divided by B and come from the shapes met in the forward
    pass, so stride, padding, dilation, groups and repeated use are right. `nonzero` counts weights that are not zero. Batch
    norm, activation and bias are not counted. A layer that the forward pass does not reach is missing.
    """
    macs, batch = {}, example_input.shape[0]
    modes = [(module, module.training) for module in model.modules()]

    def record(name):
        def hook(layer, inputs, output):
            weight = layer.weight
            if isinstance(layer, nn.Linear):
                uses = output.numel() // output.shape[-1]
            else:  # a weight is used once at each output position, in a transposed convolution at each input position
                places = inputs[0] if layer.transposed else output
                uses = places.numel() // (layer.in_channels if layer.transposed else layer.out_channels)
            dense, nonzero = macs.get(name, (0, 0))
            used = int(torch.count_nonzero(weight)) * uses // batch
            macs[name] = (dense + weight.numel() * uses // batch, nonzero + used)

        return hook

    handles = [layer.register_forward_hook(record(name)) for name, layer in prunable_layers(model).items()]
    try:
        model.eval()(example_input)
    finally:
        for module, training in modes:
            module.training = training
        for handle in handles:
            handle.remove()
    return macs
