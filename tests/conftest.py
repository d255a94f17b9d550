"""Shared by all tests: one thread, and main.py run in this process on something tiny."""

import functools
import gc
import types

import pytest
import torch
from helpers import read_few_digits

import main as program
from deploy import graph, latency
from harness import data, result
from pruners import compressor

data.read_digits = read_few_digits  # an epoch of the tests' runs has 96 images; 64 are enough to test it on
latency.SECONDS, latency.THREADS = 0.0, 1  # to measure a latency: the time is not what is tested
latency.WARM_UP, latency.FEWEST = 0, 1
result.commit = functools.cache(result.commit)  # two git commands a run

torch.set_num_threads(1)  # on inputs this small threads gain nothing, and on a busy machine they wait for each other
gc.collect()
gc.freeze()  # what is imported stays, and need not be searched again and again
gc.set_threshold(50_000, 20, 20)

READING = ('test_graph', 'test_random_graphs')  # what is read from networks is tested there: each is exported
PLAIN = (int, float, str, tuple, types.NoneType, types.FunctionType, types.BuiltinFunctionType, type)


@pytest.fixture(autouse=True)
def one_thread():
    """After each test, as what a module's tests share is made before any fixture of the next one."""
    yield
    torch.set_num_threads(1)


def structure_of(model):
    """What the graph of a network depends on, which its weights are not; None where a module may hide something more."""
    modules = []
    for name, module in model.named_modules(remove_duplicate=False):
        own = [(key, value) for key, value in vars(module).items() if key == 'training' or not key.startswith('_')]
        if module._forward_hooks or module._forward_pre_hooks or not all(isinstance(value, PLAIN) for _, value in own):
            return None
        modules.append((name, type(module), tuple(own)))
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first = {}
    for name, tensor in tensors:
        first.setdefault(tensor, name)  # tied ones have one name
    return tuple(modules), tuple((name, first[tensor], tensor.shape, tensor.dtype) for name, tensor in tensors)


EXPORTED = {}
NORMS = {}


@pytest.fixture(autouse=True, scope='module')
def exported_once(request):
    """Export each structure of network once, and look for its batch norms once: many tests have the same few networks.

    But for free sizes, which comparisons in what reads the graph bind.
    """
    if request.module.__name__ in READING:
        yield
        return
    export = graph.export

    def once(model, args, kwargs, shapes):
        structure = None if shapes else structure_of(model)
        if structure is None:
            return export(model, args, kwargs, shapes)
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        inputs = [(value.shape, value.dtype) if torch.is_tensor(value) else value for value in leaves]
        key = structure, repr((inputs, list(kwargs)))
        if key not in EXPORTED:
            EXPORTED[key] = export(model, args, kwargs, shapes)
        return EXPORTED[key]

    batch_norms = compressor.batch_norms

    def norms_once(model):  # a class of pruners asks each time it is made
        key = structure_of(model)
        if key is None:
            return batch_norms(model)
        if key not in NORMS:
            NORMS[key] = batch_norms(model)
        return dict(NORMS[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph, 'export', once)
        patch.setattr(compressor, 'batch_norms', norms_once)
        yield


@pytest.fixture
def trained(monkeypatch):
    """The names of the stages that are trained, not loaded."""
    names, end_epoch = [], program.Job.end_epoch
    monkeypatch.setattr(program.Job, 'end_epoch', lambda job, line: names.append(line['stage']) or end_epoch(job, line))
    return names


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker('gpu') and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason='no CUDA device'))
