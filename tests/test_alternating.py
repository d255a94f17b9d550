"""AC/DC, SR-STE and DPF: the examples worked by hand, and the faults of released codes that ours must not have."""

import pytest
import torch
from helpers import LAYERS, TINY, method_on, run_main, small, train_on_noise
from torch import nn

from args import parse
from methods.ac_dc import PHASES, is_compressed
from methods.sr_ste import NM, divides, nm_mask
from sparse_utils import count_zeros


def zeros(model):
    return [zeros for zeros, _ in count_zeros(model).values()]


# ------------------------------------------------------------------------------------------------------------ AC/DC


def test_phases_of_the_authors_runs():
    compressed = [epoch for epoch in range(200) if is_compressed(epoch, 200)]
    expected = [*range(10, 30), *range(50, 70), *range(90, 110), *range(130, 150), *range(170, 200)]
    assert compressed == expected
    # ImageNet, 100 epochs: compressed from 10, 20, ..., 70 and 85, dense from 15, 25, ..., 65 and 75
    phases = [share / 100 for share in range(10, 76, 5)] + [0.85]
    expected = [epoch for start in range(10, 70, 10) for epoch in range(start, start + 5)] + [*range(70, 75), *range(85, 100)]
    assert [epoch for epoch in range(100) if is_compressed(epoch, 100, phases)] == expected
    for epochs in range(1, 40):
        assert is_compressed(epochs - 1, epochs)  # also in runs that are too short for the phases
        assert epochs < 20 or not is_compressed(0, epochs)


def test_ac_dc_by_hand():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 1, bias=False))
    method, fit = method_on(model, 'ac_dc', '--ptarget=0.5')
    weight = model[1].weight
    weight.data = torch.tensor([[0.9, -0.5, 0.2, 0.1]])
    method.compress()
    assert method.masks()['1'].tolist() == [[True, True, False, False]]
    scores = torch.tensor([0.9, 0.5, 0.2, 0.1]) + 1e-4
    assert (scores > scores[1]).sum() == 1  # the released code takes what is above the second largest, and so keeps one
    method.decompress()
    assert method.masks()['1'].all() and weight.tolist() == [pytest.approx([0.9, -0.5, 0, 0])]


@pytest.mark.parametrize('words', [['--nesterov'], ['--optimizer=adam', '--lr=0.01']])
def test_ac_dc_alternates_and_ends_compressed(words):
    model = small()
    key = 'exp_avg' if 'adam' in words[0] else 'momentum_buffer'
    words = [*words, '--epochs=5', '--phases', '0.2', '0.4', '0.6', '--wd=0.01']
    method, fit = method_on(model, 'ac_dc', '--ptarget=0.9', *words, steps=10)
    seen, memory = [], []
    before_step = method.before_step

    def watch(step):
        before_step(step)
        memory.append([int(state[key].count_nonzero()) for state in fit.optimizer.state.values() if key in state])

    method.before_step = watch
    for _ in train_on_noise(method, fit, range(10)):
        seen.append(sum(zeros(model)))
    target = round(0.9 * 784)
    assert seen[2:4] == [target] * 2 and seen[6:] == [target] * 4 and max(seen[:2] + seen[4:6]) < 400
    assert sum(memory[4]) == 0 and len(memory[4]) == 6  # all parameters begin the dense phase without momentum, norms too
    assert sum(memory[2]) > 0 and sum(memory[8]) > 0


def test_ac_dc_masks_hold_within_a_phase_and_scopes():
    method, fit = method_on(small(), 'ac_dc', '--ptarget=0.9', '--epochs=3', '--phases', '0.3', '--scope=erk', steps=15)
    masks = []
    for step in train_on_noise(method, fit, range(15)):
        if step >= 5:
            masks.append(method.masks())
    assert all(torch.equal(masks[0][name], other[name]) for other in masks for name in other)
    assert [int(mask.sum()) for mask in masks[0].values()] == [8, 70]  # eps = 78 / 149: 16 eps = 8.4, 133 eps = 69.6


def test_phases_that_cannot_be():
    for phases in (['0.2', '0.4'], ['0.4', '0.2', '0.6']):
        with pytest.raises(ValueError, match='rising shares of training, an odd number'):
            method_on(small(), 'ac_dc', '--phases', *phases)
    assert parse([*TINY, '--method=ac_dc']).phases == PHASES


# ----------------------------------------------------------------------------------------------------------- SR-STE


def test_sr_ste_by_hand():
    weight = torch.tensor([[0.1, -0.4, 0.3, 0.2]], requires_grad=True)
    assert nm_mask(weight, 2, 4).tolist() == [[False, True, True, False]]
    out = NM(2, 4, 2e-4, 1)(weight)
    out.sum().backward()
    assert torch.equal(out, torch.tensor([[0.0, -0.4, 0.3, 0.0]]))
    assert torch.allclose(weight.grad, torch.tensor([[1.00002, 1, 1, 1.00004]]), rtol=0, atol=1e-7)


@pytest.mark.parametrize('n, m', [(1, 4), (2, 4), (4, 8), (1, 16)])
def test_each_group_along_the_input_channels_keeps_exactly_n(n, m):
    torch.manual_seed(0)
    for shape in ((6, 32), (5, 16, 3, 3)):
        for weight in (torch.randn(shape), torch.ones(shape), torch.zeros(shape)):
            if len(shape) == 4:
                weight = weight.to(memory_format=torch.channels_last)
            mask = nm_mask(weight, n, m)
            rows = mask.movedim(1, -1).reshape(-1, shape[1])  # conv: O, kh, kw, I
            assert mask.shape == shape
            assert (rows.view(len(rows), -1, m).sum(-1) == n).all()
    weight = torch.arange(8.0).view(1, 8)
    assert nm_mask(weight, 2, 4).tolist() == [[False, False, True, True] * 2]


def test_groups_do_not_straddle_filters():
    """The released code groups what is left of a row with the next one where the input channels are no multiple of M."""
    layers = {'3 channels': nn.Conv2d(3, 8, 7), '6': nn.Conv2d(6, 8, 3), '8': nn.Conv2d(8, 8, 3), 'linear': nn.Linear(12, 5)}
    layers |= {'depthwise': nn.Conv2d(8, 8, 3, groups=8), 'grouped': nn.Conv2d(16, 8, 3, groups=2)}
    layers |= {'transposed': nn.ConvTranspose2d(8, 6, 3), 'transposed groups': nn.ConvTranspose2d(12, 6, 3, groups=2)}
    able = {name: divides(4, layer) for name, layer in layers.items()}
    assert [name for name in able if able[name]] == ['8', 'linear', 'grouped', 'transposed']


def test_linear_layers_are_pruned_with_the_same_pattern_and_keep_their_bias(capsys):
    """The released layer for them drops its bias and falls back to M = 2."""
    model = small()
    method, fit = method_on(model, 'sr_ste', '--n=1', '--m=8')
    assert '1:8 in 1 of 2 layers, whatever --ptarget is; 0 stay dense' in capsys.readouterr().out
    bias = model[4].bias
    for _ in train_on_noise(method, fit, range(3)):
        pass
    method.finalize(model)
    assert model[4].bias is bias and (model[4].weight.view(5, 16, 8).count_nonzero(-1) == 1).all()
    assert model[0].weight.all() and list(model.state_dict()) == list(small().state_dict())


def test_masks_are_renewed_at_each_forward_and_pruned_weights_move():
    layer = nn.Linear(4, 1, bias=False)
    method, fit = method_on(layer, 'sr_ste', '--wd=0', '--clip=0', '--momentum=0', '--lr=0.1')
    weight = layer.parametrizations.weight.original
    weight.data = torch.tensor([[0.1, -0.4, 0.3, 0.29]])
    assert torch.equal(layer.weight, torch.tensor([[0.0, -0.4, 0.3, 0.0]]))
    (-layer(torch.tensor([[0.0, 0.0, 0.0, 1.0]]))).sum().backward()
    assert torch.allclose(weight.grad, torch.tensor([[2e-5, 0, 0, -1 + 5.8e-5]]))
    fit.optimizer.step()
    assert torch.allclose(layer.weight, torch.tensor([[0.0, -0.4, 0.0, 0.389994]]), atol=1e-6)


@pytest.mark.parametrize('layer, shape', LAYERS)
def test_sr_ste_on_all_layers(layer, shape):
    torch.manual_seed(0)
    layer = layer()
    if not divides(2, layer):
        return
    method, _ = method_on(layer, 'sr_ste', '--n=1', '--m=2')
    x = torch.randn(shape)
    before = layer(x)
    method.finalize(layer)
    assert torch.equal(layer(x), before) and layer.weight.count_nonzero() == layer.weight.numel() // 2


def test_patterns_that_cannot_be():
    with pytest.raises(ValueError, match='--n 4 of --m 4 weights are to be kept'):
        method_on(small(), 'sr_ste', '--n=4')
    with pytest.raises(ValueError, match='no layer has a multiple of 3 input channels'):
        method_on(small(), 'sr_ste', '--m=3', '--n=1')


def test_a_run_counts_and_says_its_pattern(tmp_path):
    result, state = run_main(tmp_path, '--method=sr_ste', '--n=1', '--m=4')
    assert result['pattern'] == '1:4' and result['layers']['conv1'][0] == 0
    others = [row[:2] for name, row in result['layers'].items() if name != 'conv1']
    assert all(4 * zeros == 3 * weights for zeros, weights in others)


@pytest.mark.gpu
def test_pytorchs_semi_structured_kernels_take_the_masks():
    from torch.sparse import to_sparse_semi_structured

    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 16, 128)).cuda()
    method, _ = method_on(model, 'sr_ste')
    method.finalize(model)
    for weight in (model[3].weight, model[0].weight.permute(0, 2, 3, 1).flatten(1)):
        weight = weight.detach().half().contiguous()
        x = torch.randn(weight.shape[1], 64, device='cuda', dtype=torch.half)
        sparse = to_sparse_semi_structured(weight)
        torch.testing.assert_close(sparse @ x, weight @ x, rtol=1e-2, atol=1e-2)


def test_the_pattern_is_what_these_kernels_take():
    """Of each four weights that follow one another in a row, two are zero: rows as (out, kh kw in), or (out, in)."""
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(64, 128))
    method, _ = method_on(model, 'sr_ste')
    method.finalize(model)
    for weight in (model[2].weight, model[0].weight.permute(0, 2, 3, 1).flatten(1)):
        assert (weight.reshape(len(weight), -1, 4).count_nonzero(-1) == 2).all()
