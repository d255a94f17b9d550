"""From the graph to the engine's steps: batch norms folded, residuals and activations fused, the rest left to PyTorch."""

import math
from collections import Counter
from dataclasses import dataclass, field

import torch

from . import build
from .graph import operation

ALIASES = {
    'view',
    'reshape',
    'flatten',
    'unsqueeze',
    'squeeze',
    'contiguous',
    'alias',
    'detach',
    '_unsafe_view',
    'clone',
    'unflatten',
}
MANY_TOKENS = 8  # from here on a linear layer runs as a 1x1 convolution over its tokens
UNLIMITED = {'low': -math.inf, 'high': math.inf}


@dataclass
class Work:
    """One step of the engine, or one operation that PyTorch runs (step None)."""

    node: object  # whose value it gives
    name: str
    sources: list  # nodes that it reads, those that own the memory
    shapes: list  # as which they are read
    step: object = None
    weight: torch.Tensor = None  # kept alive for the step's pointers
    bias: torch.Tensor = None
    maps: list = field(default_factory=list)
    shape: object = None  # of the result
    parts: bool = False  # concatenation: a copy of each source into its slice


class Lowering:
    """The list `works` for a graph and the shapes of one input. `root[node]` is the node whose memory an alias shares."""

    def __init__(self, graph, found, known):
        self.found = found
        self.known = known
        self.names = graph.names
        self.root = {}
        self.producer = {}
        self.works = []
        self.consumers = Counter()
        live = [node for node in graph.nodes if node not in known]
        for node in live:
            if self._is_alias(node):
                self.root[node] = self.root_of(node.args[0])
            else:
                self.consumers.update({self.root_of(parent) for parent in node.all_input_nodes if parent not in known})
        self.consumers.update(self.root_of(node) for node in graph.outputs if isinstance(node, torch.fx.Node))
        for node in live:
            if node not in self.root and not isinstance(found[node], int):
                lowered = getattr(self, f'_{operation(node)}', None)
                if lowered is None or not self._is_float(node) or not lowered(node):
                    self._leave_to_pytorch(node)

    def root_of(self, node):
        return self.root.get(node, node)

    def _is_alias(self, node):
        value = self.found[node]
        if not isinstance(value, torch.Tensor) or not node.args or not isinstance(node.args[0], torch.fx.Node):
            return False
        source = self.found[node.args[0]]
        if node.args[0] in self.known or not isinstance(source, torch.Tensor):
            return False
        same = value.numel() == source.numel() and value.dtype == source.dtype
        asleep = operation(node) in ('dropout', 'feature_dropout') and not node.args[2]
        return same and (asleep or operation(node) in ALIASES)

    def _is_float(self, node):
        value = self.found[node]
        return isinstance(value, torch.Tensor) and value.dtype == torch.float32 and value.numel() > 0

    def _leave_to_pytorch(self, node):
        sources = [self.root_of(parent) for parent in node.all_input_nodes if parent not in self.known]
        self.works.append(Work(node, f'{operation(node) or node.target}', sources, []))

    # ------------------------------------------------------------------------------------------------------------ small helpers

    def _arguments(self, node, *names_and_defaults):
        """The node's arguments by the operator's own names, with defaults filled in."""
        schema = node.target._schema.arguments
        values = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
        values |= dict(zip([argument.name for argument in schema], node.args, strict=False))
        return values | dict(node.kwargs)

    def _constant(self, node):
        """The tensor of an argument that does not depend on the input, None for None, False if it does."""
        if node is None:
            return None
        return self.found[node].float() if node in self.known else False

    def _step(self, node, kind, source, name, **fields):
        """Append a step that reads `source`; images and planes are those of the shapes."""
        value = self.found[source]
        result = self.found[node]
        shape = [*value.shape, 1, 1, 1][:4]
        out = [*result.shape, 1, 1, 1][:4]
        plain = {'images': shape[0], 'channels': shape[1], 'height': shape[2], 'width': shape[3]}
        plain |= {'filters': out[1], 'out_height': out[2], 'out_width': out[3], 'groups': 1}
        plain |= {f'{name}_{axis}': 1 for name in ('kernel', 'stride', 'dilation') for axis in 'hw'}
        step = build.Step(kind=kind, **plain | UNLIMITED | fields)
        work = Work(node, name, [], [], step, shape=result.shape)
        self._read(work, source)
        self.works.append(work)
        self.producer[node] = work
        return work

    def _read(self, work, node):
        work.sources.append(self.root_of(node))
        work.shapes.append(self.found[node].shape)

    def _open(self, source, kinds):
        """The work that gives `source`, if nothing else reads that and it can still be extended; else None."""
        work = self.producer.get(source)
        if work is None or work.step.kind not in kinds or self.consumers[source] != 1 or work.step.activation:
            return None
        return work if (work.step.low, work.step.high) == (-math.inf, math.inf) else None

    def _extend(self, work, node):
        """The work gives the value of `node` from now on."""
        self.producer.pop(work.node)
        self.producer[node] = work
        work.node = node
        work.shape = self.found[node].shape

    # ------------------------------------------------------------------------------------------- convolutions and linear layers

    def _conv2d(self, node):
        arguments = self._arguments(node)
        source = arguments['input']
        weight, bias = self._constant(arguments['weight']), self._constant(arguments['bias'])
        padding = arguments['padding']
        if source in self.known or weight is False or bias is False or self.found[source].dim() != 4:
            return False
        stride, dilation = _pair(arguments['stride']), _pair(arguments['dilation'])
        kernel = list(weight.shape[2:])
        if isinstance(padding, str):
            total = [0 if padding == 'valid' else dilation[axis] * (kernel[axis] - 1) for axis in (0, 1)]
            padding = [amount // 2 for amount in total]  # what is missing behind is outside the image: zero
        fields = {'groups': arguments['groups']}
        for axis, letter in enumerate('hw'):
            pairs = {'kernel': kernel, 'stride': stride, 'pad': _pair(padding), 'dilation': dilation}
            fields |= {f'{name}_{letter}': pair[axis] for name, pair in pairs.items()}
        work = self._step(node, build.CONV, source, self._layer(arguments['weight'], node), **fields)
        self._set_weight(work, weight, bias)
        return True

    def _conv1d(self, node):
        arguments = self._arguments(node)
        source = arguments['input']
        weight, bias = self._constant(arguments['weight']), self._constant(arguments['bias'])
        unusual = source in self.known or weight is False or bias is False or self.found[source].dim() != 3
        if unusual or isinstance(arguments['padding'], str):
            return False
        fields = {'kernel_w': weight.shape[2], 'groups': arguments['groups'], 'stride_w': _pair(arguments['stride'])[0]}
        fields |= {'pad_w': _pair(arguments['padding'])[0], 'dilation_w': _pair(arguments['dilation'])[0]}
        shapes = {'height': 1, 'width': self.found[source].shape[2], 'out_height': 1, 'out_width': self.found[node].shape[2]}
        work = self._step(node, build.CONV, source, self._layer(arguments['weight'], node), **fields | shapes)
        self._set_weight(work, weight, bias)
        return True

    def _conv_transpose2d(self, node):
        """A plain convolution with the kernel turned around, over the inputs with zeros spread between them."""
        arguments = self._arguments(node)
        source = arguments['input']
        weight, bias = self._constant(arguments['weight']), self._constant(arguments['bias'])
        if source in self.known or weight is False or bias is False or self.found[source].dim() != 4:
            return False
        groups, stride, dilation = arguments['groups'], _pair(arguments['stride']), _pair(arguments['dilation'])
        per_group = weight.shape[1]
        turned = weight.flip(2, 3).unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
        kernel, padding = weight.shape[2:], _pair(arguments['padding'])
        before = [dilation[axis] * (kernel[axis] - 1) - padding[axis] for axis in (0, 1)]
        out = self.found[node].shape
        wide = [out[2 + axis] + dilation[axis] * (kernel[axis] - 1) for axis in (0, 1)]
        spread = _Made(self.found[source].shape[:2] + torch.Size(wide))
        self.found[spread] = torch.empty(spread.shape, device='meta')
        self.consumers[spread] = 1
        name = self._layer(arguments['weight'], node)
        fields = {
            f'{key}_{letter}': pair[axis]
            for axis, letter in enumerate('hw')
            for key, pair in (('stride', stride), ('pad', before))
        }
        self._step(spread, build.SPREAD, source, f'{name} (zeros between inputs)', **fields)
        fields = {
            f'{key}_{letter}': pair[axis]
            for axis, letter in enumerate('hw')
            for key, pair in (('kernel', kernel), ('dilation', dilation))
        }
        work = self._step(node, build.CONV, spread, name, groups=groups, **fields)
        assert turned.shape[0] == per_group * groups
        self._set_weight(work, turned, bias)
        return True

    def _linear(self, node):
        arguments = self._arguments(node)
        source = arguments['input']
        weight, bias = self._constant(arguments['weight']), self._constant(arguments['bias'])
        if source in self.known or weight is False or bias is False:
            return False
        tokens = self.found[source].numel() // weight.shape[1]
        shapes = {'channels': weight.shape[1], 'filters': weight.shape[0], 'height': 1, 'out_height': 1}
        name = self._layer(arguments['weight'], node)
        if tokens < MANY_TOKENS:
            work = self._step(node, build.LINEAR, source, name, images=tokens, width=1, out_width=1, **shapes)
        else:
            work = self._step(node, build.CONV, source, name, images=1, width=tokens, out_width=tokens, mode=1, **shapes)
        self._set_weight(work, weight, bias)
        return True

    def _layer(self, weight, node):
        """The layer's name in the network, from the name of its weight."""
        name = self.names.get(weight)
        return name.removesuffix('.weight').removesuffix('.parametrizations') if name else node.name

    def _set_weight(self, work, weight, bias):
        work.weight = weight.contiguous()
        work.bias = None if bias is None else bias.contiguous()

    # -------------------------------------------------------------------------------------------------------------- batch norms

    def _batch_norm(self, node):
        arguments = self._arguments(node)
        names = ('weight', 'bias', 'running_mean', 'running_var')
        gamma, beta, mean, variance = (self._constant(arguments[name]) for name in names)
        source = arguments['input']
        varying = any(value is False for value in (gamma, beta, mean, variance))
        if varying or arguments['training'] or mean is None or source in self.known:
            return False
        scale = (variance.double() + arguments['eps']).rsqrt() * (1 if gamma is None else gamma.double())
        shift = -mean.double() * scale + (0 if beta is None else beta.double())
        work = self._open(source, (build.CONV, build.LINEAR))
        if work is not None and len(work.sources) == 1 and self.found[source].shape[1] == len(scale) == len(work.weight):
            old = 0 if work.bias is None else work.bias.double()
            shape = [-1] + [1] * (work.weight.dim() - 1)
            self._set_weight(work, (work.weight.double() * scale.view(shape)).float(), (old * scale + shift).float())
            self._extend(work, node)
            return True
        if self.found[source].dim() > 4:
            return False
        work = self._step(node, build.POINTWISE, source, self._layer(arguments['weight'], node), mode=3)
        self._set_weight(work, scale.float(), shift.float())
        return True

    # --------------------------------------------------------------------------------------- additions, products, concatenation

    def _add(self, node):
        arguments = self._arguments(node)
        one, other = arguments['self'], arguments['other']
        if arguments['alpha'] != 1 or not self._same_shape(node, one, other):
            return False
        for first, second in ((other, one), (one, other)):
            work = self._open(first, (build.CONV, build.LINEAR, build.POINTWISE))
            fits = work is not None and len(work.sources) == 1 and self.root_of(first) is not self.root_of(second)
            if fits and work.step.kind == build.POINTWISE and work.step.mode != 3:
                continue
            if fits:
                if work.step.kind == build.POINTWISE:
                    work.step.mode = 0
                self.works.remove(work)  # it runs where the sum was: the other summand may have been computed after it
                self.works.append(work)
                self._read(work, second)
                self._extend(work, node)
                return True
        work = self._pointwise(node, one, mode=0)
        self._read(work, other)
        return True

    def _mul(self, node):
        arguments = self._arguments(node)
        one, other = arguments['self'], arguments['other']
        if self._same_shape(node, one, other):
            work = self._pointwise(node, one, mode=1)
            self._read(work, other)
            return True
        if not isinstance(other, torch.fx.Node) or not isinstance(one, torch.fx.Node) or {one, other} & self.known:
            return False
        small, large = sorted((one, other), key=lambda n: self.found[n].numel())
        shape = self.found[large].shape
        if len(shape) != 4 or self.found[large].shape != self.found[node].shape:
            return False
        if self.found[small].shape != (*shape[:2], 1, 1):
            return False
        work = self._step(node, build.POINTWISE, large, node.name, mode=2)
        self._read(work, small)
        return True

    def _same_shape(self, node, one, other):
        if not isinstance(other, torch.fx.Node) or not isinstance(one, torch.fx.Node) or {one, other} & self.known:
            return False
        shape = self.found[node].shape
        values = [self.found[one], self.found[other]]
        return (
            all(isinstance(v, torch.Tensor) and v.shape == shape and v.dtype == torch.float32 for v in values)
            and len(shape) > 0
        )

    def _pointwise(self, node, source, mode=3):
        """A step for each number of its own. Axes other than four are read as one."""
        value = self.found[source]
        if value.dim() == 4:
            return self._step(node, build.POINTWISE, source, node.name, mode=mode)
        inner = value.numel() // value.shape[0]
        plane = {'channels': 1, 'filters': 1, 'height': 1, 'width': inner, 'out_height': 1, 'out_width': inner}
        return self._step(node, build.POINTWISE, source, node.name, mode=mode, **plane)

    def _cat(self, node):
        arguments = self._arguments(node)
        sources = [self.root_of(source) for source in arguments['tensors']]
        shapes = [self.found[source].shape for source in arguments['tensors']]
        ranks = {len(shape) for shape in shapes}
        if set(arguments['tensors']) & self.known or ranks != {len(self.found[node].shape)} or min(ranks) < 2:
            return False
        if arguments['dim'] % min(ranks) != 1 or not all(self._is_float(source) for source in arguments['tensors']):
            return False
        work = Work(node, node.name, sources, shapes, parts=True)
        self.works.append(work)
        return True

    # -------------------------------------------------------------------------------------------------------------- activations

    def _activate(self, node, kind, low=0.0, high=0.0):
        source = node.args[0]
        if source in self.known:
            return False
        work = self._open(source, (build.CONV, build.LINEAR, build.POINTWISE, build.MEAN, build.MAX_POOL, build.AVERAGE_POOL))
        if work is None:
            work = self._pointwise(node, source)
        else:
            self._extend(work, node)
        work.step.activation, work.step.low, work.step.high = kind, low, high
        return True

    def _relu(self, node):
        return self._activate(node, build.CLAMP, 0, math.inf)

    def _relu6(self, node):
        return self._activate(node, build.CLAMP, 0, 6)

    def _hardtanh(self, node):
        arguments = self._arguments(node)
        return self._activate(node, build.CLAMP, arguments['min_val'], arguments['max_val'])

    def _leaky_relu(self, node):
        return self._activate(node, build.LEAKY, self._arguments(node)['negative_slope'])

    def _elu(self, node):
        arguments = self._arguments(node)
        plain = arguments['scale'] == 1 and arguments['input_scale'] == 1
        return plain and self._activate(node, build.ELU, arguments['alpha'])

    def _gelu(self, node):
        exact = self._arguments(node)['approximate'] == 'none'
        return self._activate(node, build.GELU if exact else build.GELU_TANH)

    def _hardswish(self, node):
        return self._activate(node, build.HARDSWISH)

    def _hardsigmoid(self, node):
        return self._activate(node, build.HARDSIGMOID)

    def _sigmoid(self, node):
        return self._activate(node, build.SIGMOID)

    def _silu(self, node):
        return self._activate(node, build.SILU)

    def _tanh(self, node):
        return self._activate(node, build.TANH)

    # -------------------------------------------------------------------------------------------------------- pools and padding

    def _max_pool2d(self, node):
        return self._pool(node, build.MAX_POOL, 0)

    def _avg_pool2d(self, node):
        arguments = self._arguments(node)
        kernel = _pair(arguments['kernel_size'])
        divisor = arguments['divisor_override'] or (kernel[0] * kernel[1] if arguments['count_include_pad'] else 0)
        return not arguments['ceil_mode'] and self._pool(node, build.AVERAGE_POOL, divisor)

    def _pool(self, node, kind, divisor):
        arguments = self._arguments(node)
        source = arguments['self']
        if source in self.known or self.found[source].dim() != 4:
            return False
        kernel = _pair(arguments['kernel_size'])
        pairs = {'kernel': kernel, 'stride': _pair(arguments['stride'] or kernel), 'pad': _pair(arguments['padding'])}
        pairs['dilation'] = _pair(arguments.get('dilation', 1))
        fields = {f'{name}_{letter}': pair[axis] for axis, letter in enumerate('hw') for name, pair in pairs.items()}
        self._step(node, kind, source, node.name, mode=divisor, **fields)
        return True

    def _adaptive_avg_pool2d(self, node):
        source, size = node.args[0], list(node.args[1])
        if source in self.known or self.found[source].dim() != 4:
            return False
        height, width = self.found[source].shape[2:]
        if size == [1, 1]:
            self._step(node, build.MEAN, source, node.name)
            return True
        if height % size[0] or width % size[1]:
            return False
        kernel = height // size[0], width // size[1]
        fields = {f'{name}_{letter}': kernel[axis] for axis, letter in enumerate('hw') for name in ('kernel', 'stride')}
        self._step(node, build.AVERAGE_POOL, source, node.name, mode=kernel[0] * kernel[1], **fields)
        return True

    def _mean(self, node):
        arguments = self._arguments(node)
        source = arguments['self']
        if (
            source in self.known
            or self.found[source].dim() != 4
            or arguments.get('dim') is None
            or arguments['dtype'] is not None
        ):
            return False
        if sorted(axis % 4 for axis in arguments['dim']) != [2, 3]:
            return False
        self._step(node, build.MEAN, source, node.name, out_height=1, out_width=1, filters=self.found[source].shape[1])
        return True

    def _pad(self, node):
        arguments = self._arguments(node)
        source, amounts = arguments['self'], list(arguments['pad'])
        if source in self.known or self.found[source].dim() != 4 or len(amounts) > 4:
            return False
        amounts = amounts + [0] * (4 - len(amounts))
        mode = arguments.get('mode', 'constant')
        height, width = self.found[source].shape[2:]
        maps = [_pad_map(height, *amounts[2:], mode), _pad_map(width, *amounts[:2], mode)]
        work = self._step(node, build.PAD, source, node.name, low=arguments['value'] or 0.0)
        work.maps = [torch.tensor(values, dtype=torch.int32) for values in maps]
        return True

    _constant_pad_nd = _pad


class _Made:
    """Stands for a value that is no node of the graph."""

    def __init__(self, shape):
        self.shape = shape


def _pair(value):
    """(height, width) of an argument that may be one number."""
    values = [value] if isinstance(value, int) else list(value)
    return values * 2 if len(values) == 1 else values


def _pad_map(size, before, after, mode):
    """The input position of each padded position, -1 where a constant goes."""
    positions = range(-before, size + after)
    if mode == 'reflect':
        positions = [-p if p < 0 else 2 * (size - 1) - p if p >= size else p for p in positions]
    elif mode == 'replicate':
        positions = [min(max(p, 0), size - 1) for p in positions]
    elif mode == 'circular':
        positions = [p % size for p in positions]
    return [p if 0 <= p < size else -1 for p in positions]
