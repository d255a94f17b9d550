"""Shared by all tests: one thread, and main.py run in this process on something tiny."""

import functools

import pytest
import torch
from helpers import read_few_digits

import main as program
from deploy import latency
from harness import data, result

data.read_digits = read_few_digits  # an epoch of the tests' runs has 96 images; 64 are enough to test it on
latency.SECONDS, latency.THREADS = 0.0, 1  # to measure a latency: the time is not what is tested
latency.WARM_UP, latency.FEWEST = 0, 1
result.commit = functools.cache(result.commit)  # two git commands a run


@pytest.fixture(autouse=True)
def one_thread():
    """On inputs this small threads gain nothing, and on a busy machine they wait for each other."""
    torch.set_num_threads(1)


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
