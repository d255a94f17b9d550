"""Static masks, SET, RigL and GraNet: the examples worked by hand, and the faults of released codes that ours must not have."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import method_on, random_batch, run_main, small, train_on_noise
from torch import nn

from methods import granet, rigl
from methods import set as evolution
from methods.gmp import sparsity_at
from sparse_utils import count_zeros


def zeros(model):
    return [zeros for zeros, _ in count_zeros(model).values()]


def active(method):
    return {name: int(mask.sum()) for name, mask in method.masks().items()}


def dense_gradients(model, step):
    """Gradients of the cross-entropy of random_batch(step), of weights as they are: nothing is masked."""
    images, labels = random_batch(step)
    weights = [model[0].weight, model[4].weight]
    return dict(zip(['0', '4'], torch.autograd.grad(F.cross_entropy(model(images), labels), weights), strict=True))


# ----------------------------------------------------------------------------------------------------------- static


def test_static_masks_are_exact_do_not_change_and_depend_on_the_seed():
    masks = []
    for seed in (0, 0, 1):
        model = small()
        method, fit = method_on(model, 'static', '--ptarget=0.9', f'--seed={seed}', '--wd=0.01')
        masks.append(method.masks())
        for _ in train_on_noise(method, fit, range(6)):
            assert sum(zeros(model)) == round(0.9 * 784)
            assert all(torch.equal(method.masks()[name], masks[-1][name]) for name in ('0', '4'))
    assert torch.equal(masks[0]['0'], masks[1]['0']) and not torch.equal(masks[0]['0'], masks[2]['0'])


def test_released_codes_draw_masks_whose_count_is_right_on_average_only():
    """Bernoulli draws of density 0.1 over 784 weights have a standard deviation of 8.4; ours has none."""
    counts = {sum(active(method_on(small(), 'static', '--ptarget=0.9', f'--seed={s}')[0]).values()) for s in range(8)}
    assert counts == {784 - round(0.9 * 784)}


def test_densities_of_the_flags():
    # ERK: p = (8 + 2 + 3 + 3) / 144, 133 / 640; 157 weights are kept: eps = 157 / 149, d = 0.117077 and 0.218971: 16.86, 140.14
    assert active(method_on(small(), 'static', '--ptarget=0.8')[0]) == {'0': 17, '4': 140}
    assert active(method_on(small(), 'static', '--ptarget=0.8', '--distribution=uniform')[0]) == {'0': 29, '4': 128}
    assert active(method_on(small(), 'static', '--ptarget=0.8', '--dense-layers', 'first')[0]) == {'0': 144, '4': 13}
    assert active(method_on(small(), 'static', '--ptarget=0.8', '--pthres=200')[0]) == {'4': 128}


def test_preparing_again_keeps_the_masks():
    model = small()
    method, fit = method_on(model, 'rigl', '--ptarget=0.8', '--frequency=1')
    for _ in train_on_noise(method, fit, range(4)):
        pass
    masks = method.masks()
    method.prepare(model, 30, method.args)
    assert all(torch.equal(method.masks()[name], masks[name]) for name in masks)


# -------------------------------------------------------------------------------------------------------------- SET


def test_set_drops_the_share_nearest_to_zero_of_each_sign():
    weight = torch.tensor([-0.6, -0.3, -0.05, 0.1, 0.2, 0.4, 0.8])
    # int(0.3 * 4) = 1 of the positive ones goes, 0.1, and int(0.3 * 3) = 0 of the negative ones
    assert weight[evolution.survivors(weight, 0.3)].tolist() == pytest.approx([-0.6, -0.3, -0.05, 0.2, 0.4, 0.8])
    # the released code cuts strictly at the entries of these numbers, so that one more of each sign goes
    positive, negative = weight[weight > 0].sort().values, weight[weight < 0].sort(descending=True).values
    theirs = (weight > positive[int(0.3 * 4)]) | (weight < negative[int(0.3 * 3)])
    assert weight[theirs].tolist() == pytest.approx([-0.6, -0.3, 0.4, 0.8])
    # 0.5: two of four, one of three; a weight that is zero goes as well
    weight = torch.tensor([-0.6, 0.0, -0.3, -0.05, 0.1, 0.2, 0.4, 0.8])
    assert weight[evolution.survivors(weight, 0.5)].tolist() == pytest.approx([-0.6, -0.3, 0.4, 0.8])


def test_set_grows_at_free_places_only():
    mask = torch.tensor([[True, False, False], [True, True, False]])
    assert evolution.grow(mask, 3, torch.Generator()).all() and mask.sum() == 3
    grown = evolution.grow(mask, 2, torch.Generator().manual_seed(0))
    assert grown.sum() == 5 and (grown >= mask).all()
    seen = torch.stack([evolution.grow(mask, 1, torch.Generator().manual_seed(seed)) for seed in range(40)])
    assert torch.equal(seen.any(0), torch.ones(2, 3, dtype=torch.bool))  # every free place can be drawn


def test_set_evolves_after_each_epoch_but_the_last():
    model = small()
    method, fit = method_on(model, 'set', '--ptarget=0.3', '--epochs=3', '--dense-layers', '--wd=0.01', steps=15)
    before, counts = method.masks(), active(method)
    for step in train_on_noise(method, fit, range(15)):
        changed = any(not torch.equal(before[name], mask) for name, mask in method.masks().items())
        assert changed == (step in (5, 10))  # seen at the first step of the next epoch
        assert active(method) == counts
        before = method.masks()
    assert sum(zeros(model)) == round(0.3 * 784)


def test_set_new_weights_start_at_zero_and_the_others_keep_their_momentum():
    """The released Keras code builds its optimizer anew each epoch, so that all momentum is lost."""
    model = small()
    method, fit = method_on(model, 'set', '--ptarget=0.5', '--epochs=3', '--dense-layers', '--zeta=0.5', steps=15)
    for _ in train_on_noise(method, fit, range(4)):
        pass
    state = {name: fit.optimizer.state[weight] for name, weight in method.weights.items()}
    old = {
        name: (method.masks()[name], weight.clone(), state[name]['momentum_buffer'].clone())
        for name, weight in method.weights.items()
    }
    kept = {name: evolution.survivors(weight, 0.5) for name, weight in method.weights.items()}
    method.after_epoch(0)
    for name, weight in method.weights.items():
        mask, before, momentum = old[name]
        new = method.masks()[name] & ~kept[name]
        assert new.sum() == mask.sum() - kept[name].sum() > 0
        assert (new & mask).any() or name == '0'  # some of those just dropped come back, at zero
        assert weight[~kept[name]].count_nonzero() == 0 and torch.equal(weight[kept[name]], before[kept[name]])
        assert state[name]['momentum_buffer'][~kept[name]].count_nonzero() == 0
        assert torch.equal(state[name]['momentum_buffer'][kept[name]], momentum[kept[name]])
        assert momentum[kept[name]].count_nonzero() > 0


# ------------------------------------------------------------------------------------------------------------- RigL


def test_rigl_schedule_by_hand():
    # of 75000 steps: 0.15 (1 + cos(pi t / 75000))
    shares = [rigl.drop_share(t, 75000) for t in (0, 18750, 37500, 50000, 75000)]
    assert shares == pytest.approx([0.3, 0.256066, 0.15, 0.075, 0], abs=1e-6)
    assert int(shares[1] * 1000) == 256


def test_rigl_update_by_hand():
    weight = torch.tensor([0.5, -0.1, 0.3, 0, 0, 0])
    mask = torch.tensor([True, True, True, False, False, False])
    gradient = torch.tensor([0.1, 0.9, 0.2, -0.4, 0.05, 0.6])
    k = int(0.34 * 3)  # 1: index 1 is dropped, and comes back at once for its gradient of 0.9
    assert k == 1 and torch.equal(rigl.rewire(weight, mask, gradient, k), mask)
    k = int(0.67 * 3)  # 2: indices 1 and 2 are dropped, 1 and 5 grow
    assert k == 2 and rigl.rewire(weight, mask, gradient, k).tolist() == [True, True, False, False, False, True]
    assert torch.equal(rigl.rewire(weight, mask, gradient, 0), mask)


def test_rigl_never_drops_an_inactive_weight():
    """The released code ranks with noise, inactive weights among the others: active weights near zero are level with them."""
    mask = torch.zeros(40, dtype=torch.bool)
    mask[:20] = True
    weight = torch.where(mask, 1e-9, 0.0)
    gradient = torch.arange(40.0)
    new = rigl.rewire(weight, mask, gradient, 5)
    assert new.sum() == 20 and new[:20].sum() == 15 and new[35:].all()


def test_rigl_replaces_its_share_in_nearly_dense_layers_too():
    """A port caps k there by the number of inactive weights; here what has just been dropped may grow as well."""
    mask = torch.ones(10, dtype=torch.bool)
    mask[9] = False
    weight = torch.where(mask, torch.arange(10.0) + 1, 0)
    gradient = torch.tensor([0.1, 0.9, 0.2, 0, 0, 0, 0, 0, 0, 0.8])
    assert (~rigl.rewire(weight, mask, gradient, 3)).nonzero().tolist() == [[0]]  # 0, 1, 2 go; 1, 9 and 2 grow


def rigl_at(step, *words, ptarget=0.8):
    """RigL on small(), stopped before a step -> method, fit."""
    method, fit = method_on(small(), 'rigl', f'--ptarget={ptarget}', '--frequency=4', *words)
    for _ in train_on_noise(method, fit, range(step)):
        pass
    return method, fit


def test_rigl_grows_where_the_dense_gradient_is_largest():
    """With gradients that are masked already, places would be arbitrary, and nothing would say so."""
    method, fit = rigl_at(4)
    gradients = dense_gradients(fit.model, 4)
    expected = {}
    for name, weight in method.weights.items():
        k = int(rigl.drop_share(4, method.end) * active(method)[name])
        expected[name] = rigl.rewire(weight, method.masks()[name], gradients[name], k)
        assert k > 0 and not torch.equal(expected[name], method.masks()[name])
    next(train_on_noise(method, fit, range(4, 5)))
    assert all(torch.equal(method.masks()[name], mask) for name, mask in expected.items())


@pytest.mark.parametrize('words', [['--wd=0.1', '--nesterov'], ['--optimizer=adam', '--lr=0.01']])
def test_rigl_update_takes_the_place_of_the_step(words):
    method, fit = rigl_at(4, *words)
    before = {name: parameter.clone() for name, parameter in fit.model.named_parameters()}
    old = method.masks()
    keys = ['momentum_buffer'] if 'adam' not in words[0] else ['exp_avg', 'exp_avg_sq']
    memory = {(name, key): fit.optimizer.state[weight][key].clone() for name, weight in method.weights.items() for key in keys}
    next(train_on_noise(method, fit, range(4, 5)))
    for name, parameter in fit.model.named_parameters():
        layer = name.removesuffix('.weight')
        if layer not in method.weights:
            assert torch.equal(parameter, before[name])  # norms and biases too
            continue
        stays = old[layer] & method.masks()[layer]  # one that is dropped and grown at once keeps its value as well
        assert torch.equal(parameter[stays], before[name][stays]) and parameter[~stays].count_nonzero() == 0
        for key in keys:
            now = fit.optimizer.state[parameter][key]
            assert torch.equal(now[stays], memory[layer, key][stays]) and now[~stays].count_nonzero() == 0


def test_rigl_updates_from_step_0_until_the_end_and_counts_stay():
    method, fit = method_on(small(), 'rigl', '--ptarget=0.7', '--frequency=5', '--rewire-end=0.7')
    assert method.end == 21
    counts, before, changed = active(method), method.masks(), []
    for step in train_on_noise(method, fit, range(30)):
        if any(not torch.equal(before[name], mask) for name, mask in method.masks().items()):
            changed.append(step)
        before = method.masks()
        assert active(method) == counts
        assert sum(zeros(fit.model)) >= round(0.7 * 784)
    assert changed == [0, 5, 10, 15] and sum(zeros(fit.model)) == round(0.7 * 784)  # at 20 f is 0.0017


def test_rigl_leaves_a_dense_layer_as_it_is():
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5))
    method, fit = method_on(model, 'rigl', '--ptarget=0.5', '--frequency=1', '--dense-layers', 'first')
    for _ in train_on_noise(method, fit, range(5)):
        assert active(method) == {'0': 144, '4': 392 - 144}
    assert model[0].weight.count_nonzero() == 144


# ------------------------------------------------------------------------------------------------------------ GraNet


def test_granet_schedules_by_hand():
    # 352 steps an epoch, 80 epochs, dt 1000: J = int(28.16) = 28; 0.9 - 0.4 (1 - j / 28)^3
    sparsities = [sparsity_at(1000 * j, 0, 28000, 0.5, 0.9) for j in (0, 7, 14, 27)]
    assert sparsities == pytest.approx([0.5, 0.73125, 0.85, 0.899982], abs=1e-6)
    share = granet.rewired_share(500, 1000)  # 0.005 + 0.495 / 2
    assert share == pytest.approx(0.2525) and math.ceil(share * 1000) == 253
    assert granet.rewired_share(0, 1000) == 0.5 and granet.rewired_share(1000, 1000) == pytest.approx(0.005)


def test_granet_reaches_its_target_and_rounds_its_end_to_an_update():
    """The released code stops an update early: with 28 of them 0.4 / 28^3 is missing, with 5 here 0.0032."""
    method, fit = method_on(small(), 'granet', '--ptarget=0.9', '--frequency=3')
    assert method.end == 15
    seen = [sum(zeros(fit.model))]
    for _ in train_on_noise(method, fit, range(30)):
        seen.append(784 - sum(active(method).values()))
        assert sum(zeros(fit.model)) >= seen[-1]
    expected = [round(sparsity_at(min(t - t % 3, 15), 0, 15, 0.5, 0.9) * 784) for t in range(31)]
    assert seen == expected and seen[15] == round(0.9 * 784) == sum(zeros(fit.model))
    assert method_on(small(), 'granet', '--ptarget=0.9', '--frequency=4')[0].end == 12
    assert method_on(small(), 'granet', '--ptarget=0.9', '--frequency=1000')[0].end == 15  # once, however short the run


def test_granet_prunes_rewires_and_goes_on_rewiring():
    method, fit = method_on(small(), 'granet', '--ptarget=0.8', '--frequency=5', '--prune-end=0.4', '--wd=0.01')
    before, changed = method.masks(), []
    for step in train_on_noise(method, fit, range(30)):
        if any(not torch.equal(before[name], mask) for name, mask in method.masks().items()):
            changed.append(step + 1)
        before = method.masks()
    assert changed == [5, 10, 15, 20, 25]  # the ramp ends at 10, training at 30


def test_granet_update_by_hand():
    """Pruning takes value and momentum; rewiring leaves those of a weight that it drops and grows at once."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 1, bias=False))
    method, fit = method_on(model, 'granet', '--ptarget=0.5', '--initial-sparsity=0')
    weight = model[1].weight
    weight.data = torch.tensor([[0.5, -0.1, 0.3, 0.2, -0.05, 0.4]])
    fit.optimizer.state[weight]['momentum_buffer'] = momentum = torch.ones(1, 6)
    method.prune(0.5)  # -0.05, -0.1 and 0.2 go
    assert weight.tolist() == [pytest.approx([0.5, 0, 0.3, 0, 0, 0.4])] and momentum.tolist() == [[1, 0, 1, 0, 0, 1]]
    method.gradients = {'1': torch.tensor([[0.1, 0.2, -0.9, 0.3, 0.8, 0.0]])}
    method.rewire(0.5)  # ceil(1.5) = 2: 0.3 and 0.4 go; 0.3 comes back for its gradient of -0.9, and the fifth for 0.8
    assert method.masks()['1'].tolist() == [[True, False, True, False, True, False]]
    assert weight.tolist() == [pytest.approx([0.5, 0, 0.3, 0, 0, 0])] and momentum.tolist() == [[1, 0, 1, 0, 0, 0]]


def test_granet_grows_by_the_gradient_of_the_step_before_masking():
    method, fit = method_on(small(), 'granet', '--ptarget=0.8', '--frequency=5', '--clip=0')
    for _ in train_on_noise(method, fit, range(4)):
        pass
    gradients, seen = dense_gradients(fit.model, 4), {}
    rewire = method.rewire
    method.rewire = lambda p: (seen.update(method.gradients), rewire(p))
    next(train_on_noise(method, fit, range(4, 5)))
    assert all(torch.allclose(seen[name], gradients[name], atol=1e-7) for name in gradients)
    assert all((gradients[name][~mask] != 0).any() for name, mask in method.masks().items())


def test_granet_from_a_dense_start():
    """The README of the released code gives its dense start a flag that means an empty network; here 0 is no zeros."""
    method, fit = method_on(small(), 'granet', '--ptarget=0.8', '--initial-sparsity=0', '--frequency=5')
    assert sum(active(method).values()) == 784
    for _ in train_on_noise(method, fit, range(30)):
        pass
    assert sum(zeros(fit.model)) == round(0.8 * 784)
    with pytest.raises(ValueError, match='--initial-sparsity 0.5 is above --ptarget 0.3'):
        method_on(small(), 'granet', '--ptarget=0.3')


# -------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize(
    'words',
    [
        ['--method=rigl', '--frequency=2', '--distribution=uniform', '--optimizer=adam', '--lr=0.01', '--accumulate=2'],
        ['--method=granet', '--frequency=1', '--initial-sparsity=0', '--dense-layers', 'first'],
        ['--method=set', '--dense-layers', 'first', 'last', '--distribution=uniform'],
        ['--method=gmp', '--distribution=erk', '--frequency=1'],
        ['--method=gmp', '--distribution=uniform', '--frequency=1'],
    ],
)
def test_other_settings_as_runs(words, tmp_path):
    result, _ = run_main(tmp_path, *words, '--ptarget=0.5', '--epochs=2')
    if words[1] == '--distribution=uniform':  # of gmp: in each layer by itself
        assert all(row[0] == round(0.5 * row[1]) for row in result['layers'].values())
    else:
        assert result['zeros'] == round(0.5 * result['weights'])
