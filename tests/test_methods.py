"""The contract that every method keeps; a new file in methods/ is tested here without being named."""

import importlib
import json
from argparse import Namespace

import pytest
import torch
from helpers import (
    EXACT,
    QUICK,
    TINY,
    assert_ends_as,
    kill_everywhere,
    read_run,
    resume_everywhere,
    run_main,
    run_with_copies,
    same_state,
)

import archs
import main as program
import methods
from args import parse
from harness.training import make_optimizer, one_step
from methods import Method
from methods._algorithms import ALGORITHMS
from sparse_utils import count_zeros

NAMES = methods.names()


def test_every_method_is_a_method():
    assert {'dense', 'feather'} <= set(NAMES)
    for name in NAMES:
        assert issubclass(methods.load(name), Method)
    with pytest.raises(ValueError, match='did you mean feather'):
        methods.load('fether')


def test_the_pruners_that_can_be_imported_are_those_of_the_files():
    """Classes that are called ...Pruner: the fourteen of NNI's document, and the control that it does not have."""
    found = {}
    for name in NAMES:
        module = importlib.import_module(f'methods.{name}')
        own = [cls for cls in vars(module).values() if isinstance(cls, type) and cls.__module__ == module.__name__]
        found |= {cls.__name__: name for cls in own if cls.__name__.endswith('Pruner')}
    assert found.pop('RandomFilterPruner') == 'random_filter'
    assert methods.PRUNERS == found and len(found) == 14
    assert all(getattr(methods, name).__name__ == name for name in found)
    assert {cls.__name__ for cls in ALGORITHMS.values()} < set(found)


@pytest.fixture(scope='module', params=NAMES)
def run(request, tmp_path_factory):
    """One short run of each method, shared by the tests below: its words, folder, result, state, what kills would leave."""
    name = request.param
    epochs = 1 if any('finetune' in word for word in QUICK.get(name, [])) else 2  # more stages come behind
    words = [f'--method={name}', '--ptarget=0.8', f'--epochs={epochs}', *QUICK.get(name, []), '--seed=7']
    out = tmp_path_factory.mktemp(name) / 'run'
    result, state, copies = run_with_copies(out, words)
    return Namespace(name=name, words=words, out=out, result=result, state=state, copies=copies)


def test_run_leaves_what_it_says(run):
    result, state = run.result, run.state
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
    if run.name in EXACT:
        assert result['zeros'] == EXACT[run.name](result['weights'], 0.8)
    assert result['accuracy'] == last_line(run.out)['accuracy']  # the finished network is the one of the last epoch


def last_line(folder):
    return json.loads((folder / 'log.jsonl').read_text().splitlines()[-1])


def test_another_seed_gives_another_result(run, tmp_path):
    other = run_main(tmp_path / 'other', *run.words[:-1], '--seed=8')[1]
    assert not same_state(run.state, other)


def test_killed_after_any_write_it_ends_bit_identical(run):
    """After the first write nothing is trained yet: the same seed gives the same result."""
    assert len(run.copies) >= 7  # arguments, log and checkpoint of two epochs, model, result
    assert {path.name for path in run.copies[0].iterdir()} <= {'args.json', 'lock'}
    for copy in run.copies:
        assert_ends_as((run.result, run.state), copy, run.words)


def test_killed_within_any_write_it_ends_bit_identical(tmp_path, monkeypatch):
    """Here the process really ends at the write, in the middle of a file."""
    assert kill_everywhere(tmp_path, monkeypatch, ['--epochs=2'], halfway=True) == 7


@pytest.mark.parametrize('name', NAMES)
def test_other_image_sizes_channels_groups_and_amp(name):
    """40x40 images, one channel, two parameter groups, bfloat16, and no call to CUDA on a CPU."""
    args = parse([*TINY, f'--method={name}', '--ptarget=0.8', '--no-wd-all'])
    method = methods.load(name)(args)
    torch.manual_seed(0)
    model = archs.build('resnet20', 10, width=4, in_channels=1)
    method.prepare(model, 6, method.args)
    assert not torch.cuda.is_initialized()
    groups = method.param_groups(model, method.args)
    assert len(groups) >= 2
    grouped = [id(p) for group in groups for p in group['params']]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())  # each parameter once
    batch = torch.randn(6, 1, 40, 40), torch.randint(0, 10, (6,))
    fit = Namespace(args=args, batches=2, model=model, forward=model, replayed=None, optimizer=make_optimizer(args, groups))
    fit.criterion, fit.example = torch.nn.CrossEntropyLoss(), batch[0][:1]
    fit.autocast = torch.autocast('cpu', torch.bfloat16)
    method.attach(fit)
    for step in range(6):
        fit.autocast = torch.autocast('cpu', torch.bfloat16, enabled=step % 2 == 1)
        one_step(method, fit, step, batch)
        if step % 2:
            method.after_epoch(step // 2)
    model.eval()
    before = model(batch[0])
    model = method.finalize(model)
    assert torch.equal(model(batch[0]), before)
    assert not torch.cuda.is_initialized()


def test_weight_decay_is_for_weights_unless_asked():
    model = archs.build('resnet20', 10, width=4)
    weights = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    for words, decayed in ((['--wd=1e-3'], weights), (['--wd=1e-3', '--wd-all'], sum(p.numel() for p in model.parameters()))):
        args = parse(words)
        groups = Method(args).param_groups(model, args)
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
    assert resume_everywhere(tmp_path / 'run', []) == 11  # arguments, log and checkpoint of four epochs, model, result


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
