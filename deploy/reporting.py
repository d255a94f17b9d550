"""What stays of a pruned network although its filters are dead, and why.

for held in report(model, example_input):
    print(held)        # layer3.0.conv2: 12 dead filters stay: group_norm in layer3.0 (net.py, line 31) reads them all; ...
"""

from typing import NamedTuple

import torch
from torch import nn

from .graph import name_of, place_of
from .live import layer_of
from .shrinking import decide
from .ties import Mix


class Held(NamedTuple):
    """Dead filters of a layer that stay for one reason. filters: their numbers. held_by: the operation and its place, or the
    layer.
    remedy: what would free them."""

    layer: str
    filters: list
    held_by: str
    remedy: str

    def __str__(self):
        count = (
            f'{len(self.filters)} dead filter{"s" if len(self.filters) > 1 else ""} stay{"" if len(self.filters) > 1 else "s"}'
        )
        return f'{self.layer}: {count}: {self.held_by}; {self.remedy}'


def report(model: nn.Module, example_input: torch.Tensor | tuple | dict, round_to: int = 1) -> list['Held']:
    """[Held, ...]: for each layer with dead filters that shrink() leaves, what holds them and what would free them.

    A filter is dead that puts out one constant for any input. Arguments and errors are those of shrink().
    """
    decision, blamed = decide(model, example_input, round_to)[2:]
    return _held(decision, _Reasons(decision, blamed))


def held_by_operations(decision, blamed):
    """[Held, ...] of a decision: only what operations hold that packing cannot change either."""
    reasons = _Reasons(decision, blamed)
    return _held(decision, reasons, reasons.known)


def _held(decision, reasons, only=None):
    """[Held, ...], of the classes `only` or of all."""
    channels = decision.channels
    found = []
    for step in channels.steps:
        if not isinstance(step, Mix):
            continue
        classes = channels.classes[step.out]
        dead = ~channels.constants[step.out].isnan() & decision.keep[classes]
        by_reason = {}
        for filter_number in dead.nonzero().view(-1).tolist():
            if only is not None and int(classes[filter_number]) not in only:
                continue
            by_reason.setdefault(reasons.of(int(classes[filter_number]), layer_of(step)), []).append(filter_number)
        found += [Held(layer_of(step), filters, *reason) for reason, filters in by_reason.items()]
    return found


class _Reasons:
    """Why a class stays: (held by, remedy)."""

    def __init__(self, decision, blamed):
        self.decision = decision
        self.channels = decision.channels
        classes = self.channels.classes
        self.known = {}  # {class: (held by, remedy)}, the first reason found
        for node in blamed:
            shadow = self.channels.guesses[node]
            remedy = 'let the line take its sizes from the tensor, as x.flatten(1) and x.chunk(2, 1) do'
            self._note(classes[shadow[shadow >= 0]], f'{place_of(node)} has a size written down', remedy)
        for numbers, reason in self.channels.pins:
            self._note(classes[numbers], *_of_pin(reason))
        for numbers, node in self.channels.reasons:
            remedy = 'zero all that it reads, or none'
            self._note(classes[numbers], f'{place_of(node)} needs the dimension as it is', remedy)
        self.writers = {}
        for step in self.channels.steps:
            if isinstance(step, Mix):
                live = self.channels.constants[step.out].isnan()
                for number in classes[step.out[live]].tolist():
                    self.writers.setdefault(number, []).append(layer_of(step))

    def _note(self, classes, held_by, remedy):
        for number in classes.unique().tolist():
            self.known.setdefault(number, (held_by, remedy))

    def of(self, number, layer):
        others = [name for name in self.writers.get(number, []) if name != layer]
        if number in self.known:
            return self.known[number]
        if others:
            names = ', '.join(dict.fromkeys(others[:3])) + (', ...' if len(others) > 3 else '')
            return (
                f'{names} puts out the same channels, and is not dead there',
                'zero the same filters in all of dependency_groups()',
            )
        if self.decision.needed[number]:
            return 'a layer reads its constant, which differs at the border', 'zero the shift that the channel still emits'
        return self._of_shape(number)

    def _of_shape(self, number):
        """What stays beside what is needed, so that layers can have their shapes."""
        classes = self.channels.classes
        for node, numbers in self.channels.blocks:
            if bool((classes[numbers] == number).any()):
                return f'{place_of(node)} wants equal parts', 'prune as many in each part'
        for reader in self.decision.readers:
            own = (reader.inputs == number).any() or (reader.filters == number).any()
            if own and reader.groups > 1:
                return (
                    f'{layer_of(reader.step)} has {reader.groups} groups, which keep equally many',
                    'prune evenly in each group',
                )
            if (
                (reader.inputs == number).any()
                and reader.padded
                and bool((reader.constants[reader.inputs == number] != 0).any())
            ):
                held_by = f'it stands for the constants that {layer_of(reader.step)} reads beside its zero padding'
                return held_by, 'zero the shift that dead channels still emit'
        if self.decision.round_to > 1:
            return f'counts are rounded up to multiples of {self.decision.round_to}', 'ask for another round_to'
        return 'a layer keeps at least one filter', 'take the layer out'


def _of_pin(reason):
    """(held by, remedy) of an operation, or words, that a pin names."""
    if isinstance(reason, str):
        return f'it is {reason}' if reason.startswith('the ') else reason, 'nothing: it has to stay'
    remedies = {
        'layer_norm': 'a channel less would change the mean of the others; batch norm would not',
        'group_norm': 'a channel less would change the mean of the others; batch norm would not',
        'scaled_dot_product_attention': 'heads stay; prune inside the MLPs',
        'matmul': 'heads stay; prune inside the MLPs',
    }
    return f'{place_of(reason)} reads them all', remedies.get(
        name_of(reason), 'use operations that work channel by channel there'
    )
