"""Compiled kernels for training against the formulas that they stand for, and a run that goes on as it was begun."""

import math

import pytest
import torch
from helpers import TINY, assert_ends_as, run_main, run_with_copies

from args import parse
from deploy.engine.build import CompilerError, compile_kernels
from methods import _kernels
from methods._kernels import FastFeather, count_between, fast_soft_threshold, fast_threshold, lies_densely
from methods.feather import Method as FeatherMethod
from methods.st3 import STEPrunedLayer, effective_weight
from sparse_utils import feather, global_threshold

SHAPES = [(1,), (7,), (5, 3), (16, 8, 3, 3), (3, 100, 1, 1), (2, 2049)]
WORDS = {'feather': ['--t1=0', '--ptarget=0.9'], 'st3': ['--ptarget=0.9']}


def fast_feather(weight, threshold, theta=1.0):
    operator = FastFeather(3, theta)
    operator.threshold.fill_(threshold)
    return operator(weight)


# -------------------------------------------------------------------------------------------------------------- kernels


@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('threshold', [0.0, 1e-3, 0.5, 1.0, 10.0])
def test_feather_is_the_formula(shape, threshold):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    threshold = float(torch.tensor(threshold))  # as float32 has it
    found = fast_feather(weight, threshold)
    expected = feather(weight.double(), threshold)
    assert torch.equal(found == 0, expected == 0)
    kept = expected != 0
    # a rounding of 1 - (T / w)^3 counts the more the closer w is to T
    bound = 4 * 2**-24 * (expected.abs() + weight.double().abs() ** 3 / expected**2)[kept]
    assert ((found - expected)[kept].abs() <= bound).all()


def test_feather_by_hand():
    # (8 - 1)^(1/3) = 7^(1/3) = 1.9129312, (1.953125 - 1)^(1/3) = 0.9841239
    weight = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 1.25, 2.0], requires_grad=True)
    out = fast_feather(weight, 1.0, theta=0.5)
    torch.testing.assert_close(out, torch.tensor([-1.9129312, 0, 0, 0, 0, 0, 0.9841239, 1.9129312]), rtol=1e-6, atol=0)
    out.backward(torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8]))
    assert weight.grad.tolist() == [1, 1, 1.5, 2, 2.5, 3, 7, 8]  # halved where |w| <= 1


@pytest.mark.parametrize('theta', [0.0, 0.5, 1.0])
def test_gradient_of_feather_is_that_of_the_formula(theta):
    torch.manual_seed(0)
    for grad in (torch.randn(6, 4, 3, 3), torch.randn(4, 6, 3, 3).transpose(0, 1), torch.ones(()).expand(6, 4, 3, 3)):
        gradients = []
        for operator in (fast_feather, lambda *args: feather(args[0], args[1], 3, args[2])):
            weight = torch.linspace(-1, 1, 216).view(6, 4, 3, 3).requires_grad_()
            operator(weight, 0.5, theta).backward(grad)
            gradients.append(weight.grad)
        assert torch.equal(*gradients)


def test_feather_keeps_the_smallest_weight_above_the_threshold_and_nan():
    threshold = torch.tensor([1e-30, 1e-3, 0.1, 1.0, 1e6])
    above = threshold.nextafter(torch.tensor(math.inf))
    for t, w in zip(threshold, above, strict=True):
        out = fast_feather(torch.stack([t, w, -t, -w]), t)
        assert (out != 0).tolist() == [False, True, False, True] and out[1] > 0 > out[3]
    out = fast_feather(torch.tensor([math.nan, 0.2, 2.0, math.inf]), 1.0)
    assert out.isnan().tolist() == [True, False, False, False] and out[3] == math.inf


@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('soft', [False, True])
@pytest.mark.parametrize('rescale', [False, True])
@pytest.mark.parametrize('threshold', [0.0, 0.5, 10.0])
def test_st3_is_the_formula(shape, soft, rescale, threshold):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    weight[0] *= 1e-3  # a filter that goes as a whole
    if len(shape) == 1:
        weight = weight.view(-1, 1)
    expected = effective_weight(weight.double(), threshold, soft, rescale)
    found = fast_soft_threshold(weight, torch.tensor(threshold), soft, rescale)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
    assert torch.equal(found == 0, expected == 0)
    if threshold == 0:
        assert torch.equal(found, weight)


def test_st3_by_hand_and_straight_through():
    weight = torch.tensor([[3.0, -1.0, -2.0, 2.0], [0.5, -0.5, 1.0, 0.0]], requires_grad=True)
    out = fast_soft_threshold(weight, torch.tensor(1.0), True, True)
    scale = 1.01 / (0.01 + (7 / 4 + 1e-6) / (8 / 4 + 1e-6))  # first filter: 7 of 8 of the magnitude is kept
    torch.testing.assert_close(out, torch.tensor([[2.0, 0, -1, 1], [0, 0, 0, 0]]) * scale, rtol=1e-6, atol=0)
    out.backward(torch.arange(8.0).view(2, 4))
    assert weight.grad.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert fast_soft_threshold(torch.tensor([[math.nan, 1.0]]), torch.tensor(0.5), True, True)[0, 0].isnan()


@pytest.mark.parametrize('ratio', [0.0, 0.3, 0.9, 0.999, 1.0])
def test_the_threshold_is_the_same_to_the_bit(ratio):
    torch.manual_seed(0)
    weights = [torch.randn(shape) for shape in [(30, 20, 3, 3), (50,), (1,), (700, 30)]]
    tied = [torch.randn(500).mul(4).round().div(4), torch.zeros(40)]
    for some in (weights, tied, [weights[0].to(memory_format=torch.channels_last)], [torch.ones(3)]):
        exact = torch.cat([w.flatten() for w in some]).abs().sort().values
        expected = global_threshold(some, ratio)
        for guess in (None, expected, expected * 0.9, 0.0, 100.0):
            assert torch.equal(fast_threshold(some, ratio, guess), expected)
        assert int((exact <= expected).sum()) >= math.floor((len(exact) - 1) * ratio) + 1
    with pytest.raises(ValueError, match='NaN'):
        fast_threshold([torch.tensor([1.0, math.nan])], 0.5)


def test_between_by_hand():
    below, inside = count_between([torch.tensor([0.5, -1.0, 2.0, -3.0]), torch.tensor([1.5, math.nan, -0.25])], 1.0, 2.0)
    assert below == 2 and inside.tolist() == [1.0, 2.0, 1.5]
    many = torch.linspace(-1, 1, 10_001)  # more than there is room for at first
    below, inside = count_between([many, many], 0.25, 2.0)
    assert below == 2 * int((many.abs() < 0.25).sum()) and len(inside) == 20_002 - below and inside.min() >= 0.25


def test_threads_change_no_bit():
    """Weights of several threads, a number that none of them divides."""
    torch.manual_seed(0)
    weight = torch.randn(23, 1009).requires_grad_()
    assert weight.numel() > 20_000  # LARGE of the kernels
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        sparse = fast_feather(weight, 0.7, theta=0.5)
        (gradient,) = torch.autograd.grad(sparse, weight, weight.detach())
        below, inside = count_between([weight.detach()], 0.7, 0.8)
        thresholded = fast_soft_threshold(weight, torch.tensor(0.7), True, True)
        results.append([sparse, gradient, thresholded, torch.tensor(below), inside.sort().values])
    for others in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], others, strict=True))


def test_a_compiler_without_threads_makes_kernels_for_one(monkeypatch):
    asked = []

    def without(options=(), source=None):
        asked.append(options)
        if options:
            raise CompilerError('unknown option -fopenmp')
        return compile_kernels(source=source)

    monkeypatch.setattr(_kernels, 'compile_kernels', without)
    kernels = _kernels.library.__wrapped__()
    weight = torch.tensor([0.5, -2.0, 1.0])
    sparse = torch.empty(3)
    kernels.feather_forward(weight.data_ptr(), 3, 1.0, sparse.data_ptr(), 2)
    assert asked == [['-fopenmp'], ()] and sparse.tolist() == [0, pytest.approx(-(7 ** (1 / 3))), 0]


def test_weights_that_do_not_lie_side_by_side_are_left_to_the_formulas():
    torch.manual_seed(0)
    whole = torch.randn(8, 6, 3, 3)
    for weight in (whole[:, ::2], whole.transpose(0, 1), whole[..., 1:], whole.to(memory_format=torch.channels_last)[:, 1:]):
        assert not lies_densely(weight)
        assert torch.equal(fast_feather(weight, 0.5), feather(weight, 0.5))
        layers = [STEPrunedLayer(kernels=kernels) for kernels in (False, True)]
        for layer in layers:
            layer.threshold.fill_(0.5)
        assert torch.equal(layers[0](weight), layers[1](weight))
    assert lies_densely(whole) and lies_densely(whole.to(memory_format=torch.channels_last))


# ----------------------------------------------------------------------------------------------------------------- runs


def no_compiler():
    raise CompilerError('no compiler here')


@pytest.mark.parametrize('name', WORDS)
def test_a_run_says_what_it_computes_with_and_goes_on_with_it(tmp_path, name, capsys, monkeypatch):
    words = [f'--method={name}', *WORDS[name], '--epochs=2']
    fast, state = run_main(tmp_path / 'fast', *words)
    plain, plain_state = run_main(tmp_path / 'plain', *words, '--no-kernels')
    said = capsys.readouterr().out
    assert f'{name} computes with compiled kernels' in said and f'{name} computes in plain PyTorch: --no-kernels' in said
    assert fast['kernels'] is True and plain['kernels'] is False and fast['zeros'] == plain['zeros']
    for key, tensor in state.items():
        torch.testing.assert_close(tensor, plain_state[key], rtol=0.05, atol=0.02)  # roundings grow as the network trains

    monkeypatch.setattr(_kernels, 'library', no_compiler)
    unable, _ = run_main(tmp_path / 'unable', *words)
    assert unable['kernels'] is False and 'in plain PyTorch: no compiler here' in capsys.readouterr().out
    assert torch.equal(torch.load(tmp_path / 'unable' / 'model.pt')['conv1.weight'], plain_state['conv1.weight'])


def half_done(copies):
    """Of the folders that run_with_copies() gives, one in the middle of the training."""
    return [copy for copy in copies if (copy / 'checkpoint.pt').exists() and not (copy / 'model.pt').exists()][1]


@pytest.mark.parametrize('name', WORDS)
def test_a_run_that_was_begun_without_kernels_ends_without(tmp_path, name, monkeypatch, capsys):
    words = [f'--method={name}', *WORDS[name]]
    with monkeypatch.context() as patch:
        patch.setattr(_kernels, 'library', no_compiler)
        *whole, copies = run_with_copies(tmp_path / 'run', words)
    assert_ends_as(whole, half_done(copies), words)  # there is a compiler now
    assert 'goes on in plain PyTorch' in capsys.readouterr().out


@pytest.mark.parametrize('name', WORDS)
def test_a_run_with_kernels_does_not_go_on_without(tmp_path, name, monkeypatch):
    words = [f'--method={name}', *WORDS[name]]
    *whole, copies = run_with_copies(tmp_path / 'run', words)
    begun = half_done(copies)
    before = (begun / 'checkpoint.pt').read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(_kernels, 'library', no_compiler)
        with pytest.raises(SystemExit):
            run_main(begun, *words)
    assert (begun / 'checkpoint.pt').read_bytes() == before
    assert_ends_as(whole, begun, words)


def test_kernels_that_are_asked_for_in_vain_are_refused(monkeypatch):
    for words, reason in [(['--p=1'], 'settings'), (['--compile'], 'torch.compile'), (['--backbone=asl'], 'settings')]:
        with pytest.raises(ValueError, match=reason):
            method = FeatherMethod(parse([*TINY, '--method=feather', '--t1=0', '--kernels', *words]))
            method.prepare(torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3)), 6, method.args)
