"""Which classes of channels stay, so that a network computes the same.

Backward from the outputs, a class is needed if someone reads it: a weight that is not zero, in a filter that is itself needed,
on
a channel that is not constant. Then come those that stay with them so that every layer can have its shape: equal groups, equal
halves, at least one channel, one constant before zero padding.
"""

import math

import torch

from .ties import Mix


class Decision:
    """What stays of a network. channels: ties.Channels. extra: shadows that are to stay besides.

    needed, keep: bool [classes].
    """

    def __init__(self, channels, round_to=1, extra=()):
        self.channels = channels
        self.round_to = round_to
        self.readers = [Reader(channels, step) for step in channels.steps if isinstance(step, Mix) and not step.depthwise]
        self.depthwise = [step for step in channels.steps if isinstance(step, Mix) and step.depthwise]
        self.pinned = torch.zeros(int(channels.classes.max()) + 1 if channels.count else 0, dtype=torch.bool)
        self.pinned[channels.classes[channels.pinned_numbers()]] = True
        for shadow in extra:
            self.pinned[channels.classes[shadow[shadow >= 0]]] = True
        self._pin_uneven_parameters()
        self.needed = self._needed()
        self.keep = self._kept()

    def _pin_uneven_parameters(self):
        """A bare parameter whose channels do not lie along one dimension stays whole."""
        for shadow in self.channels.bare.values():
            classes = self.channels.classes[shadow]
            if along(classes) is None:
                self.pinned[classes.flatten()] = True

    def _needed(self):
        needed = self.pinned.clone()
        loose = [self._loose(step) for step in self.channels.steps if not isinstance(step, Mix)]
        loose = [pair for pair in loose if len(pair[0])]
        while True:
            before = int(needed.sum())
            for reader in reversed(self.readers):
                needed[reader.inputs[reader.read(needed) & reader.varies]] = True
            for source, target in loose:
                needed[source[needed[target]]] = True
            if int(needed.sum()) == before:
                return needed

    def _loose(self, step):
        """Classes on which others depend without being tied to them, as a map of one channel that gates all."""
        channels = self.channels
        source = channels.classes[step.source]
        target = channels.classes[step.target]
        apart = (source != target) & channels.constants[step.target].isnan()
        pairs = torch.stack([source[apart], target[apart]]).unique(dim=1)
        return pairs[0], pairs[1]

    def _kept(self):
        keep = self.needed.clone()
        channels = self.channels
        blocks = [channels.classes[numbers] for _, numbers in channels.blocks]
        alone = [channels.classes[numbers] for dims in channels.weights.values() for numbers in dims.values()]
        alone += [channels.classes[shadow].flatten() for shadow in channels.bare.values() if shadow.numel()]
        while True:
            before = int(keep.sum())
            for reader in self.readers:
                reader.keep_carrier(keep)
                _equalize(keep, reader.inputs, reader.filters, reader.groups, self.round_to)
            for parts in blocks:
                most = int(keep[parts].sum(1).max())
                for part in parts:
                    revive(keep, part, max(most, 1))
            for classes in alone:
                revive(keep, classes, max(int(keep[classes].sum()), 1))
            if int(keep.sum()) == before:
                return keep


class Reader:
    """A Mix step by classes: who reads which constant and varying channels."""

    def __init__(self, channels, step):
        self.step = step
        self.groups = step.groups
        self.filters = channels.classes[step.out]
        self.inputs = channels.classes[step.inputs]
        self.constants = channels.constants[step.inputs]
        module = channels.module_of(step.weight)
        shared = channels.uses[step.weight] > 1  # no bias or weight can make up for constants that differ
        if shared:
            self.constants = torch.where(self.constants == 0, self.constants, math.nan)
        self.padded = step.padded or step.bias is None and not hasattr(module, 'bias')
        self.varies = self.constants.isnan()

    def read(self, keep):
        """Bool [in]: inputs on which a filter that is kept has a weight that is not zero."""
        filters = keep[self.filters].view(self.groups, -1, 1)
        step = self.step
        if step.rectangle is not None:  # the weights that are not zero are whole rows and columns, as filter pruners leave them
            rows, columns = step.rectangle
            return (columns & (filters & rows).any(1, keepdim=True)).view(-1)
        return (step.reads & filters).any(1).view(-1)

    def keep_carrier(self, keep):
        """Where constants meet zero padding, keep one of them in each group, the largest, to stand for the others."""
        if not self.padded:
            return
        sizes = self.constants.nan_to_num(0.0).abs()
        if not (sizes > 0).any():
            return
        lost = self.read(keep) & (sizes > 0) & ~keep[self.inputs]
        for inputs, size, gone in zip(*(part.view(self.groups, -1) for part in (self.inputs, sizes, lost)), strict=True):
            if gone.any() and not (keep[inputs] & (size > 0.01 * size[gone].max())).any():  # smaller ones would cost precision
                keep[inputs[size.argmax()]] = True


def along(classes):
    """The one dimension along which a tensor of classes changes, 0 where it does not; None where there are several."""
    dims = [d for d, size in enumerate(classes.shape) if size > 1 and not bool((classes == classes.narrow(d, 0, 1)).all())]
    if len(dims) > 1:
        return None
    return dims[0] if dims else next((d for d, size in enumerate(classes.shape) if size == classes.numel() > 1), 0)


def revive(keep, classes, number):
    """Keep dead classes of a layer, the first ones first, until `number` of its channels are kept."""
    missing = min(number, len(classes)) - int(keep[classes].sum())
    if missing > 0:
        dead = classes[~keep[classes]]
        keep[dead[:missing]] = True


def _equalize(keep, inputs, filters, groups, round_to):
    """Keep as many channels in each group of a convolution as in the fullest one; no group, or all, may lose everything."""
    inputs = inputs.view(groups, -1)
    filters = filters.view(groups, -1)
    if round_to == 1 and groups == 1 and bool(keep[inputs].any()) and bool(keep[filters].any()):
        return
    alive = keep[inputs].any(1) | keep[filters].any(1)
    alive[0] |= not alive.any()
    fed = int(keep[inputs].sum(1).max())
    made = int(keep[filters].sum(1).max())
    total = math.ceil(max(made, 1) * int(alive.sum()) / round_to) * round_to
    for group in alive.nonzero().view(-1).tolist():
        revive(keep, inputs[group], max(fed, 1))
        revive(keep, filters[group], math.ceil(total / int(alive.sum())))
