"""Reading a network for the engine: its operations without changes in place, and the shapes for inputs of a given shape."""

import torch
from torch.utils import _pytree as pytree

from ..graph import read_program, writes


class GraphError(ValueError):
    """The network cannot be read as a graph."""


class Graph:
    """The operations of a network, in order.

    nodes: torch.fx nodes that compute something. inputs: the nodes of the network's inputs. constants: {node: tensor}.
    names: {node of a constant: its dotted name}. outputs: the nodes that are returned; build_output(values) makes the network's
    own nesting of their values. Raises GraphError for a network that torch.export refuses, or one that changes its buffers or
    its input.
    """

    def __init__(self, model, inputs):
        try:
            with torch.no_grad():
                program = read_program(model, tuple(inputs), free_batch=True)
        except ValueError as error:
            raise GraphError(str(error)) from error
        signature = program.exported.graph_signature
        if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
            raise GraphError(f'{type(model).__name__} changes its buffers or its input in eval mode')
        self.names = program.names
        self.constants = {node: program.tensors[name].detach() for node, name in program.names.items()}
        self.inputs = [node for node in program.nodes if node.op == 'placeholder' and node not in self.constants]
        self.nodes = [node for node in program.nodes if node.op not in ('placeholder', 'output')]
        self.outputs = list(program.nodes[-1].args[0])
        self.out_spec = program.exported.call_spec.out_spec
        self.gives_one = self.out_spec.is_leaf()
        self.fixed = [[size if isinstance(size, int) else None for size in node.meta['val'].shape] for node in self.inputs]
        for node in self.nodes:
            if writes(node):
                self._make_functional(node)

    def _make_functional(self, node):
        """relu for relu_: what is changed is read by nothing else afterwards, which read_program() sees to."""
        packet = getattr(torch.ops.aten, operation(node)[:-1], None)
        if node.args[0] in self.inputs or packet is None or node.target._overloadname not in packet.overloads():
            raise GraphError(f'{node.target} changes a tensor in place in a way that the engine cannot follow')
        node.target = getattr(packet, node.target._overloadname)

    def takes(self, shapes):
        """Whether the graph holds for inputs of these shapes: axes that were fixed in reading it have their sizes."""
        if len(shapes) != len(self.fixed):
            return False
        pairs = zip(self.fixed, shapes, strict=True)
        return all(len(a) == len(b) and all(x in (None, y) for x, y in zip(a, b, strict=True)) for a, b in pairs)

    def build_output(self, values):
        """The network's output from the values of `outputs`."""
        return values[0] if self.gives_one else pytree.tree_unflatten(values, self.out_spec)

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


def operation(node):
    """'conv2d' for a node of torch.ops.aten.conv2d.default; '' for nodes that call nothing of ATen."""
    target = getattr(node, 'target', None)
    is_aten = isinstance(target, torch._ops.OpOverload) and target.namespace == 'aten'
    return target._opname if is_aten else ''
