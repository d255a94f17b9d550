"""Properties of sparse_utils that hold for any shapes, ties and floating-point types, tried on random cases by hypothesis."""

import math
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from sparse_utils import Pruner, count_zeros, feather, global_threshold

COMMON = dict(deadline=None, suppress_health_check=list(HealthCheck))
settings.register_profile('short', max_examples=60, **COMMON)
settings.register_profile('long', max_examples=1200, **COMMON)
settings.load_profile(os.environ.get('HYPOTHESIS_PROFILE', 'short'))

SHAPES = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=5)
TYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
RATIOS = st.one_of(st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0]), st.floats(0, 1))
SEEDS = st.integers(0, 2**31)


def draw(shapes, dtype, seed, levels=None):
    """Weights of these shapes; with `levels` only so many different magnitudes, so that most are tied."""
    generator = torch.Generator().manual_seed(seed)
    if levels is None:
        return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [(torch.randint(-levels, levels + 1, shape, generator=generator) / 8).to(dtype) for shape in shapes]


def sorted_threshold(weights, ratio):
    """The definition: the interpolated quantile of all magnitudes, and the two between which it lies."""
    ordered = torch.cat([w.reshape(-1) for w in weights]).abs().double().sort().values
    position = (len(ordered) - 1) * ratio
    k = math.floor(position)
    low = float(ordered[k])
    high = float(ordered[min(k + 1, len(ordered) - 1)])
    return low + (high - low) * (position - k), low, high


@given(SHAPES, TYPES, RATIOS, SEEDS, st.sampled_from([None, 1, 3]), st.sampled_from([None, 0.5, 0.999, 1.001, 30.0]))
def test_the_threshold_is_the_sorted_definition(shapes, dtype, ratio, seed, levels, guess):
    weights = draw(shapes, dtype, seed, levels)
    expected, low, high = sorted_threshold(weights, ratio)
    previous = None if guess is None else torch.tensor(expected * guess)
    found = global_threshold(weights, ratio, previous)
    eps = torch.finfo(dtype).eps
    rounded_up = expected == pytest.approx(high, rel=eps) and found.item() == low  # to `high` it would prune one too many
    assert found.dtype == dtype and (rounded_up or found.item() == pytest.approx(expected, rel=4 * eps, abs=1e-7))


def test_a_threshold_that_would_be_rounded_up_to_the_next_magnitude_is_the_one_below():
    low = 0.1318359375  # both are numbers of bfloat16; 0.98 of the way from one to the other is rounded to the higher one
    high = 0.1376953125
    assert global_threshold([torch.tensor([low, high], dtype=torch.bfloat16)], 0.98).item() == low


@given(SHAPES, TYPES, RATIOS, SEEDS)
def test_as_many_weights_are_pruned_as_the_definition_says(shapes, dtype, ratio, seed):
    weights = draw(shapes, dtype, seed)
    ordered = torch.cat([w.reshape(-1) for w in weights]).abs().sort().values
    n, last = len(ordered), ordered[math.floor((len(ordered) - 1) * ratio)]
    asked = int((ordered <= last).sum())  # floor((n - 1) ratio) + 1, and those tied with the last of them
    assert asked >= math.floor((n - 1) * ratio) + 1
    threshold = global_threshold(weights, ratio)
    for p in (1, 3, math.inf):
        assert sum(int((feather(w, threshold, p) == 0).sum()) for w in weights) == asked


@given(SHAPES, RATIOS, SEEDS, st.randoms())
def test_the_order_of_the_layers_does_not_matter(shapes, ratio, seed, random):
    weights = draw(shapes, torch.float32, seed)
    mixed = random.sample(weights, len(weights))
    assert torch.equal(global_threshold(mixed, ratio), global_threshold(weights, ratio))


@given(SHAPES, TYPES, st.sampled_from([math.inf, -math.inf, math.nan]), SEEDS)
def test_infinity_and_nan_are_refused(shapes, dtype, value, seed):
    weights = draw(shapes, dtype, seed)
    weights[seed % len(weights)].view(-1)[0] = value
    with pytest.raises(ValueError, match='NaN or infinity'):
        global_threshold(weights, 0.5)


def network(widths, seed):
    torch.manual_seed(seed)
    layers = [nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)]
    return nn.Sequential(*[module for layer in layers for module in (layer, nn.ReLU())][:-1])


@given(st.lists(st.integers(1, 12), min_size=2, max_size=5), st.floats(0.05, 0.99), st.integers(1, 5), SEEDS)
def test_a_state_dict_carries_a_pruner_to_the_same_end(widths, rate, at, seed):
    def step(model, pruner, number):
        pruner.update_thresh()
        generator = torch.Generator().manual_seed(number)
        loss = model(torch.randn(4, widths[0], generator=generator)).square().mean()
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad

    one = network(widths, seed)
    pruner = Pruner(one, final_rate=rate, nbatches=2, epochs=3)
    for number in range(6):
        if number == at:
            saved = {name: tensor.clone() for name, tensor in one.state_dict().items()}, pruner.state_dict()
        step(one, pruner, number)
    two = network(widths, seed + 1)
    other = Pruner(two, final_rate=rate, nbatches=2, epochs=3)
    two.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    for number in range(at, 6):
        step(two, other, number)
    for own in (pruner, other):
        own.update_thresh(end_of_batch=True)
        own.desparsify()
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    zeros = sum(z for z, _ in count_zeros(one).values())
    n = sum(n for _, n in count_zeros(one).values())
    assert zeros >= math.floor((n - 1) * rate) + 1
