"""Two processes on a CPU are one process with the same batches; a process that dies ends the run, and the run resumes."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, read_run, same_state

from harness import run_folder

ONE = ['--dataset=digits', '--no-cuda', '--epochs=2', '--batch-size=50', '--lr=0.05', '--limit-train=230', '--clip=0']
NORMLESS = ['--model=lenet300_100', '--method=feather', '--ptarget=0.9']


def start(out, *words, processes=2, wait=True):
    """main.py as several processes -> CompletedProcess, or Popen with wait=False."""
    several = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}'] if processes > 1 else []
    command = [sys.executable, *several, str(ROOT / 'main.py'), *ONE, f'--out={out}', *words]
    env = os.environ | {'OMP_NUM_THREADS': '1'}
    run = subprocess.run if wait else subprocess.Popen
    return run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_two_processes_are_one(tmp_path):
    # 230 images in batches of 50: the last batch has 30, and every image counts the same in it
    assert start(tmp_path / 'one', *NORMLESS, processes=1).returncode == 0
    ended = start(tmp_path / 'two', *NORMLESS)
    assert ended.returncode == 0, ended.stdout
    (one, state_one), (two, state_two) = read_run(tmp_path / 'one'), read_run(tmp_path / 'two')
    for name in state_one:
        torch.testing.assert_close(state_two[name], state_one[name], rtol=1e-3, atol=1e-5)
    assert two['zeros'] == one['zeros'] and abs(two['accuracy'] - one['accuracy']) < 0.5
    assert ended.stdout.count('train 2/2') == 1  # one process prints
    lines = (tmp_path / 'two' / 'log.jsonl').read_text().splitlines()
    assert len(lines) == 2 and json.loads(lines[-1])['epoch'] == 2


def test_a_killed_run_of_two_processes_resumes_to_the_bit(tmp_path):
    words = ['--model=resnet20', '--width=4', '--method=st3', '--ptarget=0.9', '--epochs=3']
    assert start(tmp_path / 'whole', *words).returncode == 0
    crash = 'import main, os, torch.distributed as d\nsave = main.Job.save\n'
    crash += 'def dies(job, *a):\n    save(job, *a)\n    if d.get_rank() == 1 and a[-1] == 2:\n        os._exit(9)\n'
    crash += 'main.Job.save = dies\nmain.main()\n'
    (tmp_path / 'crash.py').write_text(crash)
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', str(tmp_path / 'crash.py')]
    env = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    died = subprocess.run([*command, *ONE, *words, f'--out={tmp_path}/cut'], env=env, capture_output=True, text=True)
    assert died.returncode != 0 and 'exitcode  : 9' in died.stderr and run_folder.finished(tmp_path / 'cut') is None
    assert start(tmp_path / 'cut', *words).returncode == 0
    assert same_state(read_run(tmp_path / 'cut')[1], read_run(tmp_path / 'whole')[1])


def test_a_refusal_comes_once(tmp_path):
    assert start(tmp_path / 'run', *NORMLESS, '--epochs=1', processes=1).returncode == 0
    refused = start(tmp_path / 'run', *NORMLESS, '--epochs=3')
    assert refused.returncode != 0 and refused.stdout.count('other arguments') == 1


@pytest.mark.parametrize('parts', [2, 3])
def test_accumulated_gradients_are_the_whole_batch(parts, tmp_path):
    for folder, words in (('whole', []), ('parts', [f'--accumulate={parts}'])):
        assert start(tmp_path / folder, *NORMLESS, *words, processes=1).returncode == 0
    (_, whole), (_, pieces) = read_run(tmp_path / 'whole'), read_run(tmp_path / 'parts')
    for name in whole:
        torch.testing.assert_close(pieces[name], whole[name], rtol=1e-3, atol=1e-5)
