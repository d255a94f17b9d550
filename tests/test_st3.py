"""ST-3 against its authors' code, against numbers worked out by hand, and the faults of that code that ours must not have."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import EXACT, TINY, log_of, resume_everywhere, run_main
from torch import nn
from torch.nn.utils import parametrize

import archs
from args import parse
from harness.result import totals
from methods._kernels import fast_soft_threshold
from methods.st3 import Method, STEPrunedLayer, effective_weight, l1, l1std, progress, rescaling, soft_threshold
from sparse_utils import count_macs, count_zeros, prunable_layers

GOLD = np.load(Path(__file__).parent / 'golden' / 'st3.npz')
WEIGHTS = {name: torch.as_tensor(GOLD[f'w/{name}']) for name in ('conv', 'pw', 'fc')}
CRITERIA = {'l1': l1, 'l1std': l1std}


def method(*words):
    return Method(parse([*TINY, '--method=st3', *words]))


def network(**options):
    torch.manual_seed(0)
    return archs.build('resnet20', 10, width=4, in_channels=1, **options)


# ---------------------------------------------------------------------------------------------------- the authors' numbers


@pytest.mark.parametrize('criterion', CRITERIA)
@pytest.mark.parametrize('ratio', [0.5, 0.9, 0.95, 0.98])
def test_thresholds_of_the_authors_code(criterion, ratio):
    thresholds = CRITERIA[criterion](WEIGHTS, ratio)
    assert list(thresholds) == list(WEIGHTS) and all(threshold.dim() == 0 for threshold in thresholds.values())
    np.testing.assert_allclose([float(t) for t in thresholds.values()], GOLD[f'{criterion}/{ratio}'], rtol=1e-6)


@pytest.mark.parametrize('soft', [False, True])
@pytest.mark.parametrize('rescale', [False, True])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('operator', [effective_weight, fast_soft_threshold])
def test_effective_weight_of_the_authors_code(soft, rescale, layout, operator):
    weight = WEIGHTS['conv'].clone(memory_format=layout).requires_grad_()
    sparse = operator(weight, torch.tensor(0.35), soft, rescale)
    (sparse * torch.linspace(-1, 1, weight.numel()).view(weight.shape)).sum().backward()
    key = f'ste/soft{soft:d}_rescale{rescale:d}'
    np.testing.assert_allclose(sparse.detach(), GOLD[f'{key}/eff'], rtol=1e-6, atol=1e-6)
    assert np.array_equal(sparse.detach() == 0, GOLD[f'{key}/eff'] == 0)
    np.testing.assert_allclose(weight.grad, GOLD[f'{key}/grad'], atol=1e-6)


def test_schedule_of_the_authors_code():
    pruning = method('--start-epoch=1', '--end-epoch=4', '--epochs=6', '--ptarget=0.9')
    pruning.prepare(network(), 30, pruning.args)
    ratios = []
    for step in range(30):
        pruning.after_step(step, None)
        ratios.append(pruning.ratio)
    np.testing.assert_allclose(np.array(ratios) / 0.9, GOLD['schedule/s1_e4_p3'], atol=1e-12)
    assert ratios[19:] == [0.9] * 11


# ------------------------------------------------------------------------------------------------------------- by hand


def test_operator_by_hand():
    weight = torch.tensor([[3.0, -1.0, -2.0, 2.0], [0.5, -0.5, 1.0, 0.0]], requires_grad=True)
    assert effective_weight(weight, 1.0, rescale=False).tolist() == [[2, 0, -1, 1], [0, 0, 0, 0]]
    assert effective_weight(weight, 1.0, soft=False, rescale=False).tolist() == [[3, 0, -2, 2], [0, 0, 0, 0]]
    scale = 1.01 / (0.01 + (7 / 4 + 1e-6) / (8 / 4 + 1e-6))  # first filter: 7 of 8 of the magnitude is kept
    out = effective_weight(weight, 1.0)
    torch.testing.assert_close(out, torch.tensor([[2.0, 0, -1, 1], [0, 0, 0, 0]]) * scale, rtol=1e-6, atol=0)
    out.backward(torch.arange(8.0).view(2, 4))
    assert weight.grad.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]  # straight through, pruned or not, and unscaled


@pytest.mark.parametrize('soft', [False, True])
@pytest.mark.parametrize('rescale', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
def test_threshold_zero_is_the_dense_weight_and_no_kept_weight_becomes_zero(soft, rescale, dtype):
    weight = torch.randn(6, 5, 3, 3).to(dtype)
    weight[0, 0, 0, 0], weight[1] = 0.0, 1e-12
    assert torch.equal(effective_weight(weight, 0.0, soft, rescale), weight)
    threshold = torch.tensor(0.1, dtype=dtype)
    above = torch.nextafter(threshold, torch.tensor(1.0, dtype=dtype))
    out = effective_weight(torch.stack([above, -above, threshold, -threshold]).view(2, 2), threshold, soft, rescale)
    assert (
        (out != 0).tolist() == [[True, True], [False, False]] and out.dtype == dtype and (out[0] > 0).tolist() == [True, False]
    )
    out = effective_weight(torch.tensor([[math.nan, 1.0], [2.0, 0.01]]), 0.5, soft, rescale)
    assert out.isnan()[0, 0] and not out[1].isnan().any()


@pytest.mark.parametrize('threshold', [0.0, 0.4, 10.0])
def test_the_kernel_is_the_formula(threshold):
    torch.manual_seed(0)
    weight = torch.randn(6, 5, 3, 3, dtype=torch.float64)
    scale = rescaling(weight, threshold)
    soft = soft_threshold(weight, threshold)
    hard = torch.where(weight.abs() > threshold, weight, 0)
    for how, expected in [((True, True), scale * soft), ((True, False), soft), ((False, True), scale * hard)]:
        torch.testing.assert_close(effective_weight(weight, threshold, *how), expected)
    torch.testing.assert_close(effective_weight(weight, threshold, False, False), hard)


def test_formulas_by_hand():
    weight = torch.tensor([[3.0, -1.0, -2.0, 2.0], [0.5, -0.5, 1.0, 0.0]])
    assert soft_threshold(weight, 1.0).tolist() == [[2, 0, -1, 1], [0, 0, 0, 0]]
    # of the first filter 7 of 8 of the magnitude is kept, of the second nothing
    expected = [[1.01 / (0.01 + (7 / 4 + 1e-6) / (8 / 4 + 1e-6))], [1.01 / (0.01 + 1e-6 / (0.5 + 1e-6))]]
    torch.testing.assert_close(rescaling(weight, 1.0), torch.tensor(expected))


def test_thresholds_by_hand():
    weights = {'a': torch.tensor([[1.0, -2.0], [3.0, -4.0]]), 'b': torch.tensor([[10.0] * 7] * 2)}  # 1/std is 2 and 3
    assert [float(t) for t in l1(weights, 2.5 / 17).values()] == [3.5, 3.5]  # position 2.5 between 3 and 4
    normalised = l1std(weights, 2.5 / 17)  # 2 4 6 8 30 ...: 7
    assert float(normalised['a']) == pytest.approx(3.5) and float(normalised['b']) == pytest.approx(7 / 3)
    assert float(l1std(weights, 1.0)['b']) == pytest.approx(10) and float(l1std(weights, 1.0)['a']) == pytest.approx(15)
    for criterion in CRITERIA.values():
        with pytest.raises(ValueError, match=r'ratio must lie in \[0, 1\]'):
            criterion(weights, 1.5)


@pytest.mark.parametrize('criterion', CRITERIA)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_exact_count_at_every_target(criterion, dtype):
    """Also at integer positions, where the threshold is a weight, and sigma's a weight up to rounding."""
    shapes = [(3, 5), (8, 3, 3, 3), (7, 8, 1, 1), (11, 7, 3, 3), (13, 11)]
    for seed in range(10):
        torch.manual_seed(seed)
        weights = {str(shape): torch.randn(shape, dtype=dtype) for shape in shapes}
        n, last = sum(weight.numel() for weight in weights.values()), None
        for position in [*range(0, n, 61), n / 3, n * 0.9, n - 1.5, n - 1]:
            ratio = position / (n - 1)
            last = CRITERIA[criterion](weights, ratio, last)
            zeros = sum(int((weight.abs() <= last[name]).sum()) for name, weight in weights.items())
            assert zeros == math.floor((n - 1) * ratio) + 1
            again = CRITERIA[criterion](weights, ratio)  # the guess saves time and changes nothing
            assert all(torch.equal(again[name], last[name]) for name in last)


def test_sigma_is_of_the_shape_and_not_of_the_fan_in():
    """Fault T14, kept for parity: 1 / sqrt(sum of the shape)."""
    weights = {'conv': torch.randn(8, 4, 3, 3), 'fc': torch.randn(10, 16)}
    thresholds = l1std(weights, 0.7)
    assert float(thresholds['conv'] / thresholds['fc']) == pytest.approx(math.sqrt(26 / 18), rel=1e-6)


# ---------------------------------------------------------------------------------------------------------- the method


@pytest.mark.parametrize('ptarget', ['0.5', '0.9', '0.99'])
@pytest.mark.parametrize('sigma', [[], ['--sigma']])
def test_a_run_meets_its_target_to_the_weight(ptarget, sigma, tmp_path):
    result, _ = run_main(tmp_path, '--method=st3', f'--ptarget={ptarget}', '--epochs=1', *sigma)
    assert result['zeros'] == EXACT['st3'](result['weights'], float(ptarget))
    line = log_of(tmp_path)[-1]
    assert line['ratio'] == float(ptarget) and line['threshold'] > 0 and line['sparsity'] == result['sparsity']


def test_sigma_killed_after_any_write_ends_bit_identical(tmp_path):
    words = ['--method=st3', '--sigma', '--ptarget=0.8', '--epochs=2', '--limit-train=32']
    assert resume_everywhere(tmp_path / 'run', words) == 7


def test_switches(tmp_path):
    switches = [[], ['--sigma'], ['--no-soft'], ['--no-rescale'], ['--no-ramp'], ['--power=1'], ['--start-epoch=0.25']]
    results = [run_main(tmp_path / str(i), '--method=st3', '--epochs=1', *words) for i, words in enumerate(switches)]
    states = [torch.cat([tensor.flatten() for tensor in state.values()]) for _, state in results]
    assert not any(torch.equal(a, b) for i, a in enumerate(states) for b in states[:i])
    assert len({result['zeros'] for result, _ in results}) == 1


def test_ramp():
    assert [progress(done, 2, 6, 3) for done in (0, 2, 6, 9)] == [0, 0, 1, 1]
    assert progress(4, 2, 6, 3) == 1 - 0.5**3 and progress(4, 2, 6, 1) == 0.5
    pruning = method('--no-ramp', '--start-epoch=1', '--epochs=4', '--ptarget=0.6')
    pruning.prepare(network(), 12, pruning.args)
    ratios = [pruning.ratio]
    for step in range(5):
        pruning.after_step(step, None)
        ratios.append(pruning.ratio)
    assert ratios == [0, 0, 0, 0.6, 0.6, 0.6]  # three steps are the first epoch
    pruning = method('--no-ramp', '--start-epoch=0')
    pruning.prepare(network(), 9, pruning.args)
    assert pruning.ratio == 0.95
    defaults = method('--epochs=160')
    assert (defaults.start, defaults.end) == (5, 80)  # the paper's


@pytest.mark.parametrize(
    'words',
    [
        ['--end-epoch=4'],
        ['--start-epoch=2'],
        ['--start-epoch=-1'],
        ['--start-epoch=1', '--end-epoch=1'],
        ['--end-epoch=nan'],
        ['--start-epoch=3', '--no-ramp'],
    ],
)
def test_a_ramp_that_does_not_end_in_the_run_is_refused(words):
    with pytest.raises(ValueError, match='--start-epoch < --end-epoch <= --epochs'):
        method(*words)
    with pytest.raises(ValueError, match='--power'):
        method('--power=0')


def test_no_layer_is_large_enough():
    with pytest.raises(ValueError, match='at least 1000000 weights'):
        pruning = method('--pthres=1000000')
        pruning.prepare(network(), 9, pruning.args)


def test_prepared_again_and_finalized_it_is_the_plain_model():
    model, pruning = network(), method('--no-ramp', '--start-epoch=0')
    names, types = list(model.state_dict()), [type(module) for module in model.modules()]
    pruning.prepare(model, 9, pruning.args)
    x = torch.randn(2, 1, 8, 8)
    expected = model.eval()(x)
    zeros = count_zeros(model)
    pruning.prepare(model, 9, pruning.args)  # bakes the first stage
    assert len(model.fc.parametrizations.weight) == 1
    assert pruning.finalize(pruning.finalize(model)) is model
    assert list(model.state_dict()) == names and [type(module) for module in model.modules()] == types
    assert count_zeros(model).keys() == zeros.keys()

    model, pruning = network().eval(), method('--no-ramp', '--start-epoch=0')
    pruning.prepare(model, 9, pruning.args)
    assert torch.equal(pruning.finalize(model)(x), expected) and count_zeros(model) == zeros


def test_a_tied_weight_counts_once_and_stays_tied():
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 3))
    model[2].weight = model[0].weight
    for words in ([], ['--sigma']):
        net, pruning = copy.deepcopy(model), method('--no-ramp', '--start-epoch=0', '--ptarget=0.6', *words)
        pruning.prepare(net, 9, pruning.args)
        net(torch.randn(4, 6)).sum().backward()
        net = pruning.finalize(net)
        assert net[0].weight is net[2].weight
        assert sum(zeros for zeros, _ in count_zeros(net).values()) == math.floor((36 + 18 - 1) * 0.6) + 1


# ------------------------------------------------------------------------------------- faults of the authors' framework


def test_batch_norm_keeps_its_momentum():
    """Fault T5: theirs writes 0.99, so that running statistics are those of the last batch."""
    model, pruning = network(), method()
    pruning.prepare(model, 9, pruning.args)
    assert {module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)} == {0.1}


def test_pruning_adds_no_parameter():
    """Fault T6: theirs doubles a layer's parameters with mask, threshold and scale."""
    model, pruning = network(), method()
    before = [id(parameter) for parameter in model.parameters()]
    pruning.prepare(model, 9, pruning.args)
    assert sorted(id(parameter) for parameter in model.parameters()) == sorted(before)  # the same ones, as trained before
    assert sum('threshold' in name for name, _ in model.named_buffers()) == len(prunable_layers(model))


LAYERS = [
    lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode='reflect', dilation=2, groups=2),
    lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, padding_mode='circular', bias=False),
    lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, padding=1, groups=2),
    lambda: nn.Linear(4, 6),
]


@pytest.mark.parametrize('layer', LAYERS)
@pytest.mark.parametrize('sigma', [[], ['--sigma']])
def test_a_layer_stays_what_it_is(layer, sigma):
    """Fault T7: theirs drops bias and padding mode. A transposed convolution has its filters on the second axis."""
    torch.manual_seed(0)
    pruned = nn.Sequential(layer())
    plain = copy.deepcopy(pruned)
    x = torch.randn({nn.Conv1d: (2, 4, 9), nn.Linear: (2, 4)}.get(type(plain[0]), (2, 4, 9, 9)))
    pruning = method('--no-ramp', '--start-epoch=0', '--ptarget=0.7', *sigma)
    pruning.prepare(pruned, 9, pruning.args)
    weight = plain[0].weight.data
    threshold = CRITERIA['l1std' if sigma else 'l1']({'0': weight}, 0.7)['0']
    if isinstance(plain[0], nn.ConvTranspose2d):  # group by group, filters first and back
        parts = [effective_weight(part.transpose(0, 1), threshold).transpose(0, 1) for part in weight.split(2)]
        sparse = torch.cat(parts)
    else:
        sparse = effective_weight(weight, threshold)
    weight.copy_(sparse)
    torch.testing.assert_close(pruned(x), plain(x), rtol=1e-5, atol=1e-6)
    pruning.finalize(pruned)
    torch.testing.assert_close(pruned[0].weight, plain[0].weight, rtol=1e-6, atol=0)  # zeros are zeros
    torch.testing.assert_close(pruned(x), plain(x), rtol=1e-5, atol=1e-6)
    assert pruned.state_dict().keys() == plain.state_dict().keys()


def test_macs_are_those_of_the_real_output():
    """Fault T8: theirs divides the input by the stride: 55,296 for the 48,600 of an unpadded convolution."""
    model, pruning = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2)), method()
    pruning.prepare(model, 9, pruning.args)
    assert count_macs(model, torch.zeros(1, 3, 32, 32))['0'][0] == 216 * 15 * 15 == 48_600


def test_dropout_is_off_in_evaluation():
    """Fault T9."""
    model = archs.build('wrn10_1', 10, dropout=0.5)
    pruning = method('--model=wrn10_1')
    pruning.prepare(model, 9, pruning.args)
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(model.eval()(x), model(x)) and not torch.equal(model.train()(x), model(x))


def test_forward_reads_no_value():
    """Fault T10: theirs branches on the threshold, so that the host waits for the GPU in each layer.

    A tensor on the meta device has no values, and asking for one is an error.
    """
    for soft in (False, True):
        for rescale in (False, True):
            layer = nn.Conv2d(3, 8, 3, device='meta')
            parametrize.register_parametrization(layer, 'weight', STEPrunedLayer(soft, rescale).to('meta'), unsafe=True)
            layer(torch.zeros(2, 3, 8, 8, device='meta')).sum().backward()
            assert layer.parametrizations.weight.original.grad.shape == (8, 3, 3, 3)
    with pytest.raises(RuntimeError):
        torch.zeros((), device='meta').item()


@pytest.mark.gpu
@pytest.mark.parametrize('sigma', [[], ['--sigma']])
def test_a_step_does_not_wait_for_the_gpu(sigma):
    model, pruning = network().cuda(), method('--no-ramp', '--start-epoch=0', *sigma)
    pruning.prepare(model, 9, pruning.args)
    x = torch.randn(2, 1, 8, 8, device='cuda')
    model(x).sum().backward()
    torch.cuda.set_sync_debug_mode('error')
    try:
        model(x).sum().backward()
        pruning.after_step(0, None)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    zeros, weights = totals(count_zeros(model))
    assert zeros == EXACT['st3'](weights, 0.95)


def test_a_step_after_pruning_moves_every_weight():
    """Straight through: pruned weights are trained too, and may come back."""
    model, pruning = network(), method('--no-ramp', '--start-epoch=0', '--ptarget=0.9')
    pruning.prepare(model, 9, pruning.args)
    F.cross_entropy(model(torch.randn(8, 1, 8, 8)), torch.randint(10, (8,))).backward()
    gradient = model.fc.parametrizations.weight.original.grad
    assert (gradient != 0).all() and (model.fc.weight == 0).any()
