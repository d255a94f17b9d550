"""Files of finished networks, among them small ones that no longer have the shapes of their architecture.

    save(model, 'small', example_input)          small.pt, a plain state dict, and small.json, what to build around it
    model = load('small')                        in another process, without the code that built it; nothing stored is run

small.json lists the layers (class and constructor arguments) and the operations between them, as torch.fx traces them. Both
are looked up in the tables of known.py when the file is read, and nothing in it is ever evaluated: a file from a stranger can
be wrong, and then gives a ValueError, but cannot run anything. Files that hold programs are those of formats.py.
"""

import copy
import json
import keyword
import operator
import re
from pathlib import Path

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from . import files
from .known import DTYPES, FUNCTION_NAMES, FUNCTIONS, LAYERS, LAYOUTS, METHODS
from .outputs import TOLERANCE, change_tensors, compare, eval_mode

FORMAT = 'network without code, 1'


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module, name):
        return is_layer(module)


def is_layer(module):
    """Whether a description can name this module: a layer of the table. Subclasses are not, they may compute something else."""
    name = type(module).__name__
    return name in LAYERS and getattr(nn, name) is type(module)


def trace(model):
    """The fx.Graph of a model in eval mode, with the layers of the table as its leaves; modes are afterwards as before.

    A forward with constant tensors leaves them on the model as attributes, so trace a copy. Raises ValueError for a model that
    torch.fx cannot trace, and one whose weights are still parametrized.
    """
    if isinstance(model, fx.GraphModule) and all(is_layer(module) for module in _called(model)):
        return model.graph
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            raise ValueError(f'layer {name or type(model).__name__} is parametrized: turn it into a plain layer first')
    try:
        with eval_mode(model):
            graph = read_in_place(_Tracer().trace(model), model)
    except Exception as error:  # whatever the model's own code raises when it meets a proxy
        raise ValueError(f'torch.fx cannot trace {type(model).__name__}: {reason(error)}') from error
    return graph


def _called(network):
    return [network.get_submodule(node.target) for node in network.graph.nodes if node.op == 'call_module']


def read_in_place(graph, model):
    """Let what is read after an operation in place be its result, as it is in the model: y.add_(x) as a statement changes y."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    modules = dict(model.named_modules())
    for node in graph.nodes:
        name = str(getattr(node.target, '__name__', node.target))
        written = node.op in ('call_function', 'call_method') and (name.endswith('_') or name in ('iadd', 'isub', 'imul'))
        written = (
            written or node.kwargs.get('inplace') or node.op == 'call_module' and vars(modules[node.target]).get('inplace')
        )
        if written and isinstance(node.args[0], fx.Node):
            node.args[0].replace_all_uses_with(node, lambda user, node=node: place[user] > place[node])
    return graph


def reason(error):
    return f'{type(error).__name__}: {" ".join(str(error).split())[:200]}'


def save(model: nn.Module, path: str | Path, example_input: torch.Tensor | tuple | dict, **info) -> tuple[Path, Path]:
    """Write `path`.pt, the plain state dict, and `path`.json, the description that load() rebuilds the network from.

    model: layers with operations of known.py between them; it is left as it is. path: with or without .pt. example_input: a
    batch, or a tuple or dict of arguments; the network is rebuilt from what will be
    written and must give the same outputs for it. info: plain values, stored along; load() gives them back as `model.info`.
    Weights that layers share are stored once each. Returns the two paths. Raises ValueError, naming the layer or operation,
    for what a description cannot hold.
    """
    network = copy.deepcopy(model).cpu().eval()
    description, tensors = describe(network, trace(network))
    example = change_tensors(lambda tensor: tensor.detach().cpu(), example_input)
    description |= {'input': _shapes(example), 'info': info}
    try:
        text = _format(description)
    except TypeError as error:
        raise ValueError(f'info must be plain values that JSON can hold: {error}') from None
    again = rebuild(json.loads(text), tensors)
    if not (difference := compare(network, again, example)) <= TOLERANCE:  # it may be NaN
        raise ValueError(f'the network rebuilt from its description differs by {difference:.1e} of the largest output')
    weights, json_file = description_paths(path)
    files.write_atomically(weights, lambda file: torch.save(tensors, file))
    files.write_atomically(json_file, lambda file: file.write(text.encode()))
    return weights, json_file


def _shapes(example):
    """The shape of an example without its batch; of several arguments, theirs."""
    if torch.is_tensor(example):
        return list(example.shape[1:])
    if isinstance(example, dict):
        return {str(key): _shapes(value) for key, value in example.items()}
    return [_shapes(value) for value in example] if isinstance(example, (list, tuple)) else None


def load(path: str | Path) -> fx.GraphModule:
    """Rebuild the network that save() wrote: an fx.GraphModule in eval mode on the CPU, with the names of the original.

    Nothing stored is run: layers and operations are looked up in fixed tables, tensors are read with weights_only. Raises
    ValueError for files that are missing, damaged, do not fit each other, or name what is not in the tables.
    """
    weights, json_file = description_paths(path)
    try:
        description = json.loads(json_file.read_text())
    except OSError as error:
        raise ValueError(f'cannot read the description {json_file}: {error.strerror}') from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{json_file} is no valid JSON: {" ".join(str(error).split())[:100]}') from None
    try:
        tensors = torch.load(weights, map_location='cpu', weights_only=True)
    except OSError as error:
        raise ValueError(f'cannot read the weights {weights}: {error.strerror}') from None
    except Exception as error:  # torch reports damage, and code, as RuntimeError, EOFError, UnpicklingError, KeyError, ...
        raise ValueError(f'{weights} is no state dict of tensors, or is damaged ({type(error).__name__})') from None
    try:
        return rebuild(description, tensors)
    except ValueError as error:
        raise ValueError(f'{json_file}: {error}') from None


def description_paths(path):
    """small, small.pt or small.json -> (small.pt, small.json)."""
    path = Path(path)
    base = path.with_suffix('') if path.suffix in ('.pt', '.json') else path
    return base.with_name(base.name + '.pt'), base.with_name(base.name + '.json')


def _format(description):
    """JSON with a line a layer, tensor and operation, so that it can be read and compared."""
    lines = []
    for key, value in description.items():
        rows = value if isinstance(value, list) else None
        inner = json.dumps(value) if rows is None else '[\n  ' + ',\n  '.join(json.dumps(row) for row in rows) + '\n ]'
        lines.append(f' {json.dumps(key)}: {inner}')
    return '{\n' + ',\n'.join(lines) + '\n}\n'


def describe(network, graph):
    """(description, {name: tensor}) of a network on the CPU and its graph: plain values, and all tensors it computes with."""
    layers = {}
    tensors = {}
    shared = {}
    operations = []
    for node in graph.nodes:
        if node.op == 'call_module' and node.target not in layers:
            layer = network.get_submodule(node.target)
            layers[node.target] = {'name': node.target, 'class': type(layer).__name__, 'arguments': _arguments(layer)}
            tensors |= {f'{node.target}.{name}': value for name, value in layer.state_dict().items()}
        elif node.op == 'get_attr':
            value = operator.attrgetter(node.target)(network)
            tensors[node.target] = value.detach()
            shared[node.target] = {'name': node.target, 'trained': isinstance(value, nn.Parameter)}
            shared[node.target] |= {'shape': list(value.shape), 'dtype': str(value.dtype)}
        operations.append(_describe_node(node))
    for name in [*layers, *shared]:
        _check_name(name)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # in its memory layout
    description = {'format': FORMAT, 'layers': list(layers.values()), 'tensors': list(shared.values())}
    return description | {'operations': operations}, tensors


def _arguments(layer):
    """The constructor arguments of a layer, from its attributes."""
    values = {name: getattr(layer, name) for name in LAYERS[type(layer).__name__]}
    if 'bias' in values:
        values['bias'] = layer.bias is not None
    return values


def _describe_node(node):
    target = node.target
    if node.op == 'call_function':
        if target not in FUNCTION_NAMES:
            raise ValueError(f'the function {getattr(target, "__name__", target)} ({node.name}) has no place in a description')
        target = FUNCTION_NAMES[target]
    row = {'name': node.name, 'op': node.op, 'target': target}
    row['args'] = [_encode(value, node) for value in node.args]
    row['kwargs'] = {key: _encode(value, node) for key, value in node.kwargs.items()}
    check_operation(row)
    return row


def _encode(value, node):
    if isinstance(value, fx.Node):
        return {'node': value.name}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, slice):
        return {'slice': [_encode(part, node) for part in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {'ellipsis': True}
    if isinstance(value, tuple):
        return {'tuple': [_encode(part, node) for part in value]}
    if isinstance(value, list):
        return [_encode(part, node) for part in value]
    if isinstance(value, dict) and all(isinstance(key, (str, int)) for key in value):
        return {'dict': [[key, _encode(part, node)] for key, part in value.items()]}
    if isinstance(value, torch.dtype) and str(value) in DTYPES:
        return {'dtype': str(value)}
    if isinstance(value, torch.memory_format) and str(value) in LAYOUTS:
        return {'layout': str(value)}
    if isinstance(value, torch.device):
        return {'device': 'cpu'}  # where load() puts the network
    raise ValueError(f'the argument {value!r} of {node.name} has no place in a description')


def rebuild(description, tensors):
    """The network that describe() described, in eval mode. Raises ValueError for what describe() would not write."""
    if not isinstance(description, dict) or description.get('format') != FORMAT:
        raise ValueError(f'this is no description of the format {FORMAT!r}')
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ValueError('the weights must be a dict of tensors')
    try:
        root = nn.Module()
        for layer in description['layers']:
            _add(root, layer['name'], _build_layer(layer))
        for row in description['tensors']:
            empty = torch.empty(row['shape'], dtype=DTYPES[row['dtype']], device='meta')
            _add(root, row['name'], nn.Parameter(empty) if row['trained'] is True else empty)
        graph = _build_graph(description['operations'], {layer['name'] for layer in description['layers']}, description)
        _fill(root, tensors)
        network = fx.GraphModule(root, graph, 'Network')
        network.info = description['info'] if 'info' in description else {}
    except ValueError:
        raise
    except Exception as error:  # missing keys, wrong types, arguments that a layer refuses
        raise ValueError(f'the description is damaged ({reason(error)})') from None
    return network.eval()


def _check_name(name):
    """The dotted name of a layer or tensor: words of letters, digits, _ and -, so that it cannot be code."""
    if not isinstance(name, str) or not all(re.fullmatch(r'(?!__)[A-Za-z0-9_-]+', part) for part in name.split('.')):
        raise ValueError(f'{name!r} is no name of a layer')


def _add(root, name, value):
    """Put a layer or tensor at its dotted name, making the modules in between."""
    _check_name(name)
    *folders, last = name.split('.')
    for folder in folders:
        if folder not in root._modules:
            root.add_module(folder, nn.Module())
        root = root._modules[folder]
    if isinstance(value, nn.Module):
        root.add_module(last, value)
    elif isinstance(value, nn.Parameter):
        root.register_parameter(last, value)
    else:
        root.register_buffer(last, value)


def _build_layer(row):
    """A layer without values: its class and arguments must be in the table, so nothing else can be constructed."""
    name = row['class']
    arguments = row['arguments']
    if name not in LAYERS:
        raise ValueError(f'unknown layer {name!r}: a description may name {", ".join(LAYERS)}')
    if not set(arguments) <= set(LAYERS[name]):
        raise ValueError(f'a {name} is not described by {", ".join(sorted(map(str, arguments)))}')
    arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
    with torch.device('meta'):
        return getattr(nn, name)(**arguments)


def _build_graph(rows, layers, description):
    """The fx.Graph of the operations. Every name in it is checked or made here: fx writes Python source from a graph."""
    graph = fx.Graph()
    nodes = {}
    inputs = set()
    names = layers | {row['name'] for row in description['tensors']}
    for row in rows:
        check_operation(row)
        op = row['op']
        target = row['target']
        if op in ('call_module', 'get_attr') and (target not in names or (op == 'call_module') != (target in layers)):
            raise ValueError(f'operation {row["name"]!r} refers to {target!r}, which is not described')
        args = tuple(_decode(value, nodes) for value in row['args'])
        kwargs = {key: _decode(value, nodes) for key, value in row['kwargs'].items()}
        if op == 'placeholder':
            name = target if target.isascii() and target.isidentifier() and not keyword.iskeyword(target) else 'x'
            if name in inputs:
                raise ValueError(f'two inputs have the name {name!r}: each operation that is one input needs its own')
            inputs.add(name)
            node = graph.placeholder(name, default_value=None) if args else graph.placeholder(name)
        elif op == 'output':
            node = graph.output(args[0])
        else:
            node = graph.create_node(op, FUNCTIONS[target] if op == 'call_function' else target, args, kwargs)
        if row['name'] in nodes:
            raise ValueError(f'two operations have the name {row["name"]!r}')
        nodes[row['name']] = node
    if not inputs or rows[-1]['op'] != 'output':
        raise ValueError('the operations must begin with at least one input and end in one output')
    return graph


def check_operation(row):
    """Raise ValueError for an operation that is not in the tables, or whose arguments could be anything but values."""
    op = row['op']
    target = row['target']
    args = row['args']
    kwargs = row['kwargs']
    if op not in ('placeholder', 'call_module', 'call_function', 'call_method', 'get_attr', 'output'):
        raise ValueError(f'unknown kind of operation {op!r}')
    if not isinstance(args, list) or not isinstance(kwargs, dict):
        raise ValueError(f'the arguments of {row["name"]!r} must be a list and a mapping')
    if not all(isinstance(key, str) and key.isidentifier() and not keyword.iskeyword(key) for key in kwargs):
        raise ValueError(f'{list(kwargs)} are no names of arguments')
    if op == 'call_function' and target not in FUNCTIONS:
        raise ValueError(f'unknown function {target!r}')
    if op == 'call_method' and target not in METHODS:
        raise ValueError(f'the method {target!r} has no place in a description')
    if op in ('call_module', 'call_method') and not (args and _is_node(args[0])):
        raise ValueError(f'{target!r} must be called on the result of an operation')
    if target == 'getattr' and op == 'call_function' and not (len(args) == 2 and _is_node(args[0]) and args[1] == 'shape'):
        raise ValueError('of the attributes only the shape of a tensor can be read')
    if op == 'placeholder' and args == [None] and not kwargs:
        return  # an input that may be left out
    if op in ('placeholder', 'get_attr') and (args or kwargs) or op == 'output' and (len(args) != 1 or kwargs):
        raise ValueError(f'wrong arguments for {op} {row["name"]!r}')


def _is_node(value):
    return isinstance(value, dict) and list(value) == ['node']


TABLES = {'dtype': DTYPES, 'layout': LAYOUTS, 'device': {'cpu': torch.device('cpu')}}


def _decode(value, nodes):
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [_decode(part, nodes) for part in value]
    if isinstance(value, dict) and len(value) == 1:
        (kind, content), *_ = value.items()
        if kind == 'node' and isinstance(content, str) and content in nodes:
            return nodes[content]
        if kind == 'tuple':
            return tuple(_decode(part, nodes) for part in content)
        if kind == 'slice' and len(content) == 3:
            return slice(*(_decode(part, nodes) for part in content))
        if kind == 'ellipsis':
            return Ellipsis
        if kind == 'dict':
            return {key: _decode(part, nodes) for key, part in content if isinstance(key, (str, int))}
        if kind in TABLES and content in TABLES[kind]:
            return TABLES[kind][content]
    raise ValueError(f'{json.dumps(value)[:100]} is no argument of an operation, or refers to one that does not come before it')


def _fill(root, tensors):
    """Give the empty network its tensors; names and shapes must be the same on both sides."""
    expected = root.state_dict()
    for name in expected.keys() | tensors.keys():
        if name not in tensors:
            raise ValueError(f'the weights have no tensor {name!r}')
        if name not in expected:
            raise ValueError(f'the weights have a tensor {name!r} that no layer has')
        if tensors[name].shape != expected[name].shape:
            shapes = f'{list(tensors[name].shape)}, not {list(expected[name].shape)}'
            raise ValueError(f'the tensor {name!r} of the weights has the shape {shapes}')
        if tensors[name].is_floating_point() != expected[name].is_floating_point():
            raise ValueError(f'the tensor {name!r} of the weights is of type {tensors[name].dtype}')
    root.load_state_dict(tensors, assign=True)
