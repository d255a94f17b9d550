"""Two processes give one process's masks, for the methods that rank by gradients, by a batch, or by random numbers."""

import pytest
import torch
from helpers import read_run, run_two

import main as program

COMMON = ['--dataset=digits', '--no-cuda', '--epochs=2', '--batch-size=50', '--lr=0.05', '--limit-train=230', '--clip=0']
COMMON += ['--model=lenet300_100', '--ptarget=0.9']  # without batch norm, whose statistics are each process's own
RUNS = {
    'set': [],
    'rigl': ['--frequency=2'],
    'granet': ['--frequency=2'],
    'snip': ['--score-batches=9'],  # the last of five batches has 30 images
    'grasp': ['--images-per-class=20'],
    'spartan': [],
}


def words(name, folder):
    return [*COMMON, f'--method={name}', *RUNS[name], f'--out={folder / name}']


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    """The folder with the runs of two processes, all by one pair of them."""
    folder = tmp_path_factory.mktemp('two')
    status, printed = run_two(*[words(name, folder) for name in RUNS], output=folder / 'printed.txt')
    assert status == 0, printed
    return folder


@pytest.mark.parametrize('name', RUNS)
def test_masks_of_two_processes_are_those_of_one(name, two, tmp_path):
    program.main(words(name, tmp_path))
    (one, alone), (both, together) = read_run(tmp_path / name), read_run(two / name)
    different = sum(int(((alone[key] == 0) != (together[key] == 0)).sum()) for key in alone)
    assert both['zeros'] == one['zeros'] and different == 0
    for key in alone:
        torch.testing.assert_close(together[key], alone[key], rtol=1e-3, atol=1e-5)
