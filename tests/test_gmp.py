"""Gradual magnitude pruning: equation 1 by hand, the two hard-mask variants recorded from ST-3's code, and zeros that stay."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, resume_everywhere, run_main
from torch import nn

from args import parse
from methods.gmp import Masking, Method, magnitude_masks, sparsity_at
from sparse_utils import count_zeros

GOLD = np.load(Path(__file__).parent / 'golden' / 'st3.npz')


def gold(key):
    return torch.as_tensor(GOLD[key])


def make(model, steps, *words, optimizer=None):
    """A method on `model` and on an optimizer, before its first step."""
    method = Method(parse([*TINY, '--method=gmp', *words]))
    method.prepare(model, steps, method.args)
    optimizer = optimizer(method.param_groups(model, method.args)) if optimizer else None
    method.attach(Namespace(model=model, forward=model, optimizer=optimizer))
    return method, optimizer


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5))


def train(model, method, optimizer, steps, each=lambda step: None, device='cpu'):
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        x, y = torch.randn(8, 2, 6, 6, generator=generator), torch.randint(0, 5, (8,), generator=generator)
        method.before_step(step)
        loss = F.cross_entropy(model(x.to(device)), y.to(device))
        optimizer.zero_grad()
        loss.backward()
        method.after_backward(step, (x, y))
        optimizer.step()
        method.after_step(step, (x, y))
        each(step)


def zeros(model):
    return [count for count, _ in count_zeros(model).values()]


def test_equation_1_by_hand():
    # halfway, (1 - 1/2)^3 = 1/8 of the way from the final to the initial sparsity is left
    assert sparsity_at(60, 10, 110, 0.0, 0.8) == pytest.approx(0.7)
    assert sparsity_at(60, 10, 110, 0.2, 0.8) == pytest.approx(0.725)
    assert [sparsity_at(t, 10, 110, 0.2, 0.8) for t in (0, 10, 110, 999)] == pytest.approx([0.2, 0.2, 0.8, 0.8])
    assert sparsity_at(110, 10, 110, 0.2, 0.8) == 0.8  # exactly: the count depends on it


def test_schedule_of_st3s_code():
    # 5 batches an epoch, from epoch 1 to 4; entry i stands after batch i, when i + 1 steps are done
    ours = [sparsity_at(i + 1, 5, 20, 0.0, 1.0) for i in range(30)]
    np.testing.assert_allclose(ours, GOLD['schedule/s1_e4_p3'], atol=1e-12)


@pytest.mark.parametrize(('variant', 'words'), [('sticky', []), ('nonsticky', ['--regrow'])])
def test_effective_weight_and_gradient_of_st3s_code(variant, words):
    weight = gold('w/conv')
    layer = nn.Conv2d(4, 8, 3)
    layer.weight.data.copy_(weight)
    method, _ = make(layer, 9, *words)
    masks = magnitude_masks(method.weights, ratio=float((weight.abs() <= 0.35).sum()) / weight.numel())
    assert torch.equal(masks[''], weight.abs() > 0.35)
    method.load_state_dict({'masks': masks})
    (layer.weight * torch.linspace(-1, 1, weight.numel()).view_as(weight)).sum().backward()
    method.after_backward(0, None)
    assert torch.equal(layer.weight.detach(), gold(f'{variant}/soft0_rescale0/eff'))
    torch.testing.assert_close(method.weights[''].grad, gold(f'{variant}/soft0_rescale0/grad'), rtol=1e-6, atol=1e-6)
    dense = method.weights['']
    assert torch.equal(dense, weight) == (variant == 'nonsticky')


OPTIMIZERS = {
    'momentum': lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    'nesterov': lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    'plain': lambda p: torch.optim.SGD(p, 0.1),
    'adam': lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.01),
    'adamw': lambda p: torch.optim.AdamW(p, 0.01),
}
RAMP = ['--epochs=6', '--start-epoch=1', '--end-epoch=4', '--frequency=3', '--ptarget=0.9']


def pruned_weights_that_move(optimizer):
    """How often a weight that was pruned before a step is not zero after it, or has a momentum."""
    model, moved = small(), 0
    method, optimizer = make(model, 30, *RAMP, optimizer=OPTIMIZERS[optimizer])
    before = method.state_dict()['masks']

    def look(step):
        nonlocal moved, before
        for name, weight in method.weights.items():
            tensors = [weight, *(optimizer.state[weight].get(key) for key in ('momentum_buffer', 'exp_avg'))]
            moved += sum(int((tensor[~before[name]] != 0).sum()) for tensor in tensors if tensor is not None)
        before = method.state_dict()['masks']
        moved += sum(int((weight[~before[name]] != 0).sum()) for name, weight in method.weights.items())

    train(model, method, optimizer, 30, look)
    return moved


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_a_pruned_weight_is_zero_after_every_step(optimizer):
    assert pruned_weights_that_move(optimizer) == 0


@pytest.mark.parametrize('optimizer', [name for name in OPTIMIZERS if name != 'plain'])
def test_masking_the_gradient_alone_would_not_do(optimizer, monkeypatch):
    monkeypatch.setattr(Masking, 'after_step', lambda self, step, batch: None)  # GMP still zeroes a weight when it is pruned
    assert pruned_weights_that_move(optimizer) > 0


def test_masks_are_renewed_every_dt_steps_and_at_the_end(monkeypatch):
    model = small()
    n = sum(weights for _, weights in count_zeros(model).values())
    method, optimizer = make(model, 30, *RAMP, optimizer=OPTIMIZERS['momentum'])  # 5 steps an epoch, from 5 to 20
    assert method.ramp == (5, 20)
    seen = [sum(zeros(model))]
    train(model, method, optimizer, 30, lambda step: seen.append(sum(zeros(model))))
    expected = [0] * 31
    for t in range(5, 31):  # 8, 11, 14, 17, 20
        expected[t] = round(sparsity_at(5 + (t - 5) // 3 * 3, 5, 20, 0, 0.9) * n)
    assert seen == expected and seen[-1] == round(0.9 * n)
    model = small()
    words = [
        *RAMP[:3],
        '--frequency=7',
        '--ptarget=0.9',
        '--initial-sparsity=0.3',
    ]  # 12, 19, and 20 though 7 does not divide 15
    method, optimizer = make(model, 30, *words, optimizer=OPTIMIZERS['momentum'])
    seen = []
    train(model, method, optimizer, 30, lambda step: seen.append(sum(zeros(model))))
    assert [t + 1 for t in range(1, 30) if seen[t] != seen[t - 1]] == [5, 12, 19, 20]
    assert seen[4] == round(0.3 * n) and seen[-1] == round(0.9 * n)


def test_a_ramp_from_step_0_and_a_ramp_shorter_than_a_step():
    model = small()
    method, _ = make(model, 30, '--start-epoch=0', '--initial-sparsity=0.5')
    assert sum(zeros(model)) == round(0.5 * 784)  # before the first forward pass
    method.prepare(model, 30, method.args)  # and again
    assert sum(zeros(model)) == round(0.5 * 784)
    for words in (['--start-epoch=2.99', '--end-epoch=3'], ['--start-epoch=0', '--end-epoch=0.01']):
        model = small()
        method, optimizer = make(model, 6, '--ptarget=0.9', *words, optimizer=OPTIMIZERS['plain'])
        train(model, method, optimizer, 6)
        assert sum(zeros(model)) == round(0.9 * 784)


@pytest.mark.parametrize('scope', ['global', 'layer'])
@pytest.mark.parametrize('ratio', [0.0, 0.001, 0.5, 0.9, 0.999, 1.0])
def test_ties_never_change_the_count(scope, ratio):
    for value in (1.0, 0.0):
        weights = {'a': torch.full((7, 5), value), 'b': torch.full((3, 2, 2), -value), 'c': torch.full((1, 2), value)}
        masks = magnitude_masks(weights, ratio, scope)
        assert all(masks[name].dtype == torch.bool and masks[name].shape == w.shape for name, w in weights.items())
        pruned = [int((~mask).sum()) for mask in masks.values()]
        if scope == 'global':
            assert sum(pruned) == round(49 * ratio)
        else:  # each layer keeps a weight
            assert pruned == [min(round(n * ratio), n - 1) for n in (35, 12, 2)]


def test_masks_by_hand():
    weights = {'a': torch.tensor([[0.1, -0.4], [0.3, -0.2]]), 'b': torch.tensor([5.0, -0.05, 6.0, 0.35])}
    masks = magnitude_masks(weights, 0.5)
    assert masks['a'].tolist() == [[False, True], [False, False]] and masks['b'].tolist() == [True, False, True, True]
    masks = magnitude_masks(weights, 0.5, 'layer')
    assert masks['a'].tolist() == [[False, True], [True, False]] and masks['b'].tolist() == [True, False, True, False]
    # what was pruned before goes first, whatever it has become
    before = {'a': torch.ones(2, 2, dtype=torch.bool), 'b': torch.tensor([True, True, False, True])}
    masks = magnitude_masks(weights, 0.25, previous=before)
    assert masks['a'].all() and masks['b'].tolist() == [True, False, False, True]
    for bad in (({}, 0.5), (weights, 1.5), (weights, 0.5, 'local')):
        with pytest.raises(ValueError):
            magnitude_masks(*bad)


def test_masks_do_not_depend_on_the_memory_layout_and_share_it():
    weight = torch.randn(8, 4, 3, 3).round(decimals=1)  # with ties
    other = weight.to(memory_format=torch.channels_last)
    one, two = magnitude_masks({'w': weight}, 0.7)['w'], magnitude_masks({'w': other}, 0.7)['w']
    assert torch.equal(one, two) and two.stride() == other.stride()


def test_pruned_weights_never_return_and_with_regrow_they_do():
    for words, returned in (([], False), (['--regrow'], True)):
        model, masks = small(), []
        method, optimizer = make(model, 30, *RAMP, *words, optimizer=OPTIMIZERS['nesterov'])
        train(model, method, optimizer, 30, lambda step, m=method, kept=masks: kept.append(m.state_dict()['masks']))
        pairs = zip(masks[:-1], masks[1:], strict=True)
        assert returned == any(bool((~old[name] & new[name]).any()) for old, new in pairs for name in old)
        assert sum(zeros(model)) == round(0.9 * 784)
        dense = method.weights['0']
        assert bool((dense[~masks[-1]['0']] != 0).any()) == returned  # w stays underneath


@pytest.mark.parametrize('words', [[], ['--regrow']])
def test_finalize_gives_plain_layers_also_for_tied_weights(words):
    model = small()
    model.append(nn.Linear(5, 5)).append(nn.Linear(5, 5))
    model[6].weight = model[5].weight
    names = list(model.state_dict())
    method, optimizer = make(model, 30, *RAMP, *words, optimizer=OPTIMIZERS['momentum'])
    assert sum(weight.numel() for weight in method.weights.values()) == 784 + 25
    train(model, method, optimizer, 30)
    x = torch.randn(3, 2, 6, 6)
    expected = model.eval()(x)
    assert method.finalize(model) is model and torch.equal(model(x), expected)
    assert list(model.state_dict()) == names and type(model[0]) is nn.Conv2d and model[6].weight is model[5].weight
    assert sum(zeros(model)) == round(0.9 * (784 + 25))


def test_layer_scope_and_regrow_as_runs_and_a_killed_one(tmp_path):
    result, _ = run_main(tmp_path / 'layer', '--method=gmp', '--scope=layer', '--ptarget=0.9', '--frequency=1')
    assert all(row[0] == min(round(0.9 * row[1]), row[1] - 1) for row in result['layers'].values())
    words = ['--method=gmp', '--regrow', '--ptarget=0.8', '--epochs=2', '--frequency=1', '--optimizer=adam', '--lr=0.01']
    assert resume_everywhere(tmp_path / 'run', words) == 7


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['--start-epoch=2', '--end-epoch=2'], 'goes from 2 to 2'),
        (['--end-epoch=3.5'], 'must lie in the 3 epochs'),
        (['--initial-sparsity=0.99', '--ptarget=0.9'], 'above --ptarget'),
        (['--pthres=1000000'], 'at least 1000000 weights'),
    ],
)
def test_settings_that_cannot_work(words, message):
    with pytest.raises(ValueError, match=message):
        make(small(), 9, *words)


@pytest.mark.gpu
@pytest.mark.parametrize('words', [[], ['--regrow']])
def test_a_step_without_new_masks_does_not_wait_for_the_gpu(words):
    model = small().cuda()
    words = ['--ptarget=0.9', '--start-epoch=0', '--end-epoch=1', '--frequency=1000', *words]
    method, optimizer = make(model, 30, *words, optimizer=OPTIMIZERS['momentum'])
    train(model, method, optimizer, 12, device='cuda')
    assert sum(zeros(model)) == round(0.9 * 784)
    torch.cuda.set_sync_debug_mode('error')
    try:
        for step in range(12, 20):
            method.before_step(step)
            method.after_backward(step, None)
            method.after_step(step, None)
    finally:
        torch.cuda.set_sync_debug_mode('default')
