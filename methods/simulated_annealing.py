"""Simulated annealing over the split of one overall sparsity among the layers, NNI's SimulatedAnnealingPruner (Liu et al.,
"AutoCompress: An Automatic DNN Structured Pruning Framework for Ultra-High Compression Rates", AAAI 2020, arXiv 1907.03141,
its heuristic search, Algorithm 1).

The target `sparsity` is the share of the weights of the layers that config_list names, all together. A candidate gives each
layer a share; the one-shot criterion `base_algo` masks the model accordingly, the evaluator scores it, and it is accepted if it
is better, or else with probability exp(-100 d / T), d the loss of score as a share of the spread of all scores seen so far: with
accuracies in percent that range from 0 to 100 this is NNI's exp(-dE / T), with any other scale of scores it works the same.
T = start_temperature, times cool_down_rate until stop_temperature is reached; at each T search_steps candidates are tried.

Layers of more weights never get a smaller share than layers of fewer (the paper's guide of the search, as NNI does it); layers
of equal size are free. A candidate is a random or perturbed list of shares, arranged so and shifted, with shares kept in [0, 1),
by the least constant with which the pruned filters hold at least the target: it is met, and exceeded by less than one filter, at
any target that leaves each layer a filter. Nothing is drawn again, so the search ends after a number of steps that is known
before. A perturbation is uniform in +-perturbation_magnitude T / start_temperature.

Deviations from NNI: the first candidate is the uniform split, so that what is found is never worse; search_steps candidates a
temperature, where NNI waited until one was accepted; the best candidate of all is what is exported; equal counts of filters are
evaluated once. A score that is not a number counts as the worst.

experiment_data_dir holds search_history.csv, a line for each candidate evaluated, and search_result.json. Started again with the
same model and arguments, the search takes over the scores of search_history.csv and ends as if it had not been interrupted: it
draws from a generator of its own, seeded with `seed`. The first candidate is evaluated anew; if its score is another one, the
evaluator has changed, and so the file is not used.

On the command line a candidate's batch norm statistics are taken anew from --recalibrate training batches before it is scored, as
after strong pruning accuracy says little without (Li et al., "EagleEye", ECCV 2020, arXiv 2007.02491), layers that end in one
residual stream get one share and lose the same filters, and no layer loses more than --max-sparsity.

Search holds what NetAdapt (netadapt.py) and AutoCompress (autocompress.py) share with it.
"""

import contextlib
import csv
import json
import math

import torch
from tqdm import tqdm

from pruners import processes
from pruners.processes import say
from pruners.search import CAP, Search, fingerprint, importance, keep_counts, own_weights, score_count, trial
from pruners.selection import num_pruned

from ._algorithms import algorithm
from ._search import Searching, add_annealing_flags, annealing_options, largest_share


def temperatures(start, stop, rate):
    """start, start rate, start rate^2, ... as long as it is above stop."""
    found = []
    while start > stop:
        found.append(start)
        start *= rate
    return found


def arrange(values, sizes):
    """The same values, the larger ones for the larger sizes; among equal sizes their order stays."""
    order = sorted(range(len(values)), key=lambda i: (sizes[i], values[i]))
    arranged = dict(zip(order, sorted(values), strict=True))
    return [arranged[i] for i in range(len(values))]


def meet(values, left, budget, cap=CAP):
    """Shift all values by the least constant, and into [0, cap], so that left(shares) <= budget; or else all are cap."""

    def shifted(by):
        return [round(min(max(value + by, 0.0), cap), 9) for value in values]

    low, high = -max(values), cap - min(values)
    if left(shifted(low)) <= budget:
        return shifted(low)
    for _ in range(26):
        middle = (low + high) / 2
        low, high = (low, middle) if left(shifted(middle)) <= budget else (middle, high)
    return shifted(high)


def is_accepted(value, current, seen, temperature, draw):
    """Metropolis' rule for utilities, relative to the spread of those seen; draw: uniform in [0, 1)."""
    if value >= current:
        return True
    if value == -math.inf:
        return False
    finite = [one for one in seen if math.isfinite(one)]
    spread = max(finite) - min(finite)
    return draw < math.exp(-100 * ((current - value) / spread) / temperature)


class History:
    """search_history.csv: a line for each candidate that was evaluated. `known` is what stands there of the same search."""

    COLUMNS = ('sparsity', 'performance', 'config_list', 'temperature', 'search')

    def __init__(self, path, name):
        self.path, self.name = path, name
        self.known = processes.same(self.read())

    def read(self):
        """Whole lines of this search, [] where there is no such file."""
        rows = []
        with contextlib.suppress(OSError, ValueError, csv.Error, TypeError, KeyError), open(self.path, newline='') as file:
            for row in csv.DictReader(file):
                if row['search'] == self.name:
                    shares = {entry['op_names'][0]: entry['sparsity'] for entry in json.loads(row['config_list'])}
                    rows.append(row | {'performance': float(row['performance']), 'shares': shares})
        return rows

    def rewrite(self, rows):
        """Begin the file with these rows alone: what was cut short, or is of another search, goes."""
        if processes.rank() == 0:
            with open(self.path, 'w', newline='') as file:
                writer = csv.writer(file)
                writer.writerow(self.COLUMNS)
                writer.writerows([row[column] for column in self.COLUMNS] for row in rows)

    def add(self, *values):
        if processes.rank() == 0:
            with open(self.path, 'a', newline='') as file:
                csv.writer(file).writerow([*values, self.name])


class SimulatedAnnealingPruner(Search):
    """SimulatedAnnealingPruner(model, config_list, evaluator, optimize_mode='maximize', base_algo='l1', ...).

    Config keys sparsity (one for all entries: the share of the weights of all layers named), op_types, op_names, exclude.
    evaluator: function of the masked model -> a number. base_algo: level, l1, l2, slim, fpgm, taylorfo, apoz, mean_activation; the
    last three need statistics, a function of the model that runs training batches. search_steps: candidates a temperature.
    max_sparsity: no layer gets a larger share; by itself the search may leave one filter of a layer, if the evaluator likes it.
    groups: lists of layers whose filters can only be removed together (shrink.dependency_groups): they get one share and lose
    the same filters. left: function of {layer: number of pruned filters} -> what is left of that which the target is a share
    of; None for the weights of the layers. The model is masked in place for each candidate, and restored.
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
        max_sparsity=CAP,
        seed=0,
        groups=(),
        statistics=None,
        left=None,
    ):
        kind = algorithm(base_algo)
        super().__init__(model, config_list, evaluator, optimize_mode, kind, experiment_data_dir, groups, statistics)
        if not 0 < stop_temperature < start_temperature < math.inf:
            raise ValueError(f'temperatures must fall to above 0, not from {start_temperature} to {stop_temperature}')
        if not 0 < cool_down_rate < 1:
            raise ValueError(f'cool_down_rate must lie between 0 and 1, got {cool_down_rate}')
        if not 0 < perturbation_magnitude < math.inf or search_steps < 1:
            raise ValueError('perturbation_magnitude must be above 0, and search_steps at least 1')
        if not self.target <= max_sparsity <= 1:
            raise ValueError(f'max_sparsity must lie between the target {self.target} and 1, got {max_sparsity}')
        self.temperatures = temperatures(start_temperature, stop_temperature, cool_down_rate)
        self.magnitudes = [perturbation_magnitude * t / start_temperature for t in self.temperatures]
        self.search_steps, self.seed, self.cap = search_steps, seed, min(max_sparsity, CAP)
        self.left = left or own_weights(self.base)
        self.settings = (type(self.base).__name__, optimize_mode, self.target, self.base.entries, self.units)
        self.settings += (self.temperatures, self.magnitudes, search_steps, seed, self.cap)

    # A candidate is a list of shares, one for each unit.

    def by_layer(self, values):
        shares = {name: share for unit, share in zip(self.units, values, strict=True) for name in unit}
        return {name: shares[name] for name in self.base.layers}

    def counts(self, shares):
        """{layer: share} -> {layer: number}, as the class of base_algo prunes."""
        sizes = {name: score_count(self.base, name) for name in shares}
        return {name: min(num_pruned(sizes[name], share), sizes[name] - 1) for name, share in shares.items()}

    def sparsity_of(self, counts):
        """What part of the weights is gone."""
        return 1 - self.left(counts) / self.whole

    def candidate(self, values):
        """Any numbers, one a unit -> shares that meet the budget, ordered as the sizes."""
        sizes = [max(self.base.layers[name].weight.numel() for name in unit) for unit in self.units]
        budget = self.whole * (1 - self.target + 1e-9)
        values = [value + 1e-6 * place for place, value in enumerate(values)]  # equal layers lose a filter one after the other
        return meet(arrange(values, sizes), lambda shares: self.left(self.counts(self.by_layer(shares))), budget, self.cap)

    def search(self):
        """Anneal: the best candidate's masks are then those of `base`, but not yet applied."""
        self.open_folder()
        self.importances = importance(self.base, self.statistics, self.groups)
        self.whole = self.left(dict.fromkeys(self.base.layers, 0))
        self.history = History(self.folder / 'search_history.csv', fingerprint(self.base.model, self.settings))
        self.seen, self.known = {}, {}  # counts -> score: in this search so far, and of the same one that was cut short
        number = len(self.units)
        best = current = self.candidate([self.target] * number)
        self.begin(current)
        if self.sparsity_of(self.counts(self.by_layer(current))) < self.target - 1e-9:
            reached = self.sparsity_of(self.counts(self.by_layer(current)))
            say(f'the target of {self.target} cannot be met: with all that each layer can give {reached:.4f} is pruned')
        generator = torch.Generator().manual_seed(self.seed)
        rounds = [pair for pair in zip(self.temperatures, self.magnitudes, strict=True) for _ in range(self.search_steps)]
        value = top = self.value(current, rounds[0][0])
        bar = tqdm(rounds, 'annealing', leave=False, disable=True if processes.rank() else None)
        for step, (temperature, magnitude) in enumerate(bar):
            *moves, draw = torch.rand(number + 1, generator=generator, dtype=torch.float64).tolist()
            if step:
                moves = [share + magnitude * (2 * move - 1) for share, move in zip(current, moves, strict=True)]
            proposal = self.candidate(moves)
            found = self.value(proposal, temperature)
            if is_accepted(found, value, [self.utility(score) for score in self.seen.values()], temperature, draw):
                current, value = proposal, found
            if found > top:
                best, top = proposal, found
                bar.set_postfix(best=self.sign * top)
        self.take(best)

    def begin(self, first):
        """Take over the scores of the same search, if the evaluator still says the same of its first candidate."""
        known, performance = self.history.known, self.evaluate(self.counts(self.by_layer(first)))
        same = known and math.isclose(known[0]['performance'], performance, rel_tol=1e-4, abs_tol=1e-12)
        self.history.rewrite(known if same else [])
        self.known = {self.key(self.counts(row['shares'])): row['performance'] for row in (known if same else [])}
        if not same:
            self.note(first, performance, self.temperatures[0])

    def key(self, counts):
        return tuple(counts[name] for name in self.base.layers)

    def note(self, values, performance, temperature):
        shares = self.by_layer(values)
        counts = self.counts(shares)
        self.seen[self.key(counts)] = performance
        self.history.add(self.sparsity_of(counts), performance, json.dumps(self.as_config_list(shares)), temperature)

    def value(self, values, temperature):
        """The utility of a candidate, evaluated if there was none of the same counts before."""
        counts = self.counts(self.by_layer(values))
        key = self.key(counts)
        if key in self.known:  # acceptance looks at the spread of what has been seen, so not earlier than at its turn
            self.seen[key] = self.known[key]
        elif key not in self.seen:
            self.note(values, self.evaluate(counts), temperature)
        return self.utility(self.seen[self.key(counts)])

    def evaluate(self, counts):
        with trial(self.base.model):
            self.base.set_masks(keep_counts(self.importances, counts))
            self.base.apply()
            return self.score()

    def take(self, values):
        shares = self.by_layer(values)
        counts = self.counts(shares)
        figures = {'performance': self.seen[self.key(counts)], 'sparsity': self.sparsity_of(counts)}
        self.finish(shares, keep_counts(self.importances, counts), **figures, met=figures['sparsity'] >= self.target - 1e-9)


class Method(Searching):
    @classmethod
    def add_args(cls, parser):
        super().add_args(parser)
        add_annealing_flags(parser.add_argument)

    def make_pruner(self, model):
        options = annealing_options(self.args) | {'groups': self.groups(self.job, model), 'statistics': self.statistics}
        options |= {'base_algo': self.args.base_algo, 'experiment_data_dir': self.job.folder}
        options['max_sparsity'] = largest_share(self.args, self.args.ptarget)
        return SimulatedAnnealingPruner(model, self.config_list(model), self.evaluator, **options)
