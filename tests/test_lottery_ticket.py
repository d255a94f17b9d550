"""The lottery ticket: the schedule by hand, rounds that reset exactly, tickets, and rounds shared among runs."""

import json

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, log_of, resume_everywhere, run_main, same_state, weights_of
from torch import nn

from args import parse
from methods import LotteryTicketPruner
from methods.lottery_ticket import Method, sparsity_at

QUICK = ['--method=lottery_ticket', '--ptarget=0.8', '--prune-iterations=2', '--epochs=1', '--limit-train=64']


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))


def train(model, optimizer, steps=3):
    torch.manual_seed(1)
    for _ in range(steps):
        loss = F.cross_entropy(model(torch.randn(10, 8)), torch.randint(0, 4, (10,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


CONFIG = [{'prune_iterations': 5, 'sparsity': 0.8, 'op_types': ['default']}]


def test_schedule_by_hand():
    # each round keeps 0.2^(1/5) = 0.7248 of what is left
    assert [sparsity_at(k, 0.8, 5) for k in range(6)] == pytest.approx([0, 0.2752, 0.4747, 0.6193, 0.7241, 0.8], abs=5e-5)
    assert sparsity_at(5, 0.8, 5) == 0.8  # exactly
    tenths = [sparsity_at(k, 0.96, 10) for k in range(11)]
    assert [round(100 * s) for s in tenths] == [0, 28, 47, 62, 72, 80, 86, 89, 92, 94, 96]


@pytest.mark.parametrize('reset', [True, False])
@pytest.mark.parametrize('kind', ['sgd', 'adam', None])
def test_rounds(kind, reset):
    model = small()
    make = {'sgd': lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), 'adam': lambda p: torch.optim.Adam(p, 0.01)}
    optimizer = make[kind or 'sgd'](model.parameters())
    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruner = LotteryTicketPruner(model, CONFIG, optimizer if kind else None, reset_weights=reset)
    assert pruner.compress() is model
    assert list(pruner.get_prune_iterations()) == [0, 1, 2, 3, 4, 5]
    for number in pruner.get_prune_iterations():
        before = {name: layer.weight.detach().clone() for name, layer in pruner.layers.items()}
        pruner.prune_iteration_start()
        for name, layer in pruner.layers.items():
            n, mask = layer.weight.numel(), pruner.masks[name]['weight']
            assert int((~mask).sum()) == int(n * [0, 0.2752, 0.4747, 0.6193, 0.7241, 0.8][number])
            assert number == 0 or before[name][~mask].abs().max() <= before[name][mask].abs().min()
            assert pruner.masks[name]['bias'] is None
            start = initial[f'{name}.weight'] if reset else before[name]
            assert number == 0 or torch.equal(layer.weight, start * mask)
        if number and reset:
            assert torch.equal(model[1].running_mean, initial['1.running_mean'])
            assert torch.equal(model[0].bias, initial['0.bias'])
            assert kind is None or not optimizer.state  # its momentum is gone too
        train(model, optimizer)
        pruner.step()
        zeros = [int((layer.weight == 0).sum()) for layer in pruner.layers.values()]
        assert zeros == [int((~masks['weight']).sum()) for masks in pruner.masks.values()]
    with pytest.raises(ValueError, match='all 5 rounds'):
        pruner.prune_iteration_start()


@pytest.mark.parametrize('kind', ['sgd', 'adam', None])
def test_rounds_hold_their_masks_without_compress(kind):
    model = small()
    make = {'sgd': lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), 'adam': lambda p: torch.optim.Adam(p, 0.01)}
    optimizer = make[kind or 'sgd'](model.parameters())
    pruner = LotteryTicketPruner(model, CONFIG, optimizer if kind else None)
    for number in pruner.get_prune_iterations():
        pruner.prune_iteration_start()
        train(model, optimizer)
        zeros = [int((layer.weight == 0).sum()) for layer in pruner.layers.values()]
        assert zeros == [int(n * [0, 0.2752, 0.4747, 0.6193, 0.7241, 0.8][number]) for n in (128, 64)]
    assert all(len(layer._forward_pre_hooks) == 1 for layer in pruner.layers.values())  # one, whatever the number of rounds
    pruner.unhook()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_scheduler_is_reset_too():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    pruner = LotteryTicketPruner(model, CONFIG, optimizer, scheduler)
    pruner.compress()
    for _ in range(3):
        pruner.prune_iteration_start()
        assert optimizer.param_groups[0]['lr'] == 0.1 and scheduler.last_epoch == 0
        for _ in range(2):
            train(model, optimizer, 1)
            scheduler.step()
        assert optimizer.param_groups[0]['lr'] == pytest.approx(0.001)


def test_late_rewinding_and_the_exported_ticket(tmp_path):
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    pruner = LotteryTicketPruner(model, CONFIG, optimizer)
    pruner.compress()
    pruner.prune_iteration_start()
    train(model, optimizer)
    point = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruner.save_rewind_point()
    train(model, optimizer)
    pruner.prune_iteration_start()
    mask = pruner.masks['0']['weight']
    assert torch.equal(model[0].weight, point['0.weight'] * mask) and torch.equal(model[1].weight, point['1.weight'])
    train(model, optimizer)
    pruner.export_ticket(tmp_path / 'ticket.pt', tmp_path / 'mask.pt')
    pruner.export_model(tmp_path / 'trained.pt', tmp_path / 'mask too.pt')
    ticket, trained_too = (torch.load(tmp_path / name, weights_only=True) for name in ('ticket.pt', 'trained.pt'))
    assert torch.equal(ticket['0.weight'], point['0.weight'] * mask) and torch.equal(ticket['3.bias'], point['3.bias'])
    assert torch.equal(trained_too['0.weight'] == 0, ~mask) and not torch.equal(trained_too['0.weight'], ticket['0.weight'])
    for name in ('mask.pt', 'mask too.pt'):
        assert torch.equal(torch.load(tmp_path / name, weights_only=True)['0']['weight'], mask.float())


def test_prune_iterations_must_agree():
    entries = [{'prune_iterations': 5, 'sparsity': 0.8, 'op_names': ['0']}]
    with pytest.raises(ValueError, match=r'equal in all entries of config_list, got \[3, 5\]'):
        LotteryTicketPruner(small(), [*entries, {'prune_iterations': 3, 'sparsity': 0.8, 'op_names': ['3']}])
    for wrong in (0, 2.5, '5', True):
        with pytest.raises(ValueError, match='prune_iterations must be a whole number, 1 or more'):
            LotteryTicketPruner(small(), [entries[0] | {'prune_iterations': wrong}])
    two = LotteryTicketPruner(small(), [*entries, {'prune_iterations': 5, 'sparsity': 0.5, 'op_names': ['3']}])
    for _ in range(6):
        two.prune_iteration_start()
    assert [int((~masks['weight']).sum()) for masks in two.masks.values()] == [int(0.8 * 128), 32]


# ----------------------------------------------------------------------------------------------------- in the shared loop


@pytest.mark.parametrize('epoch', [0, 1])
def test_the_run_leaves_rounds_and_the_ticket(epoch, tmp_path):
    result, state = run_main(tmp_path, *QUICK, '--epochs=2', f'--rewind-epoch={epoch}')
    assert [(line['stage'], line['epoch']) for line in log_of(tmp_path)] == [(f'round{r}', e) for r in range(3) for e in (1, 2)]
    rounds = json.loads((tmp_path / 'rounds.json').read_text())
    accuracies = [line['accuracy'] for line in log_of(tmp_path)]
    assert [(line['round'], line['accuracy']) for line in rounds] == list(enumerate(accuracies[1::2]))
    assert [line['best_accuracy'] for line in rounds] == [max(accuracies[i : i + 2]) for i in (0, 2, 4)]
    for target, line in zip((0, 1 - 0.2**0.5, 0.8), rounds, strict=True):
        # rounded down in each of the 20 convolutions and the linear layer
        assert target - 21 / result['weights'] < line['sparsity'] <= target
    for name, (zeros, n, *_) in result['layers'].items():
        assert zeros == int(0.8 * n), name
    ticket = torch.load(tmp_path / 'ticket.pt', weights_only=True)
    assert list(ticket) == list(state) and torch.equal(weights_of(ticket) == 0, weights_of(state) == 0)
    first = torch.load(tmp_path / 'stage-round0.pt', weights_only=True)
    if epoch:
        assert torch.equal(ticket['bn1.running_mean'], first['method']['rewind']['bn1.running_mean'])
        assert ticket['bn1.running_mean'].any() and not same_state(first['model'], first['method']['rewind'])
    else:
        assert not ticket['bn1.running_mean'].any()  # as it was initialised


def test_a_killed_run_ends_the_same_late_rewinding_too(tmp_path):
    # arguments; log, checkpoint and rounds.json of two rounds; ticket, model, result
    assert resume_everywhere(tmp_path / 'run', [*QUICK, '--rewind-epoch=1', '--prune-iterations=1']) == 10


def test_rows_share_their_rounds(tmp_path, trained):
    whole, state = run_main(tmp_path / 'alone', *QUICK)
    assert trained == ['round0', 'round1', 'round2']
    for last in range(3):
        trained.clear()
        part, same = run_main(tmp_path / str(last), *QUICK, f'--last-round={last}', f'--chain={tmp_path}/chain')
        assert trained == [f'round{last}']  # the others are taken over
        rounds = json.loads((tmp_path / str(last) / 'rounds.json').read_text())
        assert rounds == json.loads((tmp_path / 'alone' / 'rounds.json').read_text())[: last + 1]
    trained.clear()
    run_main(tmp_path / 'again', *QUICK, '--last-round=1', f'--chain={tmp_path}/chain')
    assert trained == ['round1']  # a run trains its last round itself
    assert same_state(same, state) and part['accuracy'] == whole['accuracy'] and part['epochs'] == 3
    tickets = [torch.load(tmp_path / name / 'ticket.pt', weights_only=True) for name in ('alone', '2')]
    assert same_state(*tickets)
    with pytest.raises(SystemExit, match=r'other arguments \(--ptarget 0.8 -> 0.9\); take another --chain'):
        run_main(tmp_path / 'other', *QUICK, '--ptarget=0.9', f'--chain={tmp_path}/chain')


def test_settings_that_cannot_work():
    with pytest.raises(ValueError, match='--rewind-epoch 4 is not within the 3 epochs'):
        Method(parse([*TINY, '--method=lottery_ticket', '--rewind-epoch=4']))
    with pytest.raises(ValueError, match='--last-round 3 is above --prune-iterations 2'):
        Method(parse([*TINY, '--method=lottery_ticket', '--last-round=3', '--prune-iterations=2']))
