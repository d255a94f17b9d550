"""The contract that every method keeps; a new file in methods/ is tested here without being named."""

import contextlib
import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, read_run, run_main, same_state

import archs
import main as program
import methods
import record
from args import parse
from methods import Method
from sparse_utils import count_zeros

NAMES = methods.names()
# Methods whose target is met to the weight: {name: zeros of n weights at a target}
EXACT = {
    'feather': lambda n, target: math.floor((n - 1) * target) + 1,
    'st3': lambda n, target: math.floor((n - 1) * target) + 1,
    'gmp': lambda n, target: round(target * n),
    'lrr': lambda n, target: round(target * n),
    'probmask': lambda n, target: n - round((1 - target) * n),
}
# Shorter pipelines; what they do is the same
QUICK = {
    'dsp': ['--group-epochs=1', '--finetune-epochs=2', '--cycles=2', '--val-size=0'],
    'lottery_ticket': ['--prune-iterations=1'],
    'lrr': ['--rate=0.6'],
    'probmask': ['--finetune-epochs=1'],
}
TURN, SEARCH = ['--admm-iterations=1', '--admm-epochs=1'], ['--val-size=64', '--finetune-epochs=1']
ANNEAL = ['--cool-down-rate=0.2', '--search-steps=2']
QUICK |= {
    'netadapt': [*SEARCH, '--layers', 'stage3.0.conv1', '--sparsity-per-iteration=0.3', '--short-term-steps=1'],
    'simulated_annealing': [*SEARCH, *ANNEAL],
    'admm': ['--finetune-epochs=1', '--admm-iterations=2', '--admm-epochs=1'],
    'autocompress': [*SEARCH, *ANNEAL, *TURN, '--num-iterations=1'],
}
ONE_SHOT = ['level', 'slim', 'fpgm', 'l1_filter', 'l2_filter', 'apoz', 'mean_activation', 'taylor_fo', 'agp', 'random_filter']
QUICK |= {name: ['--finetune-epochs=1'] for name in ONE_SHOT}


def test_every_method_is_a_method():
    assert {'dense', 'feather'} <= set(NAMES)
    for name in NAMES:
        assert issubclass(methods.load(name), Method)
    with pytest.raises(ValueError, match='did you mean feather'):
        methods.load('fether')


@pytest.mark.parametrize('name', NAMES)
def test_run_leaves_what_it_says(name, tmp_path):
    result, state = run_main(tmp_path, f'--method={name}', '--ptarget=0.8', *QUICK.get(name, []))
    model = archs.build('resnet20', 10, width=4, in_channels=1)
    assert result['gives'] in ('zeros', 'a smaller network', 'the dense network')
    if result['gives'] != 'a smaller network':
        assert list(state) == list(model.state_dict())  # plain names in their order
        model.load_state_dict(state)
        counts = count_zeros(model, result['args']['pthres'])
        assert sum(zeros for zeros, _ in counts.values()) == result['zeros']
        assert {layer: figures[:2] for layer, figures in result['layers'].items()} == {k: list(v) for k, v in counts.items()}
        everything = list(model.parameters())
        share = sum(int((p == 0).sum()) for p in everything) / sum(p.numel() for p in everything)
        assert result['sparsity_all'] == pytest.approx(share)
    if name in EXACT:
        assert result['zeros'] == EXACT[name](result['weights'], 0.8)
    assert result['accuracy'] == last_line(tmp_path)['accuracy']  # the finished network is the one of the last epoch


def last_line(folder):
    return json.loads((folder / 'log.jsonl').read_text().splitlines()[-1])


@pytest.mark.parametrize('name', NAMES)
def test_same_seed_same_result(name, tmp_path):
    words = [f'--method={name}', '--epochs=2', *QUICK.get(name, []), '--seed=7']
    one, two = run_main(tmp_path / 'a', *words)[1], run_main(tmp_path / 'b', *words)[1]
    other = run_main(tmp_path / 'c', *words[:-1], '--seed=8')[1]
    assert same_state(one, two) and not same_state(one, other)


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the code may catch it."""


def kill_at(monkeypatch, number, halfway=False):
    """Let the process die after its file write of this number, or in the middle of it."""
    write, calls = record.write_atomically, []

    def dying(path, content):
        calls.append(path.name)
        if len(calls) == number and halfway:
            path.with_name(path.name + '.tmp').write_bytes(b'half')
            raise Killed
        write(path, content)
        if len(calls) == number:
            raise Killed

    monkeypatch.setattr(record, 'write_atomically', dying)
    return calls


def kill_everywhere(tmp_path, monkeypatch, words, halfway=False):
    """Kill a run at its first, second, ... write, start it again, and compare the end -> how many writes there are."""
    whole, expected = run_main(tmp_path / 'whole', *words)
    for number in range(1, 1000):
        out = tmp_path / str(number)
        with monkeypatch.context() as patch:
            calls = kill_at(patch, number, halfway)
            with contextlib.suppress(Killed):
                run_main(out, *words)
        if len(calls) < number:
            return len(calls)
        result, state = run_main(out, *words)
        assert same_state(state, expected), f'killed at write {number}, of {calls[-1]}'
        assert len((out / 'log.jsonl').read_text().splitlines()) == result['epochs'] == whole['epochs']
        for key in ('accuracy', 'best_accuracy', 'zeros', 'macs_nonzero'):
            assert result[key] == whole[key]


@pytest.mark.parametrize('name', NAMES)
def test_killed_after_any_write_it_ends_bit_identical(name, tmp_path, monkeypatch):
    # at least: arguments, log and checkpoint of two epochs, model, result
    epochs = 1 if any('finetune' in word for word in QUICK.get(name, [])) else 2  # more stages come behind
    words = [f'--method={name}', '--ptarget=0.8', f'--epochs={epochs}', *QUICK.get(name, [])]
    assert kill_everywhere(tmp_path, monkeypatch, words) >= 7


def test_killed_within_any_write_it_ends_bit_identical(tmp_path, monkeypatch):
    assert kill_everywhere(tmp_path, monkeypatch, ['--epochs=2'], halfway=True) == 7


@pytest.mark.parametrize('name', NAMES)
def test_other_image_sizes_channels_groups_and_amp(name):
    """40x40 images, one channel, two parameter groups, bfloat16, and no call to CUDA on a CPU."""
    args = parse([*TINY, f'--method={name}', '--ptarget=0.8', '--no-wd-all'])
    method = methods.load(name)(args)
    torch.manual_seed(0)
    model = archs.build('resnet20', 10, width=4, in_channels=1)
    method.prepare(model, 6)
    assert not torch.cuda.is_initialized()
    groups = method.param_groups(model)
    assert len(groups) >= 2
    grouped = [id(p) for group in groups for p in group['params']]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())  # each parameter once
    optimizer = torch.optim.SGD(groups, 0.05, momentum=0.9)
    x, y = torch.randn(6, 1, 40, 40), torch.randint(0, 10, (6,))
    for step in range(6):
        method.before_step(step)
        with torch.autocast('cpu', torch.bfloat16, enabled=step % 2 == 1):
            loss = F.cross_entropy(model(x), y)
        extra = method.loss()
        optimizer.zero_grad()
        (loss if extra is None else loss + extra).backward()
        method.after_backward(step)
        optimizer.step()
        method.after_step(step, (x, y))
        if step % 2:
            method.after_epoch(step // 2)
    model.eval()
    before = model(x)
    model = method.finalize(model)
    assert torch.equal(model(x), before)
    assert not torch.cuda.is_initialized()


def test_weight_decay_is_for_weights_unless_asked():
    model = archs.build('resnet20', 10, width=4)
    weights = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    for words, decayed in ((['--wd=1e-3'], weights), (['--wd=1e-3', '--wd-all'], sum(p.numel() for p in model.parameters()))):
        groups = Method(parse(words)).param_groups(model)
        assert sum(p.numel() for group in groups if group['weight_decay'] == 1e-3 for p in group['params']) == decayed


# --------------------------------------------------------------------------------------------------- pipelines of stages


class TwoStages(Method):
    """Trains, thresholds by hand, and trains again: what lottery tickets or fine-tuning do."""

    def run(self, job):
        job.fit(self, 'first', epochs=2)
        with torch.no_grad():
            job.model.fc.weight[torch.rand(job.model.fc.weight.shape) < 0.5] = 0  # draws from the global generator
        job.fit(self, 'second', epochs=2, lr=0.01)


def test_a_pipeline_resumes_in_every_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(methods, 'load', lambda name: TwoStages)
    assert kill_everywhere(tmp_path, monkeypatch, []) == 11  # arguments, log and checkpoint of four epochs, model, result


def test_failure_is_recorded_with_its_reason(tmp_path, monkeypatch, capsys):
    class Fails(Method):
        def after_epoch(self, epoch):
            raise ValueError('the moon is wrong')

    monkeypatch.setattr(methods, 'load', lambda name: Fails)
    with pytest.raises(SystemExit) as stop:
        run_main(tmp_path)
    assert stop.value.code == 'main.py: error: the moon is wrong'
    result = json.loads((tmp_path / 'result.json').read_text())
    assert result['status'] == 'failed' and 'the moon is wrong' in result['reason'] and not (tmp_path / 'model.pt').exists()
    monkeypatch.setattr(methods, 'load', lambda name: Method)
    program.main([*TINY, f'--out={tmp_path}'])  # mended, the same command runs it
    assert read_run(tmp_path)[0]['status'] == 'finished'


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(SystemExit, match='the loss is not finite in step'):
        run_main(tmp_path, '--lr=1e30', '--clip=0', '--method=dense')
