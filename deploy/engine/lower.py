"""From the graph to the engine's steps: batch norms folded, residuals and activations fused, the rest left to PyTorch."""

import math
from collections import Counter

import torch

from . import build, layers, pointwise, pools
from .graph import operation
from .work import Work

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
UNLIMITED = {'low': -math.inf, 'high': math.inf}
OPERATIONS = layers.OPERATIONS | pointwise.OPERATIONS | pools.OPERATIONS


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
                lowered = OPERATIONS.get(operation(node))
                if lowered is None or not self.is_float(node) or not lowered(self, node):
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

    def is_float(self, node):
        value = self.found[node]
        return isinstance(value, torch.Tensor) and value.dtype == torch.float32 and value.numel() > 0

    def _leave_to_pytorch(self, node):
        sources = [self.root_of(parent) for parent in node.all_input_nodes if parent not in self.known]
        self.works.append(Work(node, f'{operation(node) or node.target}', sources, []))

    def arguments(self, node):
        """The node's arguments by the operator's own names, with defaults filled in."""
        schema = node.target._schema.arguments
        values = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
        values |= dict(zip([argument.name for argument in schema], node.args, strict=False))
        return values | dict(node.kwargs)

    def constant(self, node):
        """The tensor of an argument that does not depend on the input, None for None, False if it does."""
        if node is None:
            return None
        return self.found[node].float() if node in self.known else False

    def step(self, node, kind, source, name, **fields):
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
        self.read(work, source)
        self.works.append(work)
        self.producer[node] = work
        return work

    def read(self, work, node):
        work.sources.append(self.root_of(node))
        work.shapes.append(self.found[node].shape)

    def open(self, source, kinds):
        """The work that gives `source`, if nothing else reads that and it can still be extended; else None."""
        work = self.producer.get(source)
        if work is None or work.step.kind not in kinds or self.consumers[source] != 1 or work.step.activation:
            return None
        return work if (work.step.low, work.step.high) == (-math.inf, math.inf) else None

    def extend(self, work, node):
        """The work gives the value of `node` from now on."""
        self.producer.pop(work.node)
        self.producer[node] = work
        work.node = node
        work.shape = self.found[node].shape

    def layer(self, weight, node):
        """The layer's name in the network, from the name of its weight."""
        name = self.names.get(weight)
        return name.removesuffix('.weight').removesuffix('.parametrizations') if name else node.name

    def set_weight(self, work, weight, bias):
        work.weight = weight.contiguous()
        work.bias = None if bias is None else bias.contiguous()

    def same_shape(self, node, one, other):
        if not isinstance(other, torch.fx.Node) or not isinstance(one, torch.fx.Node) or {one, other} & self.known:
            return False
        shape = self.found[node].shape
        values = [self.found[one], self.found[other]]
        return (
            all(isinstance(v, torch.Tensor) and v.shape == shape and v.dtype == torch.float32 for v in values)
            and len(shape) > 0
        )

    def pointwise(self, node, source, mode=3):
        """A step for each number of its own. Axes other than four are read as one."""
        value = self.found[source]
        if value.dim() == 4:
            return self.step(node, build.POINTWISE, source, node.name, mode=mode)
        inner = value.numel() // value.shape[0]
        plane = {'channels': 1, 'filters': 1, 'height': 1, 'width': inner, 'out_height': 1, 'out_width': inner}
        return self.step(node, build.POINTWISE, source, node.name, mode=mode, **plane)
