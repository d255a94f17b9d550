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


class _Feather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, threshold, p, theta):
        magnitude = weight.abs()
        prune = magnitude <= threshold
        ctx.theta = theta
        if theta != 1:  # T = 0 prunes nothing, so a weight that happens to be zero keeps its whole gradient too
            ctx.save_for_backward(prune & (threshold > 0))
        if p == 1:  # soft thresholding
            shrunk = weight - weight.sign() * threshold
        elif p == math.inf:  # hard thresholding
            shrunk = weight.clone()
        else:  # in place, since memory traffic is what this costs; T/|w| rounds below 1 wherever |w| > T, so that a kept
            # weight never becomes zero, as it could if |w|^p - T^p were formed
            shrunk = torch.div(threshold, magnitude, out=magnitude).pow_(p).neg_().add_(1).pow_(1 / p).mul_(weight)
        return shrunk.masked_fill_(prune, 0)

    @staticmethod
    def backward(ctx, grad):
        if ctx.theta != 1:
            (prune,) = ctx.saved_tensors
            grad = torch.where(prune, grad * ctx.theta, grad)
        return grad, None, None, None


def feather(weight, threshold, p=3, theta=1.0):
    """Feather's thresholding operator with its scaled straight-through gradient (BMVC 2023, section 3).

    forward:  sign(w) (|w|^p - T^p)^(1/p) where |w| > T, else 0
    backward: dL/dw = m * dL/dw~, with m = 1 where |w| > T, else theta

    weight: tensor of any shape. threshold: T >= 0, a 0-d tensor on the weight's device or a float; 0 returns the weight
    unchanged. p: 1 is soft thresholding, 3 the paper's choice, math.inf hard thresholding. theta: gradient scale of the
    pruned weights, 1.0 at moderate sparsity, 0.5 above 95 % in the paper. Returns a tensor of the weight's shape and dtype.
    """
    if not p >= 1:
        raise ValueError(f'p must be 1 or more, got {p}')
    if not torch.is_tensor(threshold):
        threshold = torch.tensor(threshold, dtype=weight.dtype, device=weight.device)
    return _Feather.apply(weight, threshold, p, theta)


class Feather(nn.Module):
    """The operator as a parametrization: register it on as many layers as share one threshold."""

    def __init__(self, p=3, theta=1.0):
        super().__init__()
        self.p, self.theta = p, theta
        self.register_buffer('threshold', torch.zeros(()))

    def forward(self, weight):
        return feather(weight, self.threshold, self.p, self.theta)


# ------------------------------------------------------------------------------------------------- the global threshold


def global_threshold(weights, ratio, previous=None):
    """The threshold T that prunes a share `ratio` of all weights: the quantile of all |w|, linearly interpolated.

    weights: list of tensors, any shapes, one device. ratio in [0, 1]. The n absolute values are ranked together and T lies at
    position (n-1)*ratio, so |w| <= T holds for floor((n-1)*ratio) + 1 weights (more only where magnitudes tie with T).
    previous: a guess of T, for example the last one; it only saves time. Returns a 0-d tensor on the weights' device.
    Exact, O(n) on a CPU; on a GPU a sort, which is fast there and does not make the host wait.
    Raises ValueError for no weights, a ratio outside [0, 1], and (CPU) for NaN or infinite weights.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f'ratio must lie in [0, 1], got {ratio}')
    magnitude = torch.cat([_flat(w.detach()) for w in weights]).abs_() if weights else torch.empty(0)
    n = magnitude.numel()
    if n == 0:
        raise ValueError('there are no weights to threshold')
    position = (n - 1) * ratio
    k = math.floor(position)
    low, high = _neighbours(magnitude, k, min(k + 1, n - 1), previous)
    threshold = low + (high - low) * (position - k)
    return torch.where(threshold < high, threshold, low)  # rounding up to `high` would prune one weight too many


def _flat(tensor):
    """All elements as a vector, without a copy for the usual memory layouts; their order does not matter here."""
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.reshape(-1)


def _neighbours(magnitude, k, next_k, previous):
    """The values at ranks k and next_k (counted from 0) of a vector: find a narrow bracket, then select inside it."""
    n = magnitude.numel()
    if magnitude.device.type != 'cpu' or n <= 2**14:
        ordered = magnitude.sort().values
        if magnitude.device.type == 'cpu' and not torch.isfinite(ordered[-1]):  # sort puts NaN last
            raise ValueError('the weights hold NaN or infinity')
        return ordered[k], ordered[next_k]
    if not torch.isfinite(magnitude.max()):
        raise ValueError('the weights hold NaN or infinity')
    for low, high in _brackets(magnitude, k, previous):
        rank = k - int(torch.count_nonzero(magnitude < low))
        inside = magnitude[(magnitude >= low) & (magnitude <= high)]
        if 0 <= rank and rank + next_k - k < inside.numel():
            return inside.kthvalue(rank + 1).values, inside.kthvalue(rank + next_k - k + 1).values


def _brackets(magnitude, k, previous):
    """Guesses (low, high) of where the k-th value lies, best first; the last one holds everything."""
    if previous is not None and previous > 0:
        yield previous * 0.99, previous * 1.01  # a training step moves the threshold by less than that, after the ramp
    sample = magnitude[:: magnitude.numel() // 2**13].sort().values  # its quantile is off by ~ sqrt(q (1-q) / size)
    size, q = sample.numel(), k / magnitude.numel()
    margin = 1 + 4 * math.sqrt(q * (1 - q) * size)
    first, last = math.floor(q * size - margin), math.ceil(q * size + margin)
    yield sample[first] if first >= 0 else 0.0, sample[last] if last < size else math.inf
    yield 0.0, math.inf


# ------------------------------------------------------------------------------------------------------------ the pruner


class Pruner:
    """Feather-Global: one magnitude threshold for all layers, raised along a cubic ramp, under Feather's operator.

    model: an nn.Module; its convolutions and linear layers with at least `pthres` weights are pruned, in place.
    device: the model is moved there when given. final_rate: sparsity at the end, in (0, 1).
    nbatches, epochs: steps an epoch and epochs, which set the ramp; without both, the full rate holds from the first step.
    t1: epoch at which the ramp starts. Keywords beyond the authors' code, with the paper's values as defaults:
    p: the operator's exponent; theta: gradient scale of pruned weights (None: 0.5 above 95 % sparsity, else 1);
    ramp_end: share of all steps after which the ramp has reached final_rate;
    backbone: 'global' (one threshold over all layers) or 'layerwise' (the same ratio in each layer).
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
        if backbone not in ('global', 'layerwise'):
            raise ValueError(f"backbone must be 'global' or 'layerwise', got {backbone!r}")
        self.model = model if device is None else model.to(device)
        self.final_rate, self.p = final_rate, p
        self.theta = theta if theta is not None else 0.5 if final_rate > 0.95 else 1.0
        self.total_steps = None if nbatches is None else nbatches * epochs
        self.ramp = None if nbatches is None else (t1 * nbatches, ramp_end * nbatches * epochs)
        self.step, self._ratio = 0, 0.0
        self._attach(pthres, backbone)

    def _attach(self, pthres, backbone):
        layers = prunable_layers(self.model, pthres)
        if not layers:
            raise ValueError(f'the model has no convolution or linear layer with at least {pthres} weights')
        for name, layer in layers.items():
            if parametrize.is_parametrized(layer, 'weight'):
                raise ValueError(f'the weight of {name or "the model"} is parametrized already: call desparsify() first')
        self.layers = layers
        self._order = {name: list(layer._parameters) for name, layer in layers.items()}
        self._groups = []  # (operator, layers that share its threshold)
        owners = list({id(layer.weight): layer for layer in layers.values()}.values())  # a tied weight counts once
        for group in [owners] if backbone == 'global' else [[layer] for layer in owners]:
            operator = Feather(self.p, self.theta).to(group[0].weight)
            shared = {id(layer.weight) for layer in group}
            members = [layer for layer in layers.values() if id(_dense_weight(layer)) in shared]
            for layer in members:
                parametrize.register_parametrization(layer, 'weight', operator)
            self._groups.append((operator, group))

    @property
    def ratio(self):
        """Target share of zeros at the current step, a float."""
        return self._ratio

    @property
    def threshold(self):
        """Current threshold, a float; with backbone 'layerwise' a list of them. Reading it waits for the GPU."""
        values = [operator.threshold.item() for operator, _ in self._groups]
        return values[0] if len(values) == 1 else values

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
        for operator, layers in self._groups:
            if self._ratio == 0:
                operator.threshold.zero_()
            else:
                weights = [_dense_weight(layer) for layer in layers]
                guess = operator.threshold if operator.threshold.device.type == 'cpu' else None
                operator.threshold.copy_(global_threshold(weights, self._ratio, guess))

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
        zeros, weights = map(sum, zip(*(_count(layer.weight) for _, group in self._groups for layer in group), strict=True))
        print(f'{"all pruned layers":<{width}} {zeros:>10,} of {weights:>10,} weights are zero  {100 * zeros / weights:6.2f} %')
        return 100 * zeros / weights

    @torch.no_grad()
    def desparsify(self):
        """Bake the thresholded weights into plain layers of the original types, names and order; returns the model."""
        baked = {id(_dense_weight(layer)): layer.weight.clone() for layer in self.layers.values()}
        for name, layer in self.layers.items():
            parametrize.remove_parametrizations(layer, 'weight', leave_parametrized=False)
            layer.weight.copy_(baked[id(layer.weight)])
            for key in self._order[name]:  # removing a parametrization puts its parameter last
                layer._parameters[key] = layer._parameters.pop(key)
        self.layers, self._groups = {}, []
        return self.model

    def state_dict(self):
        """What is not in the model's state_dict, and the thresholds, to resume from."""
        return {'step': self.step, 'ratio': self._ratio, 'thresholds': [op.threshold.clone() for op, _ in self._groups]}

    def load_state_dict(self, state):
        """Continue where state_dict() was taken. Raises ValueError when it belongs to another set of layers."""
        if len(state['thresholds']) != len(self._groups):
            raise ValueError(f'the state has {len(state["thresholds"])} thresholds, this pruner {len(self._groups)}')
        self.step, self._ratio = state['step'], state['ratio']
        for (operator, _), threshold in zip(self._groups, state['thresholds'], strict=True):
            operator.threshold.copy_(threshold)


def _dense_weight(layer):
    """The trained weight: under the parametrization while there is one."""
    return layer.parametrizations.weight.original if parametrize.is_parametrized(layer, 'weight') else layer.weight


# -------------------------------------------------------------------------------------------------------------- counting


def prunable_layers(model, pthres=0):
    """{name: layer} of all convolutions and linear layers with at least `pthres` weights (biases not counted)."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PRUNABLE)}
    return {name: layer for name, layer in layers.items() if _dense_weight(layer).numel() >= pthres}


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
