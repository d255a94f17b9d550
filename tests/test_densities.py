"""Layer densities against numbers worked out by hand, counts that add up exactly, masks by magnitude without memory."""

import math

import pytest
import torch

from args import parse
from methods._densities import allot, dense_names, erk, kept_counts, kernel_ratio, uniform
from methods._masks import keep_largest, magnitude_masks

SHAPES = {'conv1': (16, 3, 3, 3), 'conv2': (32, 16, 3, 3), 'conv3': (64, 32, 3, 3), 'fc': (10, 64)}  # 24112 weights
LENET = {'fc1': (300, 784), 'fc2': (100, 300), 'fc3': (10, 100)}  # 266200


def test_erk_worked_by_hand():
    # RigL rounds the zeros of each layer down at s = 0.8: it keeps 87 + 922 + 3687 + 128 = 4824. sums of shapes 25, 54, 102, 74
    # eps = 4824 / 255 = 18.918: fc 74 / 640 eps = 2.19, dense. Then 4184 / 181 = 23.116: conv1 25 / 432 eps = 1.338, dense.
    # Then 3752 / 156 = 24.0513: conv2 54 / 4608 eps = 0.281851, conv3 102 / 18432 eps = 0.133096
    rounded = erk(SHAPES, 4824)
    assert rounded == pytest.approx({'conv1': 1, 'conv2': 0.281851, 'conv3': 0.133096, 'fc': 1}, abs=1e-6)
    # without rounding 0.2 n = 4822.4 and eps = (4822.4 - 640 - 432) / 156 = 24.0410
    exact = erk(SHAPES, 4822.4)
    assert exact == pytest.approx({'conv1': 1, 'conv2': 0.281731, 'conv3': 0.133040, 'fc': 1}, abs=1e-6)
    assert exact['conv2'] / kernel_ratio(SHAPES['conv2']) == pytest.approx(24.0410, abs=1e-4)


def test_erk_of_lenet_by_hand():
    densities = erk(LENET, 26620)  # s = 0.9
    assert densities == pytest.approx({'fc1': 0.0795678, 'fc2': 0.230189, 'fc3': 1}, abs=1e-6)
    counts = kept_counts(LENET, 0.9, 'erk')
    # 18714.35, 6905.65 and 1000: rounded down they are 26619 in all; the one left goes to fc2. RigL keeps 18715, 6906, 1000
    assert counts == {'fc1': 18714, 'fc2': 6906, 'fc3': 1000} and sum(counts.values()) == 26620
    assert [n - math.floor((1 - densities[name]) * n) for name, n in (('fc1', 235200), ('fc2', 30000))] == [18715, 6906]


def test_erdos_renyi_by_hand():
    # eps = 20: 20 (784 + 300) / (784 300), 20 (300 + 100) / (300 100)
    assert 20 * kernel_ratio((300, 784)) == pytest.approx(0.0921769, abs=1e-7)
    assert 20 * kernel_ratio((100, 300)) == pytest.approx(0.266667, abs=1e-6)


@pytest.mark.parametrize('distribution', ['erk', 'uniform'])
@pytest.mark.parametrize('ratio', [0.0, 0.3, 0.5, 0.8, 0.9, 0.98, 0.999])
def test_counts_are_exact_in_total(distribution, ratio):
    # the released code rounds by layer: of 4822.4 it keeps 432 + 1299 + 2454 + 640 = 4825
    counts = kept_counts(SHAPES, ratio, distribution)
    assert sum(counts.values()) == 24112 - round(ratio * 24112)
    assert all(0 <= counts[name] <= math.prod(shape) for name, shape in SHAPES.items())
    kept = 24112 - round(ratio * 24112)
    densities = {'erk': erk, 'uniform': uniform}[distribution](SHAPES, kept)
    for name, shape in SHAPES.items():
        assert abs(counts[name] - densities[name] * math.prod(shape)) < 1


def test_layers_that_stay_dense_count_too():
    counts = kept_counts(SHAPES, 0.9, 'uniform', dense=['conv1'])
    assert counts['conv1'] == 432 and sum(counts.values()) == 24112 - 21701
    # 2411 - 432 = 1979 of 23680: 4608, 18432 and 640 times 0.0835726 are 385.10, 1540.41, 53.49
    assert counts == {'conv1': 432, 'conv2': 385, 'conv3': 1540, 'fc': 54}
    with pytest.raises(ValueError, match='conv1, fc alone would keep more than the 241 of 24112'):
        kept_counts(SHAPES, 0.99, 'erk', dense=['conv1', 'fc'])
    assert dense_names(['a', 'b', 'c'], ['first', 'last']) == ['a', 'c'] and dense_names(['a'], ['last', 'first']) == ['a']
    assert parse(['--method=set']).dense_layers == ['last'] and parse(['--method=rigl']).dense_layers == []


def test_all_layers_dense():
    assert kept_counts(SHAPES, 0.0, 'erk') == {name: math.prod(shape) for name, shape in SHAPES.items()}
    assert erk(SHAPES, 24112) == dict.fromkeys(SHAPES, 1.0)


def test_the_rest_goes_to_the_largest_remainders_within_the_limits():
    assert allot({'a': 1.5, 'b': 2.7, 'c': 0.8}, 5, {'a': 9, 'b': 9, 'c': 9}) == {'a': 1, 'b': 3, 'c': 1}
    assert allot({'a': 1.5, 'b': 2.7, 'c': 0.8}, 5, {'a': 9, 'b': 9, 'c': 0}) == {'a': 2, 'b': 3, 'c': 0}
    assert allot({'a': 0.5, 'b': 0.5}, 1, {'a': 1, 'b': 1}) == {'a': 1, 'b': 0}
    with pytest.raises(ValueError, match='7 weights are to be kept, but the layers can keep 4 only'):
        allot({'a': 3.5, 'b': 3.5}, 7, {'a': 2, 'b': 2})


def test_with_erk_no_pruned_weight_returns_on_the_way():
    """A layer's rounded number could rise by one when the total falls; that a weight came back would be the result."""
    torch.manual_seed(0)
    weights = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    masks = {name: torch.ones(shape, dtype=torch.bool) for name, shape in SHAPES.items()}
    for step in range(1, 200):
        new = magnitude_masks(weights, 0.99 * step / 199, 'erk', masks)
        assert all((new[name] <= masks[name]).all() for name in SHAPES)
        assert sum(int(mask.sum()) for mask in new.values()) == 24112 - round(0.99 * step / 199 * 24112)
        masks = new
        weights = {name: weight * masks[name] for name, weight in weights.items()}


def reference(weights, kept):
    """The obvious way, by one stable sort."""
    ranks = torch.cat([weight.abs().flatten() for weight in weights.values()])
    mask = torch.zeros(len(ranks), dtype=torch.bool)
    mask[ranks.argsort(descending=True, stable=True)[:kept]] = True
    return mask


@pytest.mark.parametrize('rounded', [True, False])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_magnitude_masks_against_a_sort(rounded, dtype):
    torch.manual_seed(1)
    weights = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    weights = {name: (weight.round(decimals=1) if rounded else weight).to(dtype) for name, weight in weights.items()}
    for pruned in (0, 1, 2, 12000, 24000, 24111, 24112):
        masks = magnitude_masks(weights, pruned / 24112)
        flat = torch.cat([mask.flatten() for mask in masks.values()])
        assert torch.equal(flat, reference(weights, 24112 - pruned)), pruned


def test_of_equal_magnitudes_those_kept_before_stay():
    weights = {'a': torch.zeros(4), 'b': torch.tensor([0.0, 0.0, 1.0])}
    before = {'a': torch.tensor([False, False, True, False]), 'b': torch.tensor([False, True, True])}
    masks = magnitude_masks(weights, 4 / 7, previous=before)
    assert masks['a'].tolist() == [False, False, True, False] and masks['b'].tolist() == [False, True, True]
    masks = magnitude_masks(weights, 5 / 7, previous=before)
    assert masks['a'].tolist() == [False, False, True, False] and masks['b'].tolist() == [False, False, True]
    masks = magnitude_masks(weights, 3 / 7, previous=before)  # one more than there were: the first
    assert masks['a'].tolist() == [True, False, True, False] and masks['b'].tolist() == [False, True, True]


def test_keep_largest_by_index():
    masks = keep_largest({'a': torch.ones(2, 2), 'b': torch.tensor([1.0, 2.0])}, 2)
    assert masks['b'][1] and sum(int(mask.sum()) for mask in masks.values()) == 2
    assert masks['a'].shape == (2, 2)
