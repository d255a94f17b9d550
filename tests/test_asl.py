"""Adaptive Sparsity Loss against its authors' trajectory, its equations by hand, and the faults of the released code."""

import copy
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.special
import torch
import torch.nn.functional as F
from helpers import LAYERS, GoldenNet, Sharing, run_main
from torch import nn

import archs
import methods
from args import parse
from methods.asl import finish_exactly
from sparse_utils import (
    Pruner,
    adaptive_formula,
    adaptive_layers,
    adaptive_loss,
    count_zeros,
    initial_thresh,
    iter_desparsify,
    iter_sparsify,
    sparsity,
)


def test_trajectory_of_the_authors_code():
    gold = np.load(Path(__file__).parent / 'golden' / 'asl_adaptive.npz')
    model = GoldenNet()
    model.load_state_dict({key[5:]: torch.as_tensor(gold[key]) for key in gold if key.startswith('init/')})
    keys = list(model.state_dict())
    iter_sparsify(model, float(gold['thresh']), bool(gold['trainable']), int(gold['pthres']))
    optimizer = torch.optim.SGD(model.parameters(), lr=float(gold['lr']), momentum=0.9)
    analytic, per_layer, losses, measured = [], [], [], []
    for step in range(len(gold['losses'])):
        analytic.append(adaptive_loss(model).item())
        loss = F.cross_entropy(model(torch.as_tensor(gold['x'][step % 4])), torch.as_tensor(gold['y'][step % 4]))
        loss = loss + float(gold['lv']) * (float(gold['starget']) - adaptive_loss(model)) ** 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        per_layer.append(adaptive_loss(model, reduce=False).tolist())  # the golden file has them after the step
        measured.append(sparsity(model)[0])
    np.testing.assert_allclose(analytic, gold['analytic_sparsity'], rtol=1e-5)
    np.testing.assert_allclose(per_layer, gold['analytic_sparsity_per_layer'], rtol=1e-5)
    np.testing.assert_allclose(losses, gold['losses'], rtol=1e-4)
    np.testing.assert_allclose(measured, gold['sparsity_percent'], rtol=1e-6)
    before = sparsity(model)
    assert iter_desparsify(model) is model and sparsity(model) == before
    assert list(model.state_dict()) == keys
    for key, value in model.state_dict().items():
        np.testing.assert_allclose(value.numpy(), gold[f'final/{key}'], rtol=1e-3, atol=1e-6, err_msg=key)


def centred_layer(trainable=True, thresh=1.0):
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([[-3.0, -1.0, 1.0, 3.0]])  # mean 0, std sqrt(20/3) = 2.5820
    return iter_sparsify(layer, thresh, trainable, pthres=1)


def test_forward_and_gradients_by_hand():
    layer = centred_layer()
    std = math.sqrt(20 / 3)
    assert layer.weight.tolist() == [[-3.0, 0, 0, 3.0]]  # b = 2.582
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    layer(x).sum().backward()  # g = x
    assert layer.parametrizations.weight.original.grad.tolist() == x.tolist()  # straight through
    # dL/dr = -(std/b) * sum over |w| <= b of g w = -(std / (std + 1e-6)) * (2 * -1 + 3 * 1) = -1
    assert adaptive_layers(layer)[''][0].r.grad.item() == pytest.approx(-std / (std + 1e-6), rel=1e-6)


def test_forward_and_gradients_are_those_of_the_formula():
    torch.manual_seed(0)
    layer = nn.Linear(50, 20)
    iter_sparsify(layer, 0.9, pthres=1)
    operator = adaptive_layers(layer)[''][0]
    centred = layer.parametrizations.weight.original.detach().clone()
    centred -= centred.mean()
    centred.requires_grad_()
    g = torch.randn(20, 50)
    sparse = layer.weight
    (sparse * g).sum().backward()
    r = torch.tensor(0.9, requires_grad=True)
    expected = adaptive_formula(centred, r)
    (expected * g).sum().backward()
    assert torch.equal(sparse == 0, expected == 0) and (sparse == 0).any()
    torch.testing.assert_close(sparse, expected)
    torch.testing.assert_close(layer.parametrizations.weight.original.grad, centred.grad)
    assert operator.r.grad.item() == pytest.approx(r.grad.item(), rel=1e-4)


def test_formula_by_hand():
    weight = torch.tensor([-3.0, -1.0, 1.0, 3.0], requires_grad=True)  # std sqrt(20/3)
    r = torch.tensor(1.0, requires_grad=True)
    sparse = adaptive_formula(weight, r)
    torch.testing.assert_close(sparse, torch.tensor([-3.0, 0, 0, 3.0]))
    sparse.backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    torch.testing.assert_close(weight.grad, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert r.grad.item() == pytest.approx(-1.0, rel=1e-5)  # -(2 * -1 + 3 * 1), as std / b is 1 but for the 1e-6


def test_analytic_sparsity_by_hand():
    model = nn.Sequential(nn.Linear(10, 30), nn.Linear(30, 10), nn.Linear(10, 2))
    iter_sparsify(model, 1.0, pthres=100)
    assert list(adaptive_layers(model)) == ['0', '1']
    adaptive_layers(model)['0'][0].r.data.fill_(2.0)
    each = adaptive_loss(model, reduce=False)
    assert each.tolist() == pytest.approx([0.9544997, 0.6826895])  # erf(2/sqrt 2), erf(1/sqrt 2)
    assert adaptive_loss(model).item() == pytest.approx((0.9544997 * 300 + 0.6826895 * 300) / 600)
    adaptive_loss(model).backward()
    # d erf(r/sqrt 2)/dr = sqrt(2/pi) exp(-r^2/2), half of it by the weights of the mean
    assert adaptive_layers(model)['0'][0].r.grad.item() == pytest.approx(0.5 * math.sqrt(2 / math.pi) * math.exp(-2))


def test_mean_is_weighted_by_layer_size():
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 30))
    iter_sparsify(model, 1.0, pthres=1)
    adaptive_layers(model)['0'][0].r.data.fill_(0.0)
    assert adaptive_loss(model).item() == pytest.approx(0.6826895 * 3 / 4)


@pytest.mark.parametrize('target', [0.5, 0.8, 0.9, 0.95, 0.99])
def test_initial_thresholds(target):
    assert initial_thresh(target) == pytest.approx(math.sqrt(2) * scipy.special.erfinv(0.6 * target))
    assert initial_thresh(target, 1.0) == pytest.approx(math.sqrt(2) * scipy.special.erfinv(target))
    assert initial_thresh(0.9, 1.0) == pytest.approx(1.6448536)  # their commented line would give 0.126


# ------------------------------------------------------------------------------------------------ faults of the released code


@pytest.mark.parametrize('kind', ['fixed', 'adaptive', 'budget', 'flops'])
def test_every_kind_of_sparsity_loss_runs(kind, tmp_path):  # S1: fixed crashed
    result, _ = run_main(
        tmp_path, '--method=asl', f'--sparsity={kind}', '--starget=0.9', '--pthres=100', '--r-lr=0.05', '--epochs=6'
    )
    assert 0.3 < result['sparsity'] < 0.99 and result['args']['ptarget'] == 0.9


def loss_of(kind, values, target=0.9):
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 30))
    method = methods.load('asl')(parse(['--method=asl', f'--sparsity={kind}', f'--starget={target}', '--pthres=1']))
    method.prepare(model, 10, method.args)
    for (operator, _), value in zip(adaptive_layers(model).values(), values, strict=True):
        operator.r.data.fill_(initial_thresh(value, 1.0))
    method.attach(SimpleNamespace(model=model, example=torch.randn(1, 10)))
    return method.loss().item()


def test_losses_by_hand():
    # weighted mean (0.5 * 100 + 0.8 * 300) / 400 = 0.725; lv = 10
    assert loss_of('fixed', (0.5, 0.8)) == pytest.approx(10 * (0.4**2 + 0.1**2) / 2, rel=1e-4)
    assert loss_of('adaptive', (0.5, 0.8)) == pytest.approx(10 * 0.175**2, rel=1e-4)
    assert loss_of('budget', (0.5, 0.8)) == pytest.approx(10 * 0.175, rel=1e-4)
    assert loss_of('budget', (0.95, 0.95)) == 0.0
    assert loss_of('flops', (0.5, 0.8)) == pytest.approx(10 * 0.175**2, rel=1e-4)  # linear layers: MACs are sizes


def test_flops_weighs_by_macs():
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 2))
    method = methods.load('asl')(parse(['--method=asl', '--sparsity=flops', '--pthres=1']))
    method.prepare(model, 10, method.args)
    method.attach(SimpleNamespace(model=model, example=torch.randn(1, 1, 8, 8)))
    assert method.shares.tolist() == pytest.approx([36 * 64 / (36 * 64 + 512), 512 / (36 * 64 + 512)])


def test_frozen_thresholds_are_really_frozen():  # S2, S3
    layer = centred_layer(trainable=False)
    assert 'parametrizations.weight.0.r' in layer.state_dict() and len(list(layer.parameters())) == 1
    assert not adaptive_loss(layer).requires_grad
    layer(torch.ones(1, 4)).sum().backward()
    assert adaptive_layers(layer)[''][0].r.item() == 1.0


def test_thresholds_are_found_by_object_not_by_name():  # S4: a layer called r, or reduce
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.ModuleDict({'reduce': nn.Linear(40, 40), 'r': nn.Linear(40, 40)})

        def forward(self, x):
            return self.body['r'](self.body['reduce'](x))

    args = parse(['--method=asl', '--lr=0.5', '--wd=0.1'])
    method, model = methods.load('asl')(args), Named()
    method.prepare(model, 10, method.args)
    *others, thresholds = method.param_groups(model, method.args)
    assert [p.dim() for p in thresholds['params']] == [0, 0] and thresholds['lr'] == 0.005 and thresholds['weight_decay'] == 0.0
    assert sum(len(group['params']) for group in others) == 4 and all('lr' not in group for group in others)


@pytest.mark.parametrize('r, expected', [(-1.0, 0.0), (7.0, 0.9999994)])
def test_r_is_clamped_alike_in_forward_loss_and_report(r, expected):  # S5
    layer = nn.Linear(100, 100)
    iter_sparsify(layer, 1.0)
    operator = adaptive_layers(layer)[''][0]
    operator.r.data.fill_(r)
    assert adaptive_loss(layer).item() == pytest.approx(expected, abs=1e-6)
    weight = layer.parametrizations.weight.original.detach()
    assert operator.threshold(weight).item() == pytest.approx(min(max(r, 0), 5) * weight.std().item() + 1e-6)
    layer(torch.randn(2, 100)).sum().backward()
    adaptive_loss(layer).backward()
    assert operator.r.grad.item() == 0.0  # outside [0, 5] nothing pulls


def test_only_training_forwards_centre_the_weight():  # S6
    layer = nn.Linear(50, 50)
    layer.weight.data += 0.1
    before = layer.weight.detach().clone()
    iter_sparsify(layer, 0.5)
    original = layer.parametrizations.weight.original
    layer.eval()
    layer(torch.randn(2, 50))
    layer.train()
    with torch.no_grad():
        layer(torch.randn(2, 50))
    sparsity(layer)
    loss = layer(torch.randn(2, 50)).sum()
    assert torch.equal(original, before)
    loss.backward()  # moves it, so that evaluation sees what was trained
    assert torch.equal(original, before - before.mean())
    counted = sparsity(layer)
    layer.eval()
    assert sparsity(layer) == counted


def test_output_is_the_same_before_and_after_desparsifying():
    torch.manual_seed(0)
    model = archs.build('wrn10_1', 10, in_channels=1)
    iter_sparsify(model, 1.2, pthres=100)
    model.train()(torch.randn(4, 1, 8, 8)).sum().backward()
    model.eval()
    x = torch.randn(4, 1, 8, 8)
    before, counts = model(x), count_zeros(model)
    iter_desparsify(model)
    assert torch.equal(before, model(x)) and counts == count_zeros(model)


@pytest.mark.parametrize('make, shape', LAYERS)
def test_any_layer(make, shape):  # S7
    layer = make().eval()
    plain = copy.deepcopy(layer)
    b = 0.5 * plain.weight.std() + 1e-6
    plain.weight.data *= plain.weight.data.abs() > b
    x = torch.randn(*shape)
    assert torch.equal(iter_sparsify(layer, 0.5, pthres=1)(x), plain(x))


def test_size_is_the_real_number_of_weights():  # S8: 72 weights, not 576
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 3))
    assert list(adaptive_layers(iter_sparsify(model, 1.0))) == ['1']


def test_shared_and_tied_weights():
    model = iter_sparsify(Sharing(), 0.5, pthres=1)
    assert len(adaptive_layers(model)) == 2 and adaptive_loss(model, reduce=False).shape == (2,)
    model.eval()
    x = torch.randn(2, 3, 8, 8)
    before = model(x)
    assert torch.equal(before, iter_desparsify(model)(x))


def test_wrong_use_is_refused():
    for thresh in (-0.1, 5.1, math.nan):
        with pytest.raises(ValueError, match='standard deviations'):
            iter_sparsify(nn.Linear(50, 50), thresh)
    with pytest.raises(ValueError, match='at least 1000 weights'):
        iter_sparsify(nn.Linear(5, 5), 1.0)
    with pytest.raises(ValueError, match='parametrized already'):
        iter_sparsify(iter_sparsify(nn.Linear(50, 50), 1.0), 1.0)
    with pytest.raises(ValueError, match='call iter_sparsify first'):
        adaptive_loss(nn.Linear(50, 50))


# ------------------------------------------------------------------------------------------------------------- as a method


def test_the_command_of_the_seed():
    args = parse('--method asl --gpu 0 --sparsity adaptive --starget .9 --lv 10.0'.split())
    expected = {
        'model': 'wrn16_8',
        'dataset': 'cifar100',
        'epochs': 60,
        'batch_size': 128,
        'lr': 0.1,
        'wd': 5e-4,
        'ptarget': 0.9,
    }
    expected |= {
        'lr_restarts': 1,
        'lr_update': 'epoch',
        'wd_all': True,
        'pthres': 1000,
        'lv': 10.0,
        'sparsity': 'adaptive',
        'clip': 0.0,
    }
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize('target', [0.5, 0.8, 0.95])
def test_exact_ends_on_the_count(target, tmp_path):
    result, _ = run_main(tmp_path, '--method=asl', f'--starget={target}', '--pthres=100', '--exact')
    assert result['zeros'] == math.floor((result['weights'] - 1) * target) + 1


def test_finish_exactly_keeps_the_relative_order():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30))
    iter_sparsify(model, 1.0, pthres=1)
    adaptive_layers(model)['0'][0].r.data.fill_(2.0)
    relative = torch.cat(
        [
            layer.parametrizations.weight.original.abs().flatten() / (r * layer.parametrizations.weight.original.std() + 1e-6)
            for layer, r in zip(model, (2, 1), strict=True)
        ]
    )
    finish_exactly(model, 0.7)
    kept = torch.cat([layer.weight.flatten() != 0 for layer in model])
    assert torch.equal(kept, relative > relative.sort().values[math.floor(1799 * 0.7)])


def test_feather_on_this_backbone(tmp_path):
    result, _ = run_main(tmp_path, '--backbone=asl', '--ptarget=0.9', '--r-lr=0.1', '--epochs=8')
    assert result['sparsity'] > 0.6
    model = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 40))
    pruner = Pruner(model, final_rate=0.98, backbone='asl')
    assert len(pruner.threshold) == 2 and pruner.theta == 0.5
    pruner.update_thresh()
    model(torch.randn(3, 40)).sum().backward()
    assert all(operator.r.grad != 0 for operator, _ in adaptive_layers(model).values())
    percent = pruner.print_sparsity()
    model.eval()
    x = torch.randn(3, 40)
    before = model(x)
    assert torch.equal(pruner.desparsify()(x), before) and 0 < percent < 100


def test_frozen_at_the_target(tmp_path):
    result, _ = run_main(tmp_path, '--method=asl', '--starget=0.8', '--no-trainable', '--pthres=100')
    assert result['sparsity'] == pytest.approx(0.8, abs=0.06)
