"""Packing: a masked network becomes a smaller one with the same outputs; each layer runs the way that measured fastest.

    packed = pack(model, example_input)             # an fx.GraphModule of plain torch.nn layers, in eval mode
    print('\\n'.join(packed.meta['layers']))         # how each convolution runs
    dense = fold(model, example_input)              # what to compare its speed with: full size, batch norms folded

Dynamic Structure Pruning (Park et al., AAAI 2023) leaves convolutions whose filters read different input channels, group by
group; filters that read the same ones form a branch. A convolution can run
- whole: one convolution over all channels that its input still has, with zeros where a filter does not read one;
- gathered: one convolution over the channels that any of its filters reads;
- as branches: one smaller convolution for each set of filters that read the same channels;
with channel counts as they are or rounded up to multiples of 8 or 16 by zeros. In front of an addition, the live filters alone
may be computed and added into the other summand. Which way is fastest depends on the layer, the batch and the machine, so it is
measured at the example's batch size; at the end the whole network is measured against simpler ones and the folded dense one.

Deviations from the authors' packing: any number of branches and any traceable network, where theirs knows ResNets with one to
four branches; dead blocks, strides and dilations as they are; batch norms folded; a constant that a dead filter's batch norm
still emits is kept, in the bias of its readers where that is exact; nothing runs as branches where that is slower.
"""

import copy
import math
import operator
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from .channels import ChannelGraph, channel_graph
from .outputs import eval_mode

MULTIPLES = (1, 8, 16)
MAX_BRANCHES = 8
MARGIN = 0.98  # what is less simple, or larger, must take less than this share of the time
DROPPED = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)  # do nothing in eval mode
FOLLOWS = ('norm', 'pass', 'activate')  # have the channels of their input


def pack(model, example_input, how='measured'):
    """A smaller network with the outputs of the masked model in eval mode -> fx.GraphModule.

    model: any network that torch.fx can trace; it is not changed. A kernel is pruned where the convolution's bool buffer `mask`
    (shape [out, in / groups, 1, 1]) is False, and where all of its weights are exactly zero.
    example_input: a batch [B, C, H, W] on the model's device. The result takes any batch size and is fastest at this one.
    how: 'measured', or one way for all convolutions: 'whole', 'gathered', 'branches' (whole where a layer has no such way).
    Layers are copies and channel indices buffers. `meta['layers']` of the result has a line for each convolution: the way, and
    inputs -> filters of each branch; 'added' where only these filters are added to the other summand of the addition behind.
    Raises ValueError for a model that cannot be traced, for a layer that cannot be packed, by name, and where outputs differ.
    """
    if how not in ('measured', 'whole', 'gathered', 'branches'):
        raise ValueError(f"how must be 'measured', 'whole', 'gathered' or 'branches', not {how!r}")
    network = _analyse(model, example_input)
    packed = _fastest(network) if how == 'measured' else _build(network, _always(how))
    _check(model, packed, example_input)
    return packed


def fold(model, example_input, tune=True):
    """The masked model at full size with its batch norms folded: what a packed network is compared with -> fx.GraphModule.

    tune: in the memory layout that measured fastest, among which packing chooses too; else contiguous, PyTorch's default.
    """
    network = _full_size(_analyse(model, example_input))
    dense = [_build(layout, _always('whole')) for layout in (_layouts(network) if tune else [network])]
    folded = dense[_simplest(_times(dense, example_input))]
    _check(model, folded, example_input)
    return folded


# ------------------------------------------------------------------------------------------- what each layer has to compute


class Network(NamedTuple):
    """A traced model and what its nodes have to compute. Lists and keys go by the number of the node in graph.nodes.

    layers: {conv or linear node: (weight, bias)}, masked, and with the batch norm behind it folded in. folded: the names of
    those batch norms. varies: bool [channels] of each node, False where a channel holds one constant for any input, at every
    place; constant: those constants. need: bool [channels] of each node, False where nobody needs the channel to be there.
    given: {conv or linear node: bool [in]}, False for the constant inputs that its bias takes in. reads: {conv node without
    groups: bool [out, in]}, its live kernels. rigid: for each node, whether its channels must come in ascending order.
    order: {conv node: a rank for each filter}, see _order. channels_last: the conv nodes that run in that memory layout.
    """

    graph: ChannelGraph
    modules: dict
    example: torch.Tensor
    layers: dict
    folded: set
    varies: list
    constant: list
    need: list
    given: dict
    reads: dict
    rigid: list
    order: dict
    channels_last: set


def _analyse(model, example):
    graph = channel_graph(model, example)
    modules = dict(graph.traced.named_modules())
    layers, folded = _layers(graph, modules)
    with torch.no_grad(), eval_mode(model):
        found = _Constants(graph, modules, layers, folded)
        found.run(torch.zeros_like(example[:1]))
    need = _needs(graph, found)
    ungrouped = [i for i, node in enumerate(graph.nodes) if node.kind == 'conv' and node.detail[2] == 1]
    reads = {i: found.kernels[i] & found.given[i] & found.varies[i][:, None] for i in ungrouped}
    rigid = _rigid(graph)
    order = _order(graph, reads, rigid)
    return Network(
        graph, modules, example, layers, folded, found.varies, found.constant, need, found.given, reads, rigid, order, set()
    )


def _full_size(network):
    """The same with every channel of every layer needed."""
    need = [torch.ones_like(channels) for channels in network.need]
    return network._replace(need=need, rigid=[True] * len(need), order={})


def _layers(graph, modules):
    """({node: (weight, bias)}, names of the batch norms folded into them)."""
    layers, folded, seen = {}, set(), set()
    for i, node in enumerate(graph.nodes):
        if node.kind not in ('conv', 'linear', 'norm'):
            continue
        if node.module in seen:
            raise ValueError(f'{node.module} is used twice in the network and cannot be packed')
        seen.add(node.module)
        layer, norm = modules[node.module], graph.norms.get(node.module)
        for name in (node.module, norm):
            if isinstance(modules.get(name), nn.BatchNorm2d) and modules[name].running_mean is None:
                raise ValueError(f'{name} keeps no running statistics and cannot be packed')
        if node.kind == 'norm':
            continue
        weight = layer.weight.detach()
        if node.kind == 'conv' and getattr(layer, 'mask', None) is not None:
            weight = weight * layer.mask
        bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach()
        if norm:
            weight, bias = _fold(weight, bias, modules[norm])
            folded.add(norm)
        layers[i] = weight, bias
    return layers, folded


def _fold(weight, bias, norm):
    """A convolution's weight and bias with the batch norm behind it folded in, computed in double precision."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    shift = -norm.running_mean.double() * scale
    if norm.affine:
        scale, shift = (
            scale * norm.weight.detach().double(),
            shift * norm.weight.detach().double() + norm.bias.detach().double(),
        )
    folded = weight.double() * scale.view(-1, 1, 1, 1)
    return folded.to(weight.dtype), (bias.double() * scale + shift).to(bias.dtype)


class _Constants(fx.Interpreter):
    """Follows constants through the network: runs it on zeros, and sets all that varies to zero behind each node.

    What a channel then holds is its constant; where it is not the same at every place, as behind zero padding, it varies.
    """

    def __init__(self, graph, modules, layers, folded):
        super().__init__(graph.traced)
        self.channels, self.layer_of, self.layers, self.folded = graph, modules, layers, folded
        self.varies, self.constant, self.given, self.kernels = [], [], {}, {}

    def run_node(self, node):
        i = len(self.varies)
        item = self.channels.nodes[i]
        if item.kind == 'conv':
            x = self.fetch_args_kwargs_from_env(node)[0][0]
            value = nn.Conv2d._conv_forward(self.layer_of[item.module], x, *self.layers[i])
        elif item.module in self.folded:
            value = self.fetch_args_kwargs_from_env(node)[0][0]
        else:
            value = super().run_node(node)
        if item.kind in ('conv', 'linear'):
            self.note(i, item)
        varies, constant = self.what_varies(i, item, value), torch.zeros(item.channels)
        if item.channels:
            value = value.clone()
            value[:, varies.to(value.device)] = 0
            constant = value[0].reshape(item.channels, -1)[:, 0].clone()
        self.varies.append(varies)
        self.constant.append(constant)
        return value

    def note(self, i, node):
        """given: at zero padding a constant is not constant, so it must be there. kernels: those that are not all zero."""
        layer, source = self.layer_of[node.module], node.inputs[0]
        self.kernels[i] = (
            self.layers[i][0].flatten(2).ne(0).any(2).cpu() if node.kind == 'conv' else self.layers[i][0].ne(0).cpu()
        )
        self.given[i] = self.varies[source]
        if node.kind == 'conv' and layer.padding_mode == 'zeros' and layer.padding not in ('valid', (0, 0)):
            self.given[i] = self.varies[source] | self.constant[source].ne(0).cpu()

    def what_varies(self, i, node, value):
        inputs = [self.varies[source] for source in node.inputs]
        if node.kind == 'conv':
            out, _, groups = node.detail
            kernels = self.kernels[i].view(groups, out // groups, -1)
            return (kernels & self.given[i].view(groups, 1, -1)).any(2).flatten()
        if node.kind in FOLLOWS:
            return inputs[0] | _uneven(value)
        if node.kind == 'move':
            return torch.cat([inputs[0], inputs[0].new_zeros(1)])[node.detail] | _uneven(value)
        if node.kind in ('sum', 'product'):
            return torch.stack(inputs).any(0) | _uneven(value)
        return torch.cat(inputs) if node.kind == 'cat' else torch.ones(node.channels, dtype=torch.bool)


def _uneven(value):
    """bool [channels]: which channels do not hold one number at all places."""
    flat = value[0].reshape(value.shape[1], -1)
    return (flat != flat[:, :1]).any(1).cpu()


def _needs(graph, found):
    """For each node, the channels that must be there: from the output back. What is needed at all keeps one input channel."""
    need = [torch.zeros_like(channels) for channels in found.varies]
    nonzero = [varies | value.ne(0).cpu() for varies, value in zip(found.varies, found.constant, strict=True)]
    for i in reversed(range(len(need))):
        node = graph.nodes[i]
        if node.kind == 'number' or node.kind != 'output' and node.channels and not need[i].any():
            continue
        wanted = _wanted(graph, found, i, need[i], [nonzero[source] for source in node.inputs])
        if wanted and not any(channels.any() for channels in wanted):
            wanted[0] = torch.arange(len(wanted[0])) == 0
        for source, channels in zip(node.inputs, wanted, strict=True):
            need[source] = need[source] | channels
    return need


def _wanted(graph, found, i, need, nonzero):
    """The channels that node i needs of each of its inputs, when `need` are needed of it. nonzero: of each input."""
    node = graph.nodes[i]
    if node.kind == 'conv' and node.detail[2] > 1:  # whole groups stay or go
        return [need.view(node.detail[2], -1).any(1).repeat_interleave(node.detail[1])]
    if node.kind == 'conv':
        return [found.kernels[i][need & found.varies[i]].any(0) & found.given[i]]
    if node.kind == 'linear':
        return [found.kernels[i].any(0) & found.given[i]]
    if node.kind == 'sum' and node.detail:
        return [need & channels for channels in nonzero]
    if node.kind in (*FOLLOWS, 'sum', 'product'):
        return [need] * len(nonzero)
    if node.kind == 'cat':
        return list(need.split([len(channels) for channels in nonzero]))
    if _is_flatten(graph, i):
        return [need.view(len(nonzero[0]), -1).any(1)]
    return [torch.ones_like(channels) for channels in nonzero]


def _is_flatten(graph, i):
    """Whether node i turns each channel into a block of features, in order."""
    node = graph.nodes[i]
    if node.kind != 'move' or len(graph.shapes[node.name]) != 2:
        return False
    channels = graph.nodes[node.inputs[0]].channels
    return node.detail == [c for c in range(channels) for _ in range(node.channels // channels)]


def _rigid(graph):
    """For each node, whether its channels must come in ascending order: for additions, and for what is not known here."""
    rigid = [False] * len(graph.nodes)
    for i in reversed(range(len(rigid))):
        node = graph.nodes[i]
        if node.kind in ('conv', 'linear', 'number') or _is_flatten(graph, i):
            continue
        for source in node.inputs:
            rigid[source] = rigid[source] or rigid[i] or node.kind not in (*FOLLOWS, 'cat')
    return rigid


def _order(graph, reads, rigid):
    """{conv node: a rank for each of its filters}, where a convolution with two sets of filters reads it: first those that the
    one set alone reads, then those of both, then those of the other. So each branch reads neighbours, which is a view."""
    order = {}
    for i, kernels in reads.items():
        sets = kernels.unique(dim=0)
        sets = sets[sets.any(1)]
        source = graph.nodes[i].inputs[0]
        while graph.nodes[source].kind in FOLLOWS:
            source = graph.nodes[source].inputs[0]
        if len(sets) == 2 and source in reads and not rigid[source]:
            order[source] = (sets[1].int() - sets[0].int()).tolist()
    return order


# ------------------------------------------------------------------------------------------------ ways to run a convolution


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


def _ways(network, i, layout, summands):
    """All ways to run convolution i on a tensor with the channels `layout`, the simplest first.

    summands: the channels of the addition that follows, when the result may be added into its other summand; else None.
    """
    if network.graph.nodes[i].detail[2] > 1:
        return [_grouped(network, i, layout)]
    rows = network.need[i].nonzero().flatten().tolist()
    if i in network.order:
        rows.sort(key=network.order[i].__getitem__)
    sets = _sets(network.reads[i], rows, layout)
    live = sorted({position for positions, _ in sets for position in positions})
    spare = sorted(set(summands or []) - set(rows))
    out, rigid, everywhere = network.graph.nodes[i].detail[0], network.rigid[i], set(range(len(layout)))

    def piece(positions, filters, multiple):
        if summands is not None:  # round up by other channels of the sum, to which zeros are added
            filters = filters + spare[: -len(filters) % multiple]
        elif not rigid:
            filters = filters + [-1] * min(-len(filters) % multiple, out - len(filters))
        if positions is not None:
            positions = sorted(positions + sorted(everywhere - set(positions))[: -len(positions) % multiple])
        return (None if positions is None or len(positions) == len(layout) else positions), filters

    ways = []
    for multiple in MULTIPLES:
        if summands is not None:
            ways += [Way('whole', 1, [(None, summands)]), Way('gathered', multiple, [(piece(live, [], multiple)[0], summands)])]
        if summands is None or spare:
            ways.append(Way('whole', multiple, [piece(None, rows, multiple)], summands is not None))
            ways.append(Way('gathered', multiple, [piece(live, rows, multiple)], summands is not None))
        if 1 < len(sets) <= MAX_BRANCHES:
            pieces = [piece(positions, filters, multiple) for positions, filters in sets]
            ways.append(Way('branches', multiple, pieces, summands is not None))
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


def _grouped(network, i, layout):
    """The groups of a grouped convolution that are needed, as they are; a depthwise one in the order of its input."""
    _, inputs, groups = network.graph.nodes[i].detail
    kept = network.need[i].view(groups, -1).any(1).nonzero().flatten().tolist()
    place = {channel: position for position, channel in enumerate(layout)}
    if inputs == 1 and not network.rigid[i]:
        kept.sort(key=place.__getitem__)
    take = [place[group * inputs + k] for group in kept for k in range(inputs)]
    size = len(network.need[i]) // groups
    filters = [group * size + k for group in kept for k in range(size)]
    return Way('grouped', 1, [(None if take == list(range(len(layout))) else take, filters)])


def _bias(network, i):
    """The bias of conv or linear node i, with what constant inputs contribute; that of a constant filter is the constant."""
    weight, bias = network.layers[i]
    source = network.graph.nodes[i].inputs[0]
    groups = weight.shape[1] != len(network.given[i])
    if not groups:
        absorbed = network.constant[source].to(weight).masked_fill(network.given[i].to(weight.device), 0)
        bias = bias + (weight.flatten(2).sum(2) if weight.dim() == 4 else weight) @ absorbed
    return torch.where(network.varies[i].to(bias.device), bias, network.constant[i].to(bias))


def _small_conv(network, i, layout, take, filters):
    """The nn.Conv2d of one piece: its filters over the positions `take` of a tensor with the channels `layout`."""
    layer, (weight, _) = network.modules[network.graph.nodes[i].module], network.layers[i]
    groups, bias = 1, _bias(network, i)
    if layer.groups > 1:
        groups, weight, bias = len(filters) * layer.groups // layer.out_channels, weight[filters], bias[filters]
    else:
        columns = layout if take is None else [layout[position] for position in take]
        filters = [row if row >= 0 and network.need[i][row] else -1 for row in filters]
        weight = weight * network.reads[i][:, :, None, None].to(weight.device)
        weight = F.pad(weight, (0, 0, 0, 0, 0, 1, 0, 1))[filters][:, columns]  # row and column -1 are zeros
        bias = F.pad(bias, (0, 1))[filters]
    settings = {name: getattr(layer, name) for name in ('kernel_size', 'stride', 'padding', 'dilation', 'padding_mode')}
    settings |= {'groups': groups, 'device': weight.device, 'dtype': weight.dtype}
    conv = nn.utils.skip_init(nn.Conv2d, weight.shape[1] * groups, len(weight), **settings)
    conv.weight.data.copy_(weight)
    conv.bias.data.copy_(bias)
    return conv


# ------------------------------------------------------------------------------------------------- writing the new network


class _Sketch:
    """A graph that is being written; parts: {name: layer or index tensor}. last: whether tensors are in channels_last."""

    def __init__(self, network):
        self.graph, self.parts, self.device = fx.Graph(), {}, network.example.device
        self.last = 0 < _convs(network) == len(network.channels_last)

    def finish(self):
        return fx.GraphModule(self.parts, self.graph, 'Packed').eval()

    def index(self, name, positions):
        self.parts[name] = torch.tensor(positions, device=self.device)
        return self.graph.get_attr(name)

    def take(self, x, positions, name):
        """x[:, positions]: a view where they are neighbours, else a copy."""
        first, count = positions[0], len(positions)
        if positions == list(range(first, first + count)):
            return self.graph.call_function(torch.narrow, (x, 1, first, count))
        if self.last:  # there, indexing is twice as fast as index_select
            return self.graph.call_function(operator.getitem, (x, (slice(None), self.index(name, positions))))
        return self.graph.call_function(torch.index_select, (x, 1, self.index(name, positions)))

    def arrange(self, x, have, want, name, dims=4):
        """Bring the channels `have` of x into the order `want`; those that x does not have become zeros."""
        if have == want:
            return x
        place = {channel: position for position, channel in enumerate(have)}
        if any(channel not in place for channel in want):
            x = self.graph.call_function(F.pad, (x, (0, 0) * (dims - 2) + (0, 1)))
        return self.take(x, [place.get(channel, len(have)) for channel in want], f'{name}_order')

    def convolve(self, x, network, i, layout, way):
        """[(output, its filters)] of each piece of a way."""
        name, found = network.graph.nodes[i].module, []
        for k, (take, filters) in enumerate(way.pieces):
            inputs = x if take is None else self.take(x, take, f'{name}_take{k}')
            part = name if len(way.pieces) == 1 else f'{name}.{k}'
            conv = _small_conv(network, i, layout, take, filters)
            self.parts[part] = conv.to(memory_format=torch.channels_last) if i in network.channels_last else conv
            found.append((self.graph.call_module(part, (inputs,)), filters))
        return found

    def join(self, pieces):
        """The pieces side by side, and their filters."""
        filters = [channel for _, channels in pieces for channel in channels]
        if len(pieces) == 1:
            return pieces[0][0], filters
        return self.graph.call_function(torch.cat, ([y for y, _ in pieces], 1)), filters

    def add_into(self, x, target, pieces, name):
        """x, which has the channels `target`, with the pieces added to theirs."""
        place = {channel: position for position, channel in enumerate(target)}
        for k, (y, filters) in enumerate(pieces):
            if filters == target:
                x = self.graph.call_function(operator.add, (x, y))
                continue
            positions = self.index(f'{name}_put{k}', [place[channel] for channel in filters])
            if self.last:  # as the tensors lie in memory
                x, y = (self.graph.call_method('permute', (tensor, 0, 2, 3, 1)) for tensor in (x, y))
            x = self.graph.call_function(torch.index_add, (x, 3 if self.last else 1, positions, y))
            x = self.graph.call_method('permute', (x, 0, 3, 1, 2)) if self.last else x
        return x


def _convs(network):
    return sum(node.kind == 'conv' for node in network.graph.nodes)


def _build(network, choose):
    """The packed network. choose(network, conv node, layout, ways, summands) -> the way in which a convolution runs."""
    with torch.no_grad():
        return _Builder(network, choose).build()


class _Builder(_Sketch):
    """Writes the packed network node by node.

    env[i]: the new node, or None where nobody needs it. layout[i]: for each of its channels the original number, -1 for one
    that is there only to round the count up. pending: {sum node: (conv node, pieces)} to be added into the other summand.
    """

    def __init__(self, network, choose):
        super().__init__(network)
        self.network, self.choose, self.nodes = network, choose, network.graph.nodes
        self.old = list(network.graph.traced.graph.nodes)
        self.number = {old: i for i, old in enumerate(self.old)}
        self.targets, self.added = _targets(network), _added(network)
        self.env, self.layout, self.pending, self.lines = [], [], {}, []

    def build(self):
        for i, node in enumerate(self.nodes):
            write = getattr(self, f'write_{node.kind}', self.write_other)
            env, layout = write(i, node, [(self.env[source], self.layout[source]) for source in node.inputs])
            self.env.append(env)
            self.layout.append(layout)
        packed = self.finish()
        packed.meta['layers'] = self.lines
        return packed

    def copy(self, i, new=None):
        """The old node with a copy of its layer. new: {input node: what to read instead of its translation}."""
        old, new = self.old[i], new or {}
        if old.op == 'call_module':
            self.parts.setdefault(old.target, copy.deepcopy(self.network.modules[old.target]))
        return self.graph.node_copy(old, lambda source: new.get(self.number[source], self.env[self.number[source]]))

    def arranged(self, i, sources, wants):
        """{input node: its translation with the channels in the order that `wants` gives for it}."""
        new = {}
        for source, want in zip(sources, wants, strict=True):
            dims = len(self.network.graph.shapes.get(self.nodes[source].name, ()))
            name = f'{self.nodes[source].name}_for_{self.nodes[i].name}'
            new[source] = self.arrange(self.env[source], self.layout[source], want, name, dims)
        return new

    def write_other(self, i, node, sources):
        """An operation that is not known here: all channels of all inputs, in order."""
        inputs = [self.number[old] for old in self.old[i].all_input_nodes]
        full = [list(range(self.nodes[source].channels)) for source in inputs]
        return self.copy(i, self.arranged(i, inputs, full)), list(range(node.channels))

    def write_input(self, i, node, sources):
        old = self.old[i]
        if old.op == 'get_attr':
            self.parts[old.target] = operator.attrgetter(old.target)(self.network.graph.traced)
        return self.graph.node_copy(old), list(range(node.channels))

    def write_number(self, i, node, sources):
        return self.copy(i), []

    def write_conv(self, i, node, sources):
        network, (x, layout) = self.network, sources[0]
        if not network.need[i].any():
            self.lines.append(f'{node.module}: dead')
            return None, []
        total = self.added.get(i)
        summands = None if total is None else self.targets[total]
        way = self.choose(network, i, layout, _ways(network, i, layout, summands), summands)
        self.lines.append(f'{node.module}: {way.describe(len(layout))}')
        pieces = self.convolve(x, network, i, layout, way)
        if way.added:
            self.pending[total] = i, pieces
            return None, []
        y, filters = self.join(pieces)
        if not network.rigid[i] or summands is not None:
            return y, filters
        return self.arrange(y, filters, self.targets[i], node.module), self.targets[i]

    def write_norm(self, i, node, sources):
        (x, layout), old = sources[0], self.network.modules[node.module]
        if node.module in self.network.folded or x is None:
            return x, layout
        real = [k for k, channel in enumerate(layout) if channel >= 0]
        new = nn.BatchNorm2d(len(layout), old.eps, affine=old.affine).to(old.running_mean)
        for name in ('weight', 'bias', 'running_mean', 'running_var'):
            if getattr(old, name) is not None:
                getattr(new, name).data[real] = getattr(old, name).data[[layout[k] for k in real]]
        self.parts[node.module] = new
        return self.graph.call_module(node.module, (x,)), layout

    def write_pass(self, i, node, sources):
        x, layout = sources[0]
        name = getattr(self.old[i].target, '__name__', self.old[i].target)
        if (
            x is None
            or isinstance(self.network.modules.get(node.module), DROPPED)
            or name in ('dropout', 'dropout2d', 'detach')
        ):
            return x, layout
        new = self.copy(i)
        if _is_pool(self.network, i) and self.network.channels_last and not self.last:
            new = self.graph.call_method('contiguous', (new,))  # only the pool and what is in front of it run in channels_last
        return new, layout

    write_activate = write_pass

    def write_move(self, i, node, sources):
        x, layout = sources[0]
        if x is None:
            return None, []
        if not _is_flatten(self.network.graph, i):
            return self.write_other(i, node, sources)
        repeat = node.channels // self.nodes[node.inputs[0]].channels
        features = [channel * repeat + k if channel >= 0 else -1 for channel in layout for k in range(repeat)]
        return self.graph.call_function(torch.flatten, (x, 1)), features

    def write_linear(self, i, node, sources):
        (x, layout), (weight, _) = sources[0], self.network.layers[i]
        weight = F.pad(weight * self.network.given[i].to(weight.device), (0, 1))[:, layout]
        new = nn.utils.skip_init(nn.Linear, len(layout), node.channels, device=weight.device, dtype=weight.dtype)
        new.weight.data.copy_(weight)
        new.bias.data.copy_(_bias(self.network, i))
        self.parts[node.module] = new
        return self.graph.call_module(node.module, (x,)), list(range(node.channels))

    def write_cat(self, i, node, sources):
        live = [x for x, _ in sources if x is not None]
        layout = _side_by_side(self.nodes, node, [channels for _, channels in sources])
        if len(live) < 2:
            return (live[0] if live else None), layout
        return self.graph.call_function(torch.cat, (live, 1)), layout

    def write_sum(self, i, node, sources):
        target, live = self.targets[i], [s for s, (x, _) in zip(node.inputs, sources, strict=True) if x is not None]
        new = self.arranged(i, live, [target] * len(live))
        if i in self.pending:
            conv, pieces = self.pending[i]
            if live:
                return self.add_into(new[live[0]], target, pieces, self.nodes[conv].module), target
            y, filters = self.join(pieces)
            return self.arrange(y, filters, target, self.nodes[conv].module), target
        if len(live) == len(sources):
            return self.copy(i, new), target
        if not live:
            return None, []
        alone, kept = new[live[0]], any(live[0] in later.inputs for later in self.nodes[i + 1 :])
        if kept or self.nodes[live[0]].kind == 'input':  # something in place behind the sum must not reach it
            alone = self.graph.call_function(torch.clone, (alone,))
        return alone, target

    def write_product(self, i, node, sources):
        if any(x is None for x, _ in sources) or not self.targets[i]:
            return None, []
        return self.copy(i, self.arranged(i, node.inputs, [self.targets[i]] * len(sources))), self.targets[i]


def _side_by_side(nodes, node, layouts):
    """The channels of a concatenation, from those of its inputs."""
    offsets = [sum(nodes[other].channels for other in node.inputs[:k]) for k in range(len(layouts))]
    pairs = zip(layouts, offsets, strict=True)
    return [channel + offset if channel >= 0 else -1 for layout, offset in pairs for channel in layout]


def _targets(network):
    """For each node whose channels come in an order that is known before any way is chosen, that order; else None."""
    targets, nodes = [], network.graph.nodes
    for i, node in enumerate(nodes):
        inputs, need = [targets[source] for source in node.inputs], network.need[i].nonzero().flatten().tolist()
        if node.kind == 'conv':
            target = need if network.rigid[i] else None
        elif node.kind == 'product':
            target = need
        elif node.kind == 'sum':  # the channels of the widest summand, in which nothing is then moved, if that has them all
            widest = max(inputs, key=len)
            target = widest if set(need) <= set(widest) else need
        elif node.kind in FOLLOWS:
            target = inputs[0]
        elif node.kind == 'cat' or _is_flatten(network.graph, i):
            target = None
            if node.kind == 'cat' and None not in inputs:
                target = _side_by_side(nodes, node, inputs)
            elif node.kind == 'move' and inputs[0] is not None:
                repeat = node.channels // nodes[node.inputs[0]].channels
                target = [channel * repeat + k for channel in inputs[0] for k in range(repeat)]
        else:
            target = list(range(node.channels))
        targets.append(target)
    return targets


def _added(network):
    """{conv node: the sum behind it}, where its filters may be added into the other summand. One for each sum."""
    nodes, readers, added = network.graph.nodes, {}, {}
    for node in nodes:
        for source in node.inputs:
            readers[source] = readers.get(source, 0) + 1

    def nothing_done(i):
        return nodes[i].module in network.folded or isinstance(network.modules.get(nodes[i].module), DROPPED)

    for i, node in enumerate(nodes):
        if node.kind != 'sum' or not node.detail:
            continue
        found = []
        for source in node.inputs:
            while readers[source] == 1 and nodes[source].module and nothing_done(source):
                source = nodes[source].inputs[0]
            if source in network.reads and readers[source] == 1 and network.need[source].any():
                found.append(source)
        if found:
            added[min(found, key=lambda source: int(network.need[source].sum()))] = i
    return added


# ------------------------------------------------------------------------------------------------- choosing by measurement


def _always(kind, multiple=1):
    """Chooses one kind of way for all convolutions, with counts rounded up to the multiple; whole where one has no such way."""

    def choose(network, i, layout, ways, summands):
        found = [way for way in ways if way.kind == kind and way.multiple <= multiple]
        found = [way for way in found if not way.added] or found
        return max(found, key=lambda way: way.multiple, default=ways[0])

    return choose


def _measured(network, i, layout, ways, summands):
    """The fastest way to run convolution i by itself, with the addition that follows."""
    if len(ways) == 1:
        return ways[0]
    graph = network.graph
    source, shape = graph.nodes[graph.nodes[i].inputs[0]].name, graph.shapes[graph.nodes[i].name]
    inputs = [_random(len(layout), graph.shapes[source][2:], network)]
    if summands is not None:
        inputs.append(_random(len(summands), shape[2:], network))
    modules = [_alone(network, i, layout, way, summands) for way in ways]
    return ways[_simplest(measure([lambda module=module: module(*inputs) for module in modules], network.example.device))]


def _simplest(times):
    """The index of the shortest time, but that of an earlier one unless it is beaten by the margin."""
    best = 0
    for k, seconds in enumerate(times):
        if seconds < MARGIN * times[best]:
            best = k
    return best


def _random(channels, size, network):
    example = network.example
    x = torch.randn(len(example), channels, *size, device=example.device, dtype=example.dtype)
    return x.contiguous(memory_format=torch.channels_last) if len(network.channels_last) == _convs(network) else x


def _alone(network, i, layout, way, summands):
    """A module that runs convolution i in this way, and adds the result to its second input if there are summands."""
    sketch, name = _Sketch(network), network.graph.nodes[i].module
    x = sketch.graph.placeholder('x')
    other = None if summands is None else sketch.graph.placeholder('other')
    pieces = sketch.convolve(x, network, i, layout, way)
    if summands is not None:
        y = sketch.add_into(other, summands, pieces, name)
    else:
        y, filters = sketch.join(pieces)
        y = sketch.arrange(y, filters, network.need[i].nonzero().flatten().tolist(), name) if network.rigid[i] else y
    sketch.graph.output(y)
    return sketch.finish()


def measure(functions, device, seconds=0.2, most=50):
    """The shortest time of each function, called in turn so that a disturbance hits all alike.

    For about `seconds` in all, at least 4 and at most `most` times; those far behind after three are not called again.
    """
    best, start, rounds = [math.inf] * len(functions), time.perf_counter(), 0
    with torch.no_grad():
        for function in functions:
            function()  # the first call sets things up
        while rounds < 4 or rounds < most and time.perf_counter() - start < seconds:
            for k, function in enumerate(functions):
                if rounds > 2 and best[k] > 1.2 * min(best):
                    continue
                _wait(device)
                began = time.perf_counter()
                function()
                _wait(device)
                best[k] = min(best[k], time.perf_counter() - began)
            rounds += 1
    return best


def _wait(device):
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def _fastest(network):
    """The fastest of: all convolutions whole, at one multiple or another; each as it measured; the folded dense network."""
    layouts, count = _layouts(network), len(MULTIPLES)
    whole = [_build(layout, _always('whole', multiple)) for layout in layouts for multiple in MULTIPLES]
    dense = [_build(layout, _always('whole')) for layout in _layouts(_full_size(network))]
    times = _times(whole + dense, network.example)
    slow = 1.25 * min(times[: len(whole)])
    layouts = [layout for k, layout in enumerate(layouts) if min(times[k * count : k * count + count]) < slow]
    last = [whole[_simplest(times[: len(whole)])], *(_build(layout, _measured) for layout in layouts)]
    last.append(dense[_simplest(times[len(whole) :])])
    times = _times(last, network.example)
    best = _simplest(times[:-1])
    return last[-1 if MARGIN * times[best] > times[-1] else best]


def _times(networks, example):
    return measure([lambda network=network: network(example) for network in networks], example.device, 2, 300)


def _layouts(network):
    """The network in the memory layouts that are worth a try: contiguous with the convolutions in front of max pools in
    channels_last, as that is how a CPU pools fast, and channels_last throughout."""
    nodes, pooled = network.graph.nodes, set()
    for i, node in enumerate(nodes):
        if _is_pool(network, i):
            source = node.inputs[0]
            while nodes[source].kind in FOLLOWS:
                source = nodes[source].inputs[0]
            pooled |= {source} & set(network.layers)
    convs = {i for i, node in enumerate(nodes) if node.kind == 'conv'}
    return [network._replace(channels_last=pooled), network._replace(channels_last=convs)] if convs else [network]


def _is_pool(network, i):
    node = network.graph.nodes[i]
    target = list(network.graph.traced.graph.nodes)[i].target
    is_function = getattr(target, '__name__', '') in ('max_pool2d', 'boolean_dispatch')
    return node.kind == 'pass' and (is_function or isinstance(network.modules.get(node.module), nn.MaxPool2d))


def _check(model, packed, example):
    """Raise ValueError where the packed network's outputs are not those of the masked model."""
    masked = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d) and getattr(layer, 'mask', None) is not None:
            masked[f'{name}.weight'] = layer.weight.detach() * layer.mask
    with torch.no_grad(), eval_mode(model):
        expected = torch.func.functional_call(model, masked, (example.clone(),))
        found = packed(example.clone())
    pairs = [(found, expected)] if torch.is_tensor(expected) else zip(found, expected, strict=True)
    for ours, theirs in pairs:
        difference, largest = (ours - theirs).abs().max().item(), theirs.abs().max().item()
        if not difference <= 1e-4 * largest + 1e-6:
            name = type(model).__name__
            raise ValueError(f'{name} cannot be packed: outputs would differ by {difference:.1e}, the largest is {largest:.1e}')
