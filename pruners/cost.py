"""What a network costs once its dead channels are removed, as a function of the filters that are kept."""

import contextlib
import math

import torch
from torch import nn

from deploy.live import convolutions, layer_of, live_filters
from deploy.ties import Mix, read_channels
from sparse_utils import count_macs, prunable_layers

from .compressor import Compressor
from .search import Counts, keep_counts, sizes, trial
from .selection import Keep, Scores

COSTS = ('params', 'macs')


class ChannelCost:
    """What a network costs once the dead channels are removed: a function of the filters that are kept.

    kind: 'params', weights of convolutions and linear layers, or 'macs' of one example. names: count these layers only, None
    for all. Raises ValueError for a model that cannot be traced.
    """

    def __init__(self, model: nn.Module, example_input: torch.Tensor, kind: str = 'params', names: list[str] | None = None):
        self.channels = read_channels(model, example_input)
        self.number = int(self.channels.classes.max()) + 1
        self.convs = {name: out for name, (out, _, _) in convolutions(self.channels).items()}
        self.grouped = any(groups > 1 for _, _, groups in convolutions(self.channels).values())
        self.filters = {}  # {layer: classes of its filters}
        self.inputs = {}  # and of what it reads; a depthwise one reads its own filters only
        for step in self.channels.steps:
            if isinstance(step, Mix):
                self.filters[layer_of(step)] = self.channels.classes[step.out]
                if not step.depthwise:
                    self.inputs[layer_of(step)] = self.channels.classes[step.inputs]
        layers = prunable_layers(model) if names is None else {name: model.get_submodule(name) for name in names}
        if kind == 'params':
            self.layers = {name: layer.weight.numel() for name, layer in layers.items()}
        else:
            macs = count_macs(model, example_input)
            self.layers = {name: macs[name][0] if name in macs else 0 for name in layers}

    def __call__(self, keep: Keep) -> int:
        """keep: {convolution: bool tensor [out]} -> the cost, a whole number."""
        alive = self.alive(keep)
        return sum(round(whole * self.share(name, alive)) for name, whole in self.layers.items())

    def alive(self, keep: Keep) -> torch.Tensor:
        """Bool [classes of channels]: False where every convolution that writes such a channel has a dead filter there."""
        live = {name: torch.ones(out, dtype=torch.bool) for name, out in self.convs.items()}
        live |= {name: kept.cpu() for name, kept in keep.items()}
        if self.grouped:  # else, as each layer keeps a filter, nothing else dies
            live |= live_filters(self.channels, {name: live[name] for name in self.convs})
        written = {name: self.filters[name] for name in live if name in self.filters}
        alive = torch.ones(self.number, dtype=torch.bool)
        for channels in written.values():
            alive[channels] = False
        for name, channels in written.items():
            alive[channels[live[name]]] = True
        return alive

    def pinned(self) -> torch.Tensor:
        """Bool [classes of channels]: True for those that shrink() keeps whatever is dead, as the outputs of the network."""
        pinned = torch.zeros(self.number, dtype=torch.bool)
        pinned[self.channels.classes[self.channels.pinned_numbers()]] = True
        return pinned

    def share(self, name: str, alive: torch.Tensor) -> float:
        """What part of a layer's weights stays."""
        if name not in self.filters:
            return 1.0
        rows = alive[self.filters[name]]
        columns = alive[self.inputs[name]] if name in self.inputs else torch.ones(1)
        return int(rows.sum()) * int(columns.sum()) / (len(rows) * len(columns))

    def numbers(self, name: str, alive: torch.Tensor) -> tuple[int, int] | None:
        """(channels that a layer reads, filters that it keeps), or None where the graph does not know the layer."""
        if name not in self.filters:
            return None
        filters = int(alive[self.filters[name]].sum())
        return int(alive[self.inputs[name]].sum()) if name in self.inputs else filters, filters


# The cost of a candidate of a search: functions of counts, {layer: how many are pruned}, and scores, {layer: tensor}, of
# which the least are pruned first. `base` is the one-shot pruner of the search.


class ShrunkCost:
    """The cost that ChannelCost counts, in the network without its dead channels."""

    def __init__(self, base: Compressor, example_input: torch.Tensor, kind: str = 'params', names: list[str] | None = None):
        self.base = base
        self.cost_of_filters = ChannelCost(base.model, example_input, kind, names)

    def __call__(self, counts: Counts, scores: Scores) -> int:
        return self.cost_of_filters(kept_filters(self.base, keep_counts(scores, counts)))


class OwnCost:
    """What the layers of the pruner keep, without what follows from it elsewhere; the only one for single weights.

    each: {layer: cost of one weight}, None for 1 each. fixed: cost of the other layers.
    """

    def __init__(self, base: Compressor, each: dict[str, float] | None = None, fixed: int = 0):
        self.each = dict.fromkeys(base.layers, 1) if each is None else each
        self.fixed = fixed
        self.weights = {name: layer.weight.numel() for name, layer in base.layers.items()}
        self.in_one = {name: self.weights[name] // number for name, number in sizes(base).items()}

    def __call__(self, counts: Counts, scores: Scores | None = None) -> int:
        kept = {name: number - counts[name] * self.in_one[name] for name, number in self.weights.items()}
        return self.fixed + round(sum(kept[name] * self.each[name] for name in kept))


def own_cost(base: Compressor, example_input: torch.Tensor | None, kind: str) -> OwnCost:
    """OwnCost of the whole network. Raises ValueError for MACs without an example input."""
    weights = {name: layer.weight.numel() for name, layer in prunable_layers(base.model).items()}
    if kind == 'params':
        return OwnCost(base, None, sum(number for name, number in weights.items() if name not in base.layers))
    if example_input is None:
        raise ValueError('MACs are counted for an example input: give example_input')
    macs = {name: dense for name, (dense, _) in count_macs(base.model, example_input).items()}
    each = {name: macs.get(name, 0) / weights.get(name, math.inf) for name in base.layers}
    return OwnCost(base, each, sum(number for name, number in macs.items() if name not in base.layers))


def kept_filters(base: Compressor, keep: Keep) -> Keep:
    """{layer: bool [out]} -> {convolution: bool [out]}: with slim, of the convolutions that the batch norms follow."""
    if 'BatchNorm2d' not in (base.TYPES or ()):
        return keep
    return {conv: keep[norm] for conv, norm in base.norms.items() if norm in keep}


def filter_layers(base: Compressor) -> dict[str, nn.Module]:
    """{name: layer} whose filters a pruner prunes: its layers, or with slim the convolutions that they follow."""
    return {name: base.model.get_submodule(name) for name in kept_filters(base, base.layers)}


@contextlib.contextmanager
def first_inputs(model: nn.Module):
    """Yields a list that then holds one example of the first batch that the model meets, if it meets one."""
    found = []

    def watch(model, args):
        if not found and args and torch.is_tensor(args[0]):
            found.append(args[0][:1].detach().clone())

    handle = model.register_forward_pre_hook(watch)
    try:
        yield found
    finally:
        handle.remove()


def usual_example(model: nn.Module) -> torch.Tensor | None:
    """An input of zeros of a usual size that the model takes, or None."""
    parameter = next(model.parameters())
    with trial(model), torch.no_grad():
        model.eval()
        for shape in usual_shapes(model):
            example = torch.zeros(shape, device=parameter.device, dtype=parameter.dtype)
            try:
                model(example)
            except Exception:  # whatever a model raises for an input of the wrong shape
                continue
            return example
    return None


def usual_shapes(model: nn.Module) -> list[tuple[int, ...]]:
    """Shapes of one image for each number of channels that a convolution of the model reads; without any, of one vector."""
    channels = dict.fromkeys(module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d))
    features = dict.fromkeys(module.in_features for module in model.modules() if isinstance(module, nn.Linear))
    images = [(1, number, size, size) for number in channels for size in (32, 28, 224, 64)]
    return images or [(1, number) for number in features]
