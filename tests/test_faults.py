"""Faults injected on purpose: a full disk, files cut short or corrupted, a diverging loss, Ctrl-C. Kills: test_methods.py.

In every case the run either ends as if nothing had happened, or is refused in one sentence; nothing is wrong silently.
"""

import errno
import json
import multiprocessing
import os
import random
import shutil
import time

import pytest
import torch
from helpers import QUICK, TINY, read_run, run_main, same_state

import main as program
import methods
from deploy import files
from harness import training

RUN = ['--method=gmp', '--frequency=1', '--ptarget=0.8', '--epochs=3']
PIPELINE = ['--method=lrr', '--rate=0.6', '--ptarget=0.8', '--epochs=2']


def refusal(out, *words):
    """The sentence with which main.py ends, which must be one line."""
    with pytest.raises(SystemExit) as stop:
        run_main(out, *words)
    assert isinstance(stop.value.code, str) and '\n' not in stop.value.code
    return stop.value.code


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """Finished runs to compare with, and to damage copies of: {'run': folder, 'pipeline': folder}."""
    root = tmp_path_factory.mktemp('whole')
    run_main(root / 'run', *RUN)
    run_main(root / 'pipeline', *PIPELINE)
    return {'run': root / 'run', 'pipeline': root / 'pipeline'}


class Stopped(BaseException):
    pass


def stop_after(monkeypatch, name, number):
    """Let the process die after it has written the file `name` `number` times."""
    write, seen = files.write_atomically, []

    def dying(path, content):
        write(path, content)
        seen.append(path.name)
        if seen.count(name) == number:
            raise Stopped

    monkeypatch.setattr(files, 'write_atomically', dying)


@pytest.mark.parametrize('number', range(1, 9))
def test_a_full_disk_at_any_write_is_said_and_nothing_is_lost(number, whole, tmp_path, monkeypatch):
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) >= number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, 'fsync', full)
    assert 'No space left on device' in refusal(tmp_path / 'r', *RUN)
    monkeypatch.setattr(os, 'fsync', fsync)
    result, state = run_main(tmp_path / 'r', *RUN)
    assert result['status'] == 'finished' and same_state(state, read_run(whole['run'])[1])


def damage(path, how):
    content = path.read_bytes()
    if how == 'truncated':
        path.write_bytes(content[: len(content) // 2])
    elif how == 'emptied':
        path.write_bytes(b'')
    elif how == 'overwritten':
        path.write_bytes(os.urandom(len(content)))
    elif how == 'one byte':  # in the middle of the tensors
        changed = bytearray(content)
        changed[len(content) // 2] ^= 0xFF
        path.write_bytes(changed)
    elif how == 'deleted':
        path.unlink()


DAMAGES = ['truncated', 'emptied', 'overwritten', 'one byte', 'deleted']


@pytest.mark.parametrize('how', DAMAGES)
@pytest.mark.parametrize('name', ['checkpoint.pt', 'args.json', 'log.jsonl', 'stage-round0.pt'])
def test_a_damaged_file_of_an_interrupted_run(name, how, whole, tmp_path, monkeypatch):
    words = PIPELINE if name.startswith('stage') else RUN
    stop_after(monkeypatch, 'checkpoint.pt', 3 if name.startswith('stage') else 2)
    with pytest.raises(Stopped):
        run_main(tmp_path / 'r', *words)
    monkeypatch.undo()
    damage(tmp_path / 'r' / name, how)
    try:
        state = run_main(tmp_path / 'r', *words)[1]
    except SystemExit as stop:
        assert isinstance(stop.code, str) and '\n' not in stop.code and str(tmp_path / 'r') in stop.code
        assert how != 'deleted' or name != 'checkpoint.pt'  # without a checkpoint the run starts over
    else:
        assert same_state(state, read_run(whole['pipeline' if name.startswith('stage') else 'run'])[1])


@pytest.mark.parametrize('how', [how for how in DAMAGES if how != 'one byte'])  # which may leave valid JSON
def test_a_damaged_result_is_made_again(how, whole, tmp_path):
    shutil.copytree(whole['run'], tmp_path / 'r')
    damage(tmp_path / 'r' / 'result.json', how)
    result, state = run_main(tmp_path / 'r', *RUN)
    expected = read_run(whole['run'])
    assert result['accuracy'] == expected[0]['accuracy'] and same_state(state, expected[1])


@pytest.mark.parametrize('how', DAMAGES)
def test_a_damaged_model_is_not_published(how, whole, tmp_path):
    shutil.copytree(whole['run'], tmp_path / 'r')
    damage(tmp_path / 'r' / 'model.pt', how)
    with pytest.raises(SystemExit, match='model.pt is damaged'):
        program.main([f'--publish={tmp_path}/r'])
    assert not (tmp_path / 'r' / 'published.pt').exists()


def test_a_diverging_loss_names_step_rate_and_checkpoint(tmp_path, monkeypatch):
    backward, calls = training.backward, []

    def explodes(*args):
        calls.append(0)
        loss = backward(*args)
        return loss * float('nan') if len(calls) == 8 else loss

    monkeypatch.setattr(training, 'backward', explodes)
    steps = 96 // 32  # of an epoch of the tiny problem
    said = refusal(tmp_path / 'r', '--method=dense', '--epochs=5', '--lr=0.02', '--lr-schedule=constant')
    assert f'step 2 of {steps} of epoch 3 of train' in said and 'learning rate of 0.02' in said
    assert 'checkpoint of 2 epochs' in said
    result = json.loads((tmp_path / 'r' / 'result.json').read_text())
    assert result['status'] == 'failed' and 'not finite' in result['reason']
    monkeypatch.undo()  # the checkpoint is good
    assert (
        run_main(tmp_path / 'r', '--method=dense', '--epochs=5', '--lr=0.02', '--lr-schedule=constant')[0]['status']
        == 'finished'
    )


def test_ctrl_c_names_the_command_that_goes_on(whole, tmp_path, monkeypatch, capsys):
    save, calls = program.Job.save, []

    def interrupted(job, *args):
        save(job, *args)
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(program.Job, 'save', interrupted)
    said = refusal(tmp_path / 'r', *RUN)
    assert said == f'interrupted; continue with: python main.py --resume {tmp_path}/r'
    monkeypatch.undo()
    program.main(['--resume', f'{tmp_path}/r'])
    assert same_state(read_run(tmp_path / 'r')[1], read_run(whole['run'])[1])


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').write_text('')
    assert 'cannot write the run folder' in refusal(tmp_path / 'file' / 'r', *TINY)


def test_a_checkpoint_of_another_network_is_refused(whole, tmp_path, monkeypatch):
    stop_after(monkeypatch, 'checkpoint.pt', 1)
    with pytest.raises(Stopped):
        run_main(tmp_path / 'r', *RUN)
    monkeypatch.undo()
    state = torch.load(tmp_path / 'r' / 'checkpoint.pt', weights_only=True)
    state['model'].popitem()
    torch.save(state, tmp_path / 'r' / 'checkpoint.pt')
    assert 'checkpoint.pt' in refusal(tmp_path / 'r', *RUN)


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(2))
@pytest.mark.parametrize('name', methods.names())
def test_killed_by_the_system_at_random_moments(name, seed, tmp_path):
    """SIGKILL wherever the run is, four times, and then to the end; test_methods.py has every moment between two writes."""
    words = [f'--method={name}', '--ptarget=0.8', *QUICK.get(name, [])]
    began = time.perf_counter()
    whole, expected = run_main(tmp_path / 'whole', *words)
    seconds, dice = time.perf_counter() - began, random.Random(f'{name} {seed}')
    for _ in range(4):
        run = multiprocessing.get_context('fork').Process(target=run_main, args=(tmp_path / 'killed', *words))
        run.start()
        run.join(dice.uniform(0, seconds))
        run.kill()
        run.join()
    result, state = run_main(tmp_path / 'killed', *words)
    assert same_state(state, expected) and result['accuracy'] == whole['accuracy']
    assert len((tmp_path / 'killed' / 'log.jsonl').read_text().splitlines()) == whole['epochs']
    assert not list((tmp_path / 'killed').rglob('*.tmp'))
