"""--budget-ms: the table of measured layers, and the searches that meet it. A clock that counts stands for the real one."""

import copy
import csv
import math

import pytest
import torch
from helpers import residual, run_main
from torch import nn

from args import parse
from deploy import latency
from methods import L1FilterPruner, NetAdaptPruner, SimulatedAnnealingPruner, load
from methods._search import budget_of
from pruners import milliseconds
from pruners.milliseconds import Budget, MillisecondsCost, narrow
from sparse_utils import count_macs, prunable_layers

CONVS = [{'sparsity': 0.5, 'op_types': ['Conv2d']}]
EXAMPLE = torch.zeros(1, 4, 9, 9)


def chain():
    torch.manual_seed(0)
    convs = [nn.Conv2d(4, 12, 3), nn.ReLU(), nn.Conv2d(12, 16, 3), nn.ReLU(), nn.Conv2d(16, 20, 3)]
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 3))


def count(module, images, threads, seconds):
    """A layer takes 100 ns and one for each multiply-accumulate, a network also 7 for each value of a layer and 5,000 more."""
    layers = prunable_layers(module)
    macs = len(images) * sum(dense for dense, _ in count_macs(module, images).values())
    nanoseconds = macs + 100 * len(layers)
    if isinstance(module, nn.Conv2d | nn.Linear):
        return nanoseconds
    values = []
    for layer in layers.values():
        layer.register_forward_hook(lambda layer, inputs, output: values.append(output.numel()))
    module(images)
    return nanoseconds + 7 * sum(values) + 5000


@pytest.fixture
def clock(monkeypatch):
    """What was measured, in turn."""
    measured = []

    def counted(module, images, threads, seconds):
        measured.append(f'{module}')
        return count(module, images, threads, seconds)

    monkeypatch.setattr(milliseconds, 'nanoseconds_of', counted)
    return measured


class Untraceable(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(2, 4, 3))

    def forward(self, x):
        return self[0](x) if x.sum() > 0 else x


def one_shot(model):
    return L1FilterPruner(model, CONVS)


def first(**numbers):
    """{layer: bool}: so many first filters are kept."""
    sizes = {'0': 12, '2': 16, '4': 20}
    return {name: torch.arange(size) < numbers.get(f'layer{name}', size) for name, size in sizes.items()}


def test_the_time_by_hand(clock, tmp_path):
    cost = MillisecondsCost(one_shot(chain()), EXAMPLE, tmp_path / 'latency.csv', Budget(1.0, batch=2, threads=2))
    # 7x7, 5x5 and 3x3 images, two of them, and a classifier
    macs = 2 * (49 * 4 * 12 * 9 + 25 * 12 * 16 * 9 + 9 * 16 * 20 * 9 + 20 * 3)
    values = 2 * (49 * 12 + 25 * 16 + 9 * 20 + 3)
    assert cost.estimate(first()) == macs + 400 + 7 * values + 5000 == 202490
    macs = 2 * (49 * 4 * 5 * 9 + 25 * 5 * 16 * 9 + 9 * 16 * 3 * 9 + 3 * 3)
    values = 2 * (49 * 5 + 25 * 16 + 9 * 3 + 3)
    assert cost.estimate(first(layer0=5, layer4=3)) == macs + 400 + 7 * values + 5000 == 76284
    assert cost.estimate(first(layer0=5, layer4=3)) == cost.measure(first(layer0=5, layer4=3))


def test_nothing_is_measured_twice_and_the_table_is_read(clock, tmp_path):
    path = tmp_path / 'latency.csv'
    cost = MillisecondsCost(one_shot(chain()), EXAMPLE, path, Budget(1.0, threads=2))
    found = cost.estimate(first(layer2=9))
    number = len(clock)
    assert number == 4 + 1 + 4 + 1 + 2  # each layer whole and half, both networks, and the two that a narrower layer changes
    assert cost.estimate(first(layer2=9)) == found and len(clock) == number
    again = MillisecondsCost(one_shot(chain()), EXAMPLE, path, Budget(1.0, threads=2))
    assert again.estimate(first(layer2=9)) == found and len(clock) == number
    with open(path, newline='') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == number and all(int(row['nanoseconds']) > 0 for row in rows)
    assert rows[0]['what'] == 'Conv2d(4, 12, kernel_size=(3, 3), stride=(1, 1)) on 1x4x9x9, 2 threads'
    MillisecondsCost(one_shot(chain()), EXAMPLE, path, Budget(1.0, threads=1))
    assert len(clock) == number + 10  # on other threads it is another time


def test_what_shrink_keeps_takes_time(clock, tmp_path):
    """The filters of a last convolution are the outputs of the network: dead or not, they stay."""
    model = chain()[:5]
    cost = MillisecondsCost(one_shot(model), EXAMPLE, tmp_path / 'latency.csv', Budget(1.0))
    assert cost.estimate(first(layer4=3)) == cost.estimate(first())
    assert cost.estimate(first(layer2=3, layer4=3)) == cost.measure(first(layer2=3, layer4=3)) < cost.estimate(first())


def test_the_model_stays_as_it_is(clock, tmp_path):
    model = chain()
    before = copy.deepcopy(model.state_dict())
    base = one_shot(model)
    keep = base.keep
    MillisecondsCost(base, EXAMPLE, tmp_path / 'latency.csv', Budget(1.0)).estimate(first(layer2=9))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert base.keep == keep and not any(module._forward_hooks for module in model.modules())


LAYERS = [
    (nn.Conv2d(8, 12, 3, stride=2, padding=1), 5, 7, (5, 7, 1)),
    (nn.Conv2d(8, 8, 3, groups=8, bias=False), 3, 3, (3, 3, 3)),
    (nn.Conv2d(8, 16, 3, groups=8), 4, 7, (3, 6, 3)),  # two filters of each channel
    (nn.Conv2d(8, 12, 3, groups=4), 6, 9, (6, 9, 1)),
    (nn.Conv2d(8, 12, 3, groups=4), 4, 8, (4, 8, 4)),
    (nn.Conv2d(1, 12, 3), 1, 5, (1, 5, 1)),
    (nn.Conv1d(8, 12, 3, padding='same'), 2, 3, (2, 3, 1)),
    (nn.ConvTranspose2d(8, 12, 3, stride=2), 5, 7, (5, 7, 1)),
    (nn.Linear(8, 12), 5, 7, (5, 7, None)),
]


@pytest.mark.parametrize('case', LAYERS, ids=lambda case: str(case[0]))
def test_a_narrow_layer_computes(case):
    layer, inputs, outputs, expected = case
    small = narrow(layer, inputs, outputs)
    linear = isinstance(layer, nn.Linear)
    assert (*milliseconds.channel_numbers(small), None if linear else small.groups) == expected
    shape = [2, 3, expected[0]] if linear else [2, expected[0], *[9] * (layer.weight.dim() - 2)]
    whole = [2, 3, layer.in_features] if linear else [2, layer.in_channels, *shape[2:]]
    axis = -1 if linear else 1
    produced = list(small(torch.zeros(shape)).shape)
    dense = list(layer(torch.zeros(whole)).shape)
    assert produced.pop(axis) == expected[1] and dense.pop(axis) == len(layer.bias if layer.bias is not None else layer.weight)
    assert produced == dense


def adapt(model, folder, budget, example=EXAMPLE, **options):
    evaluator = options.pop('evaluator', lambda model: 0.9)
    return NetAdaptPruner(
        model, CONVS, None, evaluator, example_input=example, experiment_data_dir=folder, budget=budget, **options
    )


def anneal(model, folder, budget, example=EXAMPLE, **options):
    options = {'search_steps': 4, 'cool_down_rate': 0.7, 'evaluator': lambda model: 0.9} | options
    return SimulatedAnnealingPruner(model, CONVS, example_input=example, experiment_data_dir=folder, budget=budget, **options)


@pytest.mark.parametrize('make', [adapt, anneal])
@pytest.mark.parametrize('share', [0.3, 0.6, 0.9])
def test_the_budget_is_met_and_hardly_more(make, share, clock, tmp_path):
    for number, (model, example) in enumerate([(chain(), EXAMPLE), (residual(), torch.zeros(1, 2, 9, 9))]):
        folder = tmp_path / str(number)
        whole = count(copy.deepcopy(model), example, 2, 0) / 1e6
        budget = Budget(share * whole)
        pruner = make(model, folder, budget, example)
        pruner.compress()
        found = pruner.result
        assert found['met'] and found['milliseconds'] <= budget.milliseconds
        assert found['milliseconds'] > budget.milliseconds - 0.2 * whole  # one of the six filters of a stream is so much
        assert math.isclose(found['milliseconds'], found['milliseconds_measured'], rel_tol=0.02)


@pytest.mark.parametrize('make', [adapt, anneal])
def test_a_search_that_goes_on_asks_the_clock_for_nothing_that_it_knows(make, clock, tmp_path):
    make(chain(), tmp_path, Budget(0.05)).compress()
    expected = (tmp_path / 'search_result.json').read_text()
    measured = len(clock)
    assert measured > 8
    make(chain(), tmp_path, Budget(0.05)).compress()
    assert len(clock) == measured
    assert (tmp_path / 'search_result.json').read_text() == expected


def test_a_network_that_is_fast_enough_stays_whole(clock, tmp_path):
    for make in (adapt, anneal):
        model = chain()
        pruner = make(model, tmp_path / make.__name__, Budget(10.0))
        pruner.compress()
        assert pruner.result['met'] and pruner.result['sparsity'] == 0
        assert all((layer.weight != 0).all() for layer in prunable_layers(model).values())


def test_a_budget_that_nothing_meets_is_said(clock, tmp_path, capfd):
    for make in (adapt, anneal):
        pruner = make(chain(), tmp_path / make.__name__, Budget(0.005))
        pruner.compress()
        assert not pruner.result['met']
        said = capfd.readouterr()
        assert 'cannot be met' in said.out + said.err


def test_what_is_refused(clock, tmp_path):
    with pytest.raises(ValueError, match='needs filters to remove; LevelPruner prunes single weights'):
        adapt(chain(), tmp_path, Budget(1.0), base_algo='level')
    for wrong in (Budget(0), Budget(math.inf), Budget(1.0, 0), Budget(1.0, 1, -2)):
        with pytest.raises(ValueError, match='a budget needs milliseconds above 0'):
            anneal(chain(), tmp_path, wrong)
    for make in (adapt, anneal):
        with pytest.raises(ValueError, match='trace'):
            make(Untraceable(), tmp_path, Budget(1.0), torch.zeros(1, 2, 9, 9))
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match='give example_input'):
        anneal(chain(), tmp_path, Budget(1.0), None).compress()


def test_the_real_clock(tmp_path):
    cost = MillisecondsCost(one_shot(chain()), EXAMPLE, tmp_path / 'latency.csv', Budget(1.0))
    assert 0 < cost.estimate(first(layer2=9)) < 1e8


@pytest.mark.parametrize('name', ['netadapt', 'simulated_annealing'])
def test_the_command_line(name, clock, tmp_path):
    words = [f'--method={name}', '--epochs=1', '--val-size=64', '--finetune-epochs=1', '--budget-ms=0.5', '--budget-batch=2']
    words += ['--short-term-steps=1'] if name == 'netadapt' else ['--cool-down-rate=0.2', '--search-steps=2']
    result, _ = run_main(tmp_path / 'a', *words)
    assert result['search_met'] and result['search_milliseconds'] <= 0.5
    assert (tmp_path / 'a' / 'latency.csv').exists()
    method = load(name)(parse([*words, '--val-size=64']))
    assert budget_of(method.args) == Budget(0.5, 2, latency.THREADS)
