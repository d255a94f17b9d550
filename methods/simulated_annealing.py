"""Simulated annealing over the split of one overall sparsity among the layers, NNI's SimulatedAnnealingPruner (Liu et al.,
"AutoCompress: An Automatic DNN Structured Pruning Framework for Ultra-High Compression Rates", AAAI 2020, arXiv 1907.03141,
its heuristic search, Algorithm 1; here anneal()).

The target `sparsity` is the share of the weights of the layers that config_list names, all together. A candidate gives each
layer a share; the one-shot criterion `base_algo` masks the model accordingly, the evaluator scores it, and it is accepted if
it is better, or else with probability exp(-100 d / T), d the loss of score as a share of the spread of all scores seen so far:
with accuracies in percent that range from 0 to 100 this is NNI's exp(-dE / T), with any other scale of scores it works the
same. T = start_temperature, times cool_down_rate until stop_temperature is reached; at each T search_steps candidates are
tried.

Layers of more weights never get a smaller share than layers of fewer (the paper's guide of the search, as NNI does it); layers
of equal size are free. A candidate is a random or perturbed list of shares, ordered so and shifted by the least constant with
which the pruned filters hold at least the target; shares stay in [0, 1). The target is met, and exceeded by less than one
filter, unless layers would lose their last one. Nothing is drawn again, so the number of steps is known before. A
perturbation is uniform in +-perturbation_magnitude T / start_temperature.

Deviations from NNI: the first candidate is the uniform split, so that what is found is never worse; search_steps candidates a
temperature, where NNI waited until one was accepted; the best candidate of all is what is exported; equal counts of filters are
evaluated once. A score that is not a number counts as the worst.

experiment_data_dir holds search_history.csv, a line for each candidate evaluated, and search_result.json. Started again with
the same model and arguments, the search takes over the scores of search_history.csv and ends as if it had not been
interrupted: it draws from a generator of its own, seeded with `seed`. The first candidate is evaluated anew; if its score is
another one, the evaluator has changed, and so the file is not used.

On the command line a candidate's batch norm statistics are taken anew from --search-recalibrate training batches before it is
scored, as after strong pruning accuracy says little without (Li et al., "EagleEye", ECCV 2020, arXiv 2007.02491), layers that
end in one residual stream get one share and lose the same filters, and no layer loses more than --max-sparsity.
"""

import math
from typing import NamedTuple

import torch
from tqdm import tqdm

from pruners import processes, search
from pruners.cost import OwnCost, ShrunkCost, filter_layers
from pruners.milliseconds import Budget, MillisecondsCost
from pruners.processes import say
from pruners.selection import num_pruned
from pruners.trials import Trials

from ._algorithms import algorithm
from ._search import Searching, add_annealing_flags, add_budget_flags, annealing_options, budget_of, largest_share


class Annealing(NamedTuple):
    """The numbers of the algorithm."""

    start_temperature: float
    stop_temperature: float
    cool_down_rate: float
    perturbation_magnitude: float
    search_steps: int
    seed: int

    def check(self):
        """Raises ValueError for numbers with which nothing would be searched, or without end."""
        if not 0 < self.stop_temperature < self.start_temperature < math.inf:
            raise ValueError(f'temperatures must fall to above 0, not from {self.start_temperature} to {self.stop_temperature}')
        if not 0 < self.cool_down_rate < 1:
            raise ValueError(f'cool_down_rate must lie between 0 and 1, got {self.cool_down_rate}')
        if not 0 < self.perturbation_magnitude < math.inf or self.search_steps < 1:
            raise ValueError('perturbation_magnitude must be above 0, and search_steps at least 1')

    def temperatures(self):
        """The start, start rate, start rate^2, ... as long as it is above the stop."""
        found = [self.start_temperature]
        while found[-1] * self.cool_down_rate > self.stop_temperature:
            found.append(found[-1] * self.cool_down_rate)
        return found

    def magnitude(self, temperature):
        """How far a share is perturbed at most."""
        return self.perturbation_magnitude * temperature / self.start_temperature


def anneal(splits, trials, annealing):
    """Algorithm 1 of the paper -> the best candidate that was tried.

    splits.candidate(values) makes a candidate of any list of values. trials.utility(candidate, temperature) is larger for a
    better one.
    """
    generator = torch.Generator().manual_seed(annealing.seed)
    temperatures = [t for t in annealing.temperatures() for _ in range(annealing.search_steps)]
    current = splits.uniform()
    current_utility = trials.utility(current, temperatures[0])
    best = current
    best_utility = current_utility
    bar = tqdm(temperatures, 'annealing', leave=False, disable=True if processes.rank() else None)
    for step, temperature in enumerate(bar):
        *draws, draw = torch.rand(len(current) + 1, generator=generator, dtype=torch.float64).tolist()
        if step == 0:
            candidate = splits.candidate(draws)
        else:
            candidate = splits.candidate(perturb(current, draws, annealing.magnitude(temperature)))
        utility = trials.utility(candidate, temperature)
        if is_accepted(utility, current_utility, trials.utilities(), temperature, draw):
            current = candidate
            current_utility = utility
        if utility > best_utility:
            best = candidate
            best_utility = utility
            bar.set_postfix(best=trials.score(best))
    return best


def perturb(values, draws, magnitude):
    """Move each value by at most +-magnitude; draws: uniform in [0, 1)."""
    return [value + magnitude * (2 * draw - 1) for value, draw in zip(values, draws, strict=True)]


def is_accepted(utility, current, seen, temperature, draw):
    """Metropolis' rule, relative to the spread of the utilities seen so far; draw: uniform in [0, 1)."""
    if utility >= current:
        return True
    if utility == -math.inf:
        return False
    finite = [value for value in seen if math.isfinite(value)]
    spread = max(finite) - min(finite)
    return draw < math.exp(-100 * ((current - utility) / spread) / temperature)


class Splits:
    """The candidates: lists of shares in [0, largest], one a unit of layers, in the order of sizes, that meet the target.

    left: function of {layer: number pruned} -> what is left of that which the target is a share of.
    """

    def __init__(self, base, left, target, largest):
        self.layers = base.layers
        self.left = left
        self.target = target
        self.largest = largest
        self.units = search.units(base)
        self.numbers = search.sizes(base)
        self.whole = left(dict.fromkeys(base.layers, 0))

    def shares(self, candidate):
        """{layer: share}"""
        shares = {name: share for unit, share in zip(self.units, candidate, strict=True) for name in unit}
        return {name: shares[name] for name in self.layers}

    def counts(self, candidate):
        """{layer: number pruned}, as the class of base_algo prunes."""
        shares = self.shares(candidate)
        return {name: min(num_pruned(self.numbers[name], share), self.numbers[name] - 1) for name, share in shares.items()}

    def sparsity(self, candidate):
        """What part of the weights is gone."""
        return 1 - self.left(self.counts(candidate)) / self.whole

    def uniform(self):
        return self.candidate([self.target] * len(self.units))

    def candidate(self, values):
        """Any numbers, one a unit -> a candidate."""
        weights = [max(self.layers[name].weight.numel() for name in unit) for unit in self.units]
        values = [value + 1e-6 * place for place, value in enumerate(values)]  # equal layers lose a filter one after the other
        budget = self.whole * (1 - self.target + 1e-9)
        return shift_until(
            lambda candidate: self.left(self.counts(candidate)) <= budget, order_by_size(values, weights), self.largest
        )


def order_by_size(values, sizes):
    """The same values, the larger ones for the larger sizes; among equal sizes their order stays."""
    order = sorted(range(len(values)), key=lambda i: (sizes[i], values[i]))
    ordered = dict(zip(order, sorted(values), strict=True))
    return [ordered[i] for i in range(len(values))]


def shift_until(fits, values, largest=search.LARGEST_SHARE):
    """Shift all values by the least constant, and into [0, largest], so that fits(values); or else all are `largest`."""

    def shifted(by):
        return [round(min(max(value + by, 0.0), largest), 9) for value in values]

    low = -max(values)
    high = largest - min(values)
    if fits(shifted(low)):
        return shifted(low)
    for _ in range(26):
        middle = (low + high) / 2
        if fits(shifted(middle)):
            high = middle
        else:
            low = middle
    return shifted(high)


class SimulatedAnnealingPruner(search.Search):
    """SimulatedAnnealingPruner(model, config_list, evaluator, optimize_mode='maximize', base_algo='l1', ...).

    Config keys sparsity (one for all entries: the share of the weights of all layers named), op_types, op_names, exclude.
    evaluator: function of the masked model -> a number. base_algo: level, l1, l2, slim, fpgm, taylorfo, apoz, mean_activation;
    the last three need statistics, a function of the model that runs training batches. search_steps: candidates a temperature.
    max_sparsity: no layer gets a larger share; by itself the search may leave one filter of a layer, if the evaluator likes
    it. groups: lists of layers whose filters can only be removed together (deploy.dependency_groups): they get one share and
    lose the same filters. example_input: given one, the weights are counted in the network without its dead channels, so that
    with a filter those go that read it. budget: pruners.milliseconds.Budget(milliseconds, batch, threads), which replaces
    `sparsity`: the time on this machine, by a table of measured layers, in the folder; it needs example_input. The model is
    masked in place for each candidate, and restored.
    """

    def __init__(
        self,
        model,
        config_list,
        evaluator,
        optimize_mode='maximize',
        base_algo='l1',
        start_temperature=100,
        stop_temperature=20,
        cool_down_rate=0.9,
        perturbation_magnitude=0.35,
        experiment_data_dir='./',
        *,
        search_steps=10,
        max_sparsity=search.LARGEST_SHARE,
        seed=0,
        groups=(),
        parts=None,
        statistics=None,
        example_input=None,
        budget: Budget | None = None,
    ):
        kind = algorithm(base_algo)
        super().__init__(model, config_list, evaluator, optimize_mode, kind, experiment_data_dir, statistics, groups, parts)
        numbers = (start_temperature, stop_temperature, cool_down_rate, perturbation_magnitude, search_steps, seed)
        self.annealing = Annealing(*numbers)
        self.annealing.check()
        if not self.target <= max_sparsity <= 1:
            raise ValueError(f'max_sparsity must lie between the target {self.target} and 1, got {max_sparsity}')
        if budget is not None:
            budget.check(self.base, example_input)
        self.largest = min(max_sparsity, search.LARGEST_SHARE)
        self.budget = budget
        self.example = example_input
        self.cost = OwnCost(self.base)
        if self.base.FILTERS and example_input is not None:
            self.cost = ShrunkCost(self.base, example_input, 'params', list(filter_layers(self.base)))
        self.settings = (type(self.base).__name__, optimize_mode, self.base.entries, self.base.groups)
        self.settings += (self.annealing, self.largest, type(self.cost).__name__, budget)

    def search(self):
        """Anneal: the best candidate's masks are then those of `base`, but not yet applied."""
        search.open_folder(self.folder)
        importances = search.importance(self.base, self.statistics)
        cost = self.cost
        target = self.target
        if self.budget is not None:
            cost = MillisecondsCost(self.base, self.example, self.folder / 'latency.csv', self.budget)
            target = max(1 - self.budget.nanoseconds / cost(dict.fromkeys(self.base.layers, 0), importances), 0.0)
        splits = Splits(self.base, lambda counts: cost(counts, importances), target, self.largest)
        trials = Trials(self, splits, importances)
        trials.begin(splits.uniform(), self.annealing.start_temperature)
        reached = splits.sparsity(splits.uniform())
        if reached < target - 1e-9:
            say(f'the target of {target:.4g} cannot be met: with all that each layer can give {reached:.4f} is pruned')
        best = anneal(splits, trials, self.annealing)
        figures = {'performance': trials.score(best), 'sparsity': splits.sparsity(best)}
        figures['met'] = figures['sparsity'] >= target - 1e-9
        if self.budget is not None:
            figures |= cost.report(trials.masks(best))
        self.finish(splits.shares(best), trials.masks(best), figures)


class Method(Searching):
    @classmethod
    def add_args(cls, parser):
        super().add_args(parser)
        add_annealing_flags(parser.add_argument)
        add_budget_flags(parser.add_argument)

    def make_pruner(self, model):
        groups, parts = self.groups(self.job, model)
        return SimulatedAnnealingPruner(
            model,
            self.config_list(model),
            self.evaluator,
            base_algo=self.args.base_algo,
            experiment_data_dir=self.job.folder,
            max_sparsity=largest_share(self.args, self.args.ptarget),
            groups=groups,
            parts=parts,
            statistics=self.statistics,
            budget=budget_of(self.args),
            example_input=None if self.args.budget_ms is None else self.job.example,
            **annealing_options(self.args),
        )
