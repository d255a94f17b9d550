"""NNI's one-shot pruners and AGP: the exact cases of NNI's own tests, schedules by hand, its document's samples, and runs."""

import copy
import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, run_main
from torch import nn
from torch.nn.utils import prune

import archs
import methods
from args import parse
from deploy.shrinking import dependency_groups, shrink
from methods import (
    ActivationAPoZRankFilterPruner,
    ActivationMeanRankFilterPruner,
    AGP_Pruner,
    FPGMPruner,
    L1FilterPruner,
    L2FilterPruner,
    LevelPruner,
    LotteryTicketPruner,
    SlimPruner,
    TaylorFOWeightFilterPruner,
)
from methods._densities import kept_counts
from methods.agp import sparsity_at
from methods.fpgm import distances
from methods.random_filter import RandomFilterPruner
from pruners import processes

ONE_SHOT = [LevelPruner, SlimPruner, FPGMPruner, L1FilterPruner, L2FilterPruner]
ONE_SHOT += [ActivationAPoZRankFilterPruner, ActivationMeanRankFilterPruner, TaylorFOWeightFilterPruner]


class Model(nn.Module):
    """The network of NNI's tests of exact masks, on 28x28 images."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 5, 5), nn.BatchNorm2d(5)
        self.conv2, self.bn2 = nn.Conv2d(5, 10, 5), nn.BatchNorm2d(10)
        self.fc1, self.fc2 = nn.Linear(160, 100), nn.Linear(100, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


def constant(conv, values):
    """Let each filter be constant."""
    conv.weight.data.copy_(torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1).expand(conv.weight.shape))


def pruned(pruner, name):
    """The numbers of the filters that are pruned, after checking that a filter goes as a whole, with its bias."""
    weight, bias = pruner.masks[name]['weight'], pruner.masks[name]['bias']
    kept = weight if weight.dim() == 1 else weight.flatten(1).any(1)
    assert torch.equal(weight, kept.view(-1, *[1] * (weight.dim() - 1)).expand(weight.shape))
    assert bias is None or torch.equal(bias, kept)
    return (~kept).nonzero().flatten().tolist()


def convs(share, *names):
    return [{'sparsity': share, 'op_types': ['Conv2d'], 'op_names': list(names)}]


def step(model, optimizer=None, batch=2):
    """A training step, of the optimizer if there is one."""
    model.train()
    model.zero_grad()
    F.cross_entropy(model(torch.randn(batch, 1, 28, 28)), torch.randint(0, 10, (batch,))).backward()
    if optimizer is not None:
        optimizer.step()


# --------------------------------------------------------------------------------------------------------- one-shot criteria


def test_level_by_hand():
    model = nn.Linear(5, 2)
    model.weight.data.copy_(torch.tensor([[0.1, -0.2, 3.0, 4.0, 5.0], [-6.0, 7.0, 8.0, 9.0, 0.05]]))
    pruner = LevelPruner(model, [{'sparsity': 0.35, 'op_types': ['default']}])
    assert pruner.compress() is model
    assert (model.weight == 0).nonzero().tolist() == [[0, 0], [0, 1], [1, 4]]  # 3 = floor(3.5) of 10, the bias stays
    assert model.bias.all() and pruner.masks['']['bias'] is None
    for share, count in ((0.5, 50), (0.99, 99), (0.995, 99)):  # a threshold would prune all equals, or none
        equal = nn.Linear(10, 10)
        nn.init.constant_(equal.weight, 0.3)
        LevelPruner(equal, [{'sparsity': share, 'op_types': ['Linear']}]).compress()
        assert (equal.weight == 0).flatten().tolist() == [True] * count + [False] * (100 - count)


def test_level_with_one_ranking():
    model = nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 4))
    model[0].weight.data.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    model[1].weight.data.copy_(torch.tensor([[5.0], [6.0], [7.0], [8.0]]))
    LevelPruner(model, [{'sparsity': 0.5, 'op_types': ['Linear']}], global_sort=True).compress()
    assert model[0].weight.tolist() == [[0, 0, 0, 4]]  # each layer keeps one weight
    assert model[1].weight.flatten().tolist() == [0, 6, 7, 8]
    with pytest.raises(ValueError, match='one sparsity'):
        entries = [{'sparsity': 0.5, 'op_names': ['0']}, {'sparsity': 0.6, 'op_names': ['1']}]
        LevelPruner(model, entries, global_sort=True)


def test_fpgm_exact():
    model = Model()
    constant(model.conv2, range(1, 11))
    for share, expected in ((0.2, [4, 5]), (0.6, [2, 3, 4, 5, 6, 7])):
        trial = copy.deepcopy(model)
        pruner = FPGMPruner(trial, convs(share, 'conv2'))
        assert pruned(pruner, 'conv2') == []  # before compress()
        pruner.compress()
        assert pruned(pruner, 'conv2') == expected
        assert (trial.conv2.weight == 0).all((1, 2, 3)).nonzero().flatten().tolist() == expected
    last_wins = FPGMPruner(model, convs(0.6, 'conv2') + convs(0.2, 'conv2'))
    last_wins.compress()
    assert pruned(last_wins, 'conv2') == [4, 5]


def test_fpgm_distances_are_those_of_a_loop():
    torch.manual_seed(0)
    filters = torch.randn(30, 75)
    filters[7] = filters[3] + 1e-4  # near ones: in single precision the matrix products would not see their distance
    expected = torch.tensor([sum((a - b).double().norm() for b in filters) for a in filters])
    torch.testing.assert_close(distances(filters).double(), expected.double(), rtol=1e-6, atol=0)
    assert torch.equal(distances(torch.ones(4, 9)), torch.zeros(4))


def test_l1_exact():
    model = Model()
    constant(model.conv1, range(5))
    constant(model.conv2, [-value for value in range(10)])
    pruner = L1FilterPruner(model, convs(0.2, 'conv1') + convs(0.6, 'conv2'))
    pruner.compress()
    assert pruned(pruner, 'conv1') == [0] and pruned(pruner, 'conv2') == [0, 1, 2, 3, 4, 5]


def test_l1_and_l2_differ_where_they_should():
    conv = nn.Conv2d(1, 2, 2, bias=False)
    conv.weight.data.copy_(torch.tensor([[[[3.0, 0], [0, 0]]], [[[1.0, 1], [1, 1]]]]))  # L1: 3 and 4; L2: 3 and 2
    for pruner, expected in ((L1FilterPruner, [0]), (L2FilterPruner, [1])):
        pruner = pruner(copy.deepcopy(conv), [{'sparsity': 0.5, 'op_types': ['Conv2d']}])
        pruner.compress()
        assert pruned(pruner, '') == expected


@pytest.mark.parametrize('sign', [1, -1])
@pytest.mark.parametrize('share', [0.2, 0.6])
def test_slim_exact(sign, share):
    model = nn.Sequential(nn.Conv2d(1, 5, 1), nn.BatchNorm2d(5), nn.Conv2d(5, 5, 1), nn.BatchNorm2d(5))
    for norm in (model[1], model[3]):
        norm.weight.data.copy_(sign * torch.arange(5.0))
        nn.init.ones_(norm.bias)
    pruner = SlimPruner(model, [{'sparsity': share, 'op_types': ['BatchNorm2d']}])
    pruner.compress()
    expected = {0.2: [0], 0.6: [0, 1, 2]}[share]
    for name, norm, conv in (('1', model[1], model[0]), ('3', model[3], model[2])):
        assert pruned(pruner, name) == expected
        assert (norm.bias == 0).nonzero().flatten().tolist() == expected
        assert (conv.weight == 0).all((1, 2, 3)).nonzero().flatten().tolist() == expected
        assert (conv.bias == 0).nonzero().flatten().tolist() == expected


def test_slim_ranks_all_channels_together_and_empties_no_layer():
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6))
    config = [{'sparsity': 0.7, 'op_types': ['BatchNorm2d']}]
    fresh = SlimPruner(copy.deepcopy(model), config)  # all scales 1: a threshold would prune everything
    fresh.compress()
    assert pruned(fresh, '1') == [0, 1, 2] and pruned(fresh, '3') == [0, 1, 2, 3]
    model[1].weight.data.copy_(torch.tensor([0.4, 0.1, 0.2, 0.3]))
    model[3].weight.data.copy_(torch.tensor([0.5, 0.6, 0.7, 0.8, 0.9, 1.0]))
    for options, expected in (({}, [[1, 2, 3], [0, 1, 2, 3]]), ({'global_sort': False}, [[1, 2], [0, 1, 2, 3]])):
        pruner = SlimPruner(copy.deepcopy(model), config, **options)
        pruner.compress()
        assert [pruned(pruner, '1'), pruned(pruner, '3')] == expected
    with pytest.raises(ValueError, match='one sparsity'):
        SlimPruner(model, [{'sparsity': 0.7, 'op_names': ['1']}, {'sparsity': 0.2, 'op_names': ['3']}])


def taylor_model():
    model = Model()
    constant(model.conv1, range(5))
    constant(model.conv2, range(10, 0, -1))
    return model


def taylor_gradients(model):
    """Gradients of +1 and -1, filter by filter."""
    for conv in (model.conv1, model.conv2):
        signs = torch.tensor([(-1.0) ** i for i in range(len(conv.weight))])
        (conv.weight * signs.view(-1, 1, 1, 1)).sum().backward()


@pytest.mark.parametrize('known', [True, False])
def test_taylor_exact(known):
    model = taylor_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.001)
    pruner = TaylorFOWeightFilterPruner(model, convs(0.2, 'conv1') + convs(0.6, 'conv2'), optimizer if known else None)
    pruner.compress()
    assert pruned(pruner, 'conv1') == []
    taylor_gradients(model)
    optimizer.step()
    assert pruned(pruner, 'conv1') == [0] and pruned(pruner, 'conv2') == [4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize('known', [True, False])
def test_taylor_with_one_ranking_of_all_filters(known):
    # (w g)^2 is 25 w^2 in conv1, 125 w^2 in conv2: 0, 25, 100, 225 and 125, 500, 1125 are least, of 4 * 25 + 3 * 125 weights;
    # 400, the last of conv1, is protected, and the next would make it 600 of 1375, which is above 40 %
    model = taylor_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.001)
    config = [{'sparsity': 0.4, 'op_types': ['Conv2d']}]
    pruner = TaylorFOWeightFilterPruner(model, config, optimizer if known else None, global_sort=True)
    pruner.compress()
    taylor_gradients(model)
    optimizer.step()
    assert pruned(pruner, 'conv1') == [0, 1, 2, 3] and pruned(pruner, 'conv2') == [7, 8, 9]


def test_taylor_uses_the_weight_before_the_step():
    conv = nn.Conv2d(1, 2, 1, bias=False)
    conv.weight.data.copy_(torch.tensor([1.0, 2.0]).view(2, 1, 1, 1))
    optimizer = torch.optim.SGD(conv.parameters(), 1.0)
    pruner = TaylorFOWeightFilterPruner(conv, [{'sparsity': 0.5, 'op_types': ['Conv2d']}], optimizer)
    pruner.compress()
    conv.weight.grad = torch.tensor([3.0, 2.0]).view(2, 1, 1, 1)  # 1 * 3 < 2 * 2; after the step -2 * 3 and 0 * 2
    optimizer.step()
    assert pruned(pruner, '') == [0] and conv.weight.flatten().tolist() == [0, 0]


def test_taylor_averages_over_batches():
    conv = nn.Conv2d(1, 2, 1, bias=False)
    nn.init.ones_(conv.weight)
    optimizer = torch.optim.SGD(conv.parameters(), 0.0)
    pruner = TaylorFOWeightFilterPruner(conv, [{'sparsity': 0.5, 'op_types': ['Conv2d']}], optimizer, 2)
    pruner.compress()
    for number, gradient in enumerate(([1.0, 3.0], [4.0, 1.0])):  # 1 + 16 and 9 + 1
        assert pruned(pruner, '') == [], number
        conv.weight.grad = torch.tensor(gradient).view(2, 1, 1, 1)
        optimizer.step()
    assert pruned(pruner, '') == [1]


def activation_model():
    """Two convolutions that compute known things of the image, with a batch norm that must not matter."""
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3))
    model[0].weight.data.copy_(torch.tensor([1.0, -1.0, 0.1]).view(3, 1, 1, 1))
    model[0].bias.data.copy_(torch.tensor([0.0, 0.0, 0.01]))
    return model


@pytest.mark.parametrize(
    ('pruner', 'activation', 'expected'),
    [
        # of -4, -2, 0, 9 in an image: relu of x is 0 0 0 9, of -x 4 2 0 0, of 0.1 x + 0.01 0 0 .01 .91
        (ActivationAPoZRankFilterPruner, 'relu', [0]),  # zero most often: 3, 2, 2 of 4
        (ActivationMeanRankFilterPruner, 'relu', [2]),  # means 2.25, 1.5, 0.23
        (ActivationMeanRankFilterPruner, 'relu6', [2]),
    ],
)
@pytest.mark.parametrize('known', [True, False])
def test_activations_by_hand(pruner, activation, expected, known):
    model = activation_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.0) if known else None
    pruner = pruner(model, [{'sparsity': 0.34, 'op_types': ['Conv2d']}], optimizer, activation, statistics_batch_num=2)
    pruner.compress()
    one, two = torch.tensor([-4.0, -2.0]).view(1, 1, 2, 1), torch.tensor([0.0, 9.0]).view(1, 1, 2, 1)
    model.eval()(one)  # neither evaluation
    with torch.no_grad():
        model.train()(one)  # nor what is not differentiated is training
    for batch in (one, two):
        assert pruned(pruner, '0') == []
        model.train()(batch).sum().backward()
        if known:
            optimizer.step()
    assert pruned(pruner, '0') == expected
    model(two)
    assert (model[0].weight.flatten() == 0).nonzero().flatten().tolist() == expected
    assert (model[1].weight == 0).nonzero().flatten().tolist() == expected
    assert all(sums.shape == (3,) for sums in pruner.sums.values())  # sums are kept, not activations
    assert not model[0]._forward_hooks


def test_relu6_differs_from_relu_above_6():
    model = nn.Conv2d(1, 2, 1, bias=False)
    model.weight.data.copy_(torch.tensor([10.0, 1.5]).view(2, 1, 1, 1))
    config = [{'sparsity': 0.5, 'op_types': ['Conv2d']}]
    for activation, sums, expected in (('relu', [90.0, 13.5], [1]), ('relu6', [12.0, 12.0], [0])):
        pruner = ActivationMeanRankFilterPruner(copy.deepcopy(model), config, activation=activation)
        pruner.compress()
        pruner.model.train()(torch.tensor([-1.0, 4.0, 5.0]).view(1, 1, 3, 1))
        assert pruner.sums[''].tolist() == sums
        assert pruned(pruner, '') == expected  # of equals, the first goes
    with pytest.raises(ValueError, match="activation must be relu or relu6, got 'gelu'"):
        ActivationMeanRankFilterPruner(model, config, activation='gelu')
    with pytest.raises(ValueError, match='statistics_batch_num must be a whole number, 1 or more, got 0'):
        ActivationMeanRankFilterPruner(model, config, statistics_batch_num=0)


@pytest.mark.parametrize('kind', [ActivationAPoZRankFilterPruner, ActivationMeanRankFilterPruner, TaylorFOWeightFilterPruner])
def test_masks_come_at_the_latest_with_the_export(kind, tmp_path):
    for known in (True, False):
        model = Model()
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        pruner = kind(model, convs(0.5, 'conv1', 'conv2'), optimizer if known else None, statistics_batch_num=9)
        pruner.compress()
        pruner.update_mask()  # nothing was seen yet
        assert pruned(pruner, 'conv1') == []
        with pytest.raises(ValueError, match='has seen no training batch'):
            pruner.export_model(tmp_path / 'model.pt')
        step(model, optimizer)
        assert pruned(pruner, 'conv1') == []
        pruner.export_model(tmp_path / 'model.pt')
        state = torch.load(tmp_path / 'model.pt', weights_only=True)
        assert [int((state[f'{name}.weight'] == 0).all((1, 2, 3)).sum()) for name in ('conv1', 'conv2')] == [2, 5]


def test_processes_add_up_what_they_have_seen(monkeypatch):
    model = nn.Conv2d(1, 2, 1, bias=False)
    model.weight.data.copy_(torch.tensor([1.0, 2.0]).view(2, 1, 1, 1))
    config = [{'sparsity': 0.5, 'op_types': ['Conv2d']}]
    found = []
    for other in (None, torch.tensor([5.0, 1.0]).double()):  # sums of the second process
        if other is not None:
            monkeypatch.setattr(processes, 'world', lambda: 2)
            monkeypatch.setattr(processes, 'total', lambda sums, other=other: sums.add_(other))
        pruner = ActivationMeanRankFilterPruner(model, config)
        pruner.watch()
        model.train()(torch.ones(1, 1, 1, 1))
        found.append((pruned(pruner, ''), pruner.importance()[''].tolist()))
    assert found == [([0], [1.0, 2.0]), ([1], [3.0, 1.5])]


def test_a_layer_that_no_batch_reaches_is_named():
    model = Model()
    model.spare = nn.Conv2d(1, 4, 3)
    pruner = ActivationAPoZRankFilterPruner(model, [{'sparsity': 0.5, 'op_types': ['Conv2d']}], statistics_batch_num=2)
    pruner.compress()
    step(model)
    with pytest.raises(ValueError, match='no training batch has reached spare'):
        pruner.update_mask()
    model.conv1.weight.requires_grad_(False)
    with pytest.raises(ValueError, match='conv1 is not trained'):
        TaylorFOWeightFilterPruner(model, convs(0.5, 'conv1')).compress()


def test_random_filters():
    masks = []
    for seed in (0, 0, 1):
        pruner = RandomFilterPruner(Model(), convs(0.5, 'conv1', 'conv2'), seed=seed)
        pruner.compress()
        masks.append([pruned(pruner, 'conv1'), pruned(pruner, 'conv2')])
        assert [len(numbers) for numbers in masks[-1]] == [2, 5]
    assert masks[0] == masks[1] != masks[2]


# ------------------------------------------------------------------------------------------------------------------ all of them


class Small(nn.Module):
    """The network of NNI's test of all pruners."""

    def __init__(self, bias=True):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, bias=bias), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 2, bias=bias)

    def forward(self, x):
        return self.fc(F.relu(self.bn1(self.conv1(x))).mean((2, 3)))


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('kind', ONE_SHOT)
def test_one_step_before_and_after(kind, bias, tmp_path):
    config = [{'sparsity': 0.5, 'op_types': ['Conv2d']}]
    names = ['conv1']
    if kind is LevelPruner:
        config, names = [{'sparsity': 0.5, 'op_types': ['default']}], ['conv1', 'fc']
    if kind is SlimPruner:
        config, names = [{'sparsity': 0.75, 'op_types': ['BatchNorm2d']}], ['bn1']
    model = Small(bias)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

    def one_step():
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(2, 1, 28, 28)), torch.tensor([0, 1])).backward()
        optimizer.step()

    one_step()
    pruner = kind(model, config, optimizer)
    pruner.compress()
    for _ in range(2):
        one_step()
    pruner.export_model(tmp_path / 'model.pt', tmp_path / 'mask.pt')
    masks, state = (torch.load(tmp_path / name, weights_only=True) for name in ('mask.pt', 'model.pt'))
    assert list(masks) == names and list(state) == list(Small(bias).state_dict())
    for name in names:
        for key, mask in masks[name].items():
            if mask is not None:
                assert (mask == 0).float().mean() == config[0]['sparsity']
                assert torch.equal(state[f'{name}.{key}'] == 0, mask == 0)


@pytest.mark.parametrize('kind', [*ONE_SHOT, AGP_Pruner])
def test_nnis_faulty_configurations(kind):
    op_type = {LevelPruner: 'default', SlimPruner: 'BatchNorm2d', AGP_Pruner: 'default'}.get(kind, 'Conv2d')
    key = 'final_sparsity' if kind is AGP_Pruner else 'sparsity'
    more = {'end_epoch': 10} if kind is AGP_Pruner else {}
    optimizer = torch.optim.SGD(Small().parameters(), 0.1)
    for entry in (
        {key: '0.5', 'op_types': [op_type]},
        {key: 1.6, 'op_types': [op_type]},
        {key: 0.5, 'op_types': op_type},
        {key: 0.5, 'op_types': [op_type], 'op_names': 'conv1'},
        {key: 0.5},
        {key: 0.5, 'op_types': [op_type], 'op_nams': ['conv1']},
        {key: 0.5, 'op_types': ['Conv2D']},
    ):
        with pytest.raises(ValueError, match=r'config_list\[0\] = '):
            kind(Small(), [entry | more], optimizer)
    kind(Small(), [{key: 0.5, 'op_types': [op_type]} | more], optimizer)


# -------------------------------------------------------------------------------------------------------------------------- AGP


def test_agp_schedule_by_hand():
    ours = [sparsity_at(epoch, 0, 0.8, 0, 10) for epoch in range(12)]
    expected = [0, 0.2381, 0.4236, 0.5630, 0.6628, 0.7298, 0.7704, 0.7912, 0.7989, 0.8, 0.8, 0.8]
    assert ours == pytest.approx(expected, abs=5e-5) and ours[9] == 0.8
    assert [sparsity_at(e, 0, 0.8, 2, 12, 2) for e in (2, 4, 6, 8, 10)] == pytest.approx(
        [0, 0.4625, 0.7, 0.7875, 0.8], abs=5e-5
    )
    assert sparsity_at(0, 0.3, 0.8, 0, 10) == pytest.approx(0.3)
    assert sparsity_at(0, 0, 0.8, 0, 1) == sparsity_at(5, 0, 0.8, 5, 5) == 0.8  # no epochs to ramp over


AGP = {'initial_sparsity': 0, 'final_sparsity': 0.8, 'start_epoch': 0, 'end_epoch': 10, 'frequency': 1}


def test_agp_prunes_by_its_schedule():
    model = nn.Linear(100, 100, bias=False)
    pruner = AGP_Pruner(model, [AGP | {'op_types': ['default']}])
    assert pruner.compress() is model
    previous = None
    for epoch in range(12):
        pruner.update_epoch(epoch)
        mask = pruner.masks['']['weight'].clone()
        expected = sparsity_at(epoch, 0, 0.8, 0, 10)
        assert pruner.compute_target_sparsity(AGP) == expected
        assert int((~mask).sum()) == int(expected * 10000 + 1e-6) == int((model.weight == 0).sum())
        assert previous is None or not (mask & ~previous).any()  # what is pruned stays pruned
        previous = mask
        with torch.no_grad():
            model.weight.add_(0.01 * torch.randn_like(model.weight))
        pruner.update_epoch(epoch)  # again: nothing
        assert torch.equal(pruner.masks['']['weight'], mask)
        pruner.step()


def test_agp_keeps_to_start_and_frequency():
    model = nn.Linear(100, 100)
    config = {'final_sparsity': 0.8, 'start_epoch': 2, 'end_epoch': 12, 'frequency': 2, 'op_types': ['default']}
    pruner = AGP_Pruner(model, [config])
    pruner.compress()
    counts = []
    for epoch in range(14):
        pruner.update_epoch(epoch)
        counts.append(round(float((~pruner.masks['']['weight']).float().mean()), 4))
    assert counts == [0, 0, 0, 0, 0.4625, 0.4625, 0.7, 0.7, 0.7875, 0.7875, 0.8, 0.8, 0.8, 0.8]


def test_agp_defaults_entries_and_errors():
    least = {'final_sparsity': 0.8, 'end_epoch': 10}
    assert AGP_Pruner(Small(), [least | {'op_types': ['default']}]).compute_target_sparsity(least) == 0
    two = [least | {'op_names': ['conv1']}, least | {'final_sparsity': 0.5, 'end_epoch': 2, 'op_names': ['fc']}]
    pruner = AGP_Pruner(Small(), [*two, {'exclude': True, 'op_types': ['BatchNorm2d']}])
    pruner.compress()
    pruner.update_epoch(9)
    assert [int((~masks['weight']).sum()) for masks in pruner.masks.values()] == [int(0.8 * 72), 8]
    for change, message in (
        ({'initial_sparsity': 0.9}, 'initial_sparsity is above final_sparsity'),
        ({'start_epoch': 11}, 'end_epoch is before start_epoch'),
        ({'frequency': 0}, 'frequency must be a whole number, 1 or more'),
        ({'end_epoch': 2.5}, 'end_epoch must be a whole number'),
        ({'sparsity': 0.8}, r"unknown key 'sparsity' \(did you mean"),
    ):
        with pytest.raises(ValueError, match=message):
            AGP_Pruner(Small(), [AGP | {'op_types': ['default']} | change])
    with pytest.raises(ValueError, match='no pruning algorithm'):
        AGP_Pruner(Small(), [AGP | {'op_types': ['default']}], None, 'l0')
    with pytest.raises(ValueError, match='takes Conv1d, Conv2d, .* only'):
        AGP_Pruner(Small(), [AGP | {'op_types': ['default']}], None, 'l1')
    different = [AGP | {'op_names': ['bn1']}, AGP | {'op_names': ['bn2'], 'end_epoch': 9}]
    with pytest.raises(ValueError, match='same schedule'):
        AGP_Pruner(Model(), different, None, 'slim')


@pytest.mark.parametrize('name', ['level', 'slim', 'l1', 'l2', 'fpgm', 'taylorfo', 'apoz', 'mean_activation'])
def test_agp_with_every_criterion(name, tmp_path):
    model = Model()
    types = {'level': 'default', 'slim': 'BatchNorm2d'}.get(name, 'Conv2d')
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    pruner = AGP_Pruner(model, [AGP | {'op_types': [types]}], optimizer, pruning_algorithm=name)
    pruner.compress()
    for epoch in range(11):
        pruner.update_epoch(epoch)
        step(model, optimizer)
        target = pruner.compute_target_sparsity(AGP)
        if name == 'slim':  # all 15 channels in one ranking
            assert len(pruned(pruner, 'bn1')) + len(pruned(pruner, 'bn2')) == int(target * 15 + 1e-6)
        for layer, masks in pruner.masks.items() if name != 'slim' else ():
            n = len(masks['weight']) if name != 'level' else masks['weight'].numel()
            count = len(pruned(pruner, layer)) if name != 'level' else int((~masks['weight']).sum())
            assert count == int(target * n + 1e-6)
            assert torch.equal(pruner.layers[layer].weight == 0, ~masks['weight'])
    pruner.export_model(tmp_path / 'model.pt', tmp_path / 'mask.pt')
    assert list(torch.load(tmp_path / 'mask.pt', weights_only=True)) == list(pruner.layers)


# ------------------------------------------------------------------------------------------------- the samples of the document

SAMPLES = {
    'LevelPruner': """
config_list = [{ 'sparsity': 0.8, 'op_types': ['default'] }]
pruner = LevelPruner(model, config_list)
pruner.compress()
""",
    'SlimPruner': """
config_list = [{ 'sparsity': 0.8, 'op_types': ['BatchNorm2d'] }]
pruner = SlimPruner(model, config_list)
pruner.compress()
""",
    'FPGMPruner': """
config_list = [{
    'sparsity': 0.5,
    'op_types': ['Conv2d']
}]
pruner = FPGMPruner(model, config_list)
pruner.compress()
""",
    'L1FilterPruner': """
config_list = [{ 'sparsity': 0.8, 'op_types': ['Conv2d'] }]
pruner = L1FilterPruner(model, config_list)
pruner.compress()
""",
    'L2FilterPruner': """
config_list = [{ 'sparsity': 0.8, 'op_types': ['Conv2d'] }]
pruner = L2FilterPruner(model, config_list)
pruner.compress()
""",
    'ActivationAPoZRankFilterPruner': """
config_list = [{
    'sparsity': 0.5,
    'op_types': ['Conv2d']
}]
pruner = ActivationAPoZRankFilterPruner(model, config_list, statistics_batch_num=1)
pruner.compress()
""",
    'ActivationMeanRankFilterPruner': """
config_list = [{
    'sparsity': 0.5,
    'op_types': ['Conv2d']
}]
pruner = ActivationMeanRankFilterPruner(model, config_list, statistics_batch_num=1)
pruner.compress()
""",
    'TaylorFOWeightFilterPruner': """
config_list = [{
    'sparsity': 0.5,
    'op_types': ['Conv2d']
}]
pruner = TaylorFOWeightFilterPruner(model, config_list, statistics_batch_num=1)
pruner.compress()
""",
    'AGP_Pruner': """
config_list = [{
    'initial_sparsity': 0,
    'final_sparsity': 0.8,
    'start_epoch': 0,
    'end_epoch': 10,
    'frequency': 1,
    'op_types': ['default']
}]

# load a pretrained model or train a model before using a pruner
# model = MyModel()
# model.load_state_dict(torch.load('mycheckpoint.pth'))

# AGP pruner prunes model while fine tuning the model by adding a hook on
# optimizer.step(), so an optimizer is required to prune the model.
optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9, weight_decay=1e-4)

pruner = AGP_Pruner(model, config_list, optimizer, pruning_algorithm='level')
pruner.compress()
for epoch in range(10):
    pruner.update_epoch(epoch)
""",
    'LotteryTicketPruner': """
config_list = [{
    'prune_iterations': 5,
    'sparsity': 0.8,
    'op_types': ['default']
}]
pruner = LotteryTicketPruner(model, config_list, optimizer)
pruner.compress()
for _ in pruner.get_prune_iterations():
    pruner.prune_iteration_start()
    for epoch in range(epoch_num):
        ...
""",
}


@pytest.mark.parametrize('name', SAMPLES)
def test_sample_of_the_document(name):
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    space = {'torch': torch, 'model': model, 'optimizer': optimizer, 'epoch_num': 1}
    exec(f'from methods import {name}\n{SAMPLES[name]}', space)
    pruner, share = space['pruner'], space['config_list'][0].get('sparsity', 0.8)
    step(model)  # without an optimizer of the pruner: the criteria that watch training have seen a batch
    pruner.update_mask()
    if 'BatchNorm2d' in space['config_list'][0]['op_types']:
        assert len(pruned(pruner, 'bn1')) + len(pruned(pruner, 'bn2')) == 12
    elif 'Conv2d' in space['config_list'][0]['op_types']:
        assert [len(pruned(pruner, name)) for name in ('conv1', 'conv2')] == [int(share * 5), int(share * 10)]
    else:
        for layer, masks in zip((model.conv1, model.conv2, model.fc1, model.fc2), pruner.masks.values(), strict=True):
            assert int((~masks['weight']).sum()) == int(0.8 * layer.weight.numel()) == int((layer.weight == 0).sum())


# --------------------------------------------------------------------------------------------------------- in the shared loop

FILTERS = ['fpgm', 'l1_filter', 'l2_filter', 'apoz', 'mean_activation', 'taylor_fo', 'random_filter']


@pytest.mark.parametrize('name', FILTERS)
def test_a_run_prunes_its_share_of_every_convolution(name, tmp_path):
    words = [f'--method={name}', '--ptarget=0.5', '--finetune-epochs=1', '--epochs=1', '--exclude', 'conv1', '*.shortcut.*']
    result, state = run_main(tmp_path, *words)
    model = archs.build('resnet20', 10, width=4, in_channels=1)
    model.load_state_dict(state)
    for layer, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            gone = int((module.weight == 0).all((1, 2, 3)).sum())
            assert gone == (0 if layer == 'conv1' or 'shortcut' in layer else len(module.weight) // 2), layer
            norm = model.get_submodule(layer.replace('conv', 'bn').replace('shortcut.0', 'shortcut.1'))
            assert int((norm.weight == 0).sum()) == int((norm.bias == 0).sum()) == gone
    lines = [json.loads(line) for line in (tmp_path / 'log.jsonl').read_text().splitlines()]
    assert [(line['stage'], line['sparsity'] > 0) for line in lines] == [('pretrain', False), ('finetune', True)]
    assert lines[-1]['lr'] == 1e-3


def test_level_runs_in_each_scope(tmp_path):
    words = ['--method=level', '--ptarget=0.9', '--epochs=1', '--finetune-epochs=1']
    result, _ = run_main(tmp_path / 'layer', *words)
    for layer, (zeros, n, *_) in result['layers'].items():
        assert zeros == int(0.9 * n + 1e-6), layer
    result, _ = run_main(tmp_path / 'global', *words, '--scope=global')
    assert result['zeros'] == int(0.9 * result['weights'] + 1e-6)
    assert result['layers']['conv1'][0] < int(0.9 * result['layers']['conv1'][1])
    result, state = run_main(tmp_path / 'erk', *words, '--distribution=erk')
    shapes = {name.removesuffix('.weight'): tuple(tensor.shape) for name, tensor in state.items() if tensor.dim() > 1}
    kept = kept_counts(shapes, 0.9, 'erk')
    assert {name: n - zeros for name, (zeros, n, *_) in result['layers'].items()} == kept
    assert result['zeros'] == round(0.9 * result['weights'])


def test_the_last_round_of_the_lottery_ticket_has_the_densities_of_erk():
    method = methods.load('lottery_ticket')(parse([*TINY, '--method=lottery_ticket', '--ptarget=0.8', '--scope=erk']))
    model = nn.ModuleDict({'conv1': nn.Conv2d(3, 16, 3), 'conv2': nn.Conv2d(16, 32, 3), 'fc': nn.Linear(64, 10)})
    pruner = LotteryTicketPruner(model, method.config_list(model))
    for _ in pruner.get_prune_iterations():
        pruner.prune_iteration_start()
    # 5680 weights, 1136 are kept: eps = 1136 / (25 + 54 + 74) = 7.42484, and the layers' shares are 185.62, 400.94, 549.44
    kept = {name: int((layer.weight != 0).sum()) for name, layer in model.items()}
    assert kept == {'conv1': 186, 'conv2': 401, 'fc': 549}


def test_slim_runs_with_its_loss(tmp_path):
    words = ['--method=slim', '--ptarget=0.5', '--finetune-epochs=1', '--epochs=2', '--lr=0.05', '--no-dependency-aware']
    ends = {}
    for strength in ('0', '0.05'):
        result, state = run_main(tmp_path / strength, *words, f'--bn-l1={strength}')
        gammas = {name: tensor for name, tensor in state.items() if tensor.dim() == 1 and name.endswith('.weight')}
        total = sum(len(gamma) for gamma in gammas.values())
        assert sum(int((gamma == 0).sum()) for gamma in gammas.values()) == total // 2
        assert all((gamma != 0).any() for gamma in gammas.values())
        for name, gamma in gammas.items():  # the filters are zero too
            conv = state[name.replace('bn', 'conv').replace('shortcut.1', 'shortcut.0')]
            assert torch.equal((conv == 0).all((1, 2, 3)), gamma == 0)
        trained = torch.load(tmp_path / strength / 'stage-pretrain.pt', weights_only=True)['model']
        ends[strength] = sum(float(trained[name].abs().sum()) for name in gammas)
    assert ends['0.05'] < ends['0'] - 0.1  # lambda pulls the scales to zero
    again, _ = run_main(tmp_path / 'layer', *words, '--scope=layer')
    assert {zeros / n for zeros, n, *_ in list(again['layers'].values())[:-1]} == {0.5}


def test_slims_loss_and_its_start_by_hand():
    method = methods.load('slim')(parse([*TINY, '--method=slim', '--bn-l1=0.01']))
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5))
    method.prepare(model, 10, method.args)
    assert model[1].weight.tolist() == [0.5] * 3 and model[3].weight.tolist() == [0.5] * 5
    model[3].weight.data[0] = -2.5
    loss = method.loss()
    assert loss.item() == pytest.approx(0.01 * (7 * 0.5 + 2.5))
    loss.backward()
    torch.testing.assert_close(model[3].weight.grad, 0.01 * torch.tensor([-1.0, 1, 1, 1, 1]))
    method.pruner = SlimPruner(model, [{'sparsity': 0.5, 'op_types': ['BatchNorm2d']}])
    method.prepare(model, 10, method.args)  # for fine-tuning: nothing is set, nothing is added
    assert method.loss() is None and model[3].weight[0] == -2.5


@pytest.mark.parametrize('name', ['level', 'l1', 'slim', 'taylorfo', 'apoz'])
def test_agp_runs(name, tmp_path):
    words = ['--method=agp', f'--algorithm={name}', '--ptarget=0.75', '--epochs=1', '--finetune-epochs=4', '--end-epoch=3']
    result, state = run_main(tmp_path, *words)
    lines = [json.loads(line) for line in (tmp_path / 'log.jsonl').read_text().splitlines()]
    shares = [line['sparsity'] for line in lines]
    assert [line['stage'] for line in lines] == ['pretrain'] + ['finetune'] * 4
    assert shares[0] == shares[1] == 0 < shares[2] < shares[3] == shares[4]
    if name == 'level':
        assert shares[2] == pytest.approx(sparsity_at(1, 0, 0.75, 0, 3), abs=0.002) and shares[3] == pytest.approx(
            0.75, abs=0.002
        )
    if name in ('l1', 'taylorfo', 'apoz'):
        gone = {n: int((t == 0).all((1, 2, 3)).sum()) / len(t) for n, t in state.items() if t.dim() == 4}
        assert set(gone.values()) == {0.75}


def test_layers_by_name(tmp_path, capsys):
    words = ['--method=l1_filter', '--ptarget=0.5', '--epochs=1', '--finetune-epochs=0']
    result, _ = run_main(tmp_path / 'one', *words, '--layers', 'stage?.*.conv1', '--exclude', 'stage1.*', '--pthres=300')
    assert [name for name, (zeros, *_) in result['layers'].items() if zeros] == [
        f'stage{i}.{j}.conv1' for i, j in ((2, 0), (2, 1), (2, 2), (3, 0), (3, 1), (3, 2)) if (i, j) != (2, 0)
    ]
    said = capsys.readouterr().out
    assert 'prunes 5 layers: stage2.1.conv1, ' in said and 'leaves out conv1, stage1.0.conv1' in said
    for flag in ('--layers', '--exclude'):
        with pytest.raises(SystemExit, match=r"'stage9\.0\.conv1' matches no Conv2d layer \(did you mean"):
            run_main(tmp_path / flag, *words, flag, 'stage9.0.conv1')
    with pytest.raises(SystemExit, match='leave no Conv2d layer'):
        run_main(tmp_path / 'none', *words, '--exclude', '*')


def test_settings_of_agp_that_cannot_work():
    agp = methods.load('agp')
    for words in (['--start-epoch=3', '--end-epoch=3'], ['--end-epoch=6'], ['--start-epoch=3']):
        with pytest.raises(ValueError, match='AGP prunes in fine-tuning'):
            agp(parse([*TINY, '--method=agp', '--finetune-epochs=5', *words]))
    with pytest.raises(ValueError, match='which --compile does not let it'):
        agp(parse([*TINY, '--method=agp', '--algorithm=apoz', '--compile']))


def test_construction_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for kind in ONE_SHOT:
            op_type = {LevelPruner: 'default', SlimPruner: 'BatchNorm2d'}.get(kind, 'Conv2d')
            kind(archs.build('densenet', 10), [{'sparsity': 0.5, 'op_types': [op_type]}])


@pytest.mark.parametrize('name', ['l1_filter', 'slim', 'agp'])
def test_a_residual_stream_is_decided_together_and_gets_smaller(name, tmp_path):
    words = [f'--method={name}', '--ptarget=0.5', '--finetune-epochs=2', '--epochs=1', '--width=8']
    words += ['--algorithm=fpgm'] if name == 'agp' else []
    (aware, state), (alone, _) = run_main(tmp_path / 'a', *words), run_main(tmp_path / 'b', *words, '--no-dependency-aware')
    dead = {key: (tensor == 0).flatten(1).all(1) for key, tensor in state.items() if tensor.dim() == 4}
    model = archs.build('resnet20', 10, 8, in_channels=1)
    stream = [dead[f'{layer}.weight'] for layer in dependency_groups(model, torch.zeros(1, 1, 8, 8))[0]]
    assert len(stream) == 4 and all(torch.equal(stream[0], one) for one in stream[1:]) and stream[0].any()
    assert aware['small_parameters'] < alone['small_parameters'] < alone['dense_parameters'] == alone['parameters']
    assert aware['small_macs'] < aware['dense_macs'] == aware['macs_dense'] and aware['small_ms_32'] > 0


def test_deciding_together_by_hand():
    """Filter scores 1, 5, 2 and 4, 0, 6 of two convolutions that end in one sum have the means 2.5, 2.5 and 4."""
    model = nn.Sequential(nn.Conv2d(1, 3, 1, bias=False), nn.Conv2d(3, 3, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, 5.0, 2.0]).view(3, 1, 1, 1))
        model[1].weight.copy_(torch.tensor([4.0, 0.0, 6.0]).view(3, 1, 1, 1).expand(3, 3, 1, 1) / 3)
    pruner = L1FilterPruner(model, [{'sparsity': 0.34, 'op_types': ['Conv2d']}])
    pruner.decide_together([['0', '1'], ['not pruned', '0']])
    pruner.compress()  # means 2.5, 2.5, 4: the first of the equal ones goes, in both
    assert [mask['weight'].flatten(1).any(1).tolist() for mask in pruner.masks.values()] == [[False, True, True]] * 2


# ------------------------------------------------------------------------------------------------------- found in a review


def test_slim_leaves_a_transposed_convolution_alone():
    """Its filters lie in dimension 1: to set slices of dimension 0 to zero changes what is kept."""
    model = nn.Sequential(nn.ConvTranspose2d(6, 8, 2, stride=2), nn.BatchNorm2d(8)).eval()
    nn.init.uniform_(model[1].weight, 0.5, 1.5)
    x = torch.randn(2, 6, 4, 4)
    before = model(x)
    pruner = SlimPruner(model, [{'sparsity': 0.5, 'op_types': ['BatchNorm2d']}])
    pruner.compress()
    kept = model[1].weight != 0
    assert int(kept.sum()) == 4
    torch.testing.assert_close(model(x)[:, kept], before[:, kept])


@pytest.mark.parametrize('update', ['sub', 'copy', 'set'])
def test_masks_hold_where_weights_are_changed_by_hand(update):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 2))
    pruner = LevelPruner(model, [{'sparsity': 0.5, 'op_types': ['default']}])
    pruner.compress()
    for parameter in model.parameters():
        if update == 'sub':
            parameter.data -= 0.1
        elif update == 'copy':
            parameter.data.copy_(torch.ones_like(parameter))
        else:
            parameter.data = torch.ones_like(parameter)
    model(torch.randn(1, 3, 8, 8))
    assert int((model[0].weight == 0).sum()) == 108


def test_taylor_waits_for_a_step_with_gradients():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    pruner = TaylorFOWeightFilterPruner(model, [{'sparsity': 0.5, 'op_types': ['Conv2d']}], optimizer)
    pruner.compress()
    optimizer.step()
    assert pruner.masks == {} or (model[0].weight != 0).all()
    model(torch.randn(4, 3, 8, 8)).square().mean().backward()
    optimizer.step()
    assert int((model[0].weight.flatten(1) == 0).all(1).sum()) == 4


def test_exclude_saves_layers_that_cannot_be_pruned_and_names_layers():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    every = {'sparsity': 0.5, 'op_types': ['BatchNorm2d']}
    with pytest.raises(ValueError, match=r'config_list\[0\].*1, a BatchNorm2d, has no weight to prune'):
        SlimPruner(model, [every])
    assert list(SlimPruner(model, [every, {'exclude': True, 'op_names': ['1']}]).layers) == ['3']
    nested = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)))
    with pytest.raises(ValueError, match='1 is a Sequential and no layer itself; name those in it, as 1.0'):
        L1FilterPruner(nested, [{'sparsity': 0.5, 'op_types': ['Conv2d']}, {'exclude': True, 'op_names': ['1']}])


def test_masks_of_another_width_and_shares_before_the_start():
    pruner = L1FilterPruner(nn.Sequential(nn.Conv2d(3, 10, 3)), [{'sparsity': 0.5, 'op_types': ['Conv2d']}])
    with pytest.raises(ValueError, match=r'the mask of 0 has the shape \(8, 3, 3, 3\), its weight \(10, 3, 3, 3\)'):
        pruner.load_masks({'0': {'weight': torch.ones(8, 3, 3, 3), 'bias': None}})
    assert [sparsity_at(epoch, 0.1, 0.8, 2, 10) for epoch in (0, 1, 2)] == pytest.approx([0.1] * 3)


# ------------------------------------------------------------------------------- other convolutions, subclasses, names, groups


class OwnConv(nn.Conv2d):
    """A subclass, as many libraries have."""


class OwnNorm(nn.BatchNorm2d):
    """A batch norm with its activation, as timm's."""

    def forward(self, x):
        return F.relu(super().forward(x))


def with_norms(x):
    """The kinds of convolutions that have filters, each with a batch norm, and an input."""
    return {
        'Conv1d': (nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), x[..., 0]),
        'Conv3d': (nn.Conv3d(3, 4, 2), nn.BatchNorm3d(4), x[..., None].expand(-1, -1, -1, -1, 4)),
        'ConvTranspose1d': (nn.ConvTranspose1d(3, 4, 3), nn.BatchNorm1d(4), x[..., 0]),
        'ConvTranspose2d': (nn.ConvTranspose2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), x),
        'ConvTranspose3d': (nn.ConvTranspose3d(3, 4, 2), nn.BatchNorm3d(4), x[..., None].expand(-1, -1, -1, -1, 4)),
        'OwnConv': (OwnConv(3, 4, 3), OwnNorm(4), x),
    }


KINDS = ['Conv1d', 'Conv3d', 'ConvTranspose1d', 'ConvTranspose2d', 'ConvTranspose3d', 'OwnConv']


@pytest.mark.parametrize('kind', KINDS)
def test_filters_of_every_convolution(kind):
    """The filters that are pruned are those of the smallest norm, and their outputs are zero after the batch norm."""
    torch.manual_seed(0)
    conv, norm, x = with_norms(torch.randn(2, 3, 6, 6))[kind]
    with torch.no_grad():
        for filter_, size in enumerate([3.0, 1.0, 4.0, 2.0]):
            part = conv.weight[:, filter_] if conv.transposed else conv.weight[filter_]
            part.copy_(size * torch.ones_like(part))
            nn.init.constant_(norm.bias, 0.5)
    for pruner in (L1FilterPruner, L2FilterPruner, RandomFilterPruner, FPGMPruner):
        model = nn.Sequential(copy.deepcopy(conv), copy.deepcopy(norm))
        pruner = pruner(model, [{'sparsity': 0.5, 'op_types': [kind]}])
        pruner.compress()
        weight = model[0].weight.transpose(0, 1) if conv.transposed else model[0].weight
        gone = (weight == 0).flatten(1).all(1)
        assert int(gone.sum()) == 2 and int((model[0].weight == 0).sum()) == model[0].weight.numel() // 2
        if isinstance(pruner, (L1FilterPruner, L2FilterPruner)):
            assert gone.tolist() == [False, True, False, True]
        assert torch.equal(model[0].bias == 0, gone) and torch.equal(model[1].bias == 0, gone)
        output = model.eval()(x)
        assert not output[:, gone].any() and output[:, ~gone].any()
    slim = SlimPruner(nn.Sequential(conv, norm), [{'sparsity': 0.5, 'op_types': [type(norm).__name__]}])
    norm.weight.data.copy_(torch.tensor([1.0, 4.0, 3.0, 2.0]))
    slim.compress()
    weight = conv.weight.transpose(0, 1) if conv.transposed else conv.weight
    assert (weight == 0).flatten(1).all(1).tolist() == [True, False, False, True] == (norm.weight == 0).tolist()


@pytest.mark.parametrize('kind', KINDS)
def test_criteria_that_watch_training_see_every_convolution(kind):
    """Filters of weights -1, 1, 3 and 2 on inputs of ones: the first has no activation above zero, the second a small one."""
    conv, norm, x = with_norms(torch.ones(2, 3, 6, 6))[kind]
    nn.init.zeros_(conv.bias)
    with torch.no_grad():
        for filter_, value in enumerate([-1.0, 1.0, 3.0, 2.0]):
            part = conv.weight[:, filter_] if conv.transposed else conv.weight[filter_]
            part.copy_(value * torch.ones_like(part))
    for pruner, expected in (
        (ActivationAPoZRankFilterPruner, [0]),
        (ActivationMeanRankFilterPruner, [0]),
        (TaylorFOWeightFilterPruner, [0]),  # gradients are equal, and of the equal squares the first goes
    ):
        layer = copy.deepcopy(conv)
        pruner = pruner(layer, [{'sparsity': 0.25, 'op_types': [kind]}])
        pruner.compress()
        layer.train()(x).sum().backward()
        assert (~pruner.keep['']).nonzero().flatten().tolist() == expected
        layer.eval()(x)
        weight = layer.weight.transpose(0, 1) if layer.transposed else layer.weight
        assert (weight == 0).flatten(1).all(1).nonzero().flatten().tolist() == expected


def test_transposed_convolutions_with_groups_by_hand():
    """Weight [4, 3, 1] in 2 groups: filters 0 to 2 read inputs 0 and 1, filters 3 to 5 inputs 2 and 3."""
    layer = nn.ConvTranspose1d(4, 6, 1, groups=2)
    layer.weight.data.copy_(torch.tensor([[1.0, 2, 9], [1, 2, 9], [7, 8, 1], [7, 8, 3]])[..., None])
    nn.init.ones_(layer.bias)
    pruner = L1FilterPruner(layer, [{'sparsity': 0.5, 'op_types': ['ConvTranspose1d']}])
    assert pruner.importance()[''].tolist() == [2, 4, 18, 14, 16, 4]
    pruner.compress()  # 0, 1 and 5 go
    assert layer.weight[..., 0].tolist() == [[0, 0, 9], [0, 0, 9], [7, 8, 0], [7, 8, 0]]
    assert layer.bias.tolist() == [0, 0, 1, 1, 1, 0]
    assert torch.equal(layer(torch.randn(1, 4, 3))[:, [0, 1, 5]], torch.zeros(1, 3, 3))
    again = L1FilterPruner(copy.deepcopy(layer), [{'sparsity': 0.1, 'op_types': ['ConvTranspose1d']}])
    again.load_masks(pruner.plain_masks())
    assert again.keep[''].tolist() == [False, False, True, True, True, False]


def test_types_stand_for_their_subclasses():
    model = nn.Sequential(OwnConv(3, 4, 3), OwnNorm(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    assert list(L1FilterPruner(model, [{'sparsity': 0.5, 'op_types': ['Conv2d']}]).layers) == ['0', '2']
    assert list(L1FilterPruner(model, [{'sparsity': 0.5, 'op_types': ['OwnConv']}]).layers) == ['0']
    assert list(LevelPruner(model, [{'sparsity': 0.5, 'op_types': ['default']}]).layers) == ['0', '2', '5']
    assert list(SlimPruner(model, [{'sparsity': 0.5, 'op_types': ['BatchNorm2d']}]).layers) == ['1', '3']
    without = [{'sparsity': 0.5, 'op_types': ['Conv2d']}, {'exclude': True, 'op_types': ['OwnConv']}]
    assert list(L1FilterPruner(model, without).layers) == ['2']
    with pytest.raises(ValueError, match='no layer of the model has these op_types'):
        LevelPruner(model, [{'sparsity': 0.5, 'op_types': ['Module']}])
    sync = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert list(SlimPruner(sync, [{'sparsity': 0.5, 'op_types': ['SyncBatchNorm']}]).layers) == ['1', '3']


def test_names_may_be_patterns():
    model = archs.build('resnet20', 10, width=4)
    first = [f'stage1.{i}.conv{j}' for i in range(3) for j in (1, 2)]
    pruner = L1FilterPruner(model, [{'sparsity': 0.5, 'op_names': ['stage1.*']}])
    assert list(pruner.layers) == first  # of the layers that it takes, not the batch norms beside them
    pruner = L1FilterPruner(model, [{'sparsity': 0.5, 'op_types': ['Conv2d']}, {'exclude': True, 'op_names': ['stage[23].*']}])
    assert list(pruner.layers) == ['conv1', *first]
    pruner = LevelPruner(model, [{'sparsity': 0.5, 'op_names': ['*.conv?', 'fc'], 'op_types': ['default']}])
    assert len(pruner.layers) == 19 and 'conv1' not in pruner.layers
    everything = LevelPruner(model, [{'sparsity': 0.5, 'op_names': ['*']}])
    assert list(everything.layers) == list(LevelPruner(model, [{'sparsity': 0.5, 'op_types': ['default']}]).layers)
    with pytest.raises(ValueError, match=r"config_list\[0\] = .*'stage9.\*' matches no layer of type Conv1d or"):
        L1FilterPruner(model, [{'sparsity': 0.5, 'op_names': ['stage9.*']}])
    with pytest.raises(ValueError, match="'fc\\*' matches no layer of type Conv2d"):
        L1FilterPruner(model, [{'sparsity': 0.5, 'op_names': ['fc*'], 'op_types': ['Conv2d']}])


class StandardConv(nn.Conv2d):
    """A convolution that standardises its weight in each forward pass, as timm's ScaledStdConv2d."""

    def forward(self, x):
        weight = self.weight.flatten(1)
        weight = (weight - weight.mean(1, keepdim=True)) / weight.std(1, keepdim=True)
        return F.conv2d(x, weight.view_as(self.weight), self.bias)


class PaddedConv(nn.Conv2d):
    """One that pads by itself, as TensorFlow does, and computes with its weight as it is."""

    def forward(self, x):
        return super().forward(F.pad(x, (1, 0, 0, 1)))


def computed(kind):
    conv = nn.Conv2d(3, 4, 3)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of the old ones
        return {
            'weight_norm': lambda: nn.utils.weight_norm(conv),
            'spectral_norm': lambda: nn.utils.spectral_norm(conv),
            'parametrizations.weight_norm': lambda: nn.utils.parametrizations.weight_norm(conv),
            'parametrizations.spectral_norm': lambda: nn.utils.parametrizations.spectral_norm(conv),
            'prune': lambda: prune.random_unstructured(conv, 'weight', 0.5),
            'StandardConv': lambda: StandardConv(3, 4, 3),
        }[kind]()


@pytest.mark.parametrize(
    ('kind', 'reason'),
    [
        ('weight_norm', 'computes its weight from weight_g: make it a plain layer first, or exclude it'),
        ('spectral_norm', 'computes its weight from weight_orig'),
        ('parametrizations.weight_norm', 'computes its weight by torch.nn.utils.parametrize'),
        ('parametrizations.spectral_norm', 'computes its weight by torch.nn.utils.parametrize'),
        ('prune', 'computes its weight from weight_orig'),
        ('StandardConv', 'does not compute with its weight as it is'),
    ],
)
def test_layers_that_compute_their_weight_are_named_and_refused(kind, reason):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), computed(kind))
    before = copy.deepcopy(model.state_dict())
    for pruner in (LevelPruner, L1FilterPruner):
        with pytest.raises(ValueError, match=r'config_list\[0\] = .*: 1, a \w+, ' + reason):
            pruner(model, [{'sparsity': 0.5, 'op_types': ['Conv2d']}])
        left = pruner(model, [{'sparsity': 0.5, 'op_types': ['Conv2d']}, {'exclude': True, 'op_names': ['1']}])
        assert list(left.layers) == ['0']
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._state_dict_pre_hooks for module in model.modules())


def test_a_layer_that_only_pads_is_pruned():
    state = torch.get_rng_state()
    model = nn.Sequential(PaddedConv(3, 4, 3))
    torch.set_rng_state(state)
    pruner = LevelPruner(model, [{'sparsity': 0.5, 'op_types': ['Conv2d']}])
    pruner.compress()
    assert torch.equal(torch.get_rng_state(), state) and int((model[0].weight == 0).sum()) == 54


def stream():
    """A network of residual streams, whose batch norms differ."""
    torch.manual_seed(0)
    model = archs.build('resnet20', 10, width=8, in_channels=1)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
    return model


@pytest.mark.parametrize('kind', [L1FilterPruner, SlimPruner, AGP_Pruner])
def test_layers_of_a_residual_stream_are_decided_together_by_one_call(kind):
    """What the README shows: with it the network gets as small as the share says, without it hardly."""
    sizes = []
    for together in (True, False):
        model = stream()
        example = torch.randn(2, 1, 8, 8)
        entry = {'sparsity': 0.5, 'op_types': ['BatchNorm2d' if kind is SlimPruner else 'Conv2d']}
        if kind is AGP_Pruner:
            entry = {'final_sparsity': 0.5, 'end_epoch': 1, 'op_types': ['Conv2d']}
        pruner = kind(model, [entry], None, 'l1') if kind is AGP_Pruner else kind(model, [entry])
        if together:
            pruner.decide_together(dependency_groups(model, example, depthwise=True))
        pruner.compress()
        small = shrink(model.eval(), example)
        torch.testing.assert_close(small(example), model(example), rtol=1e-4, atol=1e-5)
        sizes.append(sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters()))
    assert sizes[0] < 0.3 < 0.4 < sizes[1]


@pytest.mark.parametrize('make', [torch.optim.SGD, torch.optim.AdamW])
def test_taylor_under_a_gradient_scaler_with_a_fused_optimizer(make):
    """Fused optimizers step with scaled gradients, and skip by themselves what has overflowed: neither shows in the scores."""
    found = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = taylor_model()
        optimizer = make(model.parameters(), 1e-3, fused=True) if fused else make(model.parameters(), 1e-3)
        scaler = torch.amp.GradScaler('cpu', init_scale=2.0**10)
        pruner = TaylorFOWeightFilterPruner(model, convs(0.2, 'conv1') + convs(0.6, 'conv2'), optimizer, 2)
        pruner.compress()
        torch.manual_seed(1)
        for factor in (1.0, 1e38, 1.0):  # the second overflows
            optimizer.zero_grad()
            scaler.scale(factor * model(torch.randn(2, 1, 28, 28)).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        assert pruner.batches == 2 and pruned(pruner, 'conv1') == [0] and len(pruned(pruner, 'conv2')) == 6
        assert int((model.conv2.weight == 0).flatten(1).all(1).sum()) == 6
        found.append(pruner.sums)
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-3, atol=1e-12)


def test_taylor_without_an_optimizer_leaves_out_what_overflowed():
    conv = nn.Conv2d(1, 2, 1, bias=False)
    conv.weight.data.copy_(torch.tensor([1.0, 2.0]).view(2, 1, 1, 1))
    pruner = TaylorFOWeightFilterPruner(conv, [{'sparsity': 0.5, 'op_types': ['Conv2d']}])
    pruner.compress()
    (conv.weight.sum() * float('inf')).backward()
    assert pruned(pruner, '') == []
    conv.zero_grad()
    conv.weight.sum().backward()
    assert pruned(pruner, '') == [0]


def test_taylor_sees_the_gradients_of_a_closure():
    """Lightning steps with a closure, in which the gradients are computed."""
    conv = nn.Conv2d(1, 2, 1, bias=False)
    conv.weight.data.copy_(torch.tensor([1.0, 2.0]).view(2, 1, 1, 1))
    optimizer = torch.optim.SGD(conv.parameters(), 1e-3)
    pruner = TaylorFOWeightFilterPruner(conv, [{'sparsity': 0.5, 'op_types': ['Conv2d']}], optimizer)
    pruner.compress()

    def closure():
        optimizer.zero_grad()
        loss = (conv.weight.flatten() * torch.tensor([5.0, 1.0])).sum()  # (g w)^2 is 25 and 4
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 7
    assert pruned(pruner, '') == [1] and conv.weight.flatten()[1] == 0


# ---------------------------------------------------------------------------------------------------------------- frameworks


def images_and_labels():
    torch.manual_seed(0)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(16, 1, 9, 9), torch.arange(16) % 2), 8)


def half_of_the_filters(model):
    return int((model.conv1.weight == 0).flatten(1).all(1).sum()) == 4 == int((model.bn1.bias == 0).sum())


@pytest.mark.frameworks
@pytest.mark.parametrize('kind', [L1FilterPruner, TaylorFOWeightFilterPruner])
def test_accelerate(kind):
    accelerate = pytest.importorskip('accelerate')
    accelerator = accelerate.Accelerator(cpu=True)
    model = Small()
    model, optimizer, batches = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), 0.01), images_and_labels())
    pruner = kind(model, [{'sparsity': 0.5, 'op_types': ['Conv2d']}], optimizer)
    pruner.compress()
    for x, y in batches:
        accelerator.backward(F.cross_entropy(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
        assert half_of_the_filters(model)
    assert type(pruner.optimizer) is torch.optim.AdamW


@pytest.mark.frameworks
@pytest.mark.parametrize('kind', [L1FilterPruner, TaylorFOWeightFilterPruner])
def test_lightning(kind, tmp_path):
    """Its steps have closures, in which the gradients are computed."""
    lightning = pytest.importorskip('lightning')

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Small()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)

        def on_train_start(self):
            self.pruner = kind(self.model, [{'sparsity': 0.5, 'op_types': ['Conv2d']}], self.optimizers())
            self.pruner.compress()

        def training_step(self, batch, number):
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def on_train_batch_end(self, *_):
            assert half_of_the_filters(self.model)

    quiet = dict.fromkeys(('logger', 'enable_progress_bar', 'enable_model_summary', 'enable_checkpointing'), False)
    trainer = lightning.Trainer(max_epochs=1, accelerator='cpu', default_root_dir=tmp_path, **quiet)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of its own
        trainer.fit(Module(), images_and_labels())


@pytest.mark.gpu
def test_no_step_and_no_evaluation_waits_for_the_gpu():
    model = Small().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    L1FilterPruner(model, [{'sparsity': 0.5, 'op_types': ['Conv2d']}], optimizer).compress()
    x, y = torch.randn(4, 1, 9, 9).cuda(), torch.tensor([0, 1, 0, 1]).cuda()
    for mode in ('default', 'error'):  # the first time, things are set up
        torch.cuda.set_sync_debug_mode(mode)
        try:
            F.cross_entropy(model.train()(x), y).backward()
            optimizer.step()
            model.eval()(x)
            model.state_dict()
        finally:
            torch.cuda.set_sync_debug_mode('default')
    assert half_of_the_filters(model)
