"""Reading a network: what torch.export sees of it, with names and places that a person can find again.

    program = read_program(model, example_input)
    for node in program.nodes: ...               # operations of ATen, in the order in which they run

The graph is only read. What is cut, packed or reported afterwards are the model's own modules: each parameter and buffer of the
graph carries its dotted name. Operations are left as the model calls them (batch norm, layer norm, linear and dropout whole),
since taking them apart costs three times as long and hides what they mean.
"""

import contextlib
import copy
import inspect
import io
import operator
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from .outputs import arguments, change_tensors, eval_mode

TORCH = str(Path(torch.__file__).parent)


class Program(NamedTuple):
    """What torch.export read.

    nodes: fx nodes of ATen operations, in the order of execution. names: {placeholder node: dotted name of its parameter or
    buffer}. tensors: {dotted name: tensor}, parameters, buffers and constants. aliases: {dotted name: all names of the same
    tensor}. model: the copy that was exported, in eval mode. exported: what torch.export gave.
    """

    nodes: list
    names: dict
    tensors: dict
    aliases: dict
    model: nn.Module
    exported: object


def unwrapped(model):
    """The network inside DataParallel, DistributedDataParallel or torch.compile, with a warning that says so."""
    while True:
        inner = getattr(model, '_orig_mod', None)
        if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if inner is None:
            return model
        warnings.warn(f'{type(model).__name__} is taken off: the result is made from the network inside it', stacklevel=3)
        model = inner


def plain_copy(model):
    """A deep copy without gradients and without the hooks of our pruners, whose masks are applied.

    Raises ValueError, naming the layer, where a weight is computed from others, so that there is nothing to cut.
    """
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            raise ValueError(f'layer {name or type(model).__name__} is parametrized: turn it into a plain layer first')
        if any(hook.__class__.__name__ in ('WeightNorm', 'SpectralNorm') for hook in module._forward_pre_hooks.values()):
            raise ValueError(
                f'layer {name} computes its weight anew in each forward: remove weight_norm or spectral_norm first'
            )
    try:
        network = copy.deepcopy(model)
    except RuntimeError as error:  # a weight that is computed from others, as torch.nn.utils.prune leaves it
        raise ValueError(f'the network cannot be copied; make its layers plain first, as prune.remove does ({error})') from None
    network.zero_grad()
    release(network)
    return network


def release(model):
    """Apply the masks of a pruner that still holds the model, and remove its hooks, which are for these shapes."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for hook in list(hooks.values()):
                pruner = getattr(getattr(hook, 'func', hook), '__self__', None)  # func: of a partial
                if hasattr(pruner, 'unhook'):
                    pruner.apply()
                    pruner.unhook()


def read_program(model, example_input, free_batch=False, training=False):
    """The Program of a model in eval mode, or in training mode.

    model: it is run, and may keep what its forward stores: give a copy. example_input: a tensor, or a tuple or dict of
    arguments. free_batch: let dimension 0 of all inputs be free; an example of one is repeated to two, as torch.export takes a
    size of one for a constant. Raises ValueError with the line that torch.export stumbled over.
    """
    args, kwargs = arguments(change_tensors(torch.clone, example_input))  # torch.export takes one tensor for one input
    shapes = None
    if free_batch or training:  # a batch norm in training wants two examples
        args, kwargs = change_tensors(_twice, (args, kwargs))
    if free_batch:
        shapes = _named(model, *change_tensors(_free, (args, kwargs)))
    try:
        with eval_mode(model), _muted():
            if training:
                model.train()
            exported = export(model, args, kwargs, shapes)
    except Exception as error:  # whatever the model's own code raises when it meets tensors without values
        raise ValueError(f'torch.export cannot trace {type(model).__name__}: {reason(error)}') from error
    signature = exported.graph_signature
    found = {**signature.inputs_to_parameters, **signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    owners = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        owners.setdefault(tensor, []).append(name)
    tensors = {**exported.constants, **exported.state_dict}
    tensors |= {names[0]: tensor for tensor, names in owners.items()}
    first = {name: names[0] for names in owners.values() for name in names}
    names = {node: first.get(found[node.name], found[node.name]) for node in exported.graph.nodes if node.name in found}
    aliases = {names[0]: names for names in owners.values()}
    return Program(list(exported.graph.nodes), names, tensors, aliases, model, exported)


def export(model, args, kwargs, shapes):
    """torch.export's program; taken apart only where an operation in place writes into a view, which could not be followed."""
    exported = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    return exported.run_decompositions({}) if _writes_into_views(exported.graph) else exported


def _twice(value):
    return torch.cat([value, value]) if value.dim() and len(value) == 1 else value


def _free(value):
    return {0: torch.export.Dim.AUTO} if value.dim() else None


def _named(model, args, kwargs):
    """dynamic_shapes wants the positional arguments as a tuple, those of *args as one of them, or all of them by name."""
    parameters = inspect.signature(model.forward).parameters
    if not kwargs:
        first = next(iter(parameters.values()), None)
        return (args,) if first is not None and first.kind == first.VAR_POSITIONAL else args
    names = list(parameters)
    return dict(zip(names, args, strict=False)) | kwargs


@contextlib.contextmanager
def _muted():
    """Without what torch.export prints when it refuses."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


def _writes_into_views(graph):
    """Whether an operation in place changes a tensor of which another view is read afterwards."""
    root = {}
    members = {}
    place = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.op != 'call_function':
            continue
        source = next((arg for arg in node.args if isinstance(arg, fx.Node)), None)
        if source is None:
            continue
        if writes(node) or shares(node):
            root[node] = root.get(source, source)
            members.setdefault(root[node], [root[node]]).append(node)
        if writes(node):
            others = [other for other in members[root[node]] if other not in (node, source)]
            if any(place[user] > place[node] for other in [*others, source] for user in other.users if user is not node):
                return True
    return False


def writes(node):
    """Whether an operation changes its first argument."""
    schema = getattr(node.target, '_schema', None)
    return schema is not None and schema.is_mutable and bool(schema.arguments) and _is_written(schema.arguments[0])


def _is_written(argument):
    return argument.alias_info is not None and argument.alias_info.is_write


def shares(node):
    """Whether the result may lie in the memory of the first argument."""
    return (
        node.target is operator.getitem or getattr(node.target, 'is_view', False) or name_of(node) in ('contiguous', 'reshape')
    )


def name_of(node):
    """relu for aten.relu.default and aten.relu_.default; getitem; '' for what is no operation."""
    if node.op != 'call_function':
        return ''
    packet = getattr(node.target, 'overloadpacket', node.target)
    name = getattr(packet, '__name__', str(packet))
    return name[:-1] if name.endswith('_') and not name.startswith('_') else name


def functional(target):
    """aten.relu.default for aten.relu_.default; the operation itself where it is not in place, or has no such twin."""
    name = getattr(target, '_opname', '')
    if not name.endswith('_') or name.endswith('__'):
        return target
    return getattr(getattr(torch.ops.aten, name[:-1], None), target._overloadname, target)


def owner_of(node):
    """The dotted name of the module in whose forward an operation runs; '' for the network itself."""
    stack = node.meta.get('nn_module_stack')
    return list(stack.values())[-1][0] if stack else ''


def line_of(node):
    """(file, line number) of the innermost line outside torch that calls an operation, or None."""
    lines = [line for line in (node.meta.get('stack_trace') or '').splitlines() if line.strip().startswith('File "')]
    parts = [line.split('"')[1:] for line in lines]
    places = [(file, int(rest.split('line ')[1].split(',')[0])) for file, rest in parts]
    own = [place for place in places if not place[0].startswith(TORCH)]
    return (own or places or [None])[-1]


def place_of(node):
    """`view in layer1.0 (net.py, line 12)`: an operation as a person finds it."""
    owner = owner_of(node)
    line = line_of(node)
    where = f' in {owner}' if owner else ''
    file = f' ({line[0].rpartition("/")[2]}, line {line[1]})' if line else ''
    return f'{name_of(node) or node.name}{where}{file}'


def shape_of(value):
    """The sizes of a traced tensor for the example, as plain numbers; () for what is no tensor."""
    value = value.meta.get('val') if isinstance(value, fx.Node) else value
    return tuple(int(size) for size in value.shape) if torch.is_tensor(value) else ()


def number_of(value):
    """Arguments of a node with sizes as plain numbers; tensors stay nodes."""
    if isinstance(value, fx.Node):
        traced = value.meta.get('val')
        return int(traced) if isinstance(traced, (torch.SymInt, int)) and not isinstance(traced, bool) else value
    if isinstance(value, (list, tuple)):
        return [number_of(part) for part in value]
    if isinstance(value, Mapping):
        return {key: number_of(part) for key, part in value.items()}
    return value


def reason(error):
    """One line of what torch.export says, with the line of the user's code where it names one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = ' '.join(lines[:1])[:300] or type(error).__name__
    code = [line for line in lines if line.startswith('File "') and 'site-packages/torch/' not in line]
    advice = ''
    if 'data-dependent' in str(error) or 'GuardOnDataDependent' in type(error).__name__:
        advice = '; a branch on the values of tensors cannot be read: use torch.where, or read the parts before and behind it'
    return f'{type(error).__name__}: {first}' + (f' ({code[-1]})' if code else '') + advice
