"""From zeros to a smaller network: remove the filters and channels that a pruned network no longer needs.

    small = shrink(model, example_input)                     # a new, dense network with equal outputs in eval mode
    small = shrink(model, example_input, round_to=8)         # channel counts that hardware likes
    groups = dependency_groups(model, example_input)         # layers whose filters can only be removed together
    python main.py --shrink runs/my_run                      # the same for a finished run

How it works. torch.fx traces the network, and every channel of every tensor gets a number; channels that one index selects
together (through batch norm, activation, pooling, depthwise convolution, residual addition, gating, concatenation, flattening)
have one number, a class. Forward, each channel is either unknown or a known constant: a filter of zeros emits its bias, its
batch norm makes another constant of it, ReLU may make that zero. Backward, a class is needed if someone reads it: a weight that
is not zero, in a filter that is itself needed, on a channel that is not constant. The rest is cut out, in all layers at once.
Constants that are not zero go into the bias of the layer that reads them, if that is a linear layer or a convolution without
zero padding. With padding the border differs from the rest, which no bias can do: there one constant channel stays, and takes
over the weights of the others. An operation that is not known here needs all of its inputs: that can cost savings but not
correctness. In the end outputs are compared.

Torch-Pruning finds such groups too, but decides by layer (a channel dead in one place and not in another), takes a convolution
of one input channel for a depthwise one and has trouble with concatenation; here it is the oracle of the tests instead.
Outputs are equal in eval mode. In training mode they are as long as only zeros were removed: batch norm in training sees a
filter of zeros as its shift alone, whatever its running mean.
"""

import copy
import math
from collections import defaultdict
from typing import NamedTuple

import torch
from torch import fx, nn

from .network_file import FUNCTION_NAMES, trace
from .outputs import TOLERANCE, compare, eval_mode

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# Element by element: what they make of a constant is computed by calling them on it.
POINTWISE = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid),
    *(nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softplus),
)
POINTWISE_NAMES = (
    'relu relu_ relu6 leaky_relu elu gelu silu mish hardswish hardsigmoid hardtanh sigmoid tanh softplus clamp neg contiguous'
    ' clone detach'
).split()
# Nothing, or over the positions of a channel: a constant stays what it is; but beside zero padding only a zero does.
SPATIAL = (
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.Upsample, nn.ReflectionPad2d, nn.ReplicationPad2d),
)
SPATIAL_NAMES = ('max_pool2d', 'adaptive_avg_pool1d', 'adaptive_avg_pool2d', 'adaptive_max_pool2d', 'interpolate')
PADDED = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.ZeroPad2d)
PADDED_NAMES = ('avg_pool2d',)
ADDITIONS = {'add': torch.add, 'iadd': torch.add, 'add_': torch.add, 'sub': torch.sub, 'isub': torch.sub}
PRODUCTS = ('mul', 'imul', 'mul_')


class Reader(NamedTuple):
    """A convolution or linear layer that mixes channels: `filters` and `inputs` are classes, `constants` those of its input."""

    layer: nn.Module
    filters: torch.Tensor  # [out], int64
    inputs: torch.Tensor  # [in], int64
    constants: torch.Tensor  # [in], float64, NaN where unknown
    padded: bool  # whether zero padding makes a constant input a varying one
    reads: torch.Tensor  # [groups, out / groups, in / groups], bool: the weights that are not zero


class Kept(NamedTuple):
    """What is left of a tensor: rows of dimension 0 and, unless None, columns of dimension 1 ([groups, in / groups] for a
    grouped convolution: those of each group that is left)."""

    rows: torch.Tensor
    columns: torch.Tensor = None


def shrink(model, example_input, round_to=1, return_kept=False):
    """A smaller network that computes what `model` computes in eval mode, to 1e-5 of the largest output.

    model: any network that torch.fx can trace; it is left as it is, and the new one has the same classes, names and modes.
    example_input: a batch [B, ...] on the model's device. round_to: keep some dead filters, so that the number of filters of
    every layer that loses any, but depthwise ones, is a multiple of this, or all of them. A layer without live filters keeps one (or round_to).
    return_kept: also return {tensor name: Kept}, for rebuild_optimizer(); tensors that are not in it are whole.
    Raises ValueError when the network cannot be traced, or when the outputs would differ, with the reason.
    """
    if round_to < 1:
        raise ValueError(f'round_to must be 1 or more, got {round_to}')
    try:
        small = copy.deepcopy(model)
    except RuntimeError as error:  # a weight that is computed from others, as torch.nn.utils.prune leaves it
        raise ValueError(f'the network cannot be copied; make its layers plain first, as prune.remove does ({error})') from None
    small.zero_grad()
    release(small)
    channels = Channels(small, example_input)
    left = channels.keep(round_to)
    kept = channels.cut(left)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(example_input.shape, generator=generator).to(example_input)  # an example of zeros would show nothing
    if not (example_input.is_floating_point() and _finite(small, noise)):  # numbers of words, or images that must be positive
        noise = example_input
    difference = compare(model, small, noise)
    if not difference <= TOLERANCE:  # it may be NaN; rounding is no reason to refuse
        difference = compare(copy.deepcopy(model).double(), copy.deepcopy(small).double(), noise.double())
    if not difference <= TOLERANCE:
        raise ValueError(f'the smaller network would differ by {difference:.1e} of the largest output, so it is not made')
    return (small, kept) if return_kept else small


def _finite(model, x):
    with torch.no_grad(), eval_mode(model):
        found = model(x)
    return all(bool(one.isfinite().all()) for one in (found if isinstance(found, (tuple, list)) else [found]))


def release(model):
    """Apply the masks of a pruner of compressor.py that still holds the model, and remove its hooks, which are for these shapes."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for hook in list(hooks.values()):
                pruner = getattr(getattr(hook, 'func', hook), '__self__', None)  # func: of a partial
                if hasattr(pruner, 'unhook'):
                    pruner.apply()
                    pruner.unhook()


def dependency_groups(model, example_input, depthwise=False):
    """[[layer names], ...]: convolutions and linear layers whose filters can only be removed together, in the model's order.

    Those are the layers that end in one residual stream. Layers that share some of their filters only (added after a
    concatenation) are in no group. depthwise=True adds depthwise convolutions to the layer that feeds them, and makes groups
    of these: their filters are removed together too, but a zero in either is enough.
    """
    network = copy.deepcopy(model)
    channels = Channels(network, example_input)
    groups = defaultdict(list)
    for name, filters in channels.layer_filters(depthwise).items():
        groups[tuple(filters.tolist())].append(name)
    return [group for group in groups.values() if len(group) > 1]


class Channels:
    """Which channels of a network belong together, which are constant, and who reads them. The network is that to be cut."""

    def __init__(self, network, example_input):
        graph = trace(network)
        self.network, self.modules = network, dict(network.named_modules())
        self.parent, self.pinned = [], set()  # union-find over channel numbers; those that must stay
        self.readers, self.followers = {}, {}  # {name: Reader}; {name of a norm or depthwise conv: channel numbers}
        self.classes, self.constants = {}, {}  # of each traced tensor: [channels] int64, and float64 with NaN for unknown
        self.shared = self._shared(graph)
        with eval_mode(network), torch.no_grad():
            self.shapes = _Shapes(fx.GraphModule(network, graph), example_input).shapes
            for node in graph.nodes:
                self._visit(node)
        self._resolve()

    def _shared(self, graph):
        """Names of layers that are used twice, or whose parameters are: they keep their channels."""
        uses, owners = defaultdict(int), defaultdict(set)
        for node in graph.nodes:
            if node.op == 'call_module':
                uses[node.target] += 1
        for name, module in self.modules.items():
            for parameter in module.parameters(recurse=False):
                owners[parameter].add(name)
        attributes = {node.target.rpartition('.')[0] for node in graph.nodes if node.op == 'get_attr'}
        tied = {name for names in owners.values() if len(names) > 1 for name in names}
        return {name for name, count in uses.items() if count > 1} | tied | attributes

    # -- classes of channels

    def _new(self, number):
        start = len(self.parent)
        self.parent += range(start, start + number)
        return torch.arange(start, start + number)

    def _find(self, number):
        while self.parent[number] != number:
            self.parent[number] = self.parent[self.parent[number]]
            number = self.parent[number]
        return number

    def _tie(self, one, other):
        for a, b in zip(one.tolist(), other.tolist(), strict=True):
            a, b = self._find(a), self._find(b)
            self.parent[max(a, b)] = min(a, b)

    def _resolve(self):
        """Replace channel numbers by their classes, once all ties are known."""
        root = torch.tensor([self._find(number) for number in range(len(self.parent))], dtype=torch.int64)
        self.pinned = root[torch.tensor(sorted(self.pinned), dtype=torch.int64)].unique()
        self.readers = {
            name: reader._replace(filters=root[reader.filters], inputs=root[reader.inputs])
            for name, reader in self.readers.items()
        }
        self.followers = {name: root[numbers] for name, numbers in self.followers.items()}

    def layer_filters(self, depthwise):
        filters = {name: reader.filters for name, reader in self.readers.items()}
        if depthwise:
            filters |= {name: numbers for name, numbers in self.followers.items() if isinstance(self.modules[name], CONVS)}
        order = list(self.modules)
        return dict(sorted(filters.items(), key=lambda item: order.index(item[0])))

    # -- the walk through the graph

    def _visit(self, node):
        """Set the classes and constants of a traced node's output, if it is a tensor with channels (dimension 1)."""
        sources = node.all_input_nodes
        if node.op in ('call_module', 'call_function', 'call_method') and len(self.shapes.get(node, ())) > 1:
            known = all(source in self.classes for source in sources if source in self.shapes)
            result = self._operation(node) if known and sources and sources[0] in self.classes else None
            if result is not None:
                self.classes[node], self.constants[node] = result
                return
        if _operation_name(node) not in ('size', 'dim', 'getattr'):  # asking for a shape reads no channel
            for source in sources:
                self.pinned.update(self.classes.get(source, torch.empty(0)).tolist())
        shape = self.shapes.get(node, ())
        if len(shape) > 1 and node.op != 'get_attr':
            self.classes[node] = self._new(shape[1])
            self.constants[node] = torch.full((shape[1],), math.nan, dtype=torch.float64)
            self.pinned.update(self.classes[node].tolist())

    def _operation(self, node):
        """(classes, constants) of the output of a known operation, or None."""
        x = node.all_input_nodes[0]
        name = _operation_name(node)
        if node.op == 'call_module':
            return self._layer(node.target, self.modules[node.target], x)
        if name in ADDITIONS or name in PRODUCTS:
            return self._arithmetic(node, name)
        if name in ('cat', 'concat'):
            return self._concatenate(node)
        classes, constants = self.classes[x], self.constants[x]
        if not node.args or node.args[0] is not x or len(node.all_input_nodes) > 1 and name not in ('view', 'reshape'):
            return None
        if name in POINTWISE_NAMES:
            return classes, _apply(constants, lambda c: _call(node, c))
        if name in SPATIAL_NAMES:
            return classes, constants
        if name in PADDED_NAMES:
            return classes, _zeros_only(constants)
        if name in ('mean', 'amax') and _keeps_channels(node, len(self.shapes[x])):
            return classes, constants
        if name == 'getitem' and _whole_channels(node.args[1]):
            return classes, constants
        flat = name == 'flatten' or name in ('view', 'reshape') and node.args[-1] == -1 and len(node.args) == 3
        return self._flatten(x, node) if flat or name == 'squeeze' else None

    def _flatten(self, x, node):
        """[B, C, H, W] -> [B, C H W], or [B, C, 1, 1] -> [B, C]: each channel becomes H W features, one after the other."""
        before, after = self.shapes[x], self.shapes[node]
        features = math.prod(before[2:])
        if after[0] != before[0] or (after[1] != before[1] * features if len(after) == 2 else after[:2] != before[:2]):
            return None
        if len(after) > 2 and _operation_name(node) not in ('squeeze', 'flatten'):
            return None
        times = features if len(after) == 2 else 1
        return self.classes[x].repeat_interleave(times), self.constants[x].repeat_interleave(times)

    def _arithmetic(self, node, name):
        """Sums, differences and products of tensors with the same channels, or of a tensor and a number."""
        if len(node.args) != 2 or node.kwargs or not isinstance(node.args[0], fx.Node):
            return None
        one, other = node.args
        combine = ADDITIONS.get(name, _product)
        if not isinstance(other, fx.Node):
            constants = _apply(self.constants[one], lambda c: combine(c, torch.tensor(other, dtype=c.dtype)))
            return self.classes[one], constants
        if other not in self.classes or one not in self.classes:
            return None
        if len(self.shapes[one]) != len(self.shapes[other]) or len(self.classes[one]) != len(self.classes[other]):
            return None
        self._tie(self.classes[one], self.classes[other])
        return self.classes[one], combine(self.constants[one], self.constants[other])

    def _concatenate(self, node):
        dim = node.kwargs.get('dim', node.args[1] if len(node.args) > 1 else 0)
        parts = node.args[0] if node.args else ()
        if dim not in (1, 1 - len(self.shapes[node])) or not all(part in self.classes for part in parts):
            return None
        return torch.cat([self.classes[part] for part in parts]), torch.cat([self.constants[part] for part in parts])

    def _layer(self, name, layer, x):
        classes, constants = self.classes[x], self.constants[x]
        kind = type(layer)
        if kind in POINTWISE:
            return classes, _apply(constants, layer)
        if kind in SPATIAL and not getattr(layer, 'return_indices', False):
            return classes, constants
        if kind in PADDED:
            plain = not isinstance(layer, nn.ZeroPad2d) and not any(_tuple(layer.padding))
            plain = plain and getattr(layer, 'divisor_override', None) is None
            return classes, constants if plain else _zeros_only(constants)
        if kind is nn.Flatten and layer.start_dim == 1 and layer.end_dim == -1:
            features = math.prod(self.shapes[x][2:])
            return classes.repeat_interleave(features), constants.repeat_interleave(features)
        if name in self.shared:
            return None
        if kind in NORMS and layer.running_mean is not None:
            self.followers[name] = classes
            return classes, _normed(layer, constants)
        if kind in CONVS:
            return self._conv(name, layer, classes, constants)
        if kind is nn.Linear and len(self.shapes[x]) == 2:
            return self._reader(name, layer, classes, constants, False)
        return None

    def _conv(self, name, layer, classes, constants):
        if layer.groups == layer.in_channels > 1 and layer.in_channels <= layer.out_channels and type(layer) not in TRANSPOSED:
            self.followers[name] = classes.repeat_interleave(layer.out_channels // layer.in_channels)
            reader = _reading(layer, classes, classes, constants)
            return self.followers[name], _emitted(reader)
        if type(layer) in TRANSPOSED and layer.groups > 1:
            return None
        return self._reader(name, layer, classes, constants, None)

    def _reader(self, name, layer, classes, constants, padded):
        filters = self._new(_rows(layer).shape[0])
        self.readers[name] = _reading(layer, filters, classes, constants, padded)
        return filters, _emitted(self.readers[name])

    # -- what is needed

    def needed(self):
        """Bool over all classes: those that the output depends on. Grows from the output backwards until it stays."""
        needed, before = torch.zeros(len(self.parent), dtype=torch.bool), -1
        needed[self.pinned] = True
        while before != (before := int(needed.sum())):
            for reader in reversed(self.readers.values()):
                needed[reader.inputs[_read(reader, needed) & reader.constants.isnan()]] = True
        return needed

    def keep(self, round_to=1):
        """Bool over all classes: the needed ones, and those that stay with them so that every layer can have its shape."""
        keep, before = self.needed(), -1
        while before != (before := int(keep.sum())):
            for reader in self.readers.values():
                _keep_carrier(keep, reader)
                groups = reader.layer.groups if isinstance(reader.layer, CONVS) else 1
                _equalize(keep, reader.inputs, reader.filters, groups, round_to)
            for classes in self.followers.values():
                _revive(keep, classes, max(int(keep[classes].sum()), 1))
        return keep

    # -- the cut

    @torch.no_grad()
    def cut(self, keep):
        """Cut all layers of the network to the classes of `keep`, in place -> {tensor name: Kept} of those that changed."""
        kept = {}
        for name, reader in self.readers.items():
            rows, columns = keep[reader.filters], keep[reader.inputs]
            if not (rows.all() and columns.all()):
                _absorb(reader, keep)
                kept |= {f'{name}.{key}': value for key, value in _cut_reader(reader, rows, columns).items()}
        for name, classes in self.followers.items():
            if not (rows := keep[classes]).all():
                kept |= {f'{name}.{key}': value for key, value in _cut_follower(self.modules[name], rows).items()}
        return kept


class _Shapes(fx.Interpreter):
    """{node: shape} of the tensors that an example meets."""

    def __init__(self, traced, example_input):
        super().__init__(traced)
        self.shapes = {}
        self.run(example_input.clone())

    def run_node(self, node):
        value = super().run_node(node)
        if torch.is_tensor(value):
            self.shapes[node] = tuple(value.shape)
        return value


def _operation_name(node):
    """relu for F.relu, torch.relu, x.relu() alike; '' for what is no function or method."""
    if node.op == 'call_function':
        return FUNCTION_NAMES.get(node.target, '').rpartition('.')[2]
    return node.target if node.op == 'call_method' else ''


def _call(node, constants):
    """The function or method of a node, on other data."""
    if node.op == 'call_method':
        return getattr(constants, node.target)(*node.args[1:], **node.kwargs)
    return node.target(constants, *node.args[1:], **node.kwargs)


def _apply(constants, function):
    """function(constants); unknown stays unknown, also through functions that do not pass NaN on."""
    return torch.where(constants.isnan(), math.nan, function(constants.clone()))


def _zeros_only(constants):
    return torch.where(constants == 0, constants, math.nan)


def _product(one, other):
    """A product with zero is zero, whatever the other factor."""
    return torch.where((one == 0) | (other == 0), 0.0, one * other)


def _keeps_channels(node, dims):
    """Whether a mean or maximum goes over positions only, not over examples or channels."""
    over = node.kwargs.get('dim', node.args[1] if len(node.args) > 1 else None)
    over = over if isinstance(over, (list, tuple)) else [over]
    return all(isinstance(dim, int) and dim % dims > 1 for dim in over)


def _whole_channels(index):
    """x[:, :, ...]: takes positions only."""
    whole = slice(None)
    return (
        isinstance(index, tuple) and len(index) > 1 and index[:2] == (whole, whole) and all(isinstance(i, slice) for i in index)
    )


def _tuple(value):
    return value if isinstance(value, tuple) else (value,)


def _normed(layer, constants):
    """Batch norm in eval mode; with a scale of zero it emits its shift, whatever its input."""
    mean, var = layer.running_mean.double().cpu(), layer.running_var.double().cpu()
    scale = torch.ones_like(mean) if layer.weight is None else layer.weight.double().cpu()
    shift = torch.zeros_like(mean) if layer.bias is None else layer.bias.double().cpu()
    return torch.where(scale == 0, shift, (constants - mean) / (var + layer.eps).sqrt() * scale + shift)


def _rows(layer):
    """The weight as [out, in / groups, ...]."""
    return layer.weight.transpose(0, 1) if isinstance(layer, TRANSPOSED) else layer.weight


def _reading(layer, filters, inputs, constants, padded=None):
    weight = _rows(layer).detach()
    groups = getattr(layer, 'groups', 1)
    reads = (weight != 0).flatten(2).any(2) if weight.dim() > 2 else weight != 0
    if padded is None:
        padded = type(layer) in TRANSPOSED or layer.padding_mode == 'zeros' and _pads(layer)
    return Reader(layer, filters, inputs, constants, padded, reads.view(groups, -1, weight.shape[1]).cpu())


def _pads(layer):
    if isinstance(layer.padding, str):
        return layer.padding == 'same' and any(size > 1 for size in layer.kernel_size)
    return any(layer.padding)


def _sums(reader, use):
    """[groups, out / groups]: what the inputs of `use` (bool [in]), which are constant, add to each filter's output."""
    weight, (groups, filters, inputs) = _rows(reader.layer).detach(), reader.reads.shape
    values = torch.where(use, reader.constants, 0.0)
    if not use.any():
        return torch.zeros(groups, filters, dtype=torch.float64)
    if groups == 1:  # only the columns in use: the first linear layer of a VGG has 25,088
        weight, values, inputs = weight[:, use.to(weight.device)], values[use], int(use.sum())
    weight = weight.double().cpu().reshape(groups, filters, inputs, -1).sum(3)
    return (weight @ values.view(groups, inputs, 1)).squeeze(2)


def _emitted(reader):
    """The constants of a layer's output: known where every weight that is not zero meets a known constant."""
    groups = reader.reads.shape[0]
    varies = reader.constants.isnan() | reader.padded & (reader.constants != 0)
    unknown = (reader.reads & varies.view(groups, 1, -1)).any(2)
    values = _sums(reader, ~varies & (reader.constants != 0))
    if reader.layer.bias is not None:
        values = values + reader.layer.bias.detach().double().cpu().view(groups, -1)
    return torch.where(unknown, math.nan, values).view(-1)


def _read(reader, keep):
    """Bool [in]: inputs on which a filter that is kept has a weight that is not zero."""
    groups = reader.reads.shape[0]
    return (reader.reads & keep[reader.filters].view(groups, -1, 1)).any(1).view(-1)


def _keep_carrier(keep, reader):
    """Where constants meet zero padding, keep one of them in each group, the largest, to stand for the others."""
    if not reader.padded:
        return
    groups, sizes = reader.reads.shape[0], torch.nan_to_num(reader.constants, 0.0).abs()
    lost = _read(reader, keep) & (sizes > 0) & ~keep[reader.inputs]
    for inputs, size, gone in zip(*(part.view(groups, -1) for part in (reader.inputs, sizes, lost)), strict=True):
        if gone.any() and not (keep[inputs] & (size > 0.01 * size[gone].max())).any():  # smaller ones would cost precision
            keep[inputs[size.argmax()]] = True


def _revive(keep, classes, number):
    """Keep dead classes of a layer, the first ones first, until `number` of its channels are kept."""
    missing = min(number, len(classes)) - int(keep[classes].sum())
    if missing > 0:
        dead = classes[~keep[classes]]
        keep[dead[:missing]] = True


def _equalize(keep, inputs, filters, groups, round_to):
    """Keep as many channels in each group of a convolution as in the fullest one; no group, or all, may lose everything."""
    inputs, filters = inputs.view(groups, -1), filters.view(groups, -1)
    alive = keep[inputs].any(1) | keep[filters].any(1)
    alive[0] |= not alive.any()
    fed, made = int(keep[inputs].sum(1).max()), int(keep[filters].sum(1).max())
    total = math.ceil(max(made, 1) * int(alive.sum()) / round_to) * round_to
    for group in alive.nonzero().view(-1).tolist():
        _revive(keep, inputs[group], max(fed, 1))
        _revive(keep, filters[group], math.ceil(total / int(alive.sum())))


def _absorb(reader, keep):
    """Let a layer do without the constants that are removed from its input: its bias makes up for them or, before zero
    padding, the weights on one constant that stays."""
    use = ~keep[reader.inputs] & (reader.constants != 0) & ~reader.constants.isnan()
    if reader.padded:
        return _merge(reader, use & _read(reader, keep), keep)
    layer, added = reader.layer, _sums(reader, use).view(-1)
    if layer.bias is None and added.any():
        layer.bias = nn.Parameter(layer.weight.new_zeros(len(added)), requires_grad=layer.weight.requires_grad)
    if layer.bias is not None:
        layer.bias.copy_(layer.bias.double() + added.to(layer.bias.device))


def _merge(reader, use, keep):
    """sum_i w_i c_i = (sum_i w_i c_i / c) c: the weights of removed constants c_i move to a constant c that stays."""
    groups, weight = reader.reads.shape[0], _rows(reader.layer)
    inputs, constants, use = (part.view(groups, -1) for part in (keep[reader.inputs], reader.constants, use))
    for group, rows in enumerate(weight.chunk(groups)):
        if use[group].any():
            c, own = constants[group], use[group].to(weight.device)
            carrier = int((torch.nan_to_num(c, 0.0).abs() * inputs[group]).argmax())
            share = (c[use[group]] / c[carrier]).to(weight.device)
            rows[:, carrier] += (rows[:, own].double() * share.view(1, -1, *[1] * (rows.dim() - 2))).sum(1)


def _cut_reader(reader, rows, columns):
    """Cut a convolution or linear layer to the filters and inputs that stay -> {parameter name: Kept}."""
    layer, groups = reader.layer, reader.reads.shape[0]
    kept_rows, kept_columns = rows.nonzero().view(-1), columns.nonzero().view(-1)
    if groups > 1:
        by_group = columns.view(groups, -1)
        alive = by_group.any(1)
        kept_columns = torch.stack([group.nonzero().view(-1) for group in by_group[alive]])
        layer.groups = int(alive.sum())
    weight = Kept(kept_rows, kept_columns)
    if isinstance(layer, TRANSPOSED):
        weight = Kept(kept_columns, kept_rows)
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = len(kept_rows), kept_columns.numel()
    else:
        layer.out_channels, layer.in_channels = len(kept_rows), kept_columns.numel()
    return _cut_tensors(layer, {'weight': weight, 'bias': Kept(kept_rows)})


def _cut_follower(layer, rows):
    """Cut a batch norm or depthwise convolution to the channels that stay -> {tensor name: Kept}."""
    kept = Kept(rows.nonzero().view(-1))
    if isinstance(layer, CONVS):
        times = layer.out_channels // layer.in_channels
        layer.out_channels, layer.in_channels = len(kept.rows), len(kept.rows) // times
        layer.groups = layer.in_channels
        return _cut_tensors(layer, {'weight': kept, 'bias': kept})
    layer.num_features = len(kept.rows)
    return _cut_tensors(layer, dict.fromkeys(['weight', 'bias', 'running_mean', 'running_var'], kept))


def _cut_tensors(layer, kept):
    kept = {key: value for key, value in kept.items() if getattr(layer, key) is not None}
    kept = {
        key: value for key, value in kept.items() if value.columns is not None or len(value.rows) < len(getattr(layer, key))
    }
    for key, value in kept.items():
        tensor = getattr(layer, key)
        smaller = take(tensor.detach(), value)
        if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
            smaller = smaller.contiguous(memory_format=torch.channels_last)
        setattr(layer, key, nn.Parameter(smaller, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else smaller)
    return kept


def take(tensor, kept):
    """The part of a tensor that stays."""
    rows, columns = kept.rows.to(tensor.device), kept.columns
    tensor = tensor.index_select(0, rows)
    if columns is None:
        return tensor
    columns = columns.to(tensor.device)
    if columns.dim() == 1:
        return tensor.index_select(1, columns)
    parts = zip(tensor.chunk(len(columns)), columns, strict=True)
    return torch.cat([part.index_select(1, own) for part, own in parts])


def rebuild_optimizer(
    optimizer: torch.optim.Optimizer, old_model: nn.Module, new_model: nn.Module, kept: dict[str, Kept]
) -> torch.optim.Optimizer:
    """An optimizer for the smaller network that goes on where `optimizer` stands.

    kept: of shrink(return_kept=True). Every parameter of the new network is in the group of the old one of its name, with the
    group's settings, and its state (momentum, Adam's averages) is cut like the parameter; a bias that shrink() had to make
    joins the group of the biases, or else of its weight, without state. What the old optimizer did not train, the new one does
    not. `optimizer` is left as it is; hooks and schedulers stay with it. Works with every optimizer of torch.optim whose state
    has the shape of the parameters. Raises ValueError for the others, which are Adafactor once it has stepped, and LBFGS; for a
    wrapper of another optimizer; and for an optimizer of parameters that are not in the old model.
    """
    kind = type(optimizer).__name__
    for key, value in vars(optimizer).items():
        if isinstance(value, torch.optim.Optimizer):
            raise ValueError(f'this {kind} steps with another optimizer, {key!r}: rebuild that one')
        if key != 'param_groups' and isinstance(value, (list, tuple)) and any(torch.is_tensor(item) for item in value):
            raise ValueError(f'{kind} keeps tensors that cannot be cut: make a new one for the smaller network')
    names = {parameter: name for name, parameter in old_model.named_parameters()}
    new = dict(new_model.named_parameters())
    groups = []
    for group in optimizer.param_groups:
        if any(parameter not in names for parameter in group['params']):
            raise ValueError('the optimizer has parameters that are not in the old model')
        groups.append(group | {'params': [new[names[parameter]] for parameter in group['params']]})
    state = defaultdict(dict)
    for parameter, of_parameter in optimizer.state.items():
        name = names[parameter]
        for key, value in of_parameter.items():
            if not _can_be_cut(value, parameter, kept.get(name)):
                raise ValueError(
                    f'{kind} keeps {key} of {name} in the shape {tuple(value.shape)}, which cannot be cut like the weight: '
                    'make a new one for the smaller network'
                )
            state[new[name]][key] = _cut_state(value, parameter, kept.get(name))
    for name, parameter in new.items():
        if name not in names.values():
            _add_bias(groups, new, name, parameter)
    result = copy.copy(optimizer)  # of its class, with hooks of its own
    for key, value in vars(optimizer).items():
        if isinstance(value, (bool, int, float, str)):
            setattr(result, key, value)  # as whether a GradScaler may leave unscaling to it
    result.state = state
    result.param_groups = groups
    return result


def _can_be_cut(value, parameter, kept):
    """Whether a value of a parameter's state is a number, or has its shape, or need not be cut."""
    return kept is None or not torch.is_tensor(value) or value.numel() == 1 or value.shape == parameter.shape


def _cut_state(value, parameter, kept):
    if not torch.is_tensor(value):
        return copy.deepcopy(value)
    return take(value, kept) if kept is not None and value.shape == parameter.shape else value.clone()


def _add_bias(groups, new, name, bias):
    """Train a bias that shrink() has made, if its weight is trained: in the group of other biases and norms, or its weight's."""
    weight = new[name.rpartition('.')[0] + '.weight']
    own = [group for group in groups if any(parameter is weight for parameter in group['params'])]
    if not own:
        return
    biases = [group for group in groups if any(parameter.dim() == 1 for parameter in group['params'])]
    home = (biases or own)[0]
    home['params'].append(bias)
    if 'param_names' in home:
        home['param_names'] = [*home['param_names'], name]
