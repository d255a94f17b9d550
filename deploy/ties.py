"""Channels of a network: which are constant, who reads whom, and which can only be removed together.

    channels = read_channels(model, example_input)

The idea. Every channel of every tensor gets a number. Beside each tensor of the program walks its *shadow*, an integer tensor
of
the same number of dimensions that holds the numbers, of size 1 in a dimension along which all elements have the same number:
[1, 64, 1, 1] for a feature map of 64 channels; -1 says that nothing is known. Operations that move elements (view, cat, slice,
...) are performed on the shadow itself. Operations that compute give new numbers, and write down a step:

- Mix: a convolution or linear layer; each filter reads the channels on which it has a weight that is not zero;
- Each: element by element, or channel by channel; what it makes of a constant is found by calling it on that constant.

`constants` holds, for each number, the constant that the channel is for any input, or NaN. `ties` says which numbers go or stay
together: the summands of an addition, a channel and its batch norm, a convolution's filters and the rows of its weight. What is
tied is a class. `pins` are the numbers that must stay, with the operation that wants them: the network's outputs, what is
normalised by layer norm, and the inputs of every operation that has no rule, so that an unknown operation costs savings but
never correctness. The rules themselves are in rules.py; what follows from all this for shrinking is decided in decisions.py,
for masks in live.py.
"""

import math
import warnings
from typing import NamedTuple

import torch

from . import rules
from .graph import name_of, plain_copy, read_program, shape_of

UNKNOWN = -1


class Mix(NamedTuple):
    """A convolution or linear layer: `out` [O] and `inputs` [I] are numbers.

    weight, bias: their dotted names, or None. swapped: whether the weight is [in, out, ...], as transposed convolutions have
    it.
    padded: whether zero padding makes a constant input a varying one. reads: bool [groups, O / groups, I / groups], the weights
    that are not zero. rectangle: (rows [groups, O / groups, 1], columns [groups, 1, I / groups]) where these are all the
    weights
    of some rows and columns, else None. depthwise: whether each filter goes and stays with its one input.
    """

    node: object
    weight: str
    bias: str
    out: torch.Tensor
    inputs: torch.Tensor
    groups: int
    swapped: bool
    padded: bool
    depthwise: bool
    reads: torch.Tensor
    rectangle: tuple


class Each(NamedTuple):
    """Computes out from inputs without mixing channels: constants of `out` are function(*constants of `inputs`).

    inputs, out: shadows. source, target: numbers [pairs]; target[i] depends on source[i]. fed: the same function for what only
    asks whether a channel can be other than zero; batch norms, whose shift counts as zero there, have another one.
    """

    node: object
    inputs: list
    out: torch.Tensor
    function: object
    fed: object
    source: torch.Tensor
    target: torch.Tensor


def read_channels(model, example_input, training=False):
    """The Channels of a model, which is left as it is. Raises ValueError where torch.export cannot read it.

    training: read branches that run in training only, too, where the network has parameters that it does not use in eval mode:
    they are cut with the rest. Where the network cannot be read in training mode, a warning names them.
    """
    program = read_program(plain_copy(model), example_input)
    met = [name for node, name in program.names.items() if node.users]
    used = {alias for name in met for alias in program.aliases.get(name, [name])}
    unused = [name for name, _ in model.named_parameters() if name not in used]
    if not (training and unused):
        return Channels(program)
    try:
        return Channels(program, read_program(plain_copy(model), example_input, training=True))
    except ValueError as error:
        warnings.warn(f'{unused[0]} is not used in eval mode, and stays as it is: {error}', stacklevel=4)
        return Channels(program)


class Channels:
    """The channels of a program; see the head of this module.

    shadows: {node: shadow, or a list of them}. steps: Mix and Each in the order of execution. weights: {name of a parameter or
    buffer: {dimension: numbers}}. bare: {name: shadow of its full shape} of parameters that are used element by element.
    pins: [(numbers, reason)]. blocks: [(node, numbers [blocks, size])], which must keep equally many each. guesses: {node:
    numbers} of views, splits and slices whose sizes may be written down in the model's code. origin: {node: the node that made
    its elements unknown}. reasons: [(numbers, node)] of operations that need a dimension as it is, whose channels are therefore
    one class. zeros: shadows of channels that are padded with zeros. uses: {name of a weight: how many layers use it}. first:
    the
    same of the program in eval mode, while the one in training mode is read.
    """

    def __init__(self, program, training=None):
        self.program = program
        self.constants = torch.empty(0, dtype=torch.float64)
        self.count = 0
        self.shadows = {}
        self.origin = {}
        self.guesses = {}
        self.steps = []
        self.pins = []
        self.reasons = []
        self.blocks = []
        self.zeros = []
        self.weights = {}
        self.bare = {}
        self.uses = {}
        self.edges = []
        self.first = None
        with torch.no_grad():
            for node in program.nodes:
                self.visit(node)
            self.first = dict(self.uses)
            if training is not None:  # what is met there for the first time is added; the rest must fit together
                self.program = training
                for node in training.nodes:
                    self.visit(node)
                self.program = program._replace(
                    aliases=training.aliases | program.aliases, tensors=training.tensors | program.tensors
                )
        self.constants = self.constants[: self.count]
        self.classes = self.connected()

    # -- numbers

    def new(self, shape, constants=None):
        """A shadow of fresh numbers, with these constants, or none known."""
        shape = tuple(shape)
        size = math.prod(shape)
        if self.count + size > len(self.constants):
            grown = torch.full((max(2 * len(self.constants), self.count + size, 4096),), math.nan, dtype=torch.float64)
            grown[: self.count] = self.constants[: self.count]
            self.constants = grown
        numbers = torch.arange(self.count, self.count + size).view(shape)
        self.count += size
        if constants is not None:
            self.constants[numbers] = constants.reshape(shape).double().cpu()
        return numbers

    def constant(self, shadow):
        """The constants of a shadow's channels, NaN where they are not known to be constant."""
        return (
            torch.where(shadow < 0, math.nan, self.constants[shadow.clamp(min=0)]) if self.count else shadow.double() * math.nan
        )

    def tie(self, one, other):
        """What has these numbers, place by place, goes and stays together."""
        one, other = torch.broadcast_tensors(one, other)
        known = (one >= 0) & (other >= 0) & (one != other)
        if known.any():
            self.edges.append(torch.stack([one[known], other[known]]))

    def pin(self, shadow, reason):
        """These channels stay. reason: the operation (a node) that wants them, or words."""
        numbers = shadow[shadow >= 0].unique()
        if len(numbers):
            self.pins.append((numbers, reason))

    def pinned(self, size, reason):
        numbers = self.new([size])
        self.pin(numbers, reason)
        return numbers

    def pinned_numbers(self):
        """Bool of all numbers: the channels that stay, whatever is dead."""
        pinned = torch.zeros(self.count, dtype=torch.bool)
        for numbers, _ in self.pins:
            pinned[numbers] = True
        return pinned

    def connected(self):
        """For each number its class, from 0 on: the connected parts of the graph of ties."""
        root = torch.arange(self.count)
        if self.edges:
            one, other = torch.cat(self.edges, 1)
            while True:
                low = torch.minimum(root[one], root[other])
                lower = root.scatter_reduce(0, root[one], low, 'amin').scatter_reduce(0, root[other], low, 'amin')
                lower = lower[lower]
                if torch.equal(lower, root):
                    break
                root = lower
        return root.unique(return_inverse=True)[1]

    def module_of(self, name):
        """The module that has the parameter of this name."""
        return self.program.model.get_submodule(name.rpartition('.')[0])

    # -- shadows of nodes

    def shadow(self, node):
        """The shadow of a node's tensor; that of a parameter is made when it is first asked for."""
        if node not in self.shadows and node in self.program.names:
            self.shadows[node] = self.of_tensor(self.program.names[node])
        return self.shadows.get(node)

    def of_tensor(self, name):
        """The shadow of a parameter or buffer that is used element by element.

        Each element counts where all lie along one dimension or the first dimension has size 1; else each row.
        """
        tensor = self.program.tensors[name].detach()
        shape = tuple(tensor.shape)
        if name in self.weights:  # also the weight of a layer: its rows are known, the rest stays
            for dimension, numbers in self.weights[name].items():
                if dimension:
                    self.pin(numbers, f'{name}, which is also used elsewhere')
            return self.weights[name][0].view(-1, *[1] * (len(shape) - 1))
        whole = max(shape, default=1) == tensor.numel() or shape[0] == 1 and tensor.numel() < 1 << 18
        if whole or not shape:
            constants = tensor if tensor.is_floating_point() else torch.full(shape, math.nan)
            self.bare[name] = self.new(shape, constants)
            return self.bare[name]
        zero = tensor.flatten(1).eq(0).all(1)
        numbers = self.new([shape[0]], torch.where(zero, 0.0, math.nan))
        self.weights[name] = {0: numbers}
        return numbers.view(-1, *[1] * (len(shape) - 1))

    def own(self, name, dimension, numbers):
        """A dimension of a parameter or buffer has the channels `numbers`."""
        if name in self.bare and self.bare[name].numel() == len(numbers):
            self.tie(self.bare[name].flatten(), numbers)
            return
        if name in self.bare:
            self.pin(self.bare[name], f'{name}, which is also used elsewhere')
            self.pin(numbers, f'{name}, which is also used elsewhere')
            return
        dimensions = self.weights.setdefault(name, {})
        if dimension in dimensions:
            self.tie(dimensions[dimension], numbers)
        else:
            dimensions[dimension] = numbers

    def along(self, node, dimension):
        """The numbers [size] of a tensor along one dimension. Where it is not known, or other dimensions are followed, too,
        what there is stays, and the numbers are new ones that stay."""
        size = shape_of(node)[dimension]
        shadow = self.shadow(node)
        if shadow.shape[dimension] == shadow.numel() == size and bool((shadow >= 0).all()):
            return shadow.flatten()
        reason = self.origin.get(node, node)
        self.pin(shadow, reason)
        return self.pinned(size, reason)

    # -- the walk

    def visit(self, node):
        """Give a node its shadow, by a rule or by pinning what it reads."""
        if node.op == 'placeholder':
            if node not in self.program.names:
                self.unknown(node, 'the input of the network')
            return
        inputs = list(dict.fromkeys(node.all_input_nodes))
        if node.op == 'output':
            for source in inputs:
                for shadow in self.all_shadows(source):
                    self.pin(shadow, 'the output of the network')
            return
        if not _has_tensors(node.meta.get('val')):
            if name_of(node) in ('item', '_local_scalar_dense'):
                self.pin_inputs(node, inputs)
            return  # a size reads no channel
        known = any(source in self.program.names or self.is_known(source) for source in inputs)
        result = rules.shadow_of(self, node) if known else None
        if result is None:
            self.pin_inputs(node, inputs)
            self.unknown(node, self.origin_of(node, inputs) if not known else node)
            return
        self.shadows[node] = result
        for source in inputs:
            if source in self.origin and not isinstance(result, list) and bool((result < 0).all()):
                self.origin[node] = self.origin[source]

    def all_shadows(self, node):
        shadow = self.shadow(node)
        return [] if shadow is None else shadow if isinstance(shadow, list) else [shadow]

    def is_known(self, node):
        return any(bool((shadow >= 0).any()) for shadow in self.all_shadows(node))

    def pin_inputs(self, node, inputs):
        for source in inputs:
            for shadow in self.all_shadows(source):
                self.pin(shadow, node)

    def origin_of(self, node, inputs):
        return next((self.origin[source] for source in inputs if source in self.origin), node)

    def unknown(self, node, origin):
        value = node.meta.get('val')
        self.origin[node] = origin
        if torch.is_tensor(value):
            self.shadows[node] = torch.full([1] * value.dim(), UNKNOWN)
        elif isinstance(value, (list, tuple)):
            self.shadows[node] = [torch.full([1] * len(shape_of(part)), UNKNOWN) for part in value]

    # -- steps

    def each(self, node, inputs, shape, function, fed=None, tied=True):
        """Write down a step channel by channel -> the shadow of its output, of shape `shape`.

        inputs: [(shadow, the same seen in the output's shape)]: the second says on which channels each output channel depends.
        """
        constants = function(*(self.constant(shadow) for shadow, _ in inputs))
        out = self.new(shape, torch.where(torch.isfinite(constants), constants, math.nan).expand(shape))
        pairs = [torch.broadcast_tensors(seen, out) for _, seen in inputs]
        for source, target in pairs if tied is True else [pair for pair, tie in zip(pairs, tied, strict=True) if tie]:
            self.tie(source, target)
        source = torch.cat([source.flatten() for source, _ in pairs])
        target = torch.cat([target.flatten() for _, target in pairs])
        known = source >= 0
        step = Each(node, [shadow for shadow, _ in inputs], out, function, fed or function, source[known], target[known])
        self.steps.append(step)
        return out

    def depends(self, node, source, target):
        """Write down that the numbers `target` [n] depend on the numbers `source` [n], in a way of which no more is known."""
        known = source >= 0
        self.steps.append(Each(node, [], target, _not_known, _not_known, source[known], target[known]))

    def mix(self, node, weight, bias, inputs, groups=1, padded=False, swapped=False, depthwise=False):
        """Write down a convolution or linear layer -> the numbers of its filters."""
        names = self.program.names
        tensors = self.program.tensors
        name = names[weight]
        bias_name = names.get(bias)
        rows = _rows(tensors[name].detach(), swapped)
        reads = (rows != 0).flatten(2).any(2) if rows.dim() > 2 else rows != 0
        reads = reads.view(groups, -1, rows.shape[1]).cpu()
        step = Mix(node, name, bias_name, None, inputs, groups, swapped, padded, depthwise, reads, _rectangle(reads))
        out = self.new([len(rows)], self.emitted(step, self.constant(inputs), bias))
        self.own(name, 1 if swapped else 0, out)
        if depthwise:
            self.tie(inputs.repeat_interleave(len(out) // len(inputs)), out)
        else:
            self.own(name, 0 if swapped else 1, inputs)
        if bias_name is not None:
            self.own(bias_name, 0, out)
        elif bias is not None:
            self.pin(out, node)
            self.pin(self.shadow(bias), node)
        if self.first is not None and name in self.first:
            return out
        # constants may be others in training mode: nothing makes up for them
        self.uses[name] = 2 if self.first is not None else self.uses.get(name, 0) + 1
        self.steps.append(step._replace(out=out))
        return out

    def emitted(self, step, constants, bias):
        """The constants that a layer puts out: known where every weight that is not zero meets a known constant."""
        groups = step.groups
        varies = constants.isnan() | step.padded & (constants != 0)
        unknown = (step.reads & varies.view(groups, 1, -1)).any(2)
        values = self.sums(step, constants, ~varies & (constants != 0))
        if bias is not None:
            name = self.program.names.get(bias)
            values = values + (self.program.tensors[name].detach().double().cpu().view(groups, -1) if name else math.nan)
        return torch.where(unknown, math.nan, values).view(-1)

    def sums(self, step, constants, use):
        """[groups, O / groups]: what the constant inputs of `use` (bool [I]) add to each filter's output."""
        groups, filters, inputs = step.reads.shape
        if not use.any():
            return torch.zeros(groups, filters, dtype=torch.float64)
        weight = _rows(self.program.tensors[step.weight].detach(), step.swapped)
        values = torch.where(use, constants, 0.0)
        if groups == 1:  # only the columns in use: the first linear layer of a VGG has 25,088
            weight = weight[:, use.to(weight.device)]
            values = values[use]
            inputs = int(use.sum())
        weight = weight.double().cpu().reshape(groups, filters, inputs, -1).sum(3)
        return (weight @ values.view(groups, inputs, 1)).squeeze(2)


def _rows(weight, swapped):
    """The weight as [out, in / groups, ...]."""
    return weight.transpose(0, 1) if swapped else weight


def _rectangle(reads):
    """(rows, columns) where exactly the weights of these rows and columns are not zero, else None."""
    rows = reads.any(2, keepdim=True)
    columns = reads.any(1, keepdim=True)
    return (rows, columns) if torch.equal(reads, rows & columns) else None


def _not_known():
    return torch.tensor(math.nan)


def _has_tensors(value):
    return torch.is_tensor(value) or isinstance(value, (list, tuple)) and any(torch.is_tensor(part) for part in value)
