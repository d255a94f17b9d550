"""What the layers of a network have to compute: masks applied, batch norms folded in, constants in the biases.

    network = read_layers(model, example_input)

Reads the program of a model (graph.py) and its channels (ties.py) and keeps of them what packing needs: for each convolution
and linear layer the weight, the kernels that matter, the filters that somebody reads. Convolutions that cannot run in other
ways than the one they have are named with the reason.
"""

import warnings
from typing import NamedTuple

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from .graph import name_of, owner_of, place_of, read_program, shape_of
from .outputs import arguments, tensors_of
from .rules import SAME, SPATIAL, SUMMING, is_pointwise
from .rules import arguments as arguments_of
from .ties import Channels, Mix

FOLLOWS = ('depthwise', 'same', 'pass', 'norm', 'cat', 'flat')  # have the channels of what they read
POOLS = ('max_pool1d', 'max_pool2d', 'max_pool3d')


class Layer(NamedTuple):
    """A convolution or linear layer. I and O: its inputs and filters; kernels are [out, in / groups].

    name: of its module, or of its weight where the module calls that otherwise. step: its ties.Mix. weight, bias: with the
    batch norm behind it folded in. out: the node whose value it gives, itself or that batch norm. varies: bool [O], False where
    a filter puts out one constant for any input. constant: double [O], those constants. need: bool [O], the filters that
    somebody reads. given: bool [I], False for the constant inputs that the bias takes in. reads: bool [O, I / groups], kernels
    that matter. most: the filters that it may have when their number is rounded up. held: why it must run as it is, or ''.
    """

    name: str
    step: Mix
    weight: torch.Tensor
    bias: torch.Tensor
    out: fx.Node
    varies: torch.Tensor
    constant: torch.Tensor
    need: torch.Tensor
    given: torch.Tensor
    reads: torch.Tensor
    most: int
    held: str


class Network(NamedTuple):
    """A program and what its layers compute.

    layers: {node: Layer}, in order. norms: {node of a batch norm that is folded: the node of its layer}. kinds: {node: how it
    treats channels, see kind_of}. rigid: the nodes whose channels must come as they are in the program. added: {node of a
    convolution: the addition behind it}, whose other summand its filters may be added into. dropped: {addition: the summand
    that is its result}, as the other is zero. used: the nodes that the outputs depend on. example: what the model is called
    with. fixed: the only batch size, or None. channels_last: the nodes of convolutions that run in that memory layout.
    """

    channels: Channels
    layers: dict
    norms: dict
    kinds: dict
    rigid: set
    added: dict
    dropped: dict
    used: set
    example: object
    fixed: int
    channels_last: frozenset

    @property
    def program(self):
        return self.channels.program

    @property
    def tensor(self):
        """The first tensor of the example that holds real numbers, or the first at all."""
        found = tensors_of(arguments(self.example))
        return next((tensor for tensor in found if tensor.is_floating_point()), found[0])

    def convolutions(self):
        return [node for node in self.layers if is_convolution(node)]


@torch.no_grad()
def read_layers(model, example, full):
    """The Network of a model in eval mode, whose masks are applied already; a copy, as reading may leave traces in it.

    full: the network at its full size, whose layers none of this one's may exceed.

    Raises ValueError where torch.export cannot read it. A batch size that the model's code fixes is warned of.
    """
    program, fixed = _program(model, example)
    channels = Channels(program)
    norms = _folded(channels)
    needed = _needed(channels)
    layers = {}
    for step in channels.steps:
        if _is_layer(channels, step):
            layers[step.node] = _layer(channels, step, norms, needed, len(full.get_parameter(step.weight)))
    kinds = {node: kind_of(channels, layers, norms, node) for node in program.nodes}
    dropped = _dropped(channels, kinds)
    used = _used(program, dropped)
    added = _added(layers, norms, kinds, dropped)
    return Network(channels, layers, norms, kinds, _rigid(program, kinds), added, dropped, used, example, fixed, frozenset())


def full_size(network):
    """The same with every filter of every layer needed, and nothing dropped or added."""
    layers = {node: layer._replace(need=torch.ones_like(layer.need)) for node, layer in network.layers.items()}
    used = _used(network.program, {})
    return network._replace(layers=layers, rigid=set(network.kinds), added={}, dropped={}, used=used)


def _program(model, example):
    """(Program, the only batch size or None)."""
    try:
        program = read_program(model, example, free_batch=True)
    except ValueError:  # inputs that are no batches, and must not be repeated
        program = None
    if program is None or not _is_free(program):
        program = read_program(model, example)
        fixed = _sizes(program)[0]
        warnings.warn(f'{type(model).__name__} fixes its batch size: the packed one takes {fixed} at a time', stacklevel=5)
        return program, int(fixed)
    return program, None


def _sizes(program):
    inputs = [node.meta.get('val') for node in program.nodes if node.op == 'placeholder' and node not in program.names]
    return [value.shape[0] for value in inputs if torch.is_tensor(value) and value.dim()] or [1]


def _is_free(program):
    return any(not is_concrete_int(size) for size in _sizes(program))


# ------------------------------------------------------------------------------------------------- what nodes do to channels


def is_convolution(node):
    return name_of(node).startswith('conv')


def _is_layer(channels, step):
    """Whether a step becomes a layer of torch.nn: linear layers and convolutions, but transposed ones."""
    return isinstance(step, Mix) and not step.swapped and (is_convolution(step.node) or name_of(step.node) == 'linear')


def kind_of(channels, layers, norms, node):
    """How an operation treats the channels, dimension 1, of what it reads.

    'conv', 'depthwise', 'linear': layers that can read them in any order. 'same': nothing happens. 'pass': channel by channel.
    'norm': a batch norm. 'cat': side by side. 'flat': each becomes a block of features. 'sum': the addition of two tensors of
    one shape. '': any other, which needs all of them in order.
    """
    layer = layers.get(node)
    name = name_of(node)
    if layer is not None:
        if layer.held or layer.step.groups > 1 and not layer.step.depthwise:
            return ''
        if not is_convolution(node):
            return 'linear' if len(shape_of(node)) == 2 else ''
        return 'depthwise' if layer.step.depthwise else 'conv'
    sources = [source for source in node.all_input_nodes if torch.is_tensor(source.meta.get('val'))]
    if node in norms or name in (*SAME, 'contiguous') and len(sources) == 1:
        return 'same'
    if not torch.is_tensor(node.meta.get('val')) or node.op != 'call_function':
        return ''
    shape = shape_of(node)
    shapes = [shape_of(source) for source in sources]
    if len(shape) < 2 or not sources or any(len(other) < 2 for other in shapes):
        return ''
    if name == 'batch_norm' and is_plain_norm(channels, node) and len(shape) <= 5:
        return 'norm'
    if name in ('cat', 'concat', 'concatenate'):
        args = arguments_of(node)
        return 'cat' if args['dim'] % len(shape) == 1 and all(len(other) == len(shape) for other in shapes) else ''
    if name == 'add' and _is_sum(channels, node, sources):
        return 'sum'
    if len(sources) != 1 or sources[0] in channels.program.names or shape[0] != shapes[0][0]:
        return ''
    if name in ('flatten', 'view', 'reshape') and len(shape) == 2 < len(shapes[0]):
        return 'flat' if shape[1] % shapes[0][1] == 0 else ''
    if shape[1] != shapes[0][1] or not (_followed(channels, node) and _followed(channels, sources[0])):
        return ''
    return 'pass' if _by_channel(node, name, len(shapes[0])) else ''


def _by_channel(node, name, dims):
    """Whether an operation on one tensor leaves each channel to itself."""
    args = arguments_of(node)
    if name in SUMMING:
        dim = args.get('dim')
        dim = [dim] if isinstance(dim, int) else dim
        return bool(dim) and all(d % dims > 1 for d in dim)
    if name == 'slice':
        return args['dim'] % dims > 1
    if name in ('pad', 'constant_pad_nd'):
        return len(args['pad']) <= 2 * (dims - 2)
    return name in SPATIAL or is_pointwise(node)


def _followed(channels, node):
    shadow = channels.shadow(node)
    shape = shape_of(node)
    return torch.is_tensor(shadow) and shadow.numel() == shadow.shape[1] == shape[1] and bool((shadow >= 0).all())


def _is_sum(channels, node, sources):
    args = arguments_of(node)
    if len(sources) != 2 or args['alpha'] != 1 or any(source in channels.program.names for source in sources):
        return False
    values = [value.meta['val'] for value in (node, *sources)]
    alike = all(list(value.shape) == list(values[0].shape) and value.dtype == values[0].dtype for value in values)
    return alike and len(values[0].shape) > 2 and _followed(channels, node)


def is_plain_norm(channels, node):
    """Whether a batch norm has statistics, and all its tensors are the model's own."""
    args = arguments_of(node)
    names = channels.program.names
    tensors = [args[key] for key in ('weight', 'bias', 'running_mean', 'running_var')]
    plain = all(tensor is None or tensor in names for tensor in tensors) and (tensors[0] is None) == (tensors[1] is None)
    return plain and tensors[2] is not None and tensors[3] is not None and not args['training']


def _rigid(program, kinds):
    """The nodes whose channels must come as they are, as somebody who reads them wants that."""
    rigid = set()
    for node in reversed(program.nodes):
        for user in node.users:
            kind = kinds.get(user, '')
            free = (
                kind in ('conv', 'linear') or kind in ('depthwise', 'same', 'pass', 'norm', 'cat', 'flat') and user not in rigid
            )
            if not free or kind in ('conv', 'linear', 'depthwise') and user.args[0] is not node:
                rigid.add(node)
    return rigid


def is_rigid(network, node):
    """Whether the filters of a convolution must come in order: for what reads it, or the batch norm that is folded in."""
    return network.kinds[node] not in ('conv', 'depthwise') or node in network.rigid


# ---------------------------------------------------------------------------------------------------------- what they compute


def _folded(channels):
    """{batch norm node: the node of the layer it alone follows}, of those that can be folded into that."""
    program = channels.program
    found = {}
    uses = {}
    for node, name in program.names.items():
        uses[name] = uses.get(name, 0) + len(node.users)
    for step in channels.steps:
        if not _is_layer(channels, step) or len(step.node.users) != 1 or channels.uses[step.weight] != 1:
            continue
        norm = next(iter(step.node.users))
        if name_of(norm) != 'batch_norm' or not is_plain_norm(channels, norm):
            continue
        statistics = program.names[arguments_of(norm)['running_mean']]
        if uses[statistics] == 1 and (is_convolution(step.node) or len(shape_of(step.node)) == 2):
            found[norm] = step.node
    return found


def _layer(channels, step, norms, needed, most):
    program = channels.program
    node = step.node
    norm = next((norm for norm, own in norms.items() if own is node), None)
    weight = program.tensors[step.weight].detach()
    bias = None if step.bias is None else program.tensors[step.bias].detach()
    if norm is not None:
        weight, bias = _fold(weight, bias, arguments_of(norm), program)
    out = channels.shadow(norm if norm is not None else node).flatten()
    constant = channels.constants[out]
    inputs = channels.constants[step.inputs]
    given = inputs.isnan() | step.padded & (inputs != 0)
    kernels = weight.flatten(2).ne(0).any(2) if weight.dim() > 2 else weight.ne(0)
    need = needed[out]
    varies = constant.isnan()
    by_group = given.view(step.groups, 1, -1).expand(-1, len(weight) // step.groups, -1).flatten(0, 1)
    reads = kernels.cpu() & by_group & (varies & need)[:, None]
    owner, _, last = step.weight.rpartition('.')
    name = owner if owner and last == 'weight' else step.weight
    if not need.any():
        need = torch.arange(len(need)) == 0
    return Layer(name, step, weight, bias, norm or node, varies, constant, need, given, reads, most, _held(channels, step))


def _held(channels, step):
    """Why a layer must run as it is, or ''."""
    if channels.uses[step.weight] > 1:
        return 'it is used more than once'
    if step.bias is None and len(step.node.args) > 2 and step.node.args[2] is not None:
        return 'its bias is computed'
    return ''


def _fold(weight, bias, args, program):
    """A layer's weight and bias with the batch norm behind it folded in, computed in double precision."""
    keys = ('weight', 'bias', 'running_mean', 'running_var')
    values = {key: None if args[key] is None else program.tensors[program.names[args[key]]].detach().double() for key in keys}
    scale = (values['running_var'] + args['eps']).rsqrt()
    shift = -values['running_mean'] * scale
    if values['weight'] is not None:
        scale = scale * values['weight']
        shift = shift * values['weight'] + values['bias']
    folded = weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))
    bias = shift if bias is None else bias.double() * scale + shift
    return folded.to(weight.dtype), bias.to(weight.dtype)


def full_bias(network, layer):
    """The bias [O] of a layer, with what constant inputs contribute; that of a constant filter is the constant."""
    weight = layer.weight
    step = layer.step
    bias = torch.zeros(len(weight), dtype=torch.float64) if layer.bias is None else layer.bias.double().cpu()
    inputs = network.channels.constants[step.inputs]
    absorbed = torch.where(layer.given, 0.0, inputs).view(step.groups, -1, 1)
    if bool(absorbed.any()):
        sums = (weight.flatten(2).double().sum(2) if weight.dim() > 2 else weight.double()).cpu()
        bias = bias + (sums.view(step.groups, -1, sums.shape[1]) @ absorbed).flatten()
    return torch.where(layer.varies, bias, layer.constant).to(weight)


def _needed(channels):
    """Bool of all numbers: whether somebody who is read reads them."""
    needed = channels.pinned_numbers()
    for step in reversed(channels.steps):
        if not isinstance(step, Mix):
            needed[step.source[needed[step.target]]] = True
            continue
        if step.depthwise:  # it has as many channels as its input
            needed[step.inputs[needed[step.out].view(len(step.inputs), -1).any(1)]] = True
            continue
        inputs = channels.constants[step.inputs]
        given = inputs.isnan() | step.padded & (inputs != 0)
        filters = (needed[step.out] & channels.constants[step.out].isnan()).view(step.groups, -1, 1)
        needed[step.inputs[(step.reads & filters).any(1).flatten() & given]] = True
    return needed


def _used(program, dropped):
    """The nodes on which the outputs depend."""
    used = set()
    waiting = [node for node in program.nodes if node.op == 'output']
    while waiting:
        node = waiting.pop()
        if node not in used:
            used.add(node)
            waiting += [dropped[node]] if node in dropped else node.all_input_nodes
    return used


def _dropped(channels, kinds):
    """{addition: the summand that is its result}, where all that anybody reads of the other one is zero."""
    found = {}
    for node, kind in kinds.items():
        if kind == 'sum':
            for zero, other in (node.args[:2], node.args[1::-1]):
                shadow = channels.shadow(zero)
                if _followed(channels, zero) and bool((channels.constants[shadow] == 0).all()):
                    found[node] = other
    return found


def _added(layers, norms, kinds, dropped):
    """{convolution: the addition behind it}, where its filters may be added into the other summand; one for each addition."""
    added = {}
    for node, kind in kinds.items():
        if kind != 'sum' or node in dropped:
            continue
        found = []
        for source in node.args[:2]:
            while len(source.users) == 1 and kinds[source] == 'same' and source.args:
                source = source.args[0]
            if kinds[source] == 'conv' and len(source.users) == 1:
                found.append(source)
        if found and node.args[0] is not node.args[1]:
            added[min(found, key=lambda source: int(live_filters(layers[source]).sum()))] = node
    return added


def live_filters(layer):
    """Bool [O]: the filters that somebody reads and that are not zero."""
    return layer.need & (layer.varies | (layer.constant != 0))


def unpacked(network):
    """[line]: the convolutions that are no layer here, and why; a batch size that is fixed."""
    lines = [] if network.fixed is None else [f'the network takes batches of {network.fixed} only, as its code fixes them']
    for node in network.program.nodes:
        if node in network.used and is_convolution(node) and node not in network.layers:
            why = 'it is transposed' if 'transpose' in name_of(node) else f'{place_of(node)} computes its weight'
            weight = network.program.names.get(node.args[1])
            name = weight.rpartition('.')[0] if weight else owner_of(node)
            lines.append(f'{name}: dense, as {why}' if name else f'dense: {why}')
    return lines
