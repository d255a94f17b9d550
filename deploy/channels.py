"""Who reads whom, channel by channel: the graph by which the dead filters and channels of a pruned network are found.

    graph = channel_graph(model, example_input)     # once: traced with torch.fx, the model is left as it is
    masks = live_masks(graph, masks)                # milliseconds, from the masks alone
    dead = dead_norms(graph, masks)                 # the batch norm channels that go with them

Dynamic Structure Pruning (Park et al., "Dynamic Structure Pruning for Compressing CNNs", AAAI 2023, arXiv 2303.09736) removes
filters that nobody reads and inputs that nobody feeds. Deviation from the authors' code, which looks for them by sending 125
batches of noise through the network in training mode for each setting it tries: the masks alone decide, without a forward.

A channel is fed while something that depends on the input reaches it, and read while something on the way to the output uses
it. Convolutions take part kernel by kernel, linear layers read and feed everything, a sum is fed while any summand is, a
concatenation lines channels up. An operation that is not known here is taken to read all of its inputs and to feed all of its
outputs: that can leave too much alive, never too little.
"""

from typing import NamedTuple

import torch
from torch import fx, nn

from .network_file import read_in_place
from .outputs import eval_mode

# Channel by channel, and zero where the input is zero.
KEEP_ZERO = (
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU),
    *(nn.SELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Mish, nn.Tanh, nn.Softsign, nn.Tanhshrink, nn.Softshrink, nn.Hardshrink),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.LPPool2d),
    *(nn.Upsample, nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d),
)
KEEP_ZERO_NAMES = {
    *('relu', 'relu_', 'relu6', 'leaky_relu', 'elu', 'celu', 'selu', 'gelu', 'silu', 'hardswish', 'mish', 'tanh', 'softsign'),
    *('dropout', 'dropout2d', 'max_pool2d', 'avg_pool2d', 'adaptive_avg_pool2d', 'adaptive_max_pool2d', 'interpolate', 'neg'),
}
# Channel by channel, but not zero at zero.
BREAK_ZERO = (nn.Sigmoid, nn.Hardsigmoid, nn.Softplus, nn.LogSigmoid)
BREAK_ZERO_NAMES = {'sigmoid', 'sigmoid_', 'hardsigmoid', 'softplus', 'logsigmoid'}
# Moves values about, changes none: where a channel goes is found by moving channel numbers.
MOVES = (nn.Flatten, nn.Unflatten)
RESHAPES = {'flatten', 'view', 'reshape', 'squeeze', 'narrow'}
MOVE_NAMES = RESHAPES | {'unsqueeze', 'getitem', 'pad', 'contiguous', 'clone'}
ADDS = {'add', 'add_', 'iadd', 'sub', 'sub_', 'isub'}
MULTIPLIES = {'mul', 'mul_', 'imul'}
LAYERS = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)


class Node(NamedTuple):
    """One operation; its channels are dimension 1 of its output.

    name: of the traced node. module: name of its layer in the model, or ''. channels: 0 where the output is no such tensor.
    inputs: positions in ChannelGraph.nodes, in the order of the arguments.
    kind: 'input', 'output', 'conv', 'norm' (batch norm), 'pass' (channel by channel, zero stays zero), 'activate' (channel by
    channel, zero does not), 'sum', 'product', 'cat', 'move' (channels of its input elsewhere), 'linear', 'number' (no tensor,
    like a size; reads no channel), or 'other' (reads everything, feeds everything).
    detail: (out, in / groups, groups) of a conv; of a sum, whether it is the plain addition of two tensors; of a move, for each
    output channel the input channel, -1 for zeros.
    """

    name: str
    kind: str
    inputs: tuple
    channels: int
    module: str = ''
    detail: object = None


class ChannelGraph(NamedTuple):
    """nodes: list of Node in the order of execution. traced: the fx.GraphModule, which shares its layers with the model.

    shapes: {node name: shape of its output for the example input}. norms: {conv name: name of the batch norm that alone reads
    it}, without the convolutions that have none.
    """

    nodes: list
    traced: fx.GraphModule
    shapes: dict
    norms: dict


def channel_graph(model, example_input):
    """Trace a model -> ChannelGraph.

    example_input: a batch [B, C, H, W] on the model's device; it goes through the network once, in eval mode and without
    gradients. Parameters, statistics and modes of the model stay as they are. Raises ValueError naming the model and what
    stopped it where tracing or the forward pass fails.
    """
    try:
        with torch.no_grad(), eval_mode(model):
            traced = fx.GraphModule(model, read_in_place(_Tracer().trace(model), model), type(model).__name__)
            reader = _Reader(traced)
            reader.run(example_input.clone())
    except Exception as error:  # whatever the model's code raises when it meets a symbolic value
        reason = f'{type(error).__name__}: {" ".join(str(error).split())[:300]}'
        raise ValueError(f'{type(model).__name__} cannot be traced, so its channels are not known: {reason}') from error
    return ChannelGraph(reader.nodes, traced, reader.shapes, _norms(reader.nodes))


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module, name):
        return isinstance(module, LAYERS) or super().is_leaf_module(module, name)  # subclasses of the layers too


class _Reader(fx.Interpreter):
    """Runs the network once and writes down a Node for each operation."""

    def __init__(self, traced):
        super().__init__(traced)
        self.layers, self.nodes, self.index, self.shapes = dict(traced.named_modules()), [], {}, {}

    def run_node(self, node):
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        value = super().run_node(node)
        if torch.is_tensor(value):
            self.shapes[node.name] = tuple(value.shape)
        kind, sources, detail = self.kind(node, args, kwargs, value)
        self.index[node] = len(self.nodes)
        shape = self.shapes.get(node.name, ())
        module = node.target if node.op == 'call_module' else ''
        inputs = tuple(self.index[source] for source in sources)
        self.nodes.append(Node(node.name, kind, inputs, shape[1] if len(shape) > 1 else 0, module, detail))
        return value

    def kind(self, node, args, kwargs, value):
        """(kind, the traced nodes it reads, detail)."""
        sources = node.all_input_nodes
        if node.op in ('placeholder', 'get_attr'):
            return 'input', [], None
        if (
            not torch.is_tensor(value)
            and node.op != 'output'
            and not isinstance(value, (tuple, list))
            or isinstance(value, torch.Size)
        ):
            return 'number', sources, None
        shapes = [self.shapes.get(source.name, ()) for source in sources]
        shape = self.shapes.get(node.name, ())
        if node.op == 'output' or len(shape) < 2 or not shapes or len(shapes[0]) < 2:
            return 'output' if node.op == 'output' else 'other', sources, None
        layer = self.layers[node.target] if node.op == 'call_module' else None
        name = '' if layer else node.target if node.op == 'call_method' else getattr(node.target, '__name__', '')
        if isinstance(layer, nn.Conv2d):
            return 'conv', sources, (layer.out_channels, layer.in_channels // layer.groups, layer.groups)
        if isinstance(layer, (nn.BatchNorm2d, nn.Linear)) and len(shape) == (4 if isinstance(layer, nn.BatchNorm2d) else 2):
            return 'norm' if isinstance(layer, nn.BatchNorm2d) else 'linear', sources, None
        if (isinstance(layer, MOVES) or name in MOVE_NAMES) and (to := self.moved(node, sources[0], args, kwargs)) is not None:
            straight = to == list(range(shapes[0][1])) and not isinstance(layer, MOVES) and name not in RESHAPES
            return ('pass', sources[:1], None) if straight else ('move', sources[:1], to)
        if name in ('cat', 'concat', 'concatenate') and self.is_cat(node, shape):
            return 'cat', list(node.args[0]), None
        same = all(len(other) == len(shape) and other[:2] == shape[:2] for other in shapes)
        numbers = [arg for arg in node.args if isinstance(arg, (int, float))]
        if name in ADDS and same and not any(numbers):
            alike = all(other == shape for other in shapes) and all(source.op != 'get_attr' for source in sources)
            return 'sum', sources, name in ('add', 'add_', 'iadd') and len(sources) == 2 and not node.kwargs and alike
        if name in MULTIPLIES and same:
            return 'product', sources, None
        if len(sources) == 1 and shape[:2] == shapes[0][:2]:
            if isinstance(layer, KEEP_ZERO) or name in KEEP_ZERO_NAMES:
                return 'pass', sources, None
            if name in ('div', 'truediv') or name == 'mean' and self.is_spatial(node, len(shapes[0])):
                return 'pass', sources, None
            if isinstance(layer, BREAK_ZERO) or name in BREAK_ZERO_NAMES:
                return 'activate', sources, None
        return 'other', sources, None

    def moved(self, node, source, args, kwargs):
        """For each output channel the input channel it holds, -1 for zeros; None where a channel does not stay together."""
        shape = self.shapes[source.name]
        numbers = torch.arange(1, shape[1] + 1, dtype=torch.float32).view(1, -1, *[1] * (len(shape) - 2)).expand(shape)
        args = tuple(numbers.contiguous() if original is source else arg for arg, original in zip(args, node.args, strict=True))
        if node.op == 'call_module':
            out = self.layers[node.target](*args, **kwargs)
        else:
            out = (
                getattr(args[0], node.target)(*args[1:], **kwargs) if node.op == 'call_method' else node.target(*args, **kwargs)
            )
        if out.dim() < 2 or out.shape[0] != shape[0]:
            return None
        out = out.transpose(0, 1).flatten(1)
        channel = out.amax(1)
        if not ((out == 0) | (out == channel[:, None])).all() or (channel != channel.round()).any() or channel.max() > shape[1]:
            return None
        return [int(number) - 1 for number in channel]

    def is_cat(self, node, shape):
        dim = node.kwargs.get('dim', node.args[1] if len(node.args) > 1 else 0)
        return dim in (1, 1 - len(shape)) and isinstance(node.args[0], (list, tuple))

    def is_spatial(self, node, dims):
        """Whether a mean is taken over dimensions after the channels."""
        dim = node.kwargs.get('dim', node.args[1] if len(node.args) > 1 else None)
        dim = [dim] if isinstance(dim, int) else dim
        return dim is not None and all(d % dims > 1 for d in dim)


def _norms(nodes):
    readers = {}
    for node in nodes:
        for source in node.inputs:
            readers.setdefault(source, []).append(node)
    only = {node.module: readers.get(i, []) for i, node in enumerate(nodes) if node.kind == 'conv'}
    return {conv: found[0].module for conv, found in only.items() if len(found) == 1 and found[0].kind == 'norm'}


# ---------------------------------------------------------------------------------------------------------- dead or alive


def live_masks(graph, masks):
    """Remove everything dead from the masks of convolutions.

    masks: {conv name: bool [out, in / groups], or with further dimensions of size 1}, True where the kernel is kept; a
    convolution that is not named keeps all of its kernels. Returns new masks of the same names and shapes, in which a kernel
    is True when it was True, its input channel is fed and its filter is read. The batch norm of a dead channel, and the bias of
    a dead filter, count as zero; the network's input is fed, its output is read. One pass in each direction finds all, since
    what nobody reads feeds nobody. Raises ValueError for a name that is no convolution, and for a wrong shape.
    """
    kept = _sweep(graph, masks)[0]
    return {name: kept[name].view(mask.shape) for name, mask in masks.items()}


def dead_norms(graph, masks):
    """{batch norm name: bool [channels]}, True where the channel is dead: nothing feeds it, or nobody reads it.

    masks: as for live_masks. All batch norms of the graph are there, also those that follow no convolution.
    """
    _, fed, read = _sweep(graph, masks)
    dead = {}
    for i, node in enumerate(graph.nodes):
        if node.kind == 'norm':  # one that is used twice is dead where it is dead in both uses
            dead[node.module] = ~(fed[i] & read[i]) & dead.get(node.module, torch.ones_like(fed[i]))
    return dead


def _sweep(graph, masks):
    """({conv name: kept kernels}, fed channels of each node, read channels of each node)."""
    masks = _checked(graph, masks)
    device = next((mask.device for mask in masks.values()), None)
    fed = []
    for node in graph.nodes:
        fed.append(_fed(node, [fed[source] for source in node.inputs], masks, device))
    read, kept = [None] * len(fed), {}
    for i in reversed(range(len(fed))):
        node = graph.nodes[i]
        read[i] = torch.zeros_like(fed[i]) if read[i] is None else read[i]
        if node.kind == 'conv':
            live = _grouped(node, masks) & (fed[i] & read[i]).view(node.detail[2], -1, 1)
            live = live & fed[node.inputs[0]].view(node.detail[2], 1, -1)
            kept[node.module] = kept[node.module] | live.flatten(0, 1) if node.module in kept else live.flatten(0, 1)
            wanted = [live.any(1).flatten()]
        else:
            wanted = _wanted(node, read[i], [fed[source] for source in node.inputs])
        for source, channels in zip(node.inputs, wanted, strict=True):
            read[source] = channels if read[source] is None else read[source] | channels
    return kept, fed, read


def _checked(graph, masks):
    """{conv name: [out, in / groups]} with None for a convolution without a mask."""
    shapes = {node.module: node.detail for node in graph.nodes if node.kind == 'conv'}
    for name, mask in masks.items():
        if name not in shapes:
            raise ValueError(f'there is a mask for {name!r}, which is no convolution of the network')
        if tuple(mask.shape[:2]) != shapes[name][:2] or mask.numel() != shapes[name][0] * shapes[name][1]:
            raise ValueError(f'the mask of {name} has shape {list(mask.shape)}, its kernels are {list(shapes[name][:2])}')
    return {name: mask.reshape(mask.shape[:2]) for name, mask in masks.items()}


def _grouped(node, masks):
    """The mask of a convolution as [groups, out / groups, in / groups]."""
    out, inputs, groups = node.detail
    if node.module not in masks:
        device = next((mask.device for mask in masks.values()), None)
        return torch.ones(groups, out // groups, inputs, dtype=torch.bool, device=device)
    return masks[node.module].view(groups, out // groups, inputs)


def _fed(node, inputs, masks, device):
    """The channels of a node that depend on the network's input, from those of its inputs."""
    if node.kind == 'conv':
        return (_grouped(node, masks) & inputs[0].view(node.detail[2], 1, -1)).any(2).flatten()
    if node.kind in ('norm', 'pass'):
        return inputs[0]
    if node.kind in ('sum', 'product'):
        total = inputs[0]
        for other in inputs[1:]:
            total = total | other if node.kind == 'sum' else total & other
        return total
    if node.kind == 'cat':
        return torch.cat(inputs)
    if node.kind == 'move':
        return torch.cat([inputs[0], inputs[0].new_zeros(1)])[node.detail]
    return torch.ones(node.channels, dtype=torch.bool, device=device)


def _wanted(node, read, fed):
    """The channels that a node reads of each of its inputs, given those that are read of it."""
    if node.kind in ('norm', 'pass', 'activate', 'sum', 'product'):
        return [read] * len(fed)
    if node.kind == 'cat':
        return read.split([len(channels) for channels in fed])
    if node.kind == 'move':
        to = torch.as_tensor(node.detail, device=read.device)
        counts = torch.zeros(len(fed[0]) + 1, dtype=torch.int64, device=read.device)
        return [counts.index_add_(0, to % len(counts), read.long())[:-1] > 0]  # -1 counts into the place after the last
    return [torch.zeros_like(channels) if node.kind == 'number' else torch.ones_like(channels) for channels in fed]
