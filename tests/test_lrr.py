"""Learning-rate rewinding: the rounds by hand, exact counts, rewound weights, and rounds shared among targets."""

import contextlib
import json
import shutil

import pytest
import torch
from helpers import TINY, Killed, kill_at, log_of, resume_everywhere, run_main, same_state, weights_of

import main as program
import methods.lrr
from args import parse
from methods.lrr import Method, rounds

QUICK = ['--method=lrr', '--rate=0.5', '--epochs=1', '--limit-train=64']


def stages_of(folder):
    numbers = range(sum(1 for _ in folder.glob('stage-round*.pt')))
    files = [*(folder / f'stage-round{r}.pt' for r in numbers), folder / 'checkpoint.pt']
    return [torch.load(file, weights_only=True) for file in files]


def test_rounds_by_hand():
    ninety = rounds(0.9)
    assert len(ninety) == 12 and ninety[0] == 0 and ninety[-1] == 0.9  # 0.8^10 = 0.107, 0.8^11 = 0.086
    assert ninety[1:4] == pytest.approx([0.2, 0.36, 0.488]) and ninety[10] == pytest.approx(0.8926, abs=1e-4)
    assert len(rounds(0.8)) == 9 and rounds(0.1) == [0, 0.1] and rounds(0.5, 0.5) == [0, 0.5]
    assert rounds(0.8, 0.5) == [0, 0.5, 0.75, 0.8]
    assert rounds(1 - 0.8**3) == pytest.approx([0, 0.2, 0.36, 0.488])  # a target that full rounds reach takes no round more


def test_each_round_prunes_smallest_survivors_and_the_last_meets_the_target(tmp_path):
    result, state = run_main(tmp_path, *QUICK, '--ptarget=0.8', '--epochs=2')
    n = result['weights']
    assert result['zeros'] == round(0.8 * n) and result['epochs'] == 8
    assert [(line['stage'], line['epoch']) for line in log_of(tmp_path)] == [(f'round{r}', e) for r in range(4) for e in (1, 2)]
    lrs = [line['lr'] for line in log_of(tmp_path)]
    assert lrs == lrs[:2] * 4 and lrs[0] > lrs[1]  # the schedule starts anew
    ends = [weights_of(end['model']) for end in stages_of(tmp_path)]
    for before, after, target in zip(ends[:-1], ends[1:], rounds(0.8, 0.5)[1:], strict=True):
        pruned = after == 0
        assert int(pruned.sum()) == round(target * n)
        assert before[pruned].abs().max() <= before[~pruned].abs().min()  # so what was zero stays zero
    for end in stages_of(tmp_path)[1:]:
        masks = torch.cat([mask.flatten() for mask in end['method']['masks'].values()])
        assert masks.dtype == torch.bool and int((~masks).sum()) == int((weights_of(end['model']) == 0).sum())


@pytest.mark.parametrize('epoch', [0, 1, 2])
def test_rewound_weights(epoch, tmp_path, monkeypatch):
    starts, ends, fit, save = [], {}, program.Job.fit, program.Job.save

    def watched_fit(job, method, stage):
        starts.append({name: tensor.clone() for name, tensor in job.model.state_dict().items()})
        fit(job, method, stage)

    def watched_save(job, method, optimizer, stage, done):
        ends[stage, done] = {name: tensor.clone() for name, tensor in job.model.state_dict().items()}
        save(job, method, optimizer, stage, done)

    monkeypatch.setattr(program.Job, 'fit', watched_fit)
    monkeypatch.setattr(program.Job, 'save', watched_save)
    run_main(tmp_path, *QUICK, '--ptarget=0.6', '--epochs=2', f'--rewind-epoch={epoch}')
    expected = starts[0] if epoch == 0 else ends['round0', epoch]
    for number, start in enumerate(starts[1:], 1):
        trained = weights_of(ends[f'round{number - 1}', 2])
        kept = weights_of(start) != 0
        assert int((~kept).sum()) == round(rounds(0.6, 0.5)[number] * len(kept))
        assert trained[~kept].abs().max() <= trained[kept].abs().min()  # pruned by what was trained,
        assert torch.equal(weights_of(start), weights_of(expected) * kept)  # and then set back
        for name, tensor in start.items():
            assert tensor.dim() > 1 or torch.equal(tensor, expected[name])


def test_a_killed_run_rewinds_to_the_same_weights(tmp_path):
    assert resume_everywhere(tmp_path / 'run', [*QUICK, '--ptarget=0.6', '--rewind-epoch=1']) == 9


@pytest.mark.parametrize('words', [[], ['--rewind-epoch=1'], ['--rewind-epoch=0', '--optimizer=adam', '--lr=0.01']])
def test_a_shared_chain_changes_nothing(words, tmp_path, trained):
    words = [*QUICK, *words, '--epochs=2']
    chain = [f'--chain={tmp_path}/chain-s{{seed}}', '--seed=3']
    alone, state = run_main(tmp_path / 'alone', *words, '--ptarget=0.8', '--seed=3')
    run_main(tmp_path / 'less', *words, '--ptarget=0.6', *chain)
    folder = tmp_path / 'chain-s3'
    assert sorted(file.name for file in folder.iterdir()) == ['round0.pt', 'round1.pt']
    trained.clear()
    shared, same = run_main(tmp_path / 'shared', *words, '--ptarget=0.8', *chain)
    assert trained == ['round2'] * 2 + ['round3'] * 2  # the rounds that were missing
    assert sorted(file.name for file in folder.iterdir()) == ['round0.pt', 'round1.pt', 'round2.pt']
    assert same_state(same, state) and log_of(tmp_path / 'shared') == log_of(tmp_path / 'alone')
    for key in ('accuracy', 'best_accuracy', 'zeros', 'epochs'):
        assert shared[key] == alone[key]
    trained.clear()
    again, least = run_main(tmp_path / 'least', *words, '--ptarget=0.3', *chain)  # branches off round 0
    assert trained == ['round1'] * 2 and again['zeros'] == round(0.3 * again['weights'])
    assert same_state(least, run_main(tmp_path / 'least alone', *words, '--ptarget=0.3', '--seed=3')[1])
    assert again['seconds'] > sum(json.loads(line)['seconds'] for line in (tmp_path / 'less/log.jsonl').open()) / 3


def test_a_run_with_a_chain_resumes_wherever_it_is_killed(tmp_path, monkeypatch):
    words = [*QUICK, '--ptarget=0.8']
    expected = run_main(tmp_path / 'alone', *words)[1]
    run_main(tmp_path / 'less', *words[:-1], '--ptarget=0.3', f'--chain={tmp_path}/chain')  # leaves round 0
    for number in range(1, 100):
        chain, out = tmp_path / f'chain{number}', tmp_path / str(number)
        shutil.copytree(tmp_path / 'chain', chain)
        with monkeypatch.context() as patch:
            calls = kill_at(patch, number)
            with contextlib.suppress(Killed):
                run_main(out, *words, f'--chain={chain}')
        if len(calls) < number:
            break
        assert same_state(run_main(out, *words, f'--chain={chain}')[1], expected), f'killed at {number}, {calls[-1]}'
        assert log_of(out) == log_of(tmp_path / 'alone')
        assert sorted(file.name for file in chain.iterdir()) == ['round0.pt', 'round1.pt', 'round2.pt']
    assert number == 14  # arguments; log and stage; log and checkpoint of three epochs, two rounds; model, result; one more

    # a chain that grew, or went away, while the run was interrupted is nothing to it
    for other in (tmp_path / 'chain12', tmp_path / 'nothing'):
        out, chain = tmp_path / f'grown{other.name}', tmp_path / f'for {other.name}'
        shutil.copytree(tmp_path / 'chain', chain)
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            kill_at(patch, 5)  # round 1 is trained, and not yet kept
            run_main(out, *words, f'--chain={chain}')
        shutil.rmtree(chain)
        if other.exists():
            shutil.copytree(other, chain)
        assert same_state(run_main(out, *words, f'--chain={chain}')[1], expected)


def test_a_chain_of_other_arguments_is_refused(tmp_path):
    chain = f'--chain={tmp_path}/chain'
    run_main(tmp_path / 'one', *QUICK, '--ptarget=0.3', chain)
    before = [file.read_bytes() for file in (tmp_path / 'chain').iterdir()]
    with pytest.raises(SystemExit, match=r'other arguments \(--epochs 1 -> 2; --lr 0.1 -> 0.05\); take another --chain'):
        run_main(tmp_path / 'two', *QUICK, '--ptarget=0.6', '--lr=0.05', '--epochs=2', chain)
    assert [file.read_bytes() for file in (tmp_path / 'chain').iterdir()] == before
    run_main(tmp_path / 'three', *QUICK, '--ptarget=0.6', chain, '--sname=other')  # place and target may differ


def test_settings_that_cannot_work():
    with pytest.raises(ValueError, match='--rewind-epoch 4 is not within the 3 epochs'):
        Method(parse([*TINY, '--method=lrr', '--rewind-epoch=4']))
    assert methods.lrr.Method(parse([*TINY, '--method=lrr', '--chain=x-{seed}', '--seed=5'])).chain.folder.name == 'x-5'
