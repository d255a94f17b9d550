"""main.py as a user meets it: the seed's commands, the run folder, resuming, and one clear sentence for what is wrong."""

import argparse
import itertools
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, TINY, log_of, read_run, run_main, same_state, start_main
from make_data import cifar100

import archs
import main as program
import methods
from args import COMMANDS, common_parser, parse
from deploy.files import read_tensors as load_state
from deploy.files import write_tensors
from harness import run_folder
from harness.result import hardware
from harness.training import lr_factor, pick_device


def from_the_shell(*words, cwd=ROOT):
    """main.py as a user starts it."""
    environment = os.environ | {'OMP_NUM_THREADS': '1'}
    command = [sys.executable, str(ROOT / 'main.py'), *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)


SEED_COMMANDS = [
    "--gpu=0 --wd=5e-4 --epochs=160 --model=resnet20 --ptarget=0.90 --sname='resnet20_ep=160_wd=5e-4_pt=0.90'",
    "--gpu=0 --wd=5e-4 --epochs=160 --model=resnet20 --ptarget=0.99 --sname='resnet20_ep=160_wd=5e-4_pt=0.99'",
]


def test_a_start_from_a_run_that_saw_other_images_is_named(tmp_path, capsys):
    there = {'dataset': 'cifar10', 'mean': [0.5, 0.5, 0.5], 'std': [0.25, 0.25, 0.25], 'per_image': None}
    (tmp_path / 'args.json').write_text(json.dumps(there))
    same = argparse.Namespace(dataset='cifar10', mean=(0.5, 0.5, 0.5), std=[0.25, 0.25, 0.25], per_image=False)
    run_folder.compare_images(tmp_path, same)
    run_folder.compare_images(tmp_path / 'model.pt', argparse.Namespace(**vars(same) | {'dataset': 'mnist', 'std': [1]}))
    run_folder.compare_images(tmp_path / 'elsewhere' / 'model.pt', same)
    assert not capsys.readouterr().out
    other = argparse.Namespace(**vars(same) | {'std': [0.2, 0.25, 0.25]})
    run_folder.compare_images(tmp_path / 'model.pt', other)
    assert '--std 0.25 0.25 0.25, this one has 0.2 0.25 0.25' in capsys.readouterr().out


@pytest.mark.parametrize('words, zeros', list(zip(SEED_COMMANDS, [983_664, 1_082_030], strict=True)))
def test_the_commands_of_the_seed(words, zeros, tmp_path, monkeypatch, capsys):
    """floor(1,092,959 x 0.90) + 1 = 983,664 and floor(1,092,959 x 0.99) + 1 = 1,082,030 of the 1,092,960 weights.

    Or one more: among a million float32 magnitudes every tenth has a twin, and a threshold that hits one prunes both.
    """
    words = shlex.split(words)
    cifar100(tmp_path / 'data', train=128, test=100)
    more = ['--epochs=1', '--limit-train=128', '--batch-size=64', f'--data-dir={tmp_path}/data']
    if words == shlex.split(SEED_COMMANDS[0]):
        done = from_the_shell(*words, *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        printed = done.stdout
    else:  # the same without seconds of imports
        monkeypatch.chdir(tmp_path)
        program.main([*words, *more])
        printed = capsys.readouterr().out
    if not torch.cuda.is_available():
        assert 'running on the CPU' in printed
    (folder,) = (tmp_path / 'runs').iterdir()
    assert '1,092,960 of 1,096,196 parameters are pruned, those of 22 weights\n' in printed
    assert folder.name.endswith(words[-1].removeprefix('--sname='))
    result, state = read_run(folder)
    assert result['zeros'] - zeros in (0, 1) and result['weights'] == 1_092_960 and result['parameters'] == 1_096_196
    assert sum(int((tensor == 0).sum()) for tensor in state.values() if tensor.dim() > 1) == result['zeros']
    assert sorted(tmp_path.iterdir()) == [tmp_path / 'data', tmp_path / 'runs']  # nothing is written elsewhere


def test_defaults_are_the_seeds():
    args = parse(['--model=resnet20', '--ptarget=0.99'])
    seed = {'method': 'feather', 'dataset': 'cifar100', 'gpu': 0, 'batch_size': 128, 'lr': 0.1, 'wd': 5e-4, 'epochs': 160}
    seed |= {'workers': 0, 'no_cuda': False, 'pthres': 0, 't1': 0, 'clip': 3.0, 'momentum': 0.9, 'lr_schedule': 'cosine'}
    assert {name: getattr(args, name) for name in seed} == seed
    assert parse([]).ptarget == 0.95 and parse(['--workers']).workers == 8 and parse(['--workers=2']).workers == 2
    assert args.mean == [0.4914, 0.4822, 0.4465] and args.std == [0.2023, 0.1994, 0.2010] and args.pad == 4 and args.flip


def test_run_folder(tmp_path):
    result, state = run_main(tmp_path / 'run', '--ptarget=0.9', '--val-size=100')
    names = {path.name.split('.')[0] for path in (tmp_path / 'run').iterdir()}
    assert names == {'args', 'log', 'checkpoint', 'events', 'model', 'result', 'lock'}
    lines = [json.loads(line) for line in (tmp_path / 'run' / 'log.jsonl').read_text().splitlines()]
    assert [line['epoch'] for line in lines] == [1, 2, 3]
    assert lines[-1]['sparsity'] == result['sparsity'] and 'val_accuracy' in lines[-1] and lines[-1]['threshold'] > 0
    keys = 'accuracy best_accuracy zeros weights sparsity sparsity_all macs_dense macs_nonzero seconds'
    keys += ' device torch commit status args'
    assert set(keys.split()) <= set(result)
    assert result['best_accuracy'] == max(line['accuracy'] for line in lines) and result['accuracy'] == lines[-1]['accuracy']
    assert result['args'] == json.loads((tmp_path / 'run' / 'args.json').read_text())
    assert all(tensor.is_contiguous() for tensor in state.values())


def test_a_finished_run_is_not_run_again(tmp_path, capsys):
    run_main(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.name != 'lock'}
    capsys.readouterr()
    program.main([*TINY, f'--out={tmp_path}'])
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.name != 'lock'}
    assert 'accuracy' in capsys.readouterr().out


def die_in_step_14():
    """SIGKILL, which nothing can catch, in the middle of epoch 5 of 3 steps each: of runs in other processes."""
    steps = itertools.count(1)
    step = program.one_step

    def dying(*args):
        if next(steps) == 14:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*args)

    program.one_step = dying


def test_sigkill_and_resume(tmp_path):
    """A real process, really killed: once with the same command again, once with --resume, as if begun by an older main.py."""
    words = [word for word in TINY if not word.startswith('--width')]
    words += ['--epochs=8', '--dropout=0.3', '--model=wrn10_1', '--amp', '--ptarget=0.9']
    program.main([*words, f'--out={tmp_path}/whole'])
    killed = start_main([*words, f'--out={tmp_path}/same'], output=tmp_path / 'output.txt', before=die_in_step_14)
    killed.join()
    assert killed.exitcode == -signal.SIGKILL and len(log_of(tmp_path / 'same')) == 4
    shutil.copytree(tmp_path / 'same', tmp_path / 'resumed')
    checkpoint = load_state(tmp_path / 'resumed' / 'checkpoint.pt')
    del checkpoint['done']['epochs_on']
    write_tensors(checkpoint, tmp_path / 'resumed' / 'checkpoint.pt')
    program.main([*words, f'--out={tmp_path}/same'])
    program.main([f'--resume={tmp_path}/resumed'])
    for name in ('same', 'resumed'):
        assert same_state(read_run(tmp_path / name)[1], read_run(tmp_path / 'whole')[1])
    here = hardware(torch.device('cpu'))
    devices = [read_run(tmp_path / name)[0]['device'] for name in ('whole', 'same', 'resumed')]
    assert devices == [here, here, f'4 epochs on unknown hardware, 4 epochs on {here}']


def test_other_arguments_are_refused_with_the_differences(tmp_path, capsys):
    run_main(tmp_path, '--ptarget=0.9')
    with pytest.raises(SystemExit) as stop:
        run_main(tmp_path, '--ptarget=0.8', '--lr=0.2')
    assert '--lr 0.1 -> 0.2' in stop.value.code and '--ptarget 0.9 -> 0.8' in stop.value.code


def test_resume_takes_its_arguments_from_the_folder(tmp_path, capsys):
    run_main(tmp_path, '--ptarget=0.9')
    program.main(['--resume', str(tmp_path), '--device=cpu'])
    for words, message in (
        ([f'--resume={tmp_path}', '--lr=1'], 'leave out --lr'),
        (['--resume=nowhere'], 'no readable args.json'),
    ):
        with pytest.raises(SystemExit) as stop:
            program.main(words)
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_from_starts_at_the_end_of_another_run(tmp_path, capsys):
    _, dense = run_main(tmp_path / 'dense-s0', '--method=dense')
    here = ['--method=dense', f'--from={tmp_path}/dense-s{{seed}}', '--lr=0']
    _, state = run_main(tmp_path / 'on', *here)  # with a learning rate of 0 only batch norm's statistics move
    parameters = [name for name in dense if name.rsplit('.')[-1] in ('weight', 'bias')]
    assert all(torch.equal(state[name], dense[name]) for name in parameters)
    for words, message in [(['--seed=1'], 'there is no'), (['--width=8'], 'do not fit resnet20')]:
        with pytest.raises(SystemExit) as stop:
            run_main(tmp_path / 'off', *here, *words)
        assert message in str(stop.value) and not (tmp_path / 'off').exists()


def test_two_runs_in_one_folder(tmp_path):
    from args import parse
    from harness.run_folder import RunError, open_run

    args = parse([*TINY, f'--out={tmp_path}'])
    _, lock = open_run(args)
    with pytest.raises(RunError, match='another run is writing'):
        open_run(args)
    lock.close()
    open_run(args)[1].close()


@pytest.mark.parametrize('keep', [0, 10, 1000])
def test_truncated_checkpoint(keep, tmp_path):
    run_main(tmp_path)
    (tmp_path / 'result.json').unlink()
    checkpoint = tmp_path / 'checkpoint.pt'
    checkpoint.write_bytes(checkpoint.read_bytes()[:keep])
    with pytest.raises(SystemExit) as stop:
        run_main(tmp_path)
    assert 'checkpoint.pt is damaged' in stop.value.code and 'delete it' in stop.value.code


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / 'evil'),))

    torch.save({'x': Evil()}, tmp_path / 'bad.pt')
    with pytest.raises(Exception, match='damaged'):
        load_state(tmp_path / 'bad.pt')
    assert not (tmp_path / 'evil').exists()


BAD = [
    (['--model=resnet21'], 1, 'unknown network'),
    (['--method=fether'], 2, 'did you mean feather'),
    (['--dataset=cifar11'], 2, "invalid choice: 'cifar11'"),
    (['--ptarget=1.5'], 2, '--ptarget: is a fraction and must lie between 0 and 1, got 1.5'),
    (['--ptarget=-1'], 2, '--ptarget: is a fraction'),
    (['--ptarget=nan'], 2, '--ptarget: is a fraction'),
    (['--epochs=0'], 2, '--epochs: must be 1 or more, got 0'),
    (['--lr=abc'], 2, "--lr: invalid nonnegative value: 'abc'"),
    (['--lr=-1'], 2, '--lr: must be 0 or more'),
    (['--mean=0.5'], 2, 'one value for each of the 3 channels'),
    (['--bach-size=3'], 2, 'unrecognized arguments: --bach-size=3'),
    (['--config=nowhere.yaml'], 2, 'cannot read the config nowhere.yaml'),
    (['--row=dense'], 2, 'give the table with --config'),
    (['--t1=80'], 1, 'not before epoch 80'),
    (['--width=3', '--model=densenet'], 1, 'has no width option'),
    (['--device=cuda:99'], 1, 'there is no device cuda:99'),
    (['--device=potato'], 1, 'potato'),
    (['--no-download', '--data-dir=nowhere'], 1, '--no-download'),
]


@pytest.mark.parametrize('words, status, message', BAD)
def test_bad_input_gets_one_sentence(words, status, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        program.main(
            ['--no-download', '--dataset=digits', '--no-cuda', *words]
            if '--data-dir=nowhere' not in words and not any('mean' in w for w in words)
            else words
        )
    code, error = stop.value.code, capsys.readouterr().err
    text = error if isinstance(code, int) else code
    assert (code if isinstance(code, int) else 1) == status
    assert message in text and 'Traceback' not in text and len(text.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_bad_input_from_the_shell(tmp_path):
    """The same through a real process: status, stderr, no traceback."""
    cifar100(tmp_path, train=8, test=8)
    (tmp_path / 'cifar-100-python' / 'train').write_bytes(b'short')
    done = from_the_shell('--data-dir', str(tmp_path), '--out', str(tmp_path / 'run'))
    assert done.returncode == 1 and done.stderr.count('\n') == 1 and 'cifar-100-python/train' in done.stderr
    assert not (tmp_path / 'run').exists()
    process = start_main(['--epochs=0'], output=tmp_path / 'printed.txt')
    process.join()
    printed = (tmp_path / 'printed.txt').read_text()
    assert process.exitcode == 2 and printed == 'main.py: error: argument --epochs: must be 1 or more, got 0\n'


def test_a_failed_download_names_the_way_on(tmp_path, monkeypatch, capsys):
    torchvision = pytest.importorskip('torchvision', exc_type=(ImportError, RuntimeError))

    def refuse(*args, **kwargs):
        raise OSError('no network')

    monkeypatch.setattr(torchvision.datasets, 'CIFAR100', refuse)
    with pytest.raises(SystemExit) as stop:
        program.main([f'--data-dir={tmp_path}', f'--out={tmp_path}/run', '--no-cuda'])
    assert 'no network' in stop.value.code and '--dataset digits' in stop.value.code


def test_help_shows_the_methods_flags(capsys):
    with pytest.raises(SystemExit) as stop:
        program.main(['--method=feather', '--help'])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and '--theta' in text and '--ptarget' in text


def test_help_names_every_network_method_and_command(capsys):
    with pytest.raises(SystemExit):
        program.main(['--help'])
    text = capsys.readouterr().out
    words = set(re.findall(r'[\w<>]+', text))
    assert {*archs.names(), 'wrn<depth>_<k>', *methods.names()} <= words
    assert all(f'--{name} ' in text for name in COMMANDS)  # what is done with a finished run


def test_every_flag_has_help():
    assert all(action.help for action in common_parser()._actions)


def test_importing_args_parses_nothing(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['x', '--nonsense'])
    fresh = runpy.run_path(str(ROOT / 'args.py'), run_name='args')
    assert fresh['parse'](['--epochs=3']).epochs == 3


def schedule(words, steps, batches=10):
    args = parse(['--epochs=10', *words])
    return [lr_factor(args, step, batches) for step in steps]


def test_learning_rate_by_hand():
    # cosine: 0.5 (1 + cos(pi s/S)) at 0, a quarter, half, and the last of 100 steps
    assert schedule([], [0, 25, 50, 99]) == pytest.approx([1, 0.8535534, 0.5, 0.00024672])
    assert schedule(['--lr-restarts=1'], [0, 25, 49, 50, 75]) == pytest.approx([1, 0.5, 0.00098664, 1, 0.5], abs=1e-7)
    assert schedule(['--lr-update=epoch'], [0, 9, 10, 59]) == pytest.approx([1, 1, 0.9755283, 0.5])
    assert schedule(['--lr-schedule=multistep'], [0, 49, 50, 74, 75, 99]) == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert schedule(['--lr-schedule=multistep', '--lr-milestones', '0.2', '--lr-gamma=0.5'], [19, 20]) == [1, 0.5]
    assert schedule(['--lr-schedule=constant', '--warmup-epochs=1'], [0, 4, 9, 10]) == pytest.approx(
        [1 / 11, 5 / 11, 10 / 11, 1]
    )


@pytest.mark.parametrize(('epochs', 'restarts'), [(10, 5), (20, 11), (100, 5), (160, 5), (200, 5), (7, 3)])
def test_a_restart_begins_at_the_full_learning_rate(epochs, restarts):
    """As floats, 5 % (10 / 6) is 10 / 6 and not 0: an epoch at a learning rate of 0."""
    args = parse([f'--epochs={epochs}', f'--lr-restarts={restarts}', '--lr-update=epoch'])
    factors = [lr_factor(args, 23 * epoch, 23) for epoch in range(epochs)]
    starts = [epoch for epoch in range(epochs) if epoch * (restarts + 1) % epochs == 0]
    assert [factors[epoch] for epoch in starts] == [1] * len(starts) and min(factors) > 0


def test_torchrun_gives_each_process_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 8)
    monkeypatch.setenv('LOCAL_RANK', '3')
    assert pick_device(parse(['--device=cuda'])) == pick_device(parse([])) == torch.device('cuda:3')
    assert pick_device(parse(['--device=cpu'])) == torch.device('cpu')
    monkeypatch.delenv('LOCAL_RANK')
    assert pick_device(parse(['--gpu=2'])) == torch.device('cuda:2')


def test_cosine_is_pytorchs():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    for factor in schedule([], range(100)):
        assert factor == pytest.approx(optimizer.param_groups[0]['lr'], abs=1e-9)
        optimizer.step()
        scheduler.step()


def test_options_reach_the_optimizer_and_the_loss(tmp_path):
    base = run_main(tmp_path / 'base', '--epochs=1')[1]
    for number, words in enumerate(
        (
            ['--optimizer=adam'],
            ['--nesterov'],
            ['--clip=0.01'],
            ['--wd=0.5'],
            ['--label-smoothing=0.5'],
            ['--bn-momentum=0.5'],
            ['--pad=1'],
            ['--flip'],
            ['--drop-last', '--batch-size=40'],
        )
    ):
        assert not same_state(base, run_main(tmp_path / str(number), '--epochs=1', *words)[1]), words


def test_amp_and_channels_last_train(tmp_path):
    result, _ = run_main(tmp_path / 'a', '--amp', '--channels-last', '--ptarget=0.9')
    assert result['zeros'] == int((result['weights'] - 1) * 0.9) + 1


@pytest.mark.gpu
def test_a_run_on_a_gpu(tmp_path):
    program.main([*[w for w in TINY if w != '--no-cuda'], f'--out={tmp_path}', '--amp', '--channels-last', '--ptarget=0.98'])
    result, _ = read_run(tmp_path)
    assert result['zeros'] == int((result['weights'] - 1) * 0.98) + 1 and 'NVIDIA' in result['device']
