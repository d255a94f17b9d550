"""Reading a network: torch.export's graph in eval mode, and the shapes that it has for inputs of a given shape.

This is the only module of the engine that knows torch.export.
"""

import torch
from torch.export import Dim
from torch.utils import _pytree as pytree

INPLACE = {
    'add_': 'add',
    'mul_': 'mul',
    'relu_': 'relu',
    'dropout_': 'dropout',
    'hardtanh_': 'hardtanh',
    'leaky_relu_': 'leaky_relu',
    'silu_': 'silu',
}
INPLACE |= {'hardswish_': 'hardswish', 'hardsigmoid_': 'hardsigmoid', 'sigmoid_': 'sigmoid', 'elu_': 'elu', 'relu6_': 'relu6'}


class GraphError(ValueError):
    """The network cannot be read as a graph."""


class Graph:
    """The operations of a network, in order.

    nodes: torch.fx nodes that compute something. inputs: the nodes of the network's inputs. constants: {node: tensor}.
    outputs: the nodes that are returned; build(values) makes the network's own nesting of them. replaced: {node: node}, where
    an
    in-place operation put its result into its first argument.
    """

    def __init__(self, model, inputs):
        free = tuple({0: Dim.AUTO} if value.dim() else {} for value in inputs)  # the other axes are as given
        twice = tuple(torch.cat([value, value]) if value.dim() and len(value) == 1 else value for value in inputs)
        try:
            with torch.no_grad():
                exported = torch.export.export(model, twice, dynamic_shapes=_nest(model, free))
        except Exception as error:
            reason = ' '.join(str(error).split())[:200]
            raise GraphError(f'torch.export cannot read {type(model).__name__}: {type(error).__name__}: {reason}') from error
        self.exported = exported
        names = exported.graph_signature
        tensors = {**exported.state_dict, **exported.constants}
        targets = {**names.inputs_to_parameters, **names.inputs_to_buffers, **names.inputs_to_lifted_tensor_constants}
        self.constants = {}
        self.names = {}
        self.inputs = []
        self.nodes = []
        for node in exported.graph.nodes:
            if node.op == 'placeholder' and node.name in targets:
                self.constants[node] = tensors[targets[node.name]].detach()
                self.names[node] = targets[node.name]
            elif node.op == 'placeholder':
                self.inputs.append(node)
            elif node.op == 'output':
                self.outputs = list(node.args[0])
            else:
                self.nodes.append(node)
        if names.buffers_to_mutate or names.user_inputs_to_mutate:
            raise GraphError(f'{type(model).__name__} changes its buffers or its input in eval mode')
        self.gives_one = exported.call_spec.out_spec.is_leaf()
        self.fixed = [_fixed(node.meta['val'].shape) for node in self.inputs]
        self._make_functional()

    def _make_functional(self):
        """Later readers of an in-place operation's argument read its result. Raises GraphError where views make that wrong."""
        replaced = {}
        for node in self.nodes:
            node.args = torch.fx.map_arg(node.args, lambda n: replaced.get(n, n))
            node.kwargs = torch.fx.map_arg(node.kwargs, lambda n: replaced.get(n, n))
            name = operation(node)
            if name.endswith('_') and not name.endswith('__'):
                changed = node.args[0]
                views = [changed, *changed.users] if operation(changed) not in VIEWS else [changed]
                asleep = name == 'dropout_' and not node.args[2]  # changes nothing
                if (
                    name not in INPLACE
                    or not asleep
                    and any(operation(view) in VIEWS for view in views)
                    or not asleep
                    and changed in self.inputs
                ):
                    raise GraphError(f'{node.target} changes a tensor in place in a way that the engine cannot follow')
                node.target = getattr(torch.ops.aten, INPLACE[name]).__getattr__(node.target._overloadname)
                replaced[changed] = node
        self.outputs = [replaced.get(node, node) for node in self.outputs]

    def takes(self, shapes):
        """Whether the graph holds for inputs of these shapes: axes that were fixed in reading it have their sizes."""
        if len(shapes) != len(self.fixed):
            return False
        pairs = zip(self.fixed, shapes, strict=True)
        return all(len(a) == len(b) and all(x in (None, y) for x, y in zip(a, b, strict=True)) for a, b in pairs)

    def build_output(self, values):
        """The network's output from the values of `outputs`."""
        return values[0] if self.gives_one else pytree.tree_unflatten(values, self.exported.call_spec.out_spec)

    def shapes(self, inputs):
        """{node: what it gives} for inputs like these, on the meta device; constants and what follows from them are real."""
        found = {node: torch.empty_like(value, device='meta') for node, value in zip(self.inputs, inputs, strict=True)}
        found |= self.constants
        known = set(self.constants)
        for node in self.nodes:
            parents = node.all_input_nodes
            if parents and all(parent in known for parent in parents):
                known.add(node)
            real = node in known

            def value(parent, real=real):
                held = found[parent]
                return held.to('meta') if isinstance(held, torch.Tensor) and not real and held.device.type != 'meta' else held

            arguments = torch.fx.map_arg(node.args, value)
            options = torch.fx.map_arg(node.kwargs, value)
            found[node] = node.target(*arguments, **options)
        return found, known


VIEWS = {'view', 'reshape', 'flatten', 'unsqueeze', 'squeeze', 'contiguous', 'alias', 'detach', 'slice', 'select', 'permute'}
VIEWS |= {
    'transpose',
    't',
    'expand',
    'split',
    'chunk',
    'narrow',
    'unbind',
    'split_with_sizes',
    '_unsafe_view',
    'unflatten',
    'movedim',
}


def operation(node):
    """'conv2d' for a node of torch.ops.aten.conv2d.default; '' for nodes that call nothing of ATen."""
    target = getattr(node, 'target', None)
    is_aten = isinstance(target, torch._ops.OpOverload) and target.namespace == 'aten'
    return target._opname if is_aten else ''


def _fixed(shape):
    return [size if isinstance(size, int) else None for size in shape]


def _nest(model, free):
    """Dynamic shapes in the form torch.export wants them: networks that take *args get theirs as one tuple."""
    import inspect

    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    return (free,) if kinds and kinds[0] == inspect.Parameter.VAR_POSITIONAL else free
