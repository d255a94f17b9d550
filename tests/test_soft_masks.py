"""STR, Spartan and DPF: the examples worked by hand, and the faults of released codes that ours must not have."""

import json

import pytest
import torch
from helpers import TINY, method_on, run_main, same_state, small, train_on_noise
from torch import nn

import methods
from args import parse
from methods.spartan import find_mu, mask_gradient, soft_mask
from methods.str import soft_threshold
from sparse_utils import count_zeros


def zeros(model):
    return sum(zeros for zeros, _ in count_zeros(model).values())


def sigmoid(x):
    return torch.sigmoid(torch.tensor(x, dtype=torch.float64)).item()


# -------------------------------------------------------------------------------------------------------------- STR


def test_str_by_hand():
    # T = sigmoid(-2) = 0.1192029, its slope T (1 - T) = 0.1049936
    weight = torch.tensor([0.5, -0.2, 0.05], requires_grad=True)
    r = torch.tensor(-2.0, requires_grad=True)
    out = soft_threshold(weight, r)
    assert out.tolist() == pytest.approx([0.3807971, -0.0807971, 0], abs=1e-7)
    (out * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert weight.grad.tolist() == [1, 2, 0] and r.grad.item() == pytest.approx(0.1049936, abs=1e-7)  # -(1 - 2) of them


def test_str_far_below_zero_only_decay_moves_r():
    weight, r = torch.tensor([0.5, -0.2], requires_grad=True), torch.tensor(-120.0, requires_grad=True)
    out = soft_threshold(weight, r)
    out.sum().backward()
    assert torch.equal(out, weight) and r.grad == 0
    method, fit = method_on(small(), 'str', '--r-init=-120', '--wd=0.1', '--lr=0.1', '--momentum=0', '--clip=0')
    for _ in train_on_noise(method, fit, range(1)):
        pass
    assert [operator.r.item() for operator in method.operators.values()] == pytest.approx([-120 * (1 - 0.1 * 0.1)] * 2)


def test_str_thresholds_have_the_weights_rate_and_decay():
    for words in ([], ['--wd-all']):
        method, fit = method_on(small(), 'str', '--wd=0.01', *words)
        own = {id(operator.r) for operator in method.operators.values()}
        groups = [g for g in fit.optimizer.param_groups if any(id(p) in own for p in g['params'])]
        assert len(groups) == 1 and groups[0]['weight_decay'] == 0.01 and groups[0]['initial_lr'] == method.args.lr
        assert len(groups[0]['params']) == 2


def test_str_has_no_target_and_says_so(tmp_path):
    result, _ = run_main(tmp_path, '--method=str', '--ptarget=0.9')
    assert result['zeros'] == 0 and result['target'].startswith('none: the share of zeros follows from --r-init and --wd')


@pytest.mark.parametrize('words', [['--r-init=-2'], ['--r-init=-5'], ['--r-init=-100', '--optimizer=adam', '--lr=0.01']])
def test_str_ends_on_the_count_when_asked(words, tmp_path):
    """From thresholds that prune too much, too little, and nothing."""
    result, state = run_main(tmp_path, '--method=str', '--ptarget=0.7', '--exact', *words)
    n = result['weights']
    assert result['zeros'] == int((n - 1) * 0.7) + 1 and 'target' not in result
    assert all(tensor.isfinite().all() for tensor in state.values())
    line = json.loads((tmp_path / 'log.jsonl').read_text().splitlines()[-1])
    assert line['accuracy'] == result['accuracy'] and line['largest_threshold'] == 0


def test_str_finishes_with_all_thresholds_multiplied_by_one_factor():
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    method, _ = method_on(model, 'str', '--exact', '--ptarget=0.6', '--r-init=0')
    first, second = method.weights.values()
    first.data = torch.tensor([[4.0, -3.0], [1.0, 0.2]])
    second.data = torch.tensor([[0.9, -0.5]])
    method.operators['2'].r.data.fill_(torch.logit(torch.tensor(0.1)))  # T = 0.5 and 0.1
    # |w| / T = 8, 6, 2, 0.4 and 9, 5; position 5 * 0.6 = 3 of 0.4, 2, 5, 6, 8, 9: the factor is 6. T = 3 and 0.6
    method.finish_exactly()
    assert torch.allclose(model[1].weight, torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert torch.allclose(model[2].weight, torch.tensor([[0.3, 0.0]]))


# ---------------------------------------------------------------------------------------------------------- Spartan


def masks_of(values, beta, k):
    weight = torch.tensor(values)
    return soft_mask(weight, beta, find_mu([weight], beta, k)).tolist()


def test_spartan_soft_masks_by_hand():
    # |w| = 2, 1, 0 and k = 1.5: by symmetry mu = -beta
    for beta in (1.0, 3.0, 8.0):
        assert masks_of([2.0, 1.0, 0.0], beta, 1.5) == pytest.approx([sigmoid(beta), 0.5, sigmoid(-beta)], abs=1e-5)
    assert masks_of([2.0, -1.0, 0.0], 1.0, 1.5) == pytest.approx([0.731059, 0.5, 0.268941], abs=1e-5)
    assert masks_of([0.9, 0.5, 0.1], 5.0, 1.0) == pytest.approx([0.70915, 0.24810, 0.04275], abs=1e-5)


def test_spartan_masks_add_up_to_k():
    """The released iteration stops at a change of 1 %: here with masks of .916, .0036 and 0, in all .919 instead of 1."""
    assert masks_of([0.9, 0.5, 0.1], 20.0, 1.0) == pytest.approx([0.98201, 0.01798, 6e-6], abs=1e-5)
    torch.manual_seed(0)
    weights = [torch.randn(40, 30), 0.01 * torch.randn(300), torch.zeros(5)]
    for beta in (0.0, 1.0, 20.0, 1000.0):
        for k in (1, 30, 750, 1500, 1504):
            for guess in (0.0, -1e6, 1e6):
                mu = find_mu(weights, beta, k, guess)
                assert sum(soft_mask(weight, beta, mu).double().sum().item() for weight in weights) == pytest.approx(
                    k, rel=1e-4
                )


def test_spartan_gradient_by_hand():
    # beta 1, G = (1, 0, 0): C = .196612 / (.196612 + .25 + .196612) = .305666
    mask = torch.tensor([sigmoid(1.0), 0.5, sigmoid(-1.0)])
    gradient = torch.tensor([1.0, 0.0, 0.0])
    spread = mask * (1 - mask)
    mean = (gradient * spread).sum() / spread.sum()
    assert mean.item() == pytest.approx(0.305666, abs=1e-6)
    assert (1.5 - mask.square().sum()).item() == pytest.approx(spread.sum().item())  # the other form of the denominator
    change = mask_gradient(mask, gradient, mean, 1.0)
    assert change.tolist() == pytest.approx([0.136514, -0.076417, -0.060098], abs=1e-6)


def test_spartan_gradient_is_that_of_the_soft_mask():
    """Against differences: |w| moves, mu follows so that the sum stays k. The loss here is linear in w m."""
    torch.manual_seed(0)
    weight, slope, beta, k = torch.randn(12, dtype=torch.float64), torch.randn(12, dtype=torch.float64), 4.0, 5

    def loss(w):
        low, high = -100.0, 100.0
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (low, middle) if torch.sigmoid(beta * w.abs() + middle).sum() > k else (middle, high)
        return (slope * w * torch.sigmoid(beta * w.abs() + low)).sum().item()

    model = nn.Linear(12, 1, bias=False).double()
    method, _ = method_on(model, 'spartan')
    method.weights[''].data = weight.clone().view(1, 12)
    method.beta, method.soft = beta, True
    method.mu = find_mu([weight], beta, k)
    method.weights[''].grad = slope.clone().view(1, 12)
    method.after_backward(0, None)
    step = 1e-5
    for index in range(12):
        shift = torch.zeros(12, dtype=torch.float64)
        shift[index] = step
        expected = (loss(weight + shift) - loss(weight - shift)) / (2 * step)
        assert method.weights[''].grad[0, index].item() == pytest.approx(expected, abs=1e-4)


def test_spartan_schedules_and_frozen_factors():
    model = small()
    method, fit = method_on(model, 'spartan', '--ptarget=0.8', '--beta=11', steps=30)
    assert (method.ramp_end, method.frozen_at) == (6, 24)
    seen, sharpness, factors = [zeros(model)], [method.beta], []
    for step in train_on_noise(method, fit, range(30)):
        seen.append(zeros(model))
        sharpness.append(method.beta)
        if step < 23 and method.soft:
            kept = 784 - round(0.8 * min((step + 1) / 6, 1) * 784)
            total = sum(soft_mask(w, method.beta, method.mu).sum().item() for w in method.weights.values())
            assert total == pytest.approx(kept, rel=1e-5)
        if step >= 23:
            factors.append({name: factor.clone() for name, factor in method.factors.items()})
    assert seen == [round(0.8 * min(t / 6, 1) * 784) for t in range(31)]
    assert sharpness == pytest.approx([1 + 10 * min(t / 24, 1) for t in range(31)])
    assert all(torch.equal(factors[0][name], other[name]) for other in factors for name in other)
    dense = {name: weight.clone() for name, weight in method.weights.items()}
    assert 0 < factors[0]['4'][factors[0]['4'] > 0].min() < 0.99
    assert method.finalize(model) is model
    for name, layer in (('0', model[0]), ('4', model[4])):
        assert torch.equal(layer.weight, dense[name] * factors[0][name])  # soft values stay factors of the weights
    assert zeros(model) == round(0.8 * 784)


def test_spartan_counts_weights_only():
    """The released code takes the share of all parameters, biases and batch norms too, out of the weights alone."""
    model = small()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    method, fit = method_on(model, 'spartan', '--ptarget=0.9')
    for _ in train_on_noise(method, fit, range(8)):
        pass
    assert zeros(model) == round(0.9 * 784) != round(0.9 * parameters)


# -------------------------------------------------------------------------------------------------------------- DPF


def test_dpf_by_hand():
    # keep 1 of (.5, -.1), lr .1: the gradient (.2, -1) at (.5, 0) gives (.48, 0); (.2, -8) then (.46, .8), and the mask turns
    model = nn.Linear(2, 1, bias=False)
    words = ['--ptarget=0.5', '--frequency=1', '--end-epoch=0.1', '--momentum=0', '--wd=0', '--clip=0', '--lr=0.1']
    method, fit = method_on(model, 'dpf', *words, '--lr-schedule=constant')
    weight = method.weights['']
    weight.data = torch.tensor([[0.5, -0.1]])
    method.update(method.ramp[1])
    assert model.weight.tolist() == [[0.5, 0.0]]
    for gradient, dense in (([0.2, -1.0], [0.48, 0.0]), ([0.2, -8.0], [0.46, 0.8])):
        fit.optimizer.zero_grad()
        (model.weight * torch.tensor([gradient])).sum().backward()
        method.after_backward(0, None)
        fit.optimizer.step()
        assert torch.allclose(weight, torch.tensor([dense]))
    method.update(30)
    assert method.masks()[''].tolist() == [[False, True]]
    # gmp --regrow would have left the second weight where it was
    other, _ = method_on(nn.Linear(2, 1, bias=False), 'gmp', '--regrow')
    other.set_masks({'': torch.tensor([[True, False]])})
    (other.layers[''].weight * torch.tensor([[0.2, -8.0]])).sum().backward()
    assert other.weights[''].grad.tolist() == [[pytest.approx(0.2), 0]]


def test_dpf_renews_its_masks_every_16_steps_of_all_weights():
    model = small()
    method, fit = method_on(model, 'dpf', '--ptarget=0.9', '--epochs=4', steps=80)
    assert method.ramp == (0, 60) and method.args.frequency == 16
    changed, before = [], method.masks()
    for step in train_on_noise(method, fit, range(80)):
        if any(not torch.equal(before[name], mask) for name, mask in method.masks().items()):
            changed.append(step + 1)
        before = method.masks()
    assert set(changed) <= {16, 32, 48, 60, 64, 80} and {16, 32, 48, 60} <= set(changed)
    assert zeros(model) == round(0.9 * 784)
    assert all((weight[~before[name]] != 0).any() for name, weight in method.weights.items())  # dense underneath
    assert all((weight.grad[~before[name]] != 0).any() for name, weight in method.weights.items())
    method.finalize(model)
    assert zeros(model) == round(0.9 * 784)  # of the weights, linear ones too; a port counts over biases as well


# -------------------------------------------------------------------------------------------------------- whole runs


def test_a_module_named_as_a_builtin_does_not_take_its_place(tmp_path):
    """methods/__init__.py has the names `str` and `set` once these modules are loaded."""
    assert methods.load('str').__module__ == 'methods.str' and methods.load('set').__module__ == 'methods.set'
    run_main(tmp_path / 'one', '--method=str', '--epochs=1')
    with pytest.raises(SystemExit, match='do not fit resnet20'):
        run_main(tmp_path / 'two', '--method=str', '--epochs=1', '--width=8', f'--from={tmp_path}/one')


@pytest.mark.parametrize('name', ['spartan', 'dpf'])
def test_tied_weights(name):
    tied = nn.Sequential(nn.Flatten(), nn.Linear(72, 72), nn.ReLU(), nn.Linear(72, 72), nn.Linear(72, 5))
    tied[3].weight = tied[1].weight
    method, fit = method_on(tied, name, '--ptarget=0.9')
    total = 72 * 72 + 72 * 5
    for _ in train_on_noise(method, fit, range(30)):
        pass
    method.finalize(tied)
    assert tied[1].weight is tied[3].weight and zeros(tied) == round(0.9 * total)


def test_str_resumes_to_the_end_with_the_exact_count(tmp_path):
    words = ['--method=str', '--exact', '--r-init=-3', '--ptarget=0.6', '--epochs=2']
    whole = run_main(tmp_path, *words)[1]
    for name in ('result.json', 'model.pt'):
        (tmp_path / name).unlink()
    assert same_state(run_main(tmp_path, *words)[1], whole)  # nothing is left to train: the count is not made again
    assert parse([*TINY, '--method=str']).r_init == -100
