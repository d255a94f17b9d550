"""Feather against its authors' trajectories and against numbers worked out by hand; thresholds; counting."""

import copy
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import LAYERS, GoldenNet, Sharing
from torch import nn
from torch.nn.utils import parametrize

from methods._kernels import FastPruner
from sparse_utils import (
    Feather,
    Pruner,
    count_macs,
    count_zeros,
    feather,
    feather_formula,
    global_threshold,
    gradient_mask,
    prunable_layers,
)

HERE = Path(__file__).parent


@pytest.mark.parametrize('name', ['feather_r90', 'feather_r98'])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('kind', [Pruner, FastPruner])
def test_trajectory_of_the_authors_code(name, layout, kind):
    gold = np.load(HERE / 'golden' / f'{name}.npz')
    model = GoldenNet()
    model.load_state_dict({key[5:]: torch.as_tensor(gold[key]) for key in gold if key.startswith('init/')})
    model.to(memory_format=layout)
    keys = list(model.state_dict())
    batches, epochs = len(gold['x']), int(gold['epochs'])
    settings = {'pthres': int(gold['pthres']), 't1': int(gold['t1'])}
    pruner = kind(model, final_rate=float(gold['final_rate']), nbatches=batches, epochs=epochs, **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=float(gold['lr']), momentum=0.9, weight_decay=5e-4)
    thresholds, ratios, losses = [], [], []
    for step in range(epochs * batches):
        pruner.update_thresh()
        thresholds.append(pruner.threshold)
        ratios.append(pruner.ratio)
        loss = F.cross_entropy(model(torch.as_tensor(gold['x'][step % batches])), torch.as_tensor(gold['y'][step % batches]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    pruner.update_thresh(end_of_batch=True)
    thresholds.append(pruner.threshold)
    pruner.desparsify()
    np.testing.assert_allclose(thresholds, gold['thresholds'], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(ratios, gold['ratios'], rtol=1e-6)
    np.testing.assert_allclose(losses, gold['losses'], rtol=1e-4)
    assert list(model.state_dict()) == keys
    for key, value in model.state_dict().items():
        final = gold[f'final/{key}']
        np.testing.assert_allclose(value.numpy(), final, rtol=1e-3, atol=1e-5, err_msg=key)
        assert int((value == 0).sum()) == int((final == 0).sum()), key


# ---------------------------------------------------------------------------------------------------------- the operator
WEIGHTS = [-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 1.25, 2.0]  # at T = 1: only -2, 1.25 and 2 are larger


@pytest.mark.parametrize(
    'p, expected',
    [
        (1, [-1.0, 0, 0, 0, 0, 0, 0.25, 1.0]),
        # (8 - 1)^(1/3) = 7^(1/3) = 1.9129312, (1.953125 - 1)^(1/3) = 0.9841239
        (3, [-1.9129312, 0, 0, 0, 0, 0, 0.9841239, 1.9129312]),
        # (2^15 - 1)^(1/15) = 1.9999959; 1.25^15 = 28.4217094, 27.4217094^(1/15) = 1.2470201
        (15, [-1.9999959, 0, 0, 0, 0, 0, 1.2470201, 1.9999959]),
        (math.inf, [-2.0, 0, 0, 0, 0, 0, 1.25, 2.0]),
    ],
)
def test_operator_by_hand(p, expected):
    weight = torch.tensor(WEIGHTS, requires_grad=True)
    out = feather(weight, torch.tensor(1.0), p, theta=0.5)
    torch.testing.assert_close(out, torch.tensor(expected), rtol=2e-6, atol=0)
    out.backward(torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8]))
    assert weight.grad.tolist() == [1, 1, 1.5, 2, 2.5, 3, 7, 8]  # halved where |w| <= 1
    assert torch.equal(out == 0, weight.abs() <= 1)


def test_operator_theta_one_passes_the_gradient_through():
    weight = torch.tensor(WEIGHTS, requires_grad=True)
    feather(weight, 1.0).backward(torch.arange(8.0))
    assert weight.grad.tolist() == list(range(8))


@pytest.mark.parametrize('p', [1, 2.5, 3, 15, math.inf])
@pytest.mark.parametrize('theta', [0.5, 1.0])
def test_threshold_zero_is_the_dense_weight(p, theta):
    weight = torch.tensor([-3e20, -1e-30, 0.0, 1e-12, 0.3, 7.0], requires_grad=True)
    out = feather(weight, 0.0, p, theta)
    assert torch.equal(out, weight)
    out.sum().backward()
    assert weight.grad.tolist() == [1, 1, theta, 1, 1, 1]  # 1 where |w| > T, as the paper has it


@pytest.mark.parametrize('p', [1, 3, 15, math.inf])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
def test_no_kept_weight_becomes_zero(p, dtype):
    threshold = torch.tensor(0.1, dtype=dtype)
    above = torch.nextafter(threshold, torch.tensor(1.0, dtype=dtype))
    out = feather(torch.stack([above, -above, threshold, -threshold]), threshold, p)
    assert (out != 0).tolist() == [True, True, False, False]
    assert out.dtype == dtype


def test_formula_and_gradient_mask_by_hand():
    weight = torch.tensor([-2.0, -0.5, 0.0, 1.0, 3.0], dtype=torch.float64)
    for p, kept in ((1, [1.0, 2.0]), (3, [7 ** (1 / 3), 26 ** (1 / 3)]), (math.inf, [2.0, 3.0])):  # at T = 1
        expected = torch.tensor([-kept[0], 0, 0, 0, kept[1]], dtype=torch.float64)
        torch.testing.assert_close(feather_formula(weight, 1.0, p), expected)
    assert gradient_mask(torch.tensor([-3.0, 0.0, 1e-30]), 0.25).tolist() == [1, 0.25, 1]


@pytest.mark.parametrize('p', [1, 2.5, 3, math.inf])
def test_gradient_of_a_trained_threshold_is_that_of_the_formula_with_the_kept_part_straight_through(p):
    """dL/dT = -sum over pruned weights of g w / T: with T (P(w/T) straight through) as Adaptive Sparsity Loss has it."""
    torch.manual_seed(0)
    weight, g = torch.randn(2, 500, dtype=torch.float64)
    threshold = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    (feather(weight, threshold, p, 0.5) * g).sum().backward()
    pruned = weight.abs() <= 0.6
    assert threshold.grad.item() == pytest.approx(-(g * weight)[pruned].sum().item() / 0.6, rel=1e-12)


def test_operator_shows_nan_and_large_p_neither_over_nor_underflows():
    assert feather(torch.tensor([math.nan, 1.0]), 0.5).isnan().tolist() == [True, False]
    weight = torch.tensor([1e-5, 2e-5, 1e5])
    out = feather(weight, 1e-5, p=15)
    torch.testing.assert_close(out, torch.tensor([0.0, 2e-5 * (1 - 2.0**-15) ** (1 / 15), 1e5]))


def test_operator_is_the_papers_formula():
    torch.manual_seed(0)
    weight = torch.randn(1000, dtype=torch.float64)
    for p in (1, 2, 3, 7.5, math.inf):
        torch.testing.assert_close(feather(weight, 0.7, p), feather_formula(weight, 0.7, p), rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match='p must be 1 or more'):
        feather(weight, 0.7, p=0.5)
    with pytest.raises(ValueError, match='theta must lie'):
        feather(weight, 0.7, theta=2.0)


# ---------------------------------------------------------------------------------------------------- the global threshold
def sorted_threshold(weights, ratio):
    """The definition, in three lines of numpy."""
    magnitude = np.sort(np.concatenate([w.double().abs().flatten().numpy() for w in weights]))
    position = (len(magnitude) - 1) * ratio
    low, high = magnitude[math.floor(position)], magnitude[math.ceil(position)]
    return low + (high - low) * (position % 1), low, high


def test_threshold_by_hand():
    weights = [torch.tensor([[1.0, -2.0], [3.0, -4.0]]), torch.tensor([5.0])]
    assert global_threshold(weights, 0.5).item() == 3.0
    assert global_threshold(weights, 0.9).item() == pytest.approx(4.6)  # position 3.6 between 4 and 5
    assert global_threshold(weights, 0.0).item() == 1.0
    assert global_threshold(weights, 1.0).item() == 5.0
    assert global_threshold([torch.tensor([-7.0])], 0.3).item() == 7.0


@pytest.mark.parametrize('sizes', [(1,), (63, 1), (300_000, 17, 64), (2**18 + 5, 2**15, 2**15 + 64), (70_000,)])
@pytest.mark.parametrize('ratio', [0.0, 1e-4, 0.5, 0.9, 0.999, 1.0])
def test_threshold_is_the_sorted_one(sizes, ratio):
    torch.manual_seed(len(sizes))
    weights = [torch.randn(size) * 10**i for i, size in enumerate(sizes)]
    exact, low, high = sorted_threshold(weights, ratio)
    magnitude = torch.cat(weights).abs()
    pruned = int((magnitude <= torch.tensor(low, dtype=torch.float32)).sum())
    for guess in (None, 0.0, exact, exact * 1.001, exact * 5, torch.tensor(exact / 3)):
        threshold = global_threshold(weights, ratio, guess)
        assert threshold.item() == pytest.approx(exact, rel=1e-6)
        assert int((magnitude <= threshold).sum()) == pruned, guess


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_threshold_prunes_the_exact_count_in_every_dtype(dtype):
    for seed in range(20):
        magnitude = torch.arange(1, 101, dtype=torch.float64).to(dtype)[torch.randperm(100)]  # exact in all of them
        threshold = global_threshold([magnitude[:37], -magnitude[37:]], 0.01 * seed + 0.5)
        assert int((magnitude <= threshold).sum()) == math.floor(99 * (0.01 * seed + 0.5)) + 1


def test_threshold_with_ties_constant_and_sorted_weights():
    assert global_threshold([torch.full((50_000,), -0.25)], 0.5).item() == 0.25
    half = torch.cat([torch.full((30_000,), 0.5), torch.full((30_000,), 2.0)])
    assert global_threshold([half], 0.3).item() == 0.5
    assert global_threshold([half], 0.7, previous=0.5).item() == 2.0
    ordered = torch.arange(100_000.0)  # a strided sample of it is no random sample
    assert global_threshold([ordered], 0.9).item() == pytest.approx(0.9 * 99_999, rel=1e-6)
    periodic = (torch.arange(100_000) % 12 != 0).float() * torch.linspace(1, 2, 100_000)  # the sample sees mostly zeros
    assert global_threshold([periodic], 0.5).item() == pytest.approx(sorted_threshold([periodic], 0.5)[0], rel=1e-6)


def test_threshold_of_channels_last_weights_is_the_same():
    weight = torch.randn(32, 16, 3, 3)
    other = weight.contiguous(memory_format=torch.channels_last)
    assert global_threshold([weight], 0.7) == global_threshold([other], 0.7) == global_threshold([weight[:, :, ::1].mT], 0.7)


@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_threshold_refuses_what_is_not_finite(bad):
    with pytest.raises(ValueError, match='NaN or infinity'):
        global_threshold([torch.tensor([1.0, bad, 2.0])], 0.5)


def test_threshold_refuses_nonsense():
    with pytest.raises(ValueError, match='no weights'):
        global_threshold([], 0.5)
    for ratio in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match='ratio'):
            global_threshold([torch.ones(3)], ratio)


# ------------------------------------------------------------------------------------------------------------ the pruner
def conv_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))


@pytest.mark.parametrize('rate', [0.5, 0.9, 0.95, 0.98, 0.99])
@pytest.mark.parametrize('backbone', ['global', 'layerwise'])
def test_exact_zeros_and_identical_output(rate, backbone):
    model = conv_net()
    state, types = list(model.state_dict()), [type(m) for m in model.modules()]
    parameters = dict(model.named_parameters())
    pruner = Pruner(model, final_rate=rate, backbone=backbone)
    pruner.update_thresh()
    x = torch.randn(4, 3, 8, 8)
    model.eval()
    before = model(x)
    pruner.desparsify()
    assert torch.equal(before, model(x))
    sizes = [216, 2880]
    counts = [math.floor((n - 1) * rate) + 1 for n in (sizes if backbone == 'layerwise' else [sum(sizes)])]
    assert sum(zeros for zeros, _ in count_zeros(model).values()) == sum(counts)
    assert list(model.state_dict()) == state
    assert [type(m) for m in model.modules()] == types
    assert pruner.print_sparsity() == pytest.approx(100 * sum(counts) / sum(sizes)) and pruner.threshold is None
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())  # an optimizer goes on
    assert not any(parametrize.is_parametrized(m) for m in model.modules())


def test_ramp_by_hand():
    pruner = Pruner(conv_net(), final_rate=0.8, nbatches=4, epochs=4, t1=1)  # steps 4 to 8 of 16
    ratios = []
    for _ in range(16):
        pruner.update_thresh()
        ratios.append(pruner.ratio)
    # 0.8 (1 - (3/4)^3) = 0.4625, 0.8 (1 - (2/4)^3) = 0.7, 0.8 (1 - (1/4)^3) = 0.7875
    assert ratios == pytest.approx([0] * 5 + [0.4625, 0.7, 0.7875] + [0.8] * 8)
    pruner.update_thresh()  # one update too many
    assert pruner.ratio == 0.8


@pytest.mark.parametrize('settings', [{'epochs': 1}, {'epochs': 3, 'ramp_end': 1.0}, {'epochs': 3, 't1': 1, 'ramp_end': 0.9}])
def test_ends_exactly_at_the_target_however_short_the_run(settings):
    model = conv_net()
    pruner = Pruner(model, final_rate=0.9, nbatches=1, **settings)
    for _ in range(settings['epochs']):
        pruner.update_thresh()
    pruner.update_thresh(end_of_batch=True)
    pruner.desparsify()
    assert sum(zeros for zeros, _ in count_zeros(model).values()) == math.floor(3095 * 0.9) + 1


def test_end_of_batch_does_not_advance():
    pruner = Pruner(conv_net(), final_rate=0.9, nbatches=5, epochs=4)
    for _ in range(3):
        pruner.update_thresh()
    ratio, threshold = pruner.ratio, pruner.threshold
    pruner.update_thresh(end_of_batch=True)
    assert (pruner.ratio, pruner.threshold) == (ratio, threshold)
    with torch.no_grad():
        pruner.layers['0'].parametrizations.weight.original.mul_(3)
    pruner.update_thresh(end_of_batch=True)
    assert pruner.ratio == ratio and pruner.threshold > threshold


def test_theta_follows_the_paper():
    assert [Pruner(conv_net(), final_rate=rate).theta for rate in (0.9, 0.95, 0.951, 0.99)] == [1.0, 1.0, 0.5, 0.5]
    assert Pruner(conv_net(), final_rate=0.99, theta=0.25).theta == 0.25


@pytest.mark.parametrize(
    'settings, message',
    [
        ({'final_rate': 1.5}, 'between 0 and 1'),
        ({'final_rate': -1}, 'between 0 and 1'),
        ({'final_rate': 0}, 'between 0 and 1'),
        ({'final_rate': 1}, 'between 0 and 1'),
        ({'final_rate': math.nan}, 'between 0 and 1'),
        ({'nbatches': 4}, 'both or neither'),
        ({'nbatches': 0, 'epochs': 3}, '1 or more'),
        ({'nbatches': 4, 'epochs': 4, 't1': 2}, 'the ramp ends at epoch 2'),
        ({'nbatches': 4, 'epochs': 4, 't1': -1}, 'the ramp ends at epoch 2'),
        ({'p': 0.5}, 'p must be'),
        ({'theta': 1.5}, 'theta'),
        ({'ramp_end': 0}, 'ramp_end'),
        ({'backbone': 'x'}, 'backbone'),
        ({'pthres': 10**6}, 'no convolution or linear layer'),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Pruner(conv_net(), **settings)


def test_a_second_pruner_is_refused():
    model = conv_net()
    Pruner(model)
    with pytest.raises(ValueError, match='parametrized already'):
        Pruner(model)


@pytest.mark.parametrize('make, shape', LAYERS)
def test_layer_parity(make, shape):
    """The layer computes what the plain layer does with the thresholded weight, whatever its options (also as the root)."""
    layer, x = make(), torch.randn(*shape)
    plain = copy.deepcopy(layer)
    threshold = global_threshold([layer.weight], 0.6)
    plain.weight.data = feather(plain.weight.data, threshold, 3, 1.0)
    pruner = Pruner(layer, final_rate=0.6)
    pruner.update_thresh()
    assert torch.equal(layer(x), plain(x))
    pruner.desparsify()
    assert torch.equal(layer(x), plain(x)) and type(layer) is type(plain) and list(layer.state_dict()) == ['weight', 'bias']


def test_shared_layers_and_tied_weights_count_once():
    torch.manual_seed(0)
    model = Sharing()
    pruner = Pruner(model, final_rate=0.5)
    pruner.update_thresh()
    x = torch.randn(2, 3, 8, 8)
    before = model(x)
    original = torch.cat(
        [model.a[0].parametrizations.weight.original.flatten(), model.f.parametrizations.weight.original.flatten()]
    )
    assert pruner.threshold == pytest.approx(sorted_threshold([original.detach()], 0.5)[0])
    pruner.desparsify()
    assert torch.equal(before, model(x))  # the tied weight is thresholded once, not twice
    assert model.f.weight is model.g.weight and model.a[0] is model.b[0]
    assert sum(weights for _, weights in count_zeros(model).values()) == 81 + 9
    assert sum(zeros for zeros, _ in count_zeros(model).values()) == math.floor(89 * 0.5) + 1


def test_evaluation_never_changes_a_weight():
    model = conv_net()
    pruner = Pruner(model, final_rate=0.9)
    pruner.update_thresh()
    model.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(torch.randn(4, 3, 8, 8))
    pruner.print_sparsity()
    count_zeros(model)
    count_macs(model, torch.randn(1, 3, 8, 8))
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_pthres_leaves_small_layers_dense_and_counts_the_real_size():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3))
    pruner = Pruner(model, final_rate=0.9, pthres=100)
    assert list(pruner.layers) == ['1']  # the depthwise one has 72 weights, not 576
    assert list(prunable_layers(model, 72)) == ['0', '1']


def test_state_dict_resumes():
    def steps(pruner, optimizer, model, count):
        torch.manual_seed(1)
        for _ in range(count):
            pruner.update_thresh()
            loss = model(torch.randn(4, 3, 8, 8)).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def start():
        model = conv_net()
        return Pruner(model, final_rate=0.9, nbatches=2, epochs=6), model

    (one, model_one), (two, model_two) = start(), start()
    sgd_one, sgd_two = (torch.optim.SGD(m.parameters(), 0.01, momentum=0.9) for m in (model_one, model_two))
    steps(one, sgd_one, model_one, 4)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    model_two.load_state_dict(model_one.state_dict())
    sgd_two.load_state_dict(copy.deepcopy(sgd_one.state_dict()))
    assert two.threshold == one.threshold and two.ratio == one.ratio
    steps(one, sgd_one, model_one, 4)
    steps(two, sgd_two, model_two, 4)
    assert one.threshold == two.threshold
    assert all(torch.equal(a, b) for a, b in zip(model_one.state_dict().values(), model_two.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match='thresholds'):
        two.load_state_dict({'step': 0, 'ratio': 0.0, 'thresholds': []})


def test_print_sparsity(capsys):
    pruner = Pruner(conv_net(), final_rate=0.9)
    pruner.update_thresh()
    percent = pruner.print_sparsity()
    said, *lines = capsys.readouterr().out.splitlines()
    assert said == '3,096 of 3,130 parameters are pruned, those of 2 weights'
    assert percent == pytest.approx(100 * (math.floor(3095 * 0.9) + 1) / 3096)
    assert len(lines) == 3 and '2,786 of      3,096' in lines[-1]


def test_training_moves_weights_under_bfloat16_autocast():
    model = conv_net()
    pruner = Pruner(model, final_rate=0.5, theta=0.5)
    pruner.update_thresh()
    with torch.autocast('cpu', torch.bfloat16):
        loss = model(torch.randn(4, 3, 8, 8)).float().square().sum()
    loss.backward()
    gradient = pruner.layers['0'].parametrizations.weight.original.grad
    assert gradient.dtype == torch.float32 and gradient.abs().sum() > 0


def test_parametrized_layer_compiles_in_one_graph():
    layer = nn.Linear(8, 8)
    pruner = Pruner(layer, final_rate=0.5)
    pruner.update_thresh()
    x = torch.randn(2, 8)
    compiled = torch.compile(layer, backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


# -------------------------------------------------------------------------------------------------------------- counting
def test_macs_by_hand():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2),  # 9x9 -> 4x4: 72 weights x 16 places
        nn.Conv2d(4, 4, 3, padding=1, groups=2),  # 72 x 16
        nn.ConvTranspose2d(4, 2, 2, stride=2),  # 32 weights, each used at the 16 input places
        nn.Flatten(),  # 2 x 8 x 8
        nn.Linear(128, 5),  # 640
    )
    with torch.no_grad():
        model[0].weight[:2] = 0
        model[4].weight[:, :28] = 0
    model.train()
    macs = count_macs(model, torch.randn(3, 2, 9, 9))
    assert macs == {'0': (1152, 576), '1': (1152, 1152), '2': (512, 512), '4': (640, 500)}
    assert model.training


def test_macs_count_every_use_and_keep_frozen_modules_frozen():
    model = Sharing()
    model.train()
    model.a[1].eval()
    macs = count_macs(model, torch.randn(2, 3, 8, 8))
    assert macs['a.0'] == (2 * 81 * 64, 2 * 81 * 64)
    assert model.training and not model.a[1].training


def test_linear_over_positions():
    assert count_macs(nn.Linear(4, 3), torch.randn(2, 7, 4)) == {'': (84, 84)}


# ----------------------------------------------------------------------------------------------------------- copying it
def test_one_file_that_works_alone(tmp_path):
    """Copied into an empty folder: only torch and the standard library are imported, and the sketch of the seed runs."""
    (tmp_path / 'sparse_utils.py').write_text((HERE.parent / 'sparse_utils.py').read_text())
    sketch = """
import torch
from sparse_utils import Pruner
train_loader = [(torch.randn(8, 3, 8, 8), torch.randint(0, 5, (8,))) for _ in range(3)]
epochs = 2
model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 5))
# create a Pruner class instance
pruner = Pruner(model, device=torch.device('cpu'), final_rate=0.9, nbatches=len(train_loader), epochs=epochs)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loss_fn = torch.nn.CrossEntropyLoss()
for epoch in range(epochs):
    for data, target in train_loader:
        # update the pruning threshold based on the iteration number and the scheduler used
        pruner.update_thresh()
        output = model(data)
        loss = loss_fn(output, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # update the pruning threshold after last step of the optimizer
    pruner.update_thresh(end_of_batch=True)
# finalize sparse model
pruner.desparsify()
import sys
zeros = sum(int((p == 0).sum()) for n, p in model.named_parameters() if 'weight' in n)
assert zeros == int((216 + 1440 - 1) * 0.9) + 1, zeros
import ast
tree = ast.parse(open('sparse_utils.py').read())
names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
assert {name.split('.')[0] for name in names} <= {'torch', *sys.stdlib_module_names}, names
print('fine')
"""
    done = subprocess.run([sys.executable, '-c', sketch], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.endswith('\nfine\n'), done.stderr


@pytest.mark.gpu
def test_step_on_a_gpu_never_waits():
    model = conv_net().cuda()
    pruner = Pruner(model, final_rate=0.98, nbatches=10, epochs=2)
    x = torch.randn(4, 3, 8, 8, device='cuda')
    torch.cuda.set_sync_debug_mode('error')
    try:
        for _ in range(3):
            pruner.update_thresh()
            model(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode('default')
    reference = global_threshold(
        [w.detach().cpu() for w in (layer.parametrizations.weight.original for layer in pruner.layers.values())], pruner.ratio
    )
    assert pruner.threshold == pytest.approx(reference.item(), rel=1e-6)


def test_operator_module_has_its_threshold_in_the_state_dict():
    model = conv_net()
    Pruner(model, final_rate=0.9).update_thresh()
    thresholds = [tensor for name, tensor in model.state_dict().items() if name.endswith('threshold')]
    assert len(thresholds) == 2 and thresholds[0] == thresholds[1] > 0
    assert isinstance(model[0].parametrizations.weight[0], Feather)
