"""NetAdapt and simulated annealing: they end, meet their budget, find the best split where it is known, and resume."""

import copy
import csv
import itertools
import json
import math

import pytest
import torch
from helpers import Digits, Residual, batches, evaluator, of_target, residual, run_main, same_state
from torch import nn

from args import parse
from deploy.shrinking import dependency_groups, shrink
from methods import L1FilterPruner, NetAdaptPruner, SimulatedAnnealingPruner, load
from methods._algorithms import ALGORITHMS
from methods.simulated_annealing import Annealing, Splits, is_accepted, order_by_size, shift_until
from pruners import processes
from pruners.cost import ChannelCost
from pruners.search import LARGEST_SHARE, keep_counts
from sparse_utils import count_macs, prunable_layers

CONVS = [{'sparsity': 0.5, 'op_types': ['Conv2d']}]


def chain(widths=(12, 16, 20)):
    """Three convolutions of 432, 1,728 and 2,880 weights."""
    torch.manual_seed(0)
    a, b, c = widths
    return nn.Sequential(nn.Conv2d(4, a, 3), nn.ReLU(), nn.Conv2d(a, b, 3), nn.ReLU(), nn.Conv2d(b, c, 3))


def pruned_filters(model):
    convs = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    return {name: int((conv.weight.flatten(1) == 0).all(1).sum()) for name, conv in convs.items()}


def shares(model):
    return [n / len(model.get_submodule(name).weight) for name, n in pruned_filters(model).items()]


def sensitivity(model, of=(3, 2, 1)):
    """A score in closed form: 100 (1 - sum a_i s_i^2 / sum a_i) of the share s_i of filters pruned in layer i."""
    return 100 * (1 - sum(a * s**2 for a, s in zip(of, shares(model), strict=True)) / sum(of))


def constant(model):
    return 0.9


def anneal(model, folder, evaluator=constant, config_list=CONVS, **options):
    options = {'search_steps': 4, 'cool_down_rate': 0.7} | options
    return SimulatedAnnealingPruner(model, config_list, evaluator, experiment_data_dir=folder, **options)


def adapt(model, folder, evaluator=constant, config_list=CONVS, fine_tuner=None, **options):
    example = torch.zeros(1, 2 if isinstance(model, Residual) else 4, 9, 9)
    options = {'example_input': example, 'sparsity_per_iteration': 0.1} | options
    return NetAdaptPruner(model, config_list, fine_tuner, evaluator, experiment_data_dir=folder, **options)


def weights(model):
    return sum(layer.weight.numel() for layer in prunable_layers(model).values())


# ----------------------------------------------------------------------------------------------------- pieces by hand
def test_larger_layers_get_the_larger_values_and_equal_ones_keep_their_order():
    assert order_by_size([0.9, 0.1, 0.5], [1, 2, 3]) == [0.1, 0.5, 0.9]
    assert order_by_size([0.9, 0.1, 0.5], [30, 2, 1]) == [0.9, 0.5, 0.1]
    assert order_by_size([0.9, 0.1, 0.5], [2, 2, 1]) == [0.9, 0.5, 0.1]
    assert order_by_size([0.1, 0.9, 0.5], [2, 2, 1]) == [0.5, 0.9, 0.1]
    assert order_by_size([0.3, 0.1, 0.2], [7, 7, 7]) == [0.3, 0.1, 0.2]


def test_any_values_meet_a_budget_by_one_shift():
    def within(budget):
        return lambda values: 1 - (values[0] + 3 * values[1]) / 4 <= budget

    assert shift_until(within(0.5), [0.0, 0.4]) == pytest.approx([0.2, 0.6], abs=1e-6)
    assert shift_until(within(0.5), [0.0, 0.9]) == pytest.approx([0.0, 2 / 3], abs=1e-6)  # at 0 it stays
    assert shift_until(within(0.1), [-5.0, 3.0]) == pytest.approx([0.6, LARGEST_SHARE], abs=1e-6)  # at the largest it stays
    assert shift_until(within(1.0), [0.3, 0.5]) == [0, 0]
    assert shift_until(within(-1.0), [0.3, 0.5]) == pytest.approx([LARGEST_SHARE] * 2)  # never: as much as there is


def annealing(start, stop, rate):
    return Annealing(start, stop, rate, 0.35, 10, 0)


def test_temperatures_are_those_of_nni():
    assert len(annealing(100, 20, 0.9).temperatures()) == 16
    assert annealing(100, 20, 0.5).temperatures() == [100, 50, 25]
    assert annealing(100, 50, 0.5).temperatures() == [100]  # above the stop


def test_acceptance_is_relative_to_the_spread_of_scores():
    for scale in (1e-12, 1.0, 1e12):
        seen = [0.0, 10 * scale]
        limit = math.exp(-100 * 0.2 / 50)  # a loss of a fifth of the spread at T = 50: 0.67
        assert is_accepted(5 * scale, 7 * scale, seen, 50, limit - 1e-6)
        assert not is_accepted(5 * scale, 7 * scale, seen, 50, limit + 1e-6)
        assert is_accepted(7 * scale, 5 * scale, seen, 50, 0.999)
    assert is_accepted(5, 5, [5], 50, 0.999)  # a constant evaluator
    assert not is_accepted(-math.inf, 5, [5, -math.inf], 50, 0.0) and is_accepted(5, -math.inf, [-math.inf, 5], 50, 0.999)


# ------------------------------------------------------------------------------------------------------ the hard cases
EVALUATORS = {
    'constant': constant,
    'tiny scores': lambda model: 1e-9 * sensitivity(model),
    'huge scores': lambda model: -1e12 + 1e9 * sensitivity(model),
    'not a number': lambda model: math.nan,
    'sometimes infinite': lambda model: math.inf if shares(model)[0] > 0.3 else sensitivity(model),
    'a tensor': lambda model: torch.tensor(sensitivity(model)),
}


@pytest.mark.parametrize('target', [0, 0.3, 0.83, 0.9])
@pytest.mark.parametrize('name', EVALUATORS)
def test_annealing_ends_and_meets_its_budget(name, target, tmp_path):
    model, calls = chain(), []

    def evaluator(model):
        calls.append(1)
        return EVALUATORS[name](model)

    pruner = anneal(model, tmp_path, evaluator, of_target(target))
    assert pruner.compress() is model
    assert len(calls) <= 1 + 4 * len(annealing(100, 20, 0.7).temperatures())
    zeros = sum(int((m.weight == 0).sum()) for m in model if isinstance(m, nn.Conv2d))
    assert 0 <= zeros - target * 5040 < 16 * 9 + 1  # by less than the largest filter
    assert pruner.result['sparsity'] == pytest.approx(zeros / 5040) and pruner.result['met']


@pytest.mark.parametrize('target', [0, 0.3, 0.83, 0.97])
@pytest.mark.parametrize('name', EVALUATORS)
def test_netadapt_ends_and_meets_its_budget(name, target, tmp_path):
    model = chain()
    pruner = adapt(model, tmp_path, EVALUATORS[name], of_target(target), sparsity_per_iteration=0.2)
    assert pruner.compress() is model
    small = shrink(nn.Sequential(*model, nn.Conv2d(20, 1, 1)), torch.zeros(1, 4, 9, 9))  # else the output keeps its channels
    left = weights(small) - small[5].weight.numel()
    assert left <= 5040 * (1 - target) + 1e-6 and pruner.result['met']
    assert pruner.result['sparsity'] == 1 - pruner.left / 5040
    assert [n for n in pruned_filters(model).values()] == [pruner.counts[name] for name in pruner.layers]


def test_a_target_that_cannot_be_met_is_named_and_all_that_can_go_goes(tmp_path, capsys):
    for make in (anneal, adapt):
        model = chain((2, 2, 2))
        pruner = make(model, tmp_path / make.__name__, config_list=of_target(0.95))
        pruner.compress()
        assert list(pruned_filters(model).values()) == [1, 1, 1] and not pruner.result['met']
        assert 'the target of 0.95 cannot be met' in capsys.readouterr().out
        assert not json.loads((tmp_path / make.__name__ / 'search_result.json').read_text())['met']


def test_netadapt_shrinks_its_step_when_no_layer_can_give_it(tmp_path):
    # the second layer may not be pruned; the others cannot give 60 % at once
    model = chain((4, 16, 4))
    config_list = [{'sparsity': 0.6, 'op_names': ['0', '4']}]
    pruner = adapt(model, tmp_path, config_list=config_list, sparsity_per_iteration=0.6)
    pruner.compress()
    assert pruner.result['met'] and pruner.iteration > 1


@pytest.mark.parametrize('make', [anneal, adapt])
def test_minimize_is_maximize_of_the_negative(make, tmp_path):
    one = make(chain(), tmp_path / 'a', lambda model: -sensitivity(model), optimize_mode='minimize')
    two = make(chain(), tmp_path / 'b', sensitivity, optimize_mode='maximize')
    one.compress(), two.compress()
    assert one.result['performance'] == -two.result['performance'] and one.result['config_list'] == two.result['config_list']
    worst = make(chain(), tmp_path / 'c', sensitivity, optimize_mode='minimize')
    worst.compress()
    assert worst.result['performance'] < two.result['performance']


def test_one_layer_and_layers_with_one_filter(tmp_path):
    for make in (anneal, adapt):
        model = nn.Sequential(nn.Conv2d(4, 10, 1))
        make(model, tmp_path / make.__name__ / '1').compress()
        assert pruned_filters(model) == {'0': 5}
        model = chain((1, 1, 1))
        pruner = make(model, tmp_path / make.__name__ / '2')
        pruner.compress()
        assert not any(pruned_filters(model).values()) and pruner.result['sparsity'] == 0 and not pruner.result['met']


# ------------------------------------------------------------------------------------- where the best split is known
def best_split(fits, of):
    """By enumeration: the best score of all counts of filters (at least one a layer stays) that fit the budget."""
    scores = {}
    for counts in itertools.product(range(12), range(16), range(20)):
        if fits(*counts):
            a = [n / width for n, width in zip(counts, (12, 16, 20), strict=True)]
            scores[counts] = 100 * (1 - sum(w * s**2 for w, s in zip(of, a, strict=True)) / sum(of))
    return max(scores.values())


@pytest.mark.parametrize('target', [0.3, 0.5, 0.8])
@pytest.mark.parametrize('of', [(3, 2, 1), (1, 1, 1)])
def test_annealing_finds_the_best_split(of, target, tmp_path):
    best = best_split(lambda a, b, c: 36 * a + 108 * b + 144 * c >= target * 5040 - 1e-6, of)
    for seed in range(2):
        pruner = SimulatedAnnealingPruner(
            chain(), of_target(target), lambda m: sensitivity(m, of), experiment_data_dir=tmp_path / str(seed), seed=seed
        )
        pruner.compress()
        assert pruner.result['performance'] >= best - 0.02 * abs(best)
        assert pruner.result['performance'] <= best + 1e-6


@pytest.mark.parametrize('target', [0.3, 0.5])
@pytest.mark.parametrize('of', [(3, 2, 1), (1, 2, 1)])
def test_netadapt_finds_the_best_split(of, target, tmp_path):
    def fits(a, b, c):  # each layer reads what the one before has left
        return 36 * (12 - a) + 9 * (12 - a) * (16 - b) + 9 * (16 - b) * (20 - c) <= 5040 * (1 - target) + 1e-6

    best = best_split(fits, of)
    pruner = adapt(chain(), tmp_path, lambda m: sensitivity(m, of), of_target(target), sparsity_per_iteration=0.05)
    pruner.compress()
    assert best - 0.02 * abs(best) <= pruner.result['performance'] <= best + 1e-6


def test_larger_layers_never_get_less(tmp_path):
    pruner = anneal(chain((20, 16, 12)), tmp_path, lambda m: sensitivity(m, (1, 2, 3)), of_target(0.4))  # 720, 2880, 1728
    pruner.compress()
    rows = read_history(tmp_path)
    assert len(rows) > 5
    for row in rows:
        a, b, c = [entry['sparsity'] for entry in json.loads(row['config_list'])]
        assert a <= c <= b


def test_the_perturbation_shrinks_with_the_temperature(tmp_path, monkeypatch):
    candidate = Splits.candidate
    proposals = []

    def recording(splits, values):
        proposals.append(candidate(splits, values))
        return proposals[-1]

    monkeypatch.setattr(Splits, 'candidate', recording)
    options = {'start_temperature': 100, 'stop_temperature': 1, 'cool_down_rate': 0.5}
    pruner = anneal(chain(), tmp_path, constant, **options)  # accepts every step
    assert [pruner.annealing.magnitude(t) for t in pruner.annealing.temperatures()] == [0.35 * 0.5**k for k in range(7)]
    pruner.compress()
    proposals = proposals[-28:]  # four at each of seven temperatures; before them the uniform split
    moves = [max(abs(x - y) for x, y in zip(a, b, strict=True)) for a, b in itertools.pairwise(proposals)]
    assert max(moves[:4]) > 5 * max(moves[-4:]) > 0


# ---------------------------------------------------------------------------------------------- what it counts, and exports
def test_the_cost_is_that_of_the_shrunk_network():
    model, x = residual(), torch.randn(2, 2, 9, 9)
    groups = dependency_groups(model, x)
    assert groups == [['back', 'stem']]
    pruner = L1FilterPruner(model, of_target(0))
    for stream, inner in ((0, 0), (2, 0), (0, 3), (4, 5), (5, 7)):
        twin = copy.deepcopy(model)
        pruner = L1FilterPruner(twin, of_target(0))
        counts = {'back': stream, 'stem': stream, 'front': inner}
        scores = {name: torch.arange(len(layer.weight)).float() for name, layer in pruner.layers.items()}
        keep = keep_counts(scores, counts)
        pruner.set_masks(keep)
        pruner.apply()
        small = shrink(twin, x)
        s, f = 6 - stream, 8 - inner
        assert ChannelCost(model, x)(keep) == weights(small) == 18 * s + 9 * s * f + 9 * f * s + 3 * s
        macs = sum(dense for dense, _ in count_macs(small, x).values())
        assert ChannelCost(model, x, 'macs')(keep) == macs == 81 * (18 * s + 18 * s * f) + 3 * s
    one = keep_counts(scores, {'back': 3, 'stem': 0, 'front': 0})  # the stream stays whole as the stem writes all of it
    assert ChannelCost(model, x)(one) == weights(model)


@pytest.mark.parametrize('target', [0.3, 0.6])
def test_annealing_with_an_example_input_counts_the_shrunk_network(target, tmp_path):
    model = chain()
    pruner = anneal(model, tmp_path, sensitivity, of_target(target), example_input=torch.zeros(1, 4, 9, 9))
    pruner.compress()
    a, b, c = (width - pruned for width, pruned in zip((12, 16, 20), pruned_filters(model).values(), strict=True))
    left = 36 * a + 9 * a * b + 9 * b * c
    assert pruner.result['sparsity'] == 1 - left / 5040 and pruner.result['met']
    assert 0 <= 5040 * (1 - target) - left < 9 * (12 + 20)  # a filter of the second layer, and what reads it


def test_annealing_refuses_an_example_input_for_what_cannot_be_traced(tmp_path):
    with pytest.raises(ValueError, match='trace'):
        anneal(Untraceable(), tmp_path, example_input=torch.zeros(1, 2, 9, 9))


def test_every_iteration_of_netadapt_cuts_its_step_and_a_stream_is_pruned_together(tmp_path):
    model = residual()
    pruner = adapt(model, tmp_path, config_list=of_target(0.7))
    pruner.compress()
    counts = pruned_filters(model)
    assert counts['back'] == counts['stem'] > 0 and torch.equal(pruner.keep['back'], pruner.keep['stem'])
    assert (model.norm.weight == 0).sum() == counts['back']
    whole, left = weights(model), 0.0
    for number, rows in itertools.groupby(read_history(tmp_path), lambda row: int(row['iteration'])):
        cuts = [float(row['sparsity']) for row in rows]
        assert all(cut >= min(left + 0.1, 0.7) - 1e-9 for cut in cuts) and number < 7
        left = min(cuts)  # the one that was taken has cut that much at least
    pruner.unhook()
    assert weights(shrink(model, torch.zeros(1, 2, 9, 9))) == pruner.left <= 0.3 * whole


def test_netadapt_counts_macs(tmp_path):
    model = chain()
    pruner = adapt(model, tmp_path, cost='macs')
    pruner.compress()
    x = torch.zeros(1, 4, 9, 9)
    dense = sum(macs for macs, _ in count_macs(model, x).values())
    small = shrink(nn.Sequential(*model, nn.Conv2d(20, 1, 1)), x)
    left = sum(macs for name, (macs, _) in count_macs(small, x).items() if name != '5')
    assert left == pruner.left <= 0.5 * dense


def test_netadapt_finds_its_example_input(tmp_path):
    def evaluator(model):
        return model(torch.zeros(3, 2, 9, 9)).sum().item()

    pruner = adapt(residual(), tmp_path / 'a', evaluator, example_input=None)
    pruner.compress()
    assert pruner.example.shape == (1, 2, 9, 9) and pruner.groups == [['back', 'stem']]
    pruner = adapt(residual(), tmp_path / 'b', constant, example_input=None)  # the evaluator runs nothing
    pruner.compress()
    assert pruner.groups == [['back', 'stem']] and pruner.result['met']


@pytest.mark.parametrize('make', [anneal, adapt])
def test_filters_of_transposed_convolutions(make, tmp_path):
    """Their weight is [in, out, ...]: 48 weights in each of 6 filters, then 54 in each of 8."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, (3, 4)), nn.ReLU(), nn.Conv2d(6, 8, 3))
    config_list = [{'sparsity': 0.5, 'op_names': ['0', '2']}]
    options = {'example_input': None} if make is anneal else {}
    pruner = make(model, tmp_path, constant, config_list, **options)
    pruner.compress()
    a, b = (int(pruner.keep[name].sum()) for name in ('0', '2'))
    assert torch.equal(model[0].weight.flatten(2).transpose(0, 1).flatten(1).any(1), pruner.keep['0']) and a < 6
    left = 48 * a + 54 * b if make is anneal else 48 * a + 9 * a * b
    assert left <= 360 and pruner.result['sparsity'] == 1 - left / 720 and pruner.result['met']


class Untraceable(Residual):
    def forward(self, x):
        return super().forward(x) if x.sum() < 1e9 else x


def test_a_model_that_cannot_be_traced_is_pruned_by_its_own_weights(tmp_path, capsys):
    torch.manual_seed(0)
    model = Untraceable()
    pruner = adapt(model, tmp_path, config_list=of_target(0.6))
    pruner.compress()
    assert 'only the weights of the pruned filters themselves' in capsys.readouterr().out
    zeros = sum(int((m.weight == 0).sum()) for m in model.modules() if isinstance(m, nn.Conv2d))
    assert zeros >= 0.6 * weights(model) and pruner.result['met']


@pytest.mark.parametrize('make', [anneal, adapt])
def test_what_was_found_is_exported(make, tmp_path):
    model = residual()
    dense = copy.deepcopy(model.state_dict())
    pruner = make(model, tmp_path, lambda m: -shares(m)[0])
    with pytest.raises(ValueError, match='compress'):
        pruner.export_model(tmp_path / 'early.pt')
    pruner.compress()
    pruner.export_model(tmp_path / 'model.pt', tmp_path / 'mask.pt')
    state, masks = (torch.load(tmp_path / name, weights_only=True) for name in ('model.pt', 'mask.pt'))
    Residual().load_state_dict(state)
    assert any((mask['weight'] == 0).any() for mask in masks.values())
    for name, mask in masks.items():
        assert torch.equal(state[f'{name}.weight'], dense[f'{name}.weight'] * mask['weight'])
        assert torch.equal(state[f'{name}.bias'] == 0, mask['bias'] == 0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    pruner.bind(optimizer)
    for _ in range(2):
        model(torch.randn(2, 2, 9, 9)).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(model.get_submodule(name).weight == 0, mask['weight'] == 0) for name, mask in masks.items())


def test_the_config_list_of_the_result_makes_the_same_masks(tmp_path):
    model = chain()
    found = anneal(model, tmp_path, sensitivity).compress(return_config_list=True)
    result = json.loads((tmp_path / 'search_result.json').read_text())
    assert json.loads(result['config_list']) == found
    twin = chain()
    L1FilterPruner(twin, found).compress()
    assert same_state(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize('make', [anneal, adapt])
@pytest.mark.parametrize('name', ALGORITHMS)
def test_every_criterion(make, name, tmp_path):
    def train(model):
        model.train()
        model(torch.randn(4, 2, 9, 9)).square().sum().backward()

    kind = {'slim': 'BatchNorm2d', 'level': 'default'}.get(name, 'Conv2d')
    options = {'fine_tuner': train} if make is adapt else {'statistics': train}
    pruner = make(residual(), tmp_path, constant, [{'sparsity': 0.4, 'op_types': [kind]}], base_algo=name, **options)
    model = pruner.compress()
    assert pruner.result['met'] or name == 'slim' and make is adapt  # a batch norm on a residual stream alone gives nothing
    assert any((p == 0).any() for p in model.parameters())
    if name == 'level':
        assert sum(int((m.weight == 0).sum()) for m in prunable_layers(model).values()) == math.ceil(0.4 * weights(model))


def test_a_group_gets_one_share_and_loses_the_same_filters(tmp_path):
    model = residual()
    pruner = anneal(model, tmp_path, groups=[['back', 'stem']])
    pruner.compress()
    assert torch.equal(pruner.keep['back'], pruner.keep['stem']) and not pruner.keep['back'].all()
    assert pruner.sparsity['back'] == pruner.sparsity['stem']


def test_the_model_is_as_it_was_but_for_the_masks(tmp_path):
    def evaluator(model):
        model.train()
        model(torch.randn(4, 2, 9, 9))  # moves the statistics of batch norm
        model.eval()
        return 1.0

    model = residual().train()
    before = copy.deepcopy(model.state_dict())
    anneal(model, tmp_path, evaluator).compress()
    assert model.training and torch.equal(model.norm.running_mean, before['norm.running_mean'])

    def fails(model):
        raise RuntimeError('no data')

    with pytest.raises(RuntimeError, match='no data'):
        anneal(model, tmp_path / 'b', fails).compress()
    assert model.training and not list(model._forward_pre_hooks.values())[1:]


def test_all_processes_decide_by_the_mean_of_their_scores(monkeypatch, tmp_path):
    def average(tensors):  # the other process likes layer 0 pruned
        for tensor in tensors:
            tensor.copy_((tensor + 1000 * shares(model)[0]) / 2)

    for make in (anneal, adapt):
        model = chain()
        make(model, tmp_path / make.__name__ / '1', sensitivity).compress()
        alone, model = shares(model), chain()
        with monkeypatch.context() as patch:
            patch.setattr(processes, 'average', average)
            make(model, tmp_path / make.__name__ / '2', sensitivity).compress()
        assert shares(model)[0] > alone[0]


# ------------------------------------------------------------------------------------------------------- files, resuming
def read_history(folder):
    with open(folder / 'search_history.csv', newline='') as file:
        return list(csv.DictReader(file))


def test_history_and_result(tmp_path):
    pruner = anneal(chain(), tmp_path, sensitivity)
    pruner.compress()
    rows, result = read_history(tmp_path), json.loads((tmp_path / 'search_result.json').read_text())
    assert list(rows[0])[:3] == ['sparsity', 'performance', 'config_list']
    assert max(float(row['performance']) for row in rows) == result['performance']
    assert all(0.5 <= float(row['sparsity']) < 0.53 for row in rows)
    counts = [
        [int(w * entry['sparsity'] + 1e-6) for w, entry in zip((12, 16, 20), json.loads(row['config_list']), strict=True)]
        for row in rows
    ]
    assert len(set(map(tuple, counts))) == len(counts)  # none was evaluated twice


class Stop(BaseException):
    """Stands for a kill."""


def test_annealing_resumes_where_it_was_stopped(tmp_path):
    calls = []

    def evaluator(model):
        calls.append(1)
        if len(calls) == limit:
            raise Stop
        return sensitivity(model)

    limit = -1
    anneal(chain(), tmp_path / 'whole', evaluator).compress()
    whole, total = read_history(tmp_path / 'whole'), len(calls)
    for number in (1, 2, total // 2, total):
        folder, calls[:], limit = tmp_path / str(number), [], number
        with pytest.raises(Stop):
            anneal(chain(), folder, evaluator).compress()
        with open(folder / 'search_history.csv', 'a') as file:
            file.write('0.5,0.7,"[{""spars')  # a line cut short
        calls[:], limit = [], -1
        pruner = anneal(chain(), folder, evaluator)
        pruner.compress()
        assert len(calls) == total - max(number - 2, 0)  # the first is always evaluated
        assert read_history(folder) == whole
        assert (folder / 'search_result.json').read_text() == (tmp_path / 'whole' / 'search_result.json').read_text()


def noisy_fine_tuner(model):
    """Draws from torch's generator, as dropout does."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape))


def test_netadapt_resumes_where_it_was_stopped(tmp_path):
    calls = []

    def fine_tuner(model):
        calls.append(1)
        if len(calls) == limit:
            raise Stop
        noisy_fine_tuner(model)

    def run(folder):
        calls[:] = []
        model = chain()
        torch.manual_seed(5)
        pruner = adapt(model, folder, sensitivity, fine_tuner=fine_tuner, sparsity_per_iteration=0.2)
        pruner.compress()
        return model.state_dict(), torch.get_rng_state(), len(calls), pruner

    limit = -1
    expected, rng, total, pruner = run(tmp_path / 'whole')
    assert pruner.iteration == 3 and total == 9 and sum(pruner.counts.values()) > 9
    for number in (1, 3, 4, 9):
        limit = number
        with pytest.raises(Stop):
            run(tmp_path / str(number))
        limit = -1
        state, after, further, _ = run(tmp_path / str(number))
        assert same_state(state, expected) and torch.equal(after, rng)
        assert further == total - (number - 1) // 3 * 3  # whole iterations are not repeated
        for name in ('search_history.csv', 'search_result.json'):
            assert (tmp_path / str(number) / name).read_text() == (tmp_path / 'whole' / name).read_text()
    assert run(tmp_path / 'whole')[2] == 0  # nothing is left to do


def test_what_is_left_of_another_search_is_not_used(tmp_path):
    for make in (anneal, adapt):
        folder = tmp_path / make.__name__
        make(chain(), folder, sensitivity).compress()
        for model, score, more in (
            (chain(), lambda m: -shares(m)[2] + 3, {}),  # another evaluator
            (chain(), sensitivity, {'config_list': of_target(0.4)}),
            (chain((20, 12, 16)), sensitivity, {}),
        ):
            fresh = make(copy.deepcopy(model), tmp_path / 'fresh' / make.__name__ / str(id(model)), score, **more)
            again = make(model, folder, score, **more)
            fresh.compress(), again.compress()
            assert again.result == fresh.result


# -------------------------------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'optimize_mode': 'max'}, "optimize_mode must be 'maximize' or 'minimize', got 'max'"),
        ({'base_algo': 'l3'}, "there is no pruning algorithm 'l3'"),
        ({'evaluator': None}, 'evaluator must be a function'),
        ({'base_algo': 'taylorfo'}, 'judges by training batches'),
        ({'config_list': [CONVS[0], {'sparsity': 0.4, 'op_names': ['0']}]}, r'all entries .* need the same, not \[0.4, 0.5\]'),
        ({'config_list': [{'sparsity': 0.5, 'op_types': ['Linear']}]}, 'this pruner takes Conv1d, Conv2d, '),
    ],
)
@pytest.mark.parametrize('make', [anneal, adapt])
def test_faulty_arguments(make, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(chain(), tmp_path, **options)


def test_faulty_arguments_of_one(tmp_path):
    for options in ({'start_temperature': 10}, {'stop_temperature': 0}, {'cool_down_rate': 1.0}, {'cool_down_rate': 0}):
        with pytest.raises(ValueError, match='temperatures must fall|cool_down_rate must'):
            anneal(chain(), tmp_path, **options)
    for options in ({'perturbation_magnitude': 0}, {'search_steps': 0}):
        with pytest.raises(ValueError, match='perturbation_magnitude must be above 0, and search_steps'):
            anneal(chain(), tmp_path, **options)
    for options in ({'sparsity_per_iteration': 0}, {'sparsity_per_iteration': 1.0}, {'cost': 'flops'}, {'fine_tuner': 3}):
        with pytest.raises(ValueError, match='must'):
            adapt(chain(), tmp_path, **options)
    for make in (anneal, adapt):
        with pytest.raises(ValueError, match="evaluator must return a number, got 'good'"):
            make(chain(), tmp_path, lambda model: 'good').compress()


def short_term_fine_tuner(model, epoch=3):
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    train_loader = batches()
    criterion = torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()
    for _ in range(epoch):
        for _batch_idx, (data, target) in enumerate(train_loader):
            data, target = data.to(device), target.to(device)
            optimizer.zero_grad()
            output = model(data)
            loss = criterion(output, target)
            loss.backward()
            optimizer.step()


def exported(pruner, folder):
    pruner.export_model(folder / 'model.pth', folder / 'mask.pth')
    return torch.load(folder / 'model.pth', weights_only=True), torch.load(folder / 'mask.pth', weights_only=True)


def test_the_documents_example_of_netadapt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = Digits().to('cuda' if torch.cuda.is_available() else 'cpu')
    # fmt: off
    config_list = [{
        'sparsity': 0.5,
        'op_types': ['Conv2d']
    }]
    pruner = NetAdaptPruner(model, config_list, short_term_fine_tuner=short_term_fine_tuner, evaluator=evaluator,base_algo='l1', experiment_data_dir='./')  # noqa: E501
    pruner.compress()
    # fmt: on
    state, masks = exported(pruner, tmp_path)
    assert pruner.result['met'] and (state['conv1.weight'] == 0).sum() == (masks['conv1']['weight'] == 0).sum()
    pruner.unhook()
    assert weights(shrink(model, torch.zeros(1, 1, 12, 12).to(model.fc.weight.device))) <= 0.5 * weights(Digits())


def test_the_documents_example_of_simulated_annealing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = Digits().to('cuda' if torch.cuda.is_available() else 'cpu')
    # fmt: off
    config_list = [{
        'sparsity': 0.5,
        'op_types': ['Conv2d']
    }]
    pruner = SimulatedAnnealingPruner(model, config_list, evaluator=evaluator, base_algo='l1', cool_down_rate=0.9, experiment_data_dir='./')  # noqa: E501
    pruner.compress()
    # fmt: on
    state, masks = exported(pruner, tmp_path)
    zeros = sum(int((mask['weight'] == 0).sum()) for mask in masks.values())
    assert 68 <= zeros < 68 + 9 and zeros == sum(int((state[f'{name}.weight'] == 0).sum()) for name in masks)  # of 136


# ------------------------------------------------------------------------------------------------------- the command line
@pytest.mark.parametrize('name', ['netadapt', 'simulated_annealing', 'autocompress'])
def test_without_a_validation_split_there_is_no_search(name):
    with pytest.raises(ValueError, match='give it images with --val-size'):
        load(name)(parse([f'--method={name}', '--val-size=0']))


def test_the_test_set_has_no_say(tmp_path, monkeypatch):
    words = ['--method=simulated_annealing', '--epochs=1', '--val-size=64', '--finetune-epochs=0', '--cool-down-rate=0.1']
    one = run_main(tmp_path / 'a', *words)[1]
    from harness import data

    split = data.read_digits

    def other_labels():
        train, (images, labels), source = split()
        return train, (images, (labels + 1) % 10), source

    monkeypatch.setattr(data, 'read_digits', other_labels)
    assert same_state(one, run_main(tmp_path / 'b', *words)[1])


@pytest.mark.parametrize('seed', range(3))
def test_a_search_that_goes_on_accepts_what_the_whole_one_does(seed, tmp_path):
    """The rule looks at the spread of the scores seen so far: those that were read from the file may not count too early."""

    def five():
        torch.manual_seed(0)
        return nn.Sequential(*[nn.Conv2d(12, 12, 1) for _ in range(5)])

    def score(model):  # depends on the masks alone
        gone = [int((layer.weight.flatten(1) == 0).all(1).sum()) for layer in model]
        return -float(sum((number - best) ** 2 for number, best in zip(gone, (9, 1, 8, 3, 9), strict=True)))

    def run(folder, evaluator):
        config_list = [{'sparsity': 0.5, 'op_types': ['Conv2d']}]
        pruner = SimulatedAnnealingPruner(
            five(), config_list, evaluator, experiment_data_dir=tmp_path / folder, search_steps=5, seed=seed
        )
        pruner.compress()
        return pruner.result

    whole = run('whole', score)
    for stop in (4, 15, 40):
        calls = itertools.count(1)

        def stopped(model, calls=calls, stop=stop):
            if next(calls) == stop:
                raise KeyboardInterrupt
            return score(model)

        with pytest.raises(KeyboardInterrupt):
            run(f'stopped{stop}', stopped)
        assert run(f'stopped{stop}', score) == whole
    assert run('whole', score) == whole  # nothing is evaluated again but the first candidate


@pytest.mark.parametrize(('layers', 'target'), [(19, 0.26), (10, 0.8)])
def test_equal_layers_lose_filters_one_after_the_other(layers, target, tmp_path):
    """All at once they would exceed the target by a filter a layer."""
    model = nn.Sequential(*[nn.Conv2d(16, 16, 1) for _ in range(layers)])
    config_list = [{'sparsity': target, 'op_types': ['Conv2d']}]
    pruner = SimulatedAnnealingPruner(model, config_list, lambda model: 0.9, experiment_data_dir=tmp_path, search_steps=1)
    pruner.compress()
    assert 0 <= (pruner.result['sparsity'] - target) * 16 * layers < 1
