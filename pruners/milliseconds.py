"""What a candidate of a search takes on this machine, in milliseconds, as NetAdapt's paper counts it (Yang et al., ECCV 2018,
arXiv 1804.03230): each layer is measured alone for the numbers of channels that a candidate gives it, once, and what was
measured is a line of a table that later candidates, and a search that is continued, read.

The time of a network is that of its layers and a rest: batch norms, activations, additions and calls. The rest is taken as
linear in the number of values that the layers put out, through two networks that are measured as a whole, the one as it comes
and the one with the first half of the filters of each layer. Deviation from the paper: it added up layers alone.
"""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from deploy.latency import THREADS, median_seconds
from deploy.shrinking import shrink
from sparse_utils import prunable_layers

from . import processes
from .compressor import Compressor
from .cost import ChannelCost, kept_filters
from .processes import say
from .search import Counts, fingerprint, keep_counts, sizes, trial
from .selection import Keep, Scores
from .trials import History

NANOSECONDS = 1_000_000_000  # of a second; costs are whole numbers of them
LAYER_SECONDS = 0.05  # how long a layer is measured
NETWORK_SECONDS = 1.0


class Budget(NamedTuple):
    """What a search has to meet: so many milliseconds for a batch on so many threads of the CPU (None: as deploy.latency)."""

    milliseconds: float
    batch: int = 1
    threads: int | None = None

    def check(self, base: Compressor, example_input: torch.Tensor | None) -> None:
        """Raises ValueError for numbers that nothing can meet, for a pruner of single weights, and for a model that cannot be
        traced with the example input, where there is one already."""
        if not base.FILTERS:
            raise ValueError(f'a budget of milliseconds needs filters to remove; {type(base).__name__} prunes single weights')
        if not 0 < self.milliseconds < math.inf or self.batch < 1 or (self.threads or 1) < 1:
            raise ValueError(f'a budget needs milliseconds above 0 and batch and threads of 1 or more, got {self}')
        if example_input is not None:
            ChannelCost(base.model, example_input[:1])

    @property
    def nanoseconds(self) -> int:
        return math.floor(self.milliseconds * 1e6)


class Call(NamedTuple):
    """A layer is called once in a forward pass."""

    shape: tuple[int, ...]  # of its input
    format: torch.memory_format
    values: int  # that it puts out


class MillisecondsCost:
    """Nanoseconds of the network without its dead channels, as a function of counts and scores (see pruners/cost.py).

    example_input: a batch whose first example is repeated. path: of the table, latency.csv; its folder must be there.
    Raises ValueError for a model that cannot be traced.
    """

    def __init__(self, base: Compressor, example_input: torch.Tensor | None, path: Path, budget: Budget):
        if example_input is None:
            raise ValueError('a budget of milliseconds is measured on an example input: give example_input')
        self.base = base
        self.budget = budget
        self.example = example_input[:1]
        self.images = self.example.repeat(budget.batch, *[1] * (self.example.dim() - 1))
        self.threads = budget.threads or THREADS
        self.table = History(path, 'what', 'nanoseconds')
        self.known = {row['what']: int(row['nanoseconds']) for row in processes.same(self.table.read())}
        self.table.write(self.known.items())
        self.channels = ChannelCost(base.model, self.example)
        self.pinned = self.channels.pinned()
        self.calls = layer_calls(base.model, self.images)
        self.times = {}  # {(layer, channels in, channels out, its call): nanoseconds}
        self.per_value, self.fixed = self.rest()

    def __call__(self, counts: Counts, scores: Scores) -> int:
        return self.estimate(keep_counts(scores, counts))

    def estimate(self, keep: Keep) -> int:
        """What the network with these filters takes by the table."""
        layers, values = self.layers_and_values(keep)
        return round(layers + self.per_value * values + self.fixed)

    def measure(self, keep: Keep) -> int:
        """What the network with these filters takes as a whole, shrunk. The model stays as it is."""
        before = self.base.keep
        with trial(self.base.model):
            self.base.set_masks(keep)
            self.base.apply()
            name = f'network {fingerprint(self.base.model)}'
            found = self.look_up(name, lambda: shrink(self.base.model, self.example), self.images, NETWORK_SECONDS)
        self.base.set_masks(before)
        return found

    def rest(self) -> tuple[float, float]:
        """(nanoseconds a value, nanoseconds in any case) of what the layers alone do not explain."""
        points = []
        for share in (1.0, 0.5):
            keep = {name: torch.arange(number) < math.ceil(number * share) for name, number in sizes(self.base).items()}
            layers, values = self.layers_and_values(keep)
            points.append((values, self.measure(keep) - layers))
        (values, rest), (fewer_values, smaller_rest) = points
        per_value = max((rest - smaller_rest) / (values - fewer_values), 0.0) if values > fewer_values else 0.0
        return per_value, rest - per_value * values

    def report(self, keep: Keep) -> dict:
        """What a search says of its end: milliseconds by the table and as the shrunk network measures them."""
        figures = {'milliseconds': self.estimate(keep) / 1e6, 'milliseconds_measured': self.measure(keep) / 1e6}
        say('{milliseconds:.3f} ms by the table of layers, {milliseconds_measured:.3f} ms measured'.format(**figures))
        wanted = self.budget.milliseconds
        if figures['milliseconds_measured'] > 1.05 * wanted:
            say(f'that is above the budget of {wanted} ms: the table is off by that much, so give a smaller one')
        return figures

    def layers_and_values(self, keep: Keep) -> tuple[int, float]:
        """(nanoseconds of all layers, each alone; how many values they put out)"""
        alive = self.channels.alive(kept_filters(self.base, keep)) | self.pinned
        nanoseconds = 0
        values = 0.0
        for name, calls in self.calls.items():
            layer = self.base.model.get_submodule(name)
            whole = channel_numbers(layer)
            inputs, outputs = self.channels.numbers(name, alive) or whole
            for call in calls:
                key = (name, inputs, outputs, call)
                if key not in self.times:
                    self.times[key] = self.layer_time(layer, inputs, outputs, call)
                nanoseconds += self.times[key]
                values += call.values * outputs / whole[1]
        return nanoseconds, values

    def layer_time(self, layer: nn.Module, inputs: int, outputs: int, call: Call) -> int:
        """What one call of a layer takes with so many channels."""
        small = narrow(layer, inputs, outputs)
        shape = list(call.shape)
        shape[-1 if isinstance(layer, nn.Linear) else 1] = channel_numbers(small)[0]
        images = torch.zeros(shape, dtype=layer.weight.dtype, device=layer.weight.device)
        images = images.contiguous(memory_format=call.format)
        return self.look_up(f'{small}', lambda: small, images, LAYER_SECONDS)

    def look_up(self, name: str, make: Callable, images: torch.Tensor, seconds: float) -> int:
        """Nanoseconds of the module that `make` returns, by the table, or else as the first process measures them."""
        place = f'{self.threads} threads' if images.device.type == 'cpu' else images.device.type
        what = f'{name} on {"x".join(map(str, images.shape))}, {place}'
        if what not in self.known:
            found = nanoseconds_of(make(), images, self.threads, seconds) if processes.rank() == 0 else None
            self.known[what] = processes.same(found)
            self.table.add(what, self.known[what])
        return self.known[what]


def nanoseconds_of(module: nn.Module, images: torch.Tensor, threads: int, seconds: float) -> int:
    """The median time of a forward pass, measured for so many seconds."""
    return max(round(median_seconds({'it': module}, images, threads, seconds)['it'] * NANOSECONDS), 1)


@torch.no_grad()
def layer_calls(model: nn.Module, images: torch.Tensor) -> dict[str, list[Call]]:
    """{convolution or linear layer: its calls in a forward pass}"""
    calls = {}

    def hook_of(name):
        def note(layer, inputs, output):
            calls.setdefault(name, []).append(Call(tuple(inputs[0].shape), format_of(inputs[0]), output.numel()))

        return note

    handles = [layer.register_forward_hook(hook_of(name)) for name, layer in prunable_layers(model).items()]
    try:
        with trial(model):
            model.eval()(images)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def format_of(images: torch.Tensor) -> torch.memory_format:
    """The memory format that a batch has."""
    if images.dim() != 4 or images.is_contiguous() or not images.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last


def channel_numbers(layer: nn.Module) -> tuple[int, int]:
    """(channels or features that a layer reads, those that it makes)"""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels


def narrow(layer: nn.Module, inputs: int, outputs: int) -> nn.Module:
    """A copy of a convolution or linear layer with so many channels or features, and zeros for weights.

    A depthwise convolution reads as many as its filters need; the groups of another grouped one become so many that they
    divide both numbers.
    """
    small = copy.deepcopy(layer)
    weight = layer.weight.detach()
    if isinstance(layer, nn.Linear):
        small.in_features = inputs
        small.out_features = outputs
        shape = (outputs, inputs)
    else:
        if layer.groups == layer.in_channels > 1:
            filters = layer.out_channels // layer.in_channels  # of each channel
            inputs = max(outputs // filters, 1)
            outputs = inputs * filters
            small.groups = inputs
        else:
            small.groups = math.gcd(layer.groups, inputs, outputs)
        small.in_channels = inputs
        small.out_channels = outputs
        first, second = (inputs, outputs) if layer.transposed else (outputs, inputs)
        shape = (first, second // small.groups, *weight.shape[2:])
    small.weight = nn.Parameter(weight.new_zeros(shape).contiguous(memory_format=format_of(weight)))
    if layer.bias is not None:
        small.bias = nn.Parameter(layer.bias.detach().new_zeros(outputs))
    return small
