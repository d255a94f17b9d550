"""Dynamic Structure Pruning: the authors' trajectory, the formulas one by one, the search, and the pipeline in its stages."""

import copy
import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, run_main, run_with_copies, same_state
from torch import nn

import archs
import main as program
import methods.dsp
from args import load_table, parse
from deploy import formats, network_file
from methods.dsp import Method, pack
from pruners.group_learning import GroupWrapper, hard_groups, regulariser_terms, remove_groups, second_order_term
from pruners.group_pruning import PruneWrapper, mask_at, ranking, shares_pruned
from sparse_utils import count_macs

GOLDEN = Path(__file__).parent / 'golden' / 'dsp.npz'
CROSS_ENTROPY = nn.CrossEntropyLoss()


def quiet(text):
    """Instead of print."""


@pytest.fixture
def no_noise(monkeypatch):
    monkeypatch.setattr(F, 'gumbel_softmax', lambda logits, dim: logits.softmax(dim))


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv_a, self.bn_a = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv_b, self.bn_b = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.downsample = nn.Identity()
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = F.relu(self.bn_a(self.conv_a(x)))
        return F.relu(self.bn_b(self.conv_b(y)) + self.downsample(x))


def authors_resnet8():
    """The network of golden/dsp.npz."""
    layers = OrderedDict(conv_1_3x3=nn.Conv2d(3, 16, 3, padding=1, bias=False), bn_1=nn.BatchNorm2d(16), relu=nn.ReLU())
    for number, (inputs, outputs) in enumerate([(16, 16), (16, 32), (32, 64)], 1):
        layers[f'stage_{number}'] = nn.Sequential(Block(inputs, outputs, 1 if number == 1 else 2))
    return nn.Sequential(layers | {'pool': nn.AdaptiveAvgPool2d(1), 'flatten': nn.Flatten(), 'classifier': nn.Linear(64, 10)})


def golden_state(golden, prefix):
    return {name.removeprefix(prefix): torch.tensor(golden[name]) for name in golden if name.startswith(prefix)}


def small(seed=0, width=8, **more):
    torch.manual_seed(seed)
    return archs.build('resnet20', 10, width=width, **more)


def sgd(model, **more):
    return torch.optim.SGD(model.parameters(), **{'lr': 0.05, 'momentum': 0.9, 'weight_decay': 1e-3} | more)


def batch(n=4, channels=3, size=16, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, channels, size, size, generator=generator), torch.randint(0, 10, (n,), generator=generator)


def train_step(grouper, x, y):
    grouper.initialize()
    loss = grouper.criterion(grouper.model(x), y)
    grouper.optimizer.zero_grad()
    loss.backward()
    grouper.optimizer.step()
    grouper.after_step(x, y)
    return loss.item()


# -------------------------------------------------------------------------------------------------- the authors' numbers


def test_trajectory_of_the_authors_code(no_noise):
    golden = np.load(GOLDEN)
    model = authors_resnet8()
    model.load_state_dict(golden_state(golden, 'init/'))
    grouper = GroupWrapper(model, sgd(model), CROSS_ENTROPY, 2e-3, 6, 4, 0.5, say=quiet)
    for i, logits in enumerate(grouper.logits):
        logits.data.copy_(torch.tensor(golden[f'group0/{i}']))
    for step, expected in enumerate(golden['losses']):
        i = step % 3
        assert train_step(grouper, torch.tensor(golden[f'x/{i}']), torch.tensor(golden[f'y/{i}'])) == pytest.approx(
            expected, rel=1e-5
        )
    final = golden_state(golden, 'final/')
    for name, tensor in model.state_dict().items():
        # Rounding decides whether one unit is just on or off in the last step, which moves weights by up to 2e-4; nothing else.
        tolerance = 1e-5 if name.endswith('.group') else 1e-3
        assert torch.allclose(tensor, final[name], rtol=tolerance, atol=tolerance), name


def test_masks_of_the_authors_code(capsys):
    golden = np.load(GOLDEN)
    flops, weights, beta = golden['prune/0.5'].tolist()
    model = authors_resnet8()
    pruner = PruneWrapper(model, 4, 2)  # before the group-learned weights are there, which have no masks
    model.load_state_dict(golden_state(golden, 'final/'))
    rankings = {name: ranking(conv.weight, conv.group, name in pruner.filters) for name, conv in pruner.convs.items()}
    masks = list(pruner.masks_at(beta, rankings).values())
    assert all(np.array_equal(mask.numpy(), golden[f'mask/0.5/{i}'][:, :, 0, 0]) for i, mask in enumerate(masks))
    tried = betas_tried(pruner)
    achieved = pruner.initialize(0.5)
    assert len(tried) < 25  # of thousands: halved again and again
    assert achieved == pytest.approx((flops, weights), abs=0.5)
    same = [np.mean(mask.numpy() == golden[f'mask/0.5/{i}']) for i, mask in enumerate(pruner.masks().values())]
    assert min(same) >= 0.98
    text = capsys.readouterr().out
    assert 'all but conv_1_3x3, stage_2.0.downsample.0, stage_3.0.downsample.0' in text and 'of the whole network' in text


# ------------------------------------------------------------------------------------------------------ the regulariser


def test_regulariser_by_hand():
    # one input channel, filters 3 and 4 in one group: S = (1 + 1)^2 = 4, L = 5, R = 20
    weight, p = torch.tensor([3.0, 4.0]).view(2, 1, 1, 1), torch.ones(1, 2)
    found = regulariser_terms(weight, p)
    assert found.size.item() == 4 and found.inverse.item() == pytest.approx(0.2)
    assert (found.penalty[:, :, None, None] * weight).flatten().tolist() == pytest.approx([2.4, 3.2])  # S W / L
    assert found.to_p.flatten().tolist() == pytest.approx([4 * 1.8 + 5 * 2, 4 * 3.2 + 5 * 2])  # S W^2 / L + L dS/dp, dS/dp = 2


def regulariser(weight, p):
    """R as the paper writes it, with a copy of the weight for each group."""
    total = 0
    for row in p:
        total = total + row.sqrt().sum().square() * (row[:, None, None, None] * weight).square().sum((0, 2, 3)).sqrt().sum()
    return total


def test_regulariser_against_autograd():
    torch.manual_seed(0)
    weight = torch.randn(6, 5, 3, 2, dtype=torch.float64, requires_grad=True)
    p = torch.randn(3, 6, dtype=torch.float64).softmax(0).requires_grad_()
    to_weight, to_p = torch.autograd.grad(regulariser(weight, p), [weight, p])
    found = regulariser_terms(weight.detach(), p.detach())
    assert torch.allclose(found.penalty[:, :, None, None] * weight, to_weight, rtol=1e-6)
    assert torch.allclose(found.to_p, to_p, rtol=1e-6)


def literal_terms(weight, p):
    """The formulas of the algorithm as they stand, group by group."""
    groups = []
    for row in p:
        gw = row[:, None, None, None] * weight
        norm = gw.square().sum((0, 2, 3)).sqrt()
        n = gw / (1e-8 + norm)[:, None, None]
        size = row.sqrt().sum().square()
        size_to_p = row.sqrt() * size / (row * row.sqrt().sum() + 1e-8)
        norm_to_p = (weight * n).sum((1, 2, 3))
        penalty = size * row[:, None, None, None] * n
        slope = size * norm_to_p + norm.sum() * size_to_p
        groups.append((penalty, slope, size_to_p, row[:, None, None, None] * n, size, n, norm_to_p, norm))
    return groups


def literal_second_order(groups, moved):
    rows = []
    for _, _, size_to_p, pn, size, n, norm_to_p, norm in groups:
        bend = norm_to_p * (pn * moved / (1e-8 + norm)[:, None, None]).sum((1, 2, 3))
        rows.append(size_to_p * (pn * moved).sum((1, 2, 3)) + size * ((2 * n * moved).sum((1, 2, 3)) - bend))
    return torch.stack(rows)


def test_second_order_against_the_formula_and_autograd():
    torch.manual_seed(0)
    weight, moved = torch.randn(2, 6, 5, 3, 3, dtype=torch.float64)
    p = torch.randn(3, 6, dtype=torch.float64).softmax(0)
    expected = literal_second_order(literal_terms(weight, p), moved)
    assert torch.allclose(second_order_term(regulariser_terms(weight, p), p, weight, moved), expected, rtol=1e-6)
    # One filter and one input channel: what it approximates, the derivative of dR/dW . D in p, it then is.
    weight, moved, p = weight[:1, :1], moved[:1, :1], torch.tensor([[0.3], [0.7]], dtype=torch.float64, requires_grad=True)
    slope = sum((groups[0] * moved).sum() for groups in literal_terms(weight, p))
    exact = torch.autograd.grad(slope, p)[0]
    assert torch.allclose(second_order_term(regulariser_terms(weight, p.detach()), p.detach(), weight, moved), exact, rtol=1e-6)


def literal_step(model, optimizer, grouper, x, y, t, total):
    """after_step() in a few lines: a deep copy looks ahead, and each group has its own copy of the weight."""
    names = list(grouper.convs)
    scales = [grouper.scales(torch.zeros(1, 3, 32, 32), len(grouper.logits[0]))[name] for name in names]
    rates = {id(p): group['lr'] for group in optimizer.param_groups for p in group['params']}
    strengths = [grouper.power * (t + 1) / total * rates[id(model.get_submodule(name).weight)] for name in names]

    def shrink(network, found):
        for name, groups, scale, strength in zip(names, found, scales, strengths, strict=True):
            network.get_submodule(name).weight.data -= sum(group[0] for group in groups) * scale * strength

    def all_terms(network, probabilities):
        return [literal_terms(network.get_submodule(n).weight.detach(), p) for n, p in zip(names, probabilities, strict=True)]

    probabilities = [p.detach() for p in grouper.p]
    kept = all_terms(model, probabilities)
    ahead, ahead_optimizer = copy.deepcopy((model, optimizer))
    shrink(ahead, kept)
    start = [ahead.get_submodule(name).weight.detach().clone() for name in names]
    ahead_optimizer.zero_grad()
    F.cross_entropy(ahead(x), y).backward()
    ahead_optimizer.step()
    there = all_terms(ahead, probabilities)
    shrink(ahead, there)
    slopes = []
    for i, name in enumerate(names):
        moved = ahead.get_submodule(name).weight.detach() - start[i]
        slopes.append(torch.stack([group[1] for group in there[i]]) + literal_second_order(kept[i], moved))
    loss = sum((p * slope).sum() for p, slope in zip(grouper.p, slopes, strict=True))
    for logits, grad in zip(grouper.logits, torch.autograd.grad(loss, grouper.logits), strict=True):
        logits.grad = grad
    grouper.adam.step()
    shrink(model, all_terms(model, [F.one_hot(a.argmax(0), len(a)).T.float() for a in grouper.logits]))


@pytest.mark.parametrize('groups', [1, 3, 5])
def test_step_against_a_literal_one(groups, no_noise):
    """With two parameter groups of different learning rates, momentum, and batch norm's statistics."""
    x, y = batch()
    states = []
    for literal in (True, False):
        model = small()
        stages = [[p for name, p in model.named_parameters() if ('stage2' in name) == second] for second in (True, False)]
        optimizer = torch.optim.SGD(
            [{'params': stages[0], 'lr': 0.02, 'weight_decay': 0.0}, {'params': stages[1], 'weight_decay': 1e-3}],
            0.05,
            momentum=0.9,
        )
        grouper = GroupWrapper(model, optimizer, CROSS_ENTROPY, 0.02, 4, groups, 0.5, say=quiet)
        torch.manual_seed(2)
        for logits in grouper.logits:
            logits.data.normal_()
        for t in range(3):
            grouper.initialize()
            loss = CROSS_ENTROPY(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if literal:
                literal_step(model, optimizer, grouper, x, y, t, 4)
            else:
                grouper.after_step(x, y)
        states.append(model.state_dict())
    for name, tensor in states[0].items():
        assert torch.allclose(states[1][name], tensor, rtol=1e-4, atol=2e-5), name
    moved = [float((states[0][name] - initial).abs().max()) for name, initial in small().state_dict().items() if 'conv' in name]
    assert min(moved) > 1e-3  # far more than the tolerance


# ------------------------------------------------------------------------------------------------------- group learning


def test_what_is_the_users_stays_as_it_was():
    """After the look-ahead: batch norm's statistics, momentum and gradients, and the mode. Only convolution weights shrink."""
    model = small()
    optimizer = sgd(model)
    grouper = GroupWrapper(model, optimizer, CROSS_ENTROPY, 2e-3, 5, 4, 0.5, say=quiet)
    x, y = batch()
    train_step(grouper, x, y)  # now there is momentum
    grouper.initialize()
    optimizer.zero_grad()
    CROSS_ENTROPY(model(x), y).backward()
    optimizer.step()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    momenta = [state['momentum_buffer'] for state in optimizer.state.values()]
    copies = [momentum.clone() for momentum in momenta]
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    grouper.after_step(x, y)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f'{name}.{part}' for name in grouper.convs for part in ('weight', 'group')}
    for name in grouper.convs:
        assert model.get_submodule(name).weight.norm() < before[f'{name}.weight'].norm()
    assert all(state['momentum_buffer'] is m for state, m in zip(optimizer.state.values(), momenta, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(momenta, copies, strict=True))
    assert all(torch.equal(model.get_parameter(name).grad, grad) for name, grad in grads.items())
    assert all(logits.grad is None for logits in grouper.logits) and model.training


@pytest.mark.parametrize('make', [torch.optim.Adam, torch.optim.RMSprop, lambda p, lr: torch.optim.SGD(p, lr)])
def test_any_optimizer(make):
    model = small()
    grouper = GroupWrapper(model, make(model.parameters(), 1e-3), CROSS_ENTROPY, 2e-3, 5, 2, 0.5, say=quiet)
    steps = []
    for _ in range(2):
        train_step(grouper, *batch())
        steps.append({float(state['step']) for state in grouper.optimizer.state.values() if 'step' in state})
    assert steps in ([{1}, {2}], [set(), set()])  # the look-ahead's steps are not counted


@pytest.mark.parametrize(('groups', 'channels', 'size'), [(1, 1, (40, 24)), (5, 4, (9, 9)), (7, 3, (32, 32))])
def test_any_groups_channels_and_image(groups, channels, size):
    model = small(in_channels=channels)
    example = torch.zeros(1, channels, *size)
    grouper = GroupWrapper(model, sgd(model), CROSS_ENTROPY, 2e-3, 5, groups, 0.5, example, say=quiet)
    assert all(logits.shape[0] == groups for logits in grouper.logits)
    train_step(grouper, torch.randn(4, channels, *size), batch()[1])
    flops, _ = PruneWrapper(model, groups, 2, example_input=example, say=quiet).initialize(0.5)
    assert flops == pytest.approx(50, abs=1)
    assert torch.isfinite(model(torch.randn(2, channels, *size))).all()


def test_scale_is_that_of_the_paper_at_any_image_size():
    model = small(width=16)
    grouper = GroupWrapper(model, sgd(model), CROSS_ENTROPY, 1, 1, 4, 0.5, say=quiet)
    scales, larger = (list(grouper.scales(torch.zeros(1, 3, size, size), 4).values()) for size in (32, 64))
    assert scales == larger
    # stage 1: 16 channels at full resolution, 3 high, 4 groups of 16 filters; then half of 32 channels' pixels a side: 32/4/16
    assert scales[0] == pytest.approx(3 * 0.25**1.5) and scales[6] == pytest.approx(3 * 0.125**1.5)
    assert scales[7] == pytest.approx(0.5**0.5 * 3 * 0.125**1.5)


def test_an_input_channel_of_zeros_gives_no_nan():
    model = small()
    grouper = GroupWrapper(model, sgd(model), CROSS_ENTROPY, 2e-3, 5, 4, 0.5, say=quiet)
    model.stage1[0].conv1.weight.data[:, 3] = 0
    model.stage2[0].conv2.weight.data.zero_()
    for _ in range(2):
        train_step(grouper, *batch())
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


def test_probabilities_are_drawn_for_each_filter_and_step():
    model = small()
    grouper = GroupWrapper(model, sgd(model), CROSS_ENTROPY, 2e-3, 5, 4, 0.5, say=quiet)
    grouper.initialize()
    first = grouper.p
    assert all(torch.allclose(p.sum(0), torch.ones(p.shape[1])) for p in first) and first[0].std() > 0.1
    grouper.initialize()
    assert not torch.equal(grouper.p[0], first[0])
    with pytest.raises(ValueError, match='initialize'):
        grouper.p = None
        grouper.after_step(*batch())


def test_group_learning_resumes_to_the_bit():
    def begin():
        model = small()
        return GroupWrapper(model, sgd(model), CROSS_ENTROPY, 2e-3, 4, 4, 0.5, say=quiet)

    whole = begin()
    for _ in range(2):
        train_step(whole, *batch())
    states = copy.deepcopy([whole.model.state_dict(), whole.optimizer.state_dict(), whole.state_dict()])
    rng = torch.get_rng_state()
    again = begin()
    for thing, state in zip([again.model, again.optimizer, again], states, strict=True):
        thing.load_state_dict(state)
    torch.set_rng_state(rng)
    for _ in range(2):
        train_step(again, *batch())
    torch.set_rng_state(rng)
    for _ in range(2):
        train_step(whole, *batch())
    assert same_state(whole.model.state_dict(), again.model.state_dict()) and again.step == 4


def test_the_look_ahead_uses_autocast():
    model, seen = small(), []
    autocast = torch.autocast('cpu', torch.bfloat16)
    grouper = GroupWrapper(model, sgd(model), CROSS_ENTROPY, 2e-3, 4, 4, 0.5, autocast=autocast, say=quiet)
    model.conv1.register_forward_hook(lambda layer, inputs, output: seen.append(output.dtype))
    train_step(grouper, *batch())
    assert seen == [torch.float32, torch.bfloat16]


def test_a_batch_in_pieces(no_noise):
    states = []
    for pieces in (1, 3):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())  # no batch norm
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.data.normal_()
        passed = []

        def forward(images, model=model, passed=passed):
            passed.append(len(images))
            return model(images)

        grouper = GroupWrapper(model, sgd(model), nn.MSELoss(), 2e-3, 4, 2, 0.5, forward=forward, accumulate=pieces, say=quiet)
        grouper.logits[0].data[0, :3] = 1
        x = batch(6, seed=3)[0]
        train_step(grouper, x, torch.ones(6, 6))
        assert passed == ([6] if pieces == 1 else [2, 2, 2])
        states.append(model.state_dict())
    assert all(torch.allclose(states[1][name], tensor, atol=1e-6) for name, tensor in states[0].items())


def test_groups_are_learned():
    """Four filters, of which two read channels 0 and 1 and two read 2 and 3: that is the split which costs least."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, bias=False), nn.Flatten())
    used = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1.0]]).view(4, 4, 1, 1)
    model[1].weight.data.copy_(used)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    keep_weights = nn.MSELoss()
    grouper = GroupWrapper(model, optimizer, keep_weights, 1e-3, 300, 2, 0.5, torch.zeros(1, 3, 1, 1), say=quiet)
    grouper.adam.param_groups[0]['lr'] = 0.05
    x = torch.randn(32, 3, 1, 1)
    y = model(x).detach()
    for _ in range(300):
        train_step(grouper, x, y)
    group = model[1].group.argmax(0).tolist()
    assert group[0] == group[2] != group[1] == group[3]


# ------------------------------------------------------------------------------------------------------ which convolutions


def test_choice_of_convolutions(capsys):
    model = archs.build('mobilenet_v1', 10)
    grouper = GroupWrapper(model, sgd(model), CROSS_ENTROPY, 2e-3, 4, 4, 0.5)
    depthwise = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d) and module.groups > 1]
    assert not set(grouper.convs) & set(depthwise) and len(grouper.convs) == 13
    assert 'which have groups of their own' in capsys.readouterr().out
    model = small()
    PruneWrapper(model, 4, 2, exclude=['stage1.0.conv1', 'conv1'])
    assert hasattr(model.stage2[0].shortcut[0], 'mask') and not hasattr(model.stage1[0].conv1, 'mask')
    with pytest.raises(ValueError, match="'fc' is to be excluded but is no convolution"):
        PruneWrapper(model, 4, 2, exclude=['fc'])


def test_the_first_convolution_is_the_one_that_runs_first():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.late, self.early = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return self.late(self.early(x)).flatten(1)

    assert list(PruneWrapper(Backwards(), 2, -1, say=quiet).convs) == ['late']


def test_whole_filters_of_which_convolutions():
    model = small()
    names = list(PruneWrapper(model, 4, 1, say=quiet).convs)
    assert PruneWrapper(model, 4, 2, say=quiet).filters == names[1::2] == [name for name in names if name.endswith('conv2')]
    assert PruneWrapper(model, 4, 3, say=quiet).filters == names[2::3]
    assert PruneWrapper(model, 4, 2, [0, 5], say=quiet).filters == [names[0], names[5]]  # the indices win
    for none in (
        {'fp_every_nth_conv': -1},
        {'fp_layer_indices': []},
        {'fp_every_nth_conv': 2, 'fp_layer_indices': -1},
        {'fp_layer_indices': [-1]},
    ):
        assert PruneWrapper(model, 4, **none, say=quiet).filters == []
    for wrong, words in (
        ({}, 'give fp_every_nth_conv'),
        ({'fp_every_nth_conv': 0}, '1 or more'),
        ({'fp_layer_indices': [18]}, '18'),
    ):
        with pytest.raises(ValueError, match=words):
            PruneWrapper(model, 4, **wrong, say=quiet)


def test_errors_are_sentences():
    model = small()
    with pytest.raises(ValueError, match='num_groups from 1'):
        GroupWrapper(model, sgd(model), CROSS_ENTROPY, 2e-3, 5, 0, 0.5)
    with pytest.raises(ValueError, match='does not train stage1.0.conv1'):
        GroupWrapper(model, torch.optim.SGD(model.fc.parameters(), 0.1), CROSS_ENTROPY, 2e-3, 5, 2, 0.5, say=quiet)
    with pytest.raises(ValueError, match='no 2-d convolution'):
        PruneWrapper(nn.Linear(2, 2), 4, 2)
    pruner = PruneWrapper(model, 4, 2, say=quiet)
    for rate in (1, 50, -0.1):
        with pytest.raises(ValueError, match='share of FLOPs'):
            pruner.initialize(rate)
    with pytest.raises(ValueError, match='has 4 groups, not 2'):
        PruneWrapper(model, 2, 2, say=quiet)
    model.stage1[0].conv1.weight.data[0] = float('nan')
    with pytest.raises(ValueError, match='NaN'):
        pruner.initialize(0.5)


# -------------------------------------------------------------------------------------------------------------- pruning


def with_random_groups(groups=4, every=2, seed=0, **more):
    model = small(width=16)
    pruner = PruneWrapper(model, groups, every, say=quiet, **more)
    torch.manual_seed(seed)
    for conv in pruner.convs.values():
        conv.group.normal_()
    return model, pruner


def betas_tried(pruner):
    """A list that takes down each beta whose masks the pruner looks at."""
    tried = []
    masks_at = pruner.masks_at
    pruner.masks_at = lambda beta, rankings: tried.append(beta) or masks_at(beta, rankings)
    return tried


def test_masks_at_a_beta_by_hand():
    # group 0: filters 0 and 2, group 1: filter 1. Squared weights of group 0 by channel: 1, 4, 5; of group 1: 0, 9, 1.
    weight = torch.tensor([[1.0, 0, 1], [0, 3, 1], [0, 2, 2]]).view(3, 3, 1, 1)
    logits = torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    r = ranking(weight, logits, False)
    assert torch.allclose(r.channels, torch.tensor([[0.1, 0.5, 1.0], [-1, 0.1, 1]], dtype=torch.float64))
    expected = {
        0.0: [[1, 1, 1], [0, 1, 1], [1, 1, 1]],  # nothing is under zero, but zeros go
        0.1: [[1, 1, 1], [0, 1, 1], [1, 1, 1]],
        0.11: [[0, 1, 1], [0, 1, 0], [0, 1, 1]],
        1.0: [[0, 0, 1], [0, 1, 0], [0, 0, 1]],  # the last channel of a group stays
    }
    for beta, mask in expected.items():
        assert mask_at(beta, r).tolist() == torch.tensor(mask).bool().tolist()
    # whole filters: squared norms 2, 10, 8, shares 0.1, 1, 0.5 cumulated in ascending order
    assert mask_at(0.11, ranking(weight, logits, True)).tolist() == [[False] * 3, [False, True, False], [False, True, True]]
    assert not mask_at(0.0, ranking(torch.zeros(3, 3, 1, 1), logits, True)).any()


def test_more_beta_prunes_more_and_little_prunes_little():
    model, pruner = with_random_groups()
    rankings = {name: ranking(conv.weight, conv.group, name in pruner.filters) for name, conv in pruner.convs.items()}
    pruned = [
        pruner.flops_pruned(pruner.masks_at(beta, rankings))
        for beta in [0, 1e-6, 0.005, 0.01, *torch.linspace(0.02, 1, 50).tolist()]
    ]
    assert pruned == sorted(pruned) and pruned[0] == pruned[1] == 0 and pruned[3] < 0.05 and 0.9 < pruned[-1] < 1


@pytest.mark.parametrize('rate', [0.1, 0.3, 0.5, 0.7, 0.9])
def test_the_request_is_met_and_counted_alike(rate):
    """initialize(0.1) prunes 10 %, after few tries; count_macs finds the same on the network, convolution for convolution."""
    model, pruner = with_random_groups()
    tried = betas_tried(pruner)
    flops, weights = pruner.initialize(rate)
    assert len(tried) < 25
    assert flops == pytest.approx(100 * rate, abs=1) and flops >= 100 * rate
    macs = count_macs(model, torch.zeros(1, 3, 32, 32))
    dense, left = (sum(macs[name][i] for name in pruner.convs) for i in (0, 1))
    assert flops == pytest.approx(100 * (1 - left / dense))
    zeros, total = (sum(f(conv.weight) for conv in pruner.convs.values()) for f in (lambda w: int((w == 0).sum()), torch.numel))
    assert weights == pytest.approx(100 * zeros / total)


def test_a_request_that_cannot_be_met_is_explained():
    said = []
    model, pruner = with_random_groups(groups=1, round_to=16)  # in the first stage, of 16 channels, all or none
    fresh, pruner.say, off = copy.deepcopy(model.state_dict()), said.append, []
    for percent in range(2, 52, 2):
        model.load_state_dict(fresh)
        said.clear()
        flops, _ = pruner.initialize(percent / 100)
        assert len(said) == (2 if abs(flops - percent) > 1 else 1)
        if len(said) == 2:
            assert 'neighbouring setting' in said[1] and f'{flops:.2f} %' in said[1]
            off.append(flops - percent)
    assert off and max(map(abs, off)) < 5
    chain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))
    assert PruneWrapper(chain, 1, -1, say=said.append).initialize(0.9)[0] == 75 and 'no more goes' in said[-1]
    model, pruner = with_random_groups()
    for conv in pruner.convs.values():
        conv.weight.data[:, ::2] = 0  # costs nothing to prune
    pruner.say = said.append
    assert pruner.initialize(0.2)[0] > 45 and 'zero already' in said[-1]
    assert pruner.initialize(0.0)[0] > 45


def test_the_networks_share_is_printed_beside():
    said = []
    model, pruner = with_random_groups()
    pruner.say = said.append
    flops, _ = pruner.initialize(0.5)
    macs = count_macs(model, torch.zeros(1, 3, 32, 32)).values()
    whole = 100 * (1 - sum(nonzero for _, nonzero in macs) / sum(dense for dense, _ in macs))
    assert whole < flops and f'{whole:.2f} % of the FLOPs of the whole network' in said[0]


def test_nothing_but_weights_and_masks_changes():
    """No statistics, no mode, no random number: the search never runs the network."""
    model, pruner = with_random_groups()
    model(batch(size=32)[0])
    statistics = {name: tensor.clone() for name, tensor in model.named_buffers() if 'running' in name}
    rng = torch.get_rng_state()
    PruneWrapper(model, 4, 2, say=quiet).initialize(0.2)
    assert torch.equal(rng, torch.get_rng_state()) and model.training
    assert all(torch.equal(model.get_buffer(name), tensor) for name, tensor in statistics.items())


def test_what_is_dead_changes_no_output():
    model, pruner = with_random_groups()
    pruner.initialize(0.6)
    model.eval()
    x, _ = batch(size=32)
    expected, revived = model(x), 0
    for conv in pruner.convs.values():
        dead = ~conv.mask.flatten(1).any(1)
        revived += int(dead.sum())
        conv.weight.data[dead] = 1
    assert revived > 20 and torch.equal(model(x), expected)  # nobody reads them


def test_zeros_hold_with_momentum():
    model, pruner = with_random_groups()
    optimizer = sgd(model, lr=0.1)
    x, y = batch(size=32)
    CROSS_ENTROPY(model(x), y).backward()
    optimizer.step()  # momentum everywhere
    pruner.initialize(0.6)
    for _ in range(2):
        optimizer.zero_grad()
        CROSS_ENTROPY(model(x), y).backward()
        optimizer.step()
        pruner.after_step(optimizer)
    kept = 0
    for conv in pruner.convs.values():
        for tensor in (conv.weight, optimizer.state[conv.weight]['momentum_buffer']):
            assert not tensor[~conv.mask.expand_as(tensor)].any()
        kept += int((conv.weight != 0).sum())
    assert kept == sum(int(conv.mask.sum()) * 9 for conv in pruner.convs.values())  # and nothing else is zero
    for norm, dead in pruner.dead:
        for parameter in (norm.weight, norm.bias):
            assert not parameter[dead].any() and not optimizer.state[parameter]['momentum_buffer'][dead].any()
    mask, bn = model.stage1[0].conv1.mask, model.stage1[0].bn1
    assert torch.equal(bn.bias == 0, ~mask.flatten(1).any(1)) and int((bn.bias == 0).sum()) > 0


def test_biases_of_dead_filters_go():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 4, 1))
    pruner = PruneWrapper(model, 2, 1, say=quiet)
    pruner.initialize(0.6)
    dead = ~model[1].mask.flatten(1).any(1)
    assert dead.any() and not model[1].bias[dead].any() and model[1].bias[~dead].all()


def test_masks_load_with_the_weights():
    """A pruned state dict brings its masks, and with them what is dead; a group-learned one resets them."""
    model, pruner = with_random_groups()
    learned = {name: tensor.clone() for name, tensor in model.state_dict().items() if not name.endswith('.mask')}
    pruner.initialize(0.6)
    pruned = copy.deepcopy(model.state_dict())
    other, fresh = with_random_groups(seed=1)
    other.load_state_dict(pruned)
    other.stage1[0].bn1.bias.data.fill_(1)
    fresh.after_step()
    dead = ~other.stage1[0].conv1.mask.flatten(1).any(1)
    assert dead.any() and torch.equal(other.stage1[0].bn1.bias == 0, dead)
    other.load_state_dict(learned)
    assert all(conv.mask.all() for conv in fresh.convs.values())
    assert fresh.initialize(0.6) == pruner.initialize(0.6)


def test_pruning_again_never_gives_a_kernel_back():
    _, pruner = with_random_groups()
    flops, _ = pruner.initialize(0.5)
    before = {name: mask.clone() for name, mask in pruner.masks().items()}
    more, _ = pruner.initialize(flops / 100 + 0.001)
    assert flops + 0.1 <= more < flops + 1
    assert all(not (mask & ~before[name]).any() for name, mask in pruner.masks().items())


def test_counts_in_multiples():
    model, pruner = with_random_groups(groups=2, round_to=8)
    flops, _ = pruner.initialize(0.5)
    for name, conv in pruner.convs.items():
        group, mask = hard_groups(conv.group, 8), conv.mask[:, :, 0, 0]
        for k in range(2):
            assert (group == k).sum() % 8 == 0
            if name.endswith('conv1'):  # it reads the sum of a stage, in which no channel is dead
                assert mask[group == k].any(0).sum() % 8 == 0
            else:
                assert mask[group == k].any(1).sum() % 8 == 0
    assert flops == pytest.approx(50, abs=5)


def test_group_sizes_by_hand():
    logits = torch.tensor([[5.0, 4, 3, 2, 1, 0], [0, 0, 2.5, 0, 0, 0], [0, 0, 0, 0, 0, 9]])
    assert hard_groups(logits).tolist() == [0, 0, 0, 0, 0, 2]
    assert hard_groups(logits, 2).tolist() == [0] * 6  # sizes 5, 0 and 1 have remainders 1, 0 and 1: the first gets them
    assert hard_groups(logits, 4).tolist() == [0, 0, 0, 0, 0, 2]  # six filters are no multiple of four: the rest stays
    logits = torch.tensor([[5.0, 4, 3, 2, 1, 0, 0, 0], [0, 0, 2.5, 0, 0, 2, 2, 2]])
    assert hard_groups(logits).tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    assert hard_groups(logits, 4).tolist() == [0, 0, 1, 0, 0, 1, 1, 1]  # 5 and 3 become 4 and 4; filter 2 loses least


# ------------------------------------------------------------------------------------------------------ the seed's samples


def test_the_seeds_samples_run_as_written(capsys):
    names = {}
    exec('from methods.dsp import *', names)
    assert {'GroupWrapper', 'PruneWrapper', 'pack'} <= set(names)
    names |= {'model': small(), 'criterion': CROSS_ENTROPY, 'regularization_power': 2e-3, 'total_num_iterations': 2}
    names |= {
        'num_groups': 4,
        'temperature': 0.5,
        'fp_every_nth_conv': 2,
        'pruning_rate': 0.5,
        'train_dataloader': [batch()] * 2,
    }
    names['optimizer'] = sgd(names['model'])
    exec(
        """
group_trainer = GroupWrapper(model, optimizer, criterion, regularization_power, total_num_iterations, num_groups, temperature)
for x, y in train_dataloader:
    group_trainer.initialize()
    out = model(x)
    loss = criterion(out, y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    group_trainer.after_step(x, y)
""",
        names,
    )
    learned = names['model'].state_dict()
    names['model'] = small(seed=5)
    names['optimizer'] = sgd(names['model'])
    exec('pruner = PruneWrapper(model, num_groups, fp_every_nth_conv)', names)
    names['model'].load_state_dict(learned)
    exec(
        """
flops, params = pruner.initialize(pruning_rate)
for x, y in train_dataloader:
    loss = criterion(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    pruner.after_step()
""",
        names,
    )
    assert names['flops'] == pytest.approx(50, abs=1) and 0 < names['params'] < 100
    zeros = sum(int((conv.weight == 0).sum()) for conv in names['pruner'].convs.values())
    assert zeros == sum(int((~mask).sum()) * 9 for mask in names['pruner'].masks().values())


def test_from_one_wrapper_to_the_other_and_back_to_a_plain_network():
    model = small()
    names = list(model.state_dict())
    grouper = GroupWrapper(model, sgd(model), CROSS_ENTROPY, 2e-3, 5, 4, 0.5, say=quiet)
    grouper.logits[0].data[2] = 1
    pruner = PruneWrapper(model, 4, 2, say=quiet)
    assert model.stage1[0].conv1.group[2].eq(1).all() and 'stage1.0.conv1.group' not in dict(model.named_parameters())
    pruner.remove()
    assert list(model.state_dict()) == names
    model.load_state_dict(small().state_dict())  # and no mask is asked for
    assert list(remove_groups(model).state_dict()) == names


# ---------------------------------------------------------------------------------------------------------- the pipeline

PIPELINE = [
    '--method=dsp',
    '--epochs=2',
    '--group-epochs=2',
    '--finetune-epochs=4',
    '--cycles=2',
    '--val-size=100',
    '--groups=2',
]


def stages(folder):
    return [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]


def test_the_whole_pipeline_on_digits(tmp_path):
    more = ['--limit-train=700', '--width=8', '--batch-size=50', '--prune=0.5']
    result, state = run_main(tmp_path, *PIPELINE, *more)
    assert list(state) == list(archs.build('resnet20', 10, width=8, in_channels=1).state_dict())
    lines = stages(tmp_path)
    assert [(line['stage'], line['epoch']) for line in lines] == [
        (stage, epoch) for stage in ('pretrain', 'group', 'cycle1', 'cycle2') for epoch in (1, 2)
    ]
    assert [line['lr'] for line in lines[4:6]] == [line['lr'] for line in lines[6:]] and lines[4]['lr'] > lines[5]['lr']
    first, last = lines[4]['flops_pruned'], lines[6]['flops_pruned']
    assert 0.5 <= first < 0.51 and first + 0.001 <= last < first + 0.01
    assert result['accuracy'] > 70 and 0.4 < 1 - result['macs_nonzero'] / result['macs_dense'] < last  # counted over all layers
    masks = torch.load(tmp_path / 'masks.pt', weights_only=True)
    assert len(masks) == 18
    for name, mask in masks.items():
        assert torch.equal(state[f'{name}.weight'].flatten(2).any(2), mask[:, :, 0, 0])  # zeros and masks say the same


def test_the_best_validation_epoch_is_handed_on(tmp_path, monkeypatch):
    """With val as with test-best: the network that is saved is that of the best epoch of the last cycle."""
    for select, key in (('val', 'val_accuracy'), ('test-best', 'accuracy')):
        states, save = [], program.Job.save

        def watched(job, method, optimizer, stage, epoch, states=states, save=save):
            states.append({name: tensor.clone() for name, tensor in job.model.state_dict().items()})
            save(job, method, optimizer, stage, epoch)

        with monkeypatch.context() as patch:
            patch.setattr(program.Job, 'save', watched)
            result, state = run_main(tmp_path / select, *PIPELINE, f'--select={select}', '--finetune-lr=0.5')
        scores = [line[key] for line in stages(tmp_path / select)[-2:]]
        best = len(states) - 2 + scores.index(max(scores))
        assert all(torch.equal(state[name], states[best][name]) for name in state)
        assert result['args']['select'] == select
        if select == 'test-best':
            assert result['accuracy'] == max(scores)


def test_a_kill_in_each_stage(tmp_path):
    """Two epochs a stage, so that each is continued in its middle and at its end, with the best network so far.

    Killed after epochs 1 and 2 of group learning, and 1 of the first cycle: two writes each, and one before.
    """
    words = [*PIPELINE, '--limit-train=64']
    _, expected, copies = run_with_copies(tmp_path / 'whole', words)
    for number in (7, 9, 11):
        assert same_state(run_main(copies[number - 1], *words)[1], expected)


def test_stages_alone_share_what_comes_before(tmp_path):
    quick = [*PIPELINE, '--limit-train=64']
    result, dense = run_main(tmp_path / 'dense', *quick, '--stage=pretrain')
    assert result['gives'] == 'the dense network' and result['epochs'] == 2
    result, learned = run_main(tmp_path / 'group', *quick, '--stage=group', f'--from={tmp_path / "dense"}')
    assert list(learned) != list(dense) and learned['stage1.0.conv1.group'].shape == (2, 4) and result['epochs'] == 2
    assert result['parameters'] == sum(t.numel() for n, t in dense.items() if 'running' not in n and 'tracked' not in n)
    start = f'--from={tmp_path / "group"}'
    result, pruned = run_main(tmp_path / 'prune', *quick, '--stage=prune', start)
    assert result['epochs'] == 0 and pruned.keys() == learned.keys() and (tmp_path / 'prune' / 'masks.pt').exists()
    tuned = [run_main(tmp_path / stage, *quick, f'--stage={stage}', start)[1] for stage in ('finetune', 'all')]
    assert same_state(*tuned) and list(tuned[0]) == list(dense)
    with pytest.raises(SystemExit, match='learned 2 groups, not 3'):
        run_main(tmp_path / 'three', *quick, '--groups=3', '--stage=finetune', start)
    with pytest.raises(SystemExit, match='needs learned groups'):
        run_main(tmp_path / 'none', *quick, '--stage=finetune', f'--from={tmp_path / "dense"}')


def test_packing_stage(tmp_path, capsys, monkeypatch):
    """What it writes gives the masked network's outputs, from fewer parameters."""
    ways = []

    def watched(model, example, how):
        ways.append(how)
        return pack(model, example, how)

    monkeypatch.setattr(methods.dsp, 'pack', watched)
    quick = [*PIPELINE, '--limit-train=64', '--width=8', '--pack-how=gathered']  # which measures nothing
    tuned, _ = run_main(tmp_path / 'tuned', *quick)
    capsys.readouterr()
    result, state = run_main(tmp_path / 'packed', *quick, '--stage=pack', f'--from={tmp_path / "tuned"}', '--torchscript')
    said = capsys.readouterr().out
    assert ways == ['gathered']
    assert result['gives'] == 'a smaller network, packed' and 'this gives zeros' not in said and 'best of any epoch' not in said
    assert f'this gives a smaller network, packed; saved in {tmp_path / "packed"}/packed.pt' in said
    assert all(result[key] == pytest.approx(tuned[key], abs=1e-9) for key in ('flops_pruned', 'weights_pruned'))
    model = archs.build('resnet20', 10, width=8, in_channels=1)
    model.load_state_dict(state)
    x = torch.randn(5, 1, 8, 8)
    expected = model.eval()(x)
    small_one = network_file.load(tmp_path / 'packed' / 'packed')
    assert torch.allclose(small_one.eval()(x), expected, atol=1e-4)
    sizes = [sum(p.numel() for p in network.parameters()) for network in (small_one, model)]
    assert sizes == [result['small_parameters'], result['dense_parameters']] and sizes[0] < sizes[1]
    assert result['small_macs'] < result['dense_macs'] and result['small_ms_1'] > 0
    for name in ('packed.pt2', 'packed.ts'):
        assert torch.allclose(formats.read(tmp_path / 'packed' / name, trust=True)(x), expected, atol=1e-4)


@pytest.mark.parametrize(
    ('words', 'sentence'),
    [
        (['--stage=finetune'], 'name it with --from'),
        (['--finetune-epochs=2', '--cycles=3'], 'at least as many'),
        (['--select=val', '--val-size=0'], 'takes a validation split'),
        (['--temperature=0'], 'above 0'),
    ],
)
def test_settings_that_cannot_work(words, sentence):
    with pytest.raises(ValueError, match=sentence):
        Method(parse([*TINY, '--method=dsp', *words]))


def test_a_layer_that_is_not_there_is_found_before_training(tmp_path):
    with pytest.raises(SystemExit, match='nolayer'):
        run_main(tmp_path, *PIPELINE, '--exclude', 'nolayer')
    assert not (tmp_path / 'log.jsonl').exists()


def test_selection_without_a_validation_split_is_the_last_epoch():
    assert Method(parse([*TINY, '--method=dsp', '--val-size=0'])).select == 'last'
    assert Method(parse([*TINY, '--method=dsp'])).select == 'val'


@pytest.mark.gpu
def test_on_a_gpu_as_on_the_cpu(no_noise):
    results = []
    for device in ('cpu', 'cuda'):
        model = small().to(device)
        x, y = (tensor.to(device) for tensor in batch())
        grouper = GroupWrapper(model, sgd(model), CROSS_ENTROPY, 2e-3, 5, 4, 0.5, say=quiet)
        torch.manual_seed(3)
        for logits in grouper.logits:
            logits.data.copy_(torch.randn(logits.shape))
        train_step(grouper, x, y)
        pruner = PruneWrapper(model, 4, 2, say=quiet)
        results.append(([c.group.cpu() for c in pruner.convs.values()], [*pruner.initialize(0.5)]))
        pruner.after_step(grouper.optimizer)
    assert results[0][1] == pytest.approx(results[1][1], abs=1)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(results[0][0], results[1][0], strict=True))


def test_shares_of_zeros_by_hand():
    """Two convolutions of 2 x 2 kernels: one of 9 weights at 10 MACs a kernel has lost 1, one of 1 weight at 3 has lost 2."""
    convs = {'a': nn.Conv2d(2, 2, 3), 'b': nn.Conv2d(2, 2, 1)}
    convs['a'].weight.data[0, 1] = 0
    convs['a'].weight.data[1, 1, 0, 0] = 0  # a kernel that is not wholly zero counts in full
    convs['b'].weight.data[:, 0] = 0
    flops, weights = shares_pruned(convs, {'a': (40, 30), 'b': (12, 6)})
    assert flops == pytest.approx((10 + 6) / 52) and weights == pytest.approx((9 + 2) / 40)


def test_images_are_normalised_as_the_authors_do():
    """As in configs/dsp/cifar10.yaml; a data set of other channels has its own, and a flag of the user's wins."""
    table = load_table(Path(__file__).parent.parent / 'configs' / 'dsp' / 'cifar10.yaml')
    args = parse(['--method=dsp'])
    assert (args.mean, args.std) == (table['defaults']['mean'], table['defaults']['std'])
    assert parse(['--method=dense', '--dataset=cifar10']).std == [0.2023, 0.1994, 0.2010]
    assert parse([*TINY, '--method=dsp']).std == [0.3763]
    assert parse(['--method=dsp', '--std', '1', '2', '3']).std == [1, 2, 3] and parse(['--method=dsp']).std == args.std


@pytest.mark.parametrize('norm', [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_a_convolution_that_computes_its_weight_is_named(norm):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm(nn.Conv2d(4, 4, 3)))
    with pytest.raises(ValueError, match='1 computes its weight by torch.nn.utils.parametrize: make it a plain layer first'):
        PruneWrapper(model, 2, -1, say=quiet)
    assert not hasattr(model[1], 'mask') and not hasattr(model[1], 'group')
