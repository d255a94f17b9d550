"""Shared by all tests: one thread, and main.py run in this process on something tiny."""

import functools

import pytest
import torch
from helpers import read_few_digits

import main as program
from deploy import graph, latency
from harness import data, result

data.read_digits = read_few_digits  # an epoch of the tests' runs has 96 images; 64 are enough to test it on
latency.SECONDS, latency.THREADS = 0.0, 1  # to measure a latency: the time is not what is tested
latency.WARM_UP, latency.FEWEST = 0, 1
result.commit = functools.cache(result.commit)  # two git commands a run


RUNNING = ('test_methods', 'test_admm', 'test_faults', 'test_lrr', 'test_main', 'test_nni', 'test_searches', 'test_dsp')


@pytest.fixture(autouse=True)
def one_thread():
    """On inputs this small threads gain nothing, and on a busy machine they wait for each other."""
    torch.set_num_threads(1)


@functools.cache
def exported_before(key):
    """A box for what torch.export made of a network of this structure: the graph does not depend on the weights."""
    return []


@pytest.fixture(autouse=True)
def exported_once(request, monkeypatch):
    """Export each structure of network once in the tests that run main.py, the same few networks again and again.

    Tests of what is read from networks export each of theirs.
    """
    if request.module.__name__ not in RUNNING:
        return
    export = graph.export

    def once(model, args, kwargs, shapes):
        inputs = [
            (tuple(x.shape), x.dtype) if torch.is_tensor(x) else x for x in torch.utils._pytree.tree_leaves((args, kwargs))
        ]
        modes = [module.training for module in model.modules()]
        weights = [(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()]
        box = exported_before(repr((str(model), modes, weights, inputs, shapes)))
        if not box:
            box.append(export(model, args, kwargs, shapes))
        return box[0]

    monkeypatch.setattr(graph, 'export', once)


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
