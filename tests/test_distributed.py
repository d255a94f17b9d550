"""Two processes on a CPU are one process with the same batches; a process that dies ends the run, and the run resumes."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, read_run, run_two, same_state

import main as program
from harness import run_folder

ONE = ['--dataset=digits', '--no-cuda', '--epochs=2', '--batch-size=50', '--lr=0.05', '--limit-train=230', '--clip=0']
NORMLESS = ['--model=lenet300_100', '--method=feather', '--ptarget=0.9', '--lr=1']  # it learns: the loss falls from 2.3 to 1.4


def run_one(out, *words):
    """main.py in this process."""
    program.main([*ONE, f'--out={out}', *words])


def run_both(out, *words):
    """main.py as two processes -> (worst exit status, what they printed)."""
    return run_two([*ONE, f'--out={out}', *words], output=out.with_name(f'{out.name}.txt'))


def test_two_processes_are_one(tmp_path):
    # 230 images in batches of 50: the last batch has 30, and every image counts the same in it
    run_one(tmp_path / 'one', *NORMLESS)
    status, printed = run_both(tmp_path / 'two', *NORMLESS)
    assert status == 0, printed
    (one, state_one), (two, state_two) = read_run(tmp_path / 'one'), read_run(tmp_path / 'two')
    for name in state_one:
        torch.testing.assert_close(state_two[name], state_one[name], rtol=1e-3, atol=1e-5)
    assert two['zeros'] == one['zeros'] and abs(two['accuracy'] - one['accuracy']) < 100 / 63  # one of 64 images
    assert printed.count('train 2/2') == 1  # one process prints
    lines = (tmp_path / 'two' / 'log.jsonl').read_text().splitlines()
    assert len(lines) == 2 and json.loads(lines[-1])['epoch'] == 2


def test_two_processes_recalibrate_as_one(tmp_path):
    """Without learning the weights are those of the seed, and every process averages the same whole batches."""
    words = ['--model=resnet20', '--width=4', '--method=dense', '--epochs=1', '--lr=0', '--recalibrate=120']
    run_one(tmp_path / 'one', *words)
    status, printed = run_both(tmp_path / 'two', *words)
    assert status == 0, printed
    (one, state_one), (two, state_two) = read_run(tmp_path / 'one'), read_run(tmp_path / 'two')
    assert one['recalibrated_images'] == two['recalibrated_images'] == 120 and two['accuracy'] == one['accuracy']
    for name in state_one:
        torch.testing.assert_close(state_two[name], state_one[name], rtol=1e-5, atol=1e-6)


def test_a_killed_run_of_two_processes_resumes_to_the_bit(tmp_path):
    """The run that is cut is started by torchrun, which has to end the other process too."""
    words = ['--model=resnet20', '--width=4', '--method=st3', '--ptarget=0.9', '--epochs=3']
    status, printed = run_both(tmp_path / 'whole', *words)
    assert status == 0, printed
    crash = 'import main, os, torch.distributed as d\nsave = main.Job.save\n'
    crash += 'def dies(job, *a):\n    save(job, *a)\n    if d.get_rank() == 1 and a[-1] == 2:\n        os._exit(9)\n'
    crash += 'main.Job.save = dies\nmain.main()\n'
    (tmp_path / 'crash.py').write_text(crash)
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', str(tmp_path / 'crash.py')]
    env = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    died = subprocess.run([*command, *ONE, *words, f'--out={tmp_path}/cut'], env=env, capture_output=True, text=True)
    assert died.returncode != 0 and 'exitcode  : 9' in died.stderr and run_folder.finished(tmp_path / 'cut') is None
    status, printed = run_both(tmp_path / 'cut', *words)
    assert status == 0, printed
    assert same_state(read_run(tmp_path / 'cut')[1], read_run(tmp_path / 'whole')[1])


def test_a_refusal_comes_once(tmp_path):
    run_one(tmp_path / 'run', *NORMLESS, '--epochs=1')
    status, printed = run_both(tmp_path / 'run', *NORMLESS, '--epochs=3')
    assert status != 0 and printed.count('other arguments') == 1


@pytest.fixture(scope='module')
def in_one_piece(tmp_path_factory):
    out = tmp_path_factory.mktemp('whole')
    run_one(out, *NORMLESS)
    return read_run(out)[1]


@pytest.mark.parametrize('parts', [2, 3])
def test_accumulated_gradients_are_the_whole_batch(parts, tmp_path, in_one_piece):
    run_one(tmp_path, *NORMLESS, f'--accumulate={parts}')
    pieces = read_run(tmp_path)[1]
    for name, tensor in in_one_piece.items():
        torch.testing.assert_close(pieces[name], tensor, rtol=1e-3, atol=1e-5)
