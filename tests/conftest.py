"""Shared by all tests: one thread, and main.py run in this process on something tiny."""

import json
from pathlib import Path

import pytest
import torch

import main as program
import shrink

ROOT = Path(__file__).parent.parent
TINY = ['--dataset=digits', '--model=resnet20', '--width=4', '--limit-train=96', '--batch-size=32', '--epochs=3', '--no-cuda']
shrink.SECONDS, shrink.THREADS = 0.0, 1  # to measure a latency: the time is not what is tested


@pytest.fixture(autouse=True)
def one_thread():
    """On inputs this small threads gain nothing, and on a busy machine they wait for each other."""
    torch.set_num_threads(1)


def run_main(out, *words):
    """main.py on a tiny problem -> (result.json, model.pt) of the run folder `out`."""
    program.main([*TINY, f'--out={out}', *words])
    return read_run(out)


def read_run(out):
    return json.loads((Path(out) / 'result.json').read_text()), torch.load(Path(out) / 'model.pt', weights_only=True)


def same_state(a, b):
    """Equal names in equal order, and bit-identical tensors."""
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker('gpu') and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason='no CUDA device'))
