"""Ways to run a convolution whose filters read different channels: whole, gathered, or as branches.

Which is fastest is for packing.py to measure; writing.py writes them.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .graph import number_of
from .layers import full_bias, is_rigid, live_filters
from .rules import arguments as arguments_of

MULTIPLES = (1, 8, 16)
MAX_BRANCHES = 8
CONVS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


class Way(NamedTuple):
    """A way to run a convolution.

    kind: 'whole', 'gathered', 'branches' or 'grouped'. multiple: what counts are rounded up to. pieces: (take, filters) of each
    smaller convolution: the positions of its inputs in the tensor it reads, None for all of them, and the numbers of its
    filters, -1 for one of zeros. added: whether the filters are added into the other summand of the addition that follows.
    """

    kind: str
    multiple: int
    pieces: list
    added: bool = False

    def describe(self, inputs):
        counts = [f'{inputs if take is None else len(take)} -> {len(filters)}' for take, filters in self.pieces]
        return f'{self.kind} {", ".join(counts)}' + (' added' if self.added else '')


def ways_of(network, node, layout, order, into_sum):
    """All ways to run a convolution on a tensor with the channels `layout`, the simplest first.

    order: a rank for each filter, or None. into_sum: whether the result may be added into the other summand of an addition.
    """
    layer = network.layers[node]
    everything = list(range(len(layer.need)))
    rigid = is_rigid(network, node)
    kind = network.kinds[node]
    if kind == 'depthwise':
        return [_depthwise(layer, layout, rigid)]
    if kind != 'conv':
        return [Way('whole' if layer.step.groups == 1 else 'grouped', 1, [(None, everything)])]
    rows = live_filters(layer) if into_sum else layer.need | rigid
    rows = rows.nonzero().flatten().tolist()
    if order is not None:
        rows.sort(key=order.__getitem__)
    sets = _sets(layer.reads, rows, layout)
    live = sorted({position for positions, _ in sets for position in positions})
    spare = sorted(set(everything) - set(rows)) if into_sum else []
    positions_everywhere = set(range(len(layout)))

    def piece(positions, filters, multiple):
        if into_sum:  # round up by other channels of the sum, to which zeros are added
            filters = filters + spare[: -len(filters) % multiple]
        elif not rigid:
            filters = filters + [-1] * min(-len(filters) % multiple, max(layer.most - len(filters), 0))
        if positions is not None:
            positions = sorted(positions + sorted(positions_everywhere - set(positions))[: -len(positions) % multiple])
        return (None if positions is None or len(positions) == len(layout) else positions), filters

    ways = []
    for multiple in MULTIPLES:
        if into_sum:
            ways.append(Way('whole', 1, [(None, everything)]))
            ways.append(Way('gathered', multiple, [(piece(live, [], multiple)[0], everything)]))
        if not into_sum or spare:
            ways.append(Way('whole', multiple, [piece(None, rows, multiple)], into_sum))
            ways.append(Way('gathered', multiple, [piece(live, rows, multiple)], into_sum))
        if 1 < len(sets) <= MAX_BRANCHES:
            pieces = [piece(positions, filters, multiple) for positions, filters in sets]
            ways.append(Way('branches', multiple, pieces, into_sum))
    ways.sort(key=lambda way: ('whole', 'gathered', 'branches').index(way.kind))
    return [way for k, way in enumerate(ways) if all(way[2:] != other[2:] for other in ways[:k])]


def _sets(reads, rows, layout):
    """[(positions, filters)]: the filters `rows` by the positions in `layout` that they read; constants go with the first."""
    kernels = F.pad(reads, (0, 1))[rows][:, layout]
    patterns, index = kernels.unique(dim=0, return_inverse=True)
    sets = [(pattern.nonzero().flatten().tolist(), []) for pattern in patterns]
    for row, k in zip(rows, index.tolist(), strict=True):
        sets[k][1].append(row)
    sets.sort(key=lambda item: item[1][0])
    reading = [item for item in sets if item[0]] or [([0], [])]
    reading[0][1].extend(row for positions, filters in sets if not positions for row in filters)
    return reading


def _depthwise(layer, layout, rigid):
    """A depthwise convolution in the order of its input, -1 for filters of zeros over channels that are none."""
    size = len(layer.need) // len(layer.given)
    if rigid:
        place = {channel: position for position, channel in enumerate(layout)}
        take = [place[channel] for channel in range(len(layer.given))]
        layout = list(range(len(take)))
        take = None if take == layout else take
    else:
        take = None
    return Way('grouped', 1, [(take, [channel * size + k if channel >= 0 else -1 for channel in layout for k in range(size)])])


def small_conv(network, node, layout, take, filters):
    """The convolution of one piece: its filters over the positions `take` of a tensor with the channels `layout`."""
    layer = network.layers[node]
    args = number_of(arguments_of(node))
    weight = layer.weight
    bias = full_bias(network, layer)
    groups = args['groups']
    tail = (0, 0) * (weight.dim() - 2)
    if network.kinds[node] == 'conv':
        columns = layout if take is None else [layout[position] for position in take]
        filters = [row if row >= 0 and layer.need[row] else -1 for row in filters]
        weight = weight * _as_kernels(layer.reads, weight)
        weight = F.pad(weight, (*tail, 0, 1, 0, 1))[filters][:, columns]  # row and column -1 are zeros
        bias = F.pad(bias, (0, 1))[filters]
    elif network.kinds[node] == 'depthwise':
        groups = len(filters) * groups // len(weight)
        weight = F.pad(weight * _as_kernels(layer.reads, weight), (*tail, 0, 0, 0, 1))[filters]
        bias = F.pad(bias, (0, 1))[filters]
    elif not layer.held:
        weight = weight * _as_kernels(layer.reads, weight)
    settings = {key: args[key] for key in ('stride', 'padding', 'dilation')} | {'kernel_size': tuple(weight.shape[2:])}
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    settings = {key: value * (weight.dim() - 2) if value and len(value) == 1 else value for key, value in settings.items()}
    settings |= {'groups': groups, 'device': weight.device, 'dtype': weight.dtype}
    conv = nn.utils.skip_init(CONVS[weight.dim()], weight.shape[1] * groups, len(weight), **settings)
    conv.weight.data.copy_(weight)
    conv.bias.data.copy_(bias)
    return conv


def _as_kernels(reads, weight):
    return reads.to(weight).view(*reads.shape, *[1] * (weight.dim() - 2))


def small_linear(network, node, layout):
    """The linear layer over features in the order `layout`, None as they are."""
    layer = network.layers[node]
    if layer.held:
        weight = layer.weight
        bias = layer.bias
    else:
        weight = layer.weight * layer.given.to(layer.weight)
        bias = full_bias(network, layer)
        bias = bias if layer.bias is not None or bool(bias.any()) else None
    if layout is not None:
        weight = F.pad(weight, (0, 1))[:, layout]
    settings = {'device': weight.device, 'dtype': weight.dtype}
    linear = nn.utils.skip_init(nn.Linear, weight.shape[1], len(weight), bias is not None, **settings)
    linear.weight.data.copy_(weight)
    if bias is not None:
        linear.bias.data.copy_(bias)
    return linear


def norm_over(network, node, layout):
    """The batch norm of channels in the order `layout`, -1 for channels that are none; None as they are."""
    args = arguments_of(node)
    program = network.program
    values = {key: args[key] for key in ('weight', 'bias', 'running_mean', 'running_var')}
    values = {key: None if value is None else program.tensors[program.names[value]].detach() for key, value in values.items()}
    mean = values['running_mean']
    layout = list(range(len(mean))) if layout is None else layout
    kinds = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    kind = kinds[len(node.meta['val'].shape)]
    norm = kind(len(layout), args['eps'], args['momentum'], affine=values['weight'] is not None).to(mean)
    for key, value in values.items():
        if value is not None:
            filler = 1.0 if key in ('weight', 'running_var') else 0.0
            getattr(norm, key).data.copy_(torch.cat([value, value.new_full([1], filler)])[layout])
    return norm
