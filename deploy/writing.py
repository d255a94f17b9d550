"""Writing a network: from the program of torch.export to an fx.GraphModule of plain layers and known operations.

The layers are copies. What changes nothing in eval mode is left out, and what works in place does not any more.
"""

import inspect
import operator

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils import _pytree as pytree

from .graph import functional, name_of, shape_of
from .layers import POOLS, is_convolution, is_rigid, unpacked
from .ways import norm_over, small_conv, small_linear, ways_of

# Operations that have the same arguments in torch, where a call takes half of the time.
PLAIN = {
    'relu.default': torch.relu,
    'sigmoid.default': torch.sigmoid,
    'tanh.default': torch.tanh,
    'cat.default': torch.cat,
    'flatten.using_ints': torch.flatten,
    'mean.dim': torch.mean,
    'reshape.default': torch.reshape,
    'permute.default': torch.permute,
    'adaptive_avg_pool1d.default': torch.adaptive_avg_pool1d,
    'adaptive_avg_pool2d.default': F.adaptive_avg_pool2d,
    'silu.default': F.silu,
}
CHECKS = ('_assert', 'sym_constrain', 'aten_assert', '_check')


class Sketch:
    """A graph that is being written; parts: {name: layer or tensor}. last: whether tensors are in channels_last."""

    def __init__(self, network):
        self.network = network
        self.graph = fx.Graph()
        self.parts = {}
        self.device = network.tensor.device
        convs = network.convolutions()
        self.last = 0 < len(convs) == len(network.channels_last)

    def finish(self):
        return fx.GraphModule(self.parts, self.graph, 'Packed').eval()

    def index(self, name, positions):
        self.parts[name] = torch.tensor(positions, device=self.device)
        return self.graph.get_attr(name)

    def take(self, x, positions, name):
        """x[:, positions]: a view where they are neighbours, else a copy."""
        first = positions[0]
        count = len(positions)
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

    def convolve(self, x, node, layout, way):
        """[(output, its filters)] of each piece of a way."""
        name = self.network.layers[node].name
        found = []
        for k, (take, filters) in enumerate(way.pieces):
            inputs = x if take is None else self.take(x, take, f'{name}_take{k}')
            part = name if len(way.pieces) == 1 else f'{name}.{k}'
            if part not in self.parts:  # a layer that is used twice is one layer
                conv = small_conv(self.network, node, layout, take, filters)
                last = node in self.network.channels_last and conv.weight.dim() == 4
                self.parts[part] = conv.to(memory_format=torch.channels_last) if last else conv
            found.append((self.graph.call_module(part, (inputs,)), filters))
        return found

    def join(self, pieces):
        """The pieces side by side, and their filters."""
        filters = [channel for _, channels in pieces for channel in channels]
        if len(pieces) == 1:
            return pieces[0][0], filters
        return self.graph.call_function(torch.cat, ([y for y, _ in pieces], 1)), filters

    def add_into(self, x, pieces, name, channels, dims):
        """x with the pieces added to their channels."""
        last = self.last and dims == 4
        for k, (y, filters) in enumerate(pieces):
            if filters == list(range(channels)):
                x = self.graph.call_function(operator.add, (x, y))
                continue
            positions = self.index(f'{name}_put{k}', filters)
            if last:  # as the tensors lie in memory
                x, y = (self.graph.call_method('permute', (tensor, 0, 2, 3, 1)) for tensor in (x, y))
            x = self.graph.call_function(torch.index_add, (x, 3 if last else 1, positions, y))
            x = self.graph.call_method('permute', (x, 0, 3, 1, 2)) if last else x
        return x


def write(network, choose):
    """The packed network. choose(network, convolution, layout, ways, into_sum) -> the way in which it runs."""
    with torch.no_grad():
        return _Writer(network, choose).write()


class _Writer(Sketch):
    """Writes the packed network node by node.

    env: {node of the program: node here, None where it is added later}. layout: {node: for each of its channels the number in
    the program, -1 for one that is there only to round the count up}, for those whose channels are not as in the program.
    pending: {addition: (convolution, pieces)} to be added into the other summand.
    """

    def __init__(self, network, choose):
        super().__init__(network)
        self.choose = choose
        self.order = _order(network)
        self.env = {}
        self.layout = {}
        self.pending = {}
        self.lines = []
        self.owners = {layer.name for layer in network.layers.values()}
        self.owners |= {self.name_of_norm(node) for node, kind in network.kinds.items() if kind == 'norm'}

    def write(self):
        program = self.network.program
        given = self.placeholders()
        for node in program.nodes:
            if node.op == 'placeholder' and node not in program.names:
                self.env[node] = next(given)
            elif node.op == 'output':
                self.graph.output(self.outputs(node))
            elif node.op == 'call_function' and not name_of(node).startswith(CHECKS):
                self.write_node(node)
        packed = self.finish()
        packed.meta['layers'] = self.lines + unpacked(self.network)
        return packed

    def write_node(self, node):
        kind = self.network.kinds[node]
        if node not in self.network.used:
            if node in self.network.layers and is_convolution(node):
                self.lines.append(f'{self.network.layers[node].name}: dead')
            return
        if node in self.network.layers:
            self.write_layer(node)
        elif kind == 'sum':
            self.write_sum(node)
        elif kind == 'same':
            source = node.args[0]
            self.env[node] = self.env[source] if source in self.env else self.of(source)
            self.keep_layout(node, source)
        elif kind == 'norm':
            self.write_norm(node)
        elif kind == 'cat' and node not in self.network.rigid:
            self.write_cat(node)
        elif kind == 'flat':
            self.write_flat(node)
        elif kind == 'pass':
            self.write_pass(node)
        else:
            self.env[node] = self.copy(node, self.natural)

    # -- what is read

    def of(self, node):
        """The node here of a node of the program; that of a tensor of the model is made when it is first asked for."""
        if node not in self.env and node in self.network.program.names:
            name = self.network.program.names[node].replace('lifted_tensor_', 'constant_')
            if name in self.owners or name.rpartition('.')[0] in self.owners:  # there is a layer of that name here
                name = f'{name.replace(".", "_")}_alone'
            tensor = self.network.program.tensors[self.network.program.names[node]]
            trained = isinstance(tensor, nn.Parameter)
            copied = tensor.detach().clone()
            if name not in self.parts:
                self.parts[name] = nn.Parameter(copied, tensor.requires_grad) if trained else copied
            self.env[node] = self.graph.get_attr(name)
        return self.env[node]

    def natural(self, node):
        """The node here with its channels as they are in the program."""
        x = self.of(node)
        if node not in self.layout:
            return x
        shape = shape_of(node)
        return self.arrange(x, self.layout[node], list(range(shape[1])), f'{node.name}_for', len(shape))

    def layout_of(self, node):
        return self.layout.get(node, list(range(shape_of(node)[1])))

    def keep_layout(self, node, source):
        if source in self.layout:
            self.layout[node] = self.layout[source]

    def set_layout(self, node, layout):
        if layout != list(range(shape_of(node)[1])):
            self.layout[node] = layout

    def placeholders(self):
        """Yields the nodes of the tensors in the order of the program; those that an argument nests are taken out of it."""
        args, kwargs = self.network.program.exported.call_spec.in_spec.unflatten(_inputs(self.network.program))
        names = _names_of(self.network.program.model, args, kwargs)
        values = dict(zip(names, [*args, *kwargs.values()], strict=True))
        left_out = [name for name in kwargs if kwargs[name] is None]  # by name, so the order is free: these may stay away
        order = [name for name in names if name not in left_out] + left_out
        roots = {name: self.placeholder(name, name in left_out) for name in order}
        for name in names:
            yield from self.taken_out(roots[name], values[name])

    def placeholder(self, name, may_be_left_out):
        return self.graph.placeholder(name, default_value=None) if may_be_left_out else self.graph.placeholder(name)

    def taken_out(self, x, value):
        if isinstance(value, (list, tuple, dict)):
            keys = value if isinstance(value, dict) else range(len(value))
            for key in keys:
                yield from self.taken_out(self.graph.call_function(operator.getitem, (x, key)), value[key])
        else:
            yield x

    def outputs(self, node):
        """What the network returns, as it nests it; classes of its own become dicts, tuples and lists."""
        values = [self.natural(value) if isinstance(value, fx.Node) else value for value in node.args[0]]
        return _plain(pytree.tree_unflatten(values, self.network.program.exported.call_spec.out_spec))

    # -- what is written

    def copy(self, node, read):
        """The same operation, not in place, of what read(source) gives."""
        args = fx.map_arg(node.args, read)
        kwargs = fx.map_arg(dict(node.kwargs), read)
        name = name_of(node)
        if name == 'sym_size':
            return self.graph.call_method('size', args)
        target = functional(node.target)
        plain = PLAIN.get(f'{name}.{target._overloadname}') if isinstance(target, torch._ops.OpOverload) else None
        if name in ('view', '_unsafe_view'):  # which wants one memory layout
            plain = torch.reshape
        if name == 'add' and not kwargs and all(isinstance(arg, fx.Node) for arg in args):
            plain = operator.add
        if name == 'mul' and all(isinstance(arg, fx.Node) for arg in args):
            plain = operator.mul
        return self.graph.call_function(plain or target, args, kwargs)

    def write_layer(self, node):
        network = self.network
        layer = self.network.layers[node]
        source = node.args[0]
        kind = network.kinds[node]
        if not is_convolution(node):
            read = self.of(source) if kind == 'linear' else self.natural(source)
            if layer.name not in self.parts:
                self.parts[layer.name] = small_linear(network, node, self.layout.get(source) if kind == 'linear' else None)
            self.env[node] = self.graph.call_module(layer.name, (read,))
            return
        flexible = kind in ('conv', 'depthwise')
        x = self.of(source) if flexible else self.natural(source)
        layout = self.layout_of(source) if flexible else list(range(shape_of(source)[1]))
        total = network.added.get(node)
        ways = ways_of(network, node, layout, self.order.get(node), total is not None)
        way = self.choose(network, node, layout, ways, total is not None)
        self.lines.append(f'{layer.name}: {way.describe(len(layout))}' + (f', dense as {layer.held}' if layer.held else ''))
        pieces = self.convolve(x, node, layout, way)
        if way.added:
            self.pending[total] = node, pieces
            self.env[node] = None
            return
        y, filters = self.join(pieces)
        if is_rigid(network, node):
            y = self.arrange(y, filters, list(range(len(layer.need))), layer.name, len(shape_of(node)))
        else:
            self.set_layout(node, filters)
        self.env[node] = y

    def write_norm(self, node):
        source = node.args[0]
        name = self.name_of_norm(node)
        rigid = node in self.network.rigid
        layout = None if rigid else self.layout.get(source)
        x = self.natural(source) if rigid else self.of(source)
        if layout is None:
            self.parts.setdefault(name, norm_over(self.network, node, None))
        else:
            name = name if name not in self.parts else f'{name}_{node.name}'
            self.parts[name] = norm_over(self.network, node, layout)
            self.layout[node] = layout
        self.env[node] = self.graph.call_module(name, (x,))

    def name_of_norm(self, node):
        statistics = self.network.program.names[node.args[3]]
        return statistics.rpartition('.')[0] or statistics

    def write_cat(self, node):
        layout = []
        before = 0
        for source in node.args[0]:
            layout += [channel + before if channel >= 0 else -1 for channel in self.layout_of(source)]
            before += shape_of(source)[1]
        self.env[node] = self.copy(node, self.of)
        self.set_layout(node, layout)

    def write_flat(self, node):
        source = node.args[0]
        rigid = node in self.network.rigid
        x = self.natural(source) if rigid else self.of(source)
        self.env[node] = self.graph.call_function(torch.flatten, (x, 1))
        if source in self.layout and not rigid:
            size = shape_of(node)[1] // shape_of(source)[1]
            layout = self.layout[source]
            self.layout[node] = [channel * size + k if channel >= 0 else -1 for channel in layout for k in range(size)]

    def write_pass(self, node):
        if node in self.network.rigid:
            self.env[node] = self.copy(node, self.natural)
        else:
            self.env[node] = self.copy(node, self.of)
            self.keep_layout(node, source_of(node))
        if name_of(node) in POOLS and self.network.channels_last and not self.last:
            self.env[node] = self.graph.call_method('contiguous', (self.env[node],))  # only the pool is in channels_last

    def write_sum(self, node):
        if node in self.network.dropped:
            self.env[node] = self.natural(self.network.dropped[node])
        elif node in self.pending:
            conv, pieces = self.pending[node]
            other = next(source for source in node.args[:2] if self.env[source] is not None)
            name = self.network.layers[conv].name
            shape = shape_of(node)
            self.env[node] = self.add_into(self.natural(other), pieces, name, shape[1], len(shape))
        else:
            self.env[node] = self.copy(node, self.natural)


def source_of(node):
    """The tensor that an operation on one tensor reads."""
    return next(other for other in node.all_input_nodes if torch.is_tensor(other.meta.get('val')))


def _order(network):
    """{convolution: a rank for each of its filters}, where a convolution with two sets of filters reads it: first those that
    the one set alone reads, then those of both, then those of the other. So each branch reads neighbours, which is a view."""
    order = {}
    for node, layer in network.layers.items():
        if network.kinds[node] != 'conv':
            continue
        sets = layer.reads.unique(dim=0)
        sets = sets[sets.any(1)]
        source = node.args[0]
        while network.kinds.get(source) in ('same', 'pass', 'norm'):
            source = source_of(source)
        if len(sets) == 2 and network.kinds.get(source) == 'conv' and not is_rigid(network, source):
            order[source] = (sets[1].int() - sets[0].int()).tolist()
    return order


def _inputs(program):
    """A value for each tensor that goes in: True, or None for an argument that is None."""
    nodes = [node for node in program.nodes if node.op == 'placeholder' and node not in program.names]
    return [None if node.meta.get('val') is None else True for node in nodes]


def _names_of(model, args, kwargs):
    """The names of the arguments as the model's forward has them."""
    names = []
    for name, parameter in inspect.signature(model.forward).parameters.items():
        many = parameter.kind is inspect.Parameter.VAR_POSITIONAL
        names += [f'{name}_{k}' for k in range(len(args))] if many else [name]
    return [*names[: len(args)], *kwargs]


def _plain(value):
    """The same in plain dicts, tuples and lists."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [_plain(part) for part in value]
        return parts if type(value) is list else tuple(parts)
    return value
