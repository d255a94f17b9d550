"""NetAdapt, NNI's NetAdaptPruner (Yang et al., "NetAdapt: Platform-Aware Neural Network Adaptation for Mobile Applications",
ECCV 2018, arXiv 1804.03230, Algorithm 1): in each iteration every layer in turn is pruned alone until the network's cost has
fallen by a fixed step, fine-tuned for a short time and evaluated; the best of these networks is where the next iteration starts.

The cost is that of the network as it would be without its dead channels, found through its channel graph (channels.py,
shrink.py): the weights of all its convolutions and linear layers, also of those that config_list does not name (cost='params'),
or the multiply-accumulates of one example (cost='macs'). The target `sparsity` is the share of this cost that goes; each iteration
takes sparsity_per_iteration of it, the last one what is missing. Layers that end in one residual stream are pruned together, as
their filters can only be removed together. With base_algo 'level' the cost is that of the weights that are not zero.

A layer gives a step with the fewest filters whose removal saves as much. When no layer can give the step, it is halved until one
can; when none can give anything, each having one filter left, the search ends with what it has, and says so. Each iteration
lowers a cost that is a whole number, so it always ends. Among equal scores the layer that has lost the least share goes on.

Deviations. From the paper: the cost is counted, not measured on a device; there is no final long fine-tuning, which is the
user's; the step does not shrink from iteration to iteration. From NNI: it took the next layer in the order of the modules for
the one that reads this one, added up nominal steps instead of counting, and did not end when no layer could give a step.

The graph needs an example input: example_input, or else the first one that the evaluator sends through the model, or else
zeros of usual sizes. Where the model cannot be traced, only the weights of the pruned filters themselves are counted.

experiment_data_dir holds search_history.csv, a line for each candidate, search_result.json, and search_state.pt, everything after
the last iteration that has ended, from where the search goes on when it is started again with the same model and arguments.
The random numbers that the fine-tuner takes from torch's generator on the CPU are then those of a search without interruption.
"""

import csv
import io
import json
import math

import torch
from tqdm import tqdm

from deploy.files import read_tensors, write_tensors
from deploy.shrinking import dependency_groups
from pruners import processes
from pruners.cost import COSTS, Cost, convolutions, usual_example
from pruners.processes import say
from pruners.search import Search, fingerprint, importance, keep_counts, snapshot, trial
from sparse_utils import count_macs, prunable_layers

from ._algorithms import algorithm
from ._flags import fraction, nonnegative, positive
from ._search import Searching, train


class NetAdaptPruner(Search):
    """NetAdaptPruner(model, config_list, short_term_fine_tuner, evaluator, optimize_mode='maximize', base_algo='l1', ...).

    Config keys sparsity (one for all entries: the share of the network's cost), op_types, op_names, exclude.
    short_term_fine_tuner: function of the masked model that trains it a little, or None. evaluator: function of the model -> a
    number. base_algo: level, l1, l2, slim, fpgm, taylorfo, apoz, mean_activation; the last three watch what short_term_fine_tuner
    does. cost: 'params' or 'macs'. example_input: a batch for the channel graph. dependency_aware=False: each layer alone, although
    the filters of a residual stream then save nothing until all of its layers have lost them. The model ends with the weights of the best
    candidate of the last iteration, masked.
    """

    def __init__(
        self,
        model,
        config_list,
        short_term_fine_tuner,
        evaluator,
        optimize_mode='maximize',
        base_algo='l1',
        sparsity_per_iteration=0.05,
        experiment_data_dir='./',
        *,
        cost='params',
        example_input=None,
        dependency_aware=True,
    ):
        if short_term_fine_tuner is not None and not callable(short_term_fine_tuner):
            raise ValueError(f'short_term_fine_tuner must be a function of the model, got {short_term_fine_tuner!r}')
        kind = algorithm(base_algo)
        super().__init__(model, config_list, evaluator, optimize_mode, kind, experiment_data_dir, (), short_term_fine_tuner)
        if not 0 < sparsity_per_iteration < 1:
            raise ValueError(f'sparsity_per_iteration must lie between 0 and 1, got {sparsity_per_iteration}')
        if cost not in COSTS:
            raise ValueError(f'cost must be one of {", ".join(COSTS)}, got {cost!r}')
        self.fine_tune, self.step, self.kind, self.example = short_term_fine_tuner, sparsity_per_iteration, cost, example_input
        self.together, self.settings = dependency_aware, (type(self.base).__name__, optimize_mode, self.target)
        self.settings += (self.base.entries, sparsity_per_iteration, cost, dependency_aware)

    # The cost.

    def measure_with(self, example):
        """Set self.cost, a function of counts given self.importances, and the layers that are pruned together."""
        self.cost = self.own_cost
        self.fixed, self.uses = 0, dict.fromkeys(self.base.layers, 1)
        everything = {name: layer.weight.numel() for name, layer in prunable_layers(self.base.model).items()}
        if example is not None:
            macs = count_macs(self.base.model, example)
            if self.kind == 'macs':
                self.uses = {name: macs.get(name, (0, 0))[0] / everything.get(name, math.inf) for name in self.base.layers}
                everything = {name: dense for name, (dense, _) in macs.items()}
            if self.base.FILTERS:
                try:
                    self.graph_cost = Cost(self.base.model, example, self.kind)
                    self.set_groups(dependency_groups(self.base.model, example, depthwise=True) if self.together else [])
                    self.cost = self.real_cost
                except ValueError as error:
                    say(f'{error}; only the weights of the pruned filters themselves are counted')
        elif self.kind == 'macs':
            raise ValueError('MACs are counted for an example input: give example_input')
        elif self.base.FILTERS:
            say('no example input is known, so only the weights of the pruned filters themselves are counted')
        self.fixed = sum(number for name, number in everything.items() if name not in self.base.layers)

    def real_cost(self, counts):
        return self.graph_cost(convolutions(self.base, keep_counts(self.importances, counts, self.base.keep)))

    def own_cost(self, counts):
        """Of what the layers keep, without what follows from it elsewhere."""
        kept = 0
        for name, layer in self.base.layers.items():
            per = layer.weight[0].numel() if self.base.FILTERS else 1
            kept += (layer.weight.numel() - counts[name] * per) * self.uses[name]
        return self.fixed + round(kept)

    # The search.

    def search(self):
        """Run all iterations: the best network's weights are then those of the model, its masks those of `base`."""
        self.open_folder()
        self.name = fingerprint(self.base.model, self.settings)
        self.counts, self.rows, self.iteration = dict.fromkeys(self.base.layers, 0), [], 0
        self.performance = self.dense = self.first_score()
        self.measure_with(usual_example(self.base.model) if self.example is None else self.example)
        self.rank()
        self.whole = self.left = self.cost(self.counts)
        self.goal = math.floor(self.whole * (1 - self.target) + 1e-6)
        self.resume()
        disable = True if processes.rank() else None
        with tqdm(total=self.whole - self.goal, desc='netadapt', leave=False, disable=disable, unit_scale=True) as bar:
            bar.update(self.whole - self.left)
            while self.left > self.goal and (options := self.options()):
                self.iterate(options)
                bar.update(min(self.whole - self.left, bar.total) - bar.n)
                bar.set_postfix(performance=self.performance)
        if self.left > self.goal:
            reached = 1 - self.left / self.whole
            say(f'the target of {self.target} cannot be met: no layer can give more after {reached:.4f} of the cost')
        shares, keep = self.shares(self.counts), self.base.keep
        keep = keep_counts(self.importances, self.counts) if keep is None else keep
        figures = {'performance': self.performance, 'sparsity': 1 - self.left / self.whole}
        self.finish(shares, keep, **figures, met=self.left <= self.goal)

    def first_score(self):
        """The score of the model as it comes; what it meets on the way may be the example input."""
        seen = []

        def watch(model, args):
            if not seen and args and torch.is_tensor(args[0]):
                seen.append(args[0][:1].detach().clone())

        handle = self.base.model.register_forward_pre_hook(watch)
        try:
            with trial(self.base.model):
                score = self.score()
        finally:
            handle.remove()
        self.example = seen[0] if self.example is None and seen else self.example
        return score

    def rank(self):
        """Score all filters, by the present weights."""
        self.importances = importance(self.base, self.statistics, self.groups)

    def options(self):
        """{number of a unit: counts}, for each unit that can give the step, or, halved as often as it takes, a part of it."""
        step = self.whole * self.step
        while step >= 0.5:
            wanted = max(self.left - step, self.goal)
            found = {unit: self.fewest(unit, wanted) for unit in range(len(self.units))}
            if found := {unit: counts for unit, counts in found.items() if counts is not None}:
                return found
            step /= 2
        return {}

    def fewest(self, unit, wanted):
        """The counts with the fewest further filters of one unit so that the cost is at most `wanted`, or None."""
        name = self.units[unit][0]
        low, high = self.counts[name], len(self.importances[name].reshape(-1)) - 1
        if high <= low or self.cost(self.with_count(unit, high)) > wanted:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.cost(self.with_count(unit, middle)) <= wanted else (middle, high)
        return self.with_count(unit, high)

    def with_count(self, unit, count):
        return self.counts | dict.fromkeys(self.units[unit], count)

    def iterate(self, options):
        """Try each option, go on with the best one's weights and masks."""
        best, before = None, self.base.keep
        for unit, counts in options.items():
            keep = keep_counts(self.importances, counts, before)
            with trial(self.base.model):
                score = self.attempt(keep)
                name = self.units[unit][0]
                order = (self.utility(score), -self.shares(counts)[name])
                if best is None or order > best[0]:
                    best = order, counts, keep, score, snapshot(self.base.model)
            self.base.set_masks(before)
            left = self.cost(counts)
            config_list = json.dumps(self.as_config_list(self.shares(counts)))
            self.rows.append([1 - left / self.whole, score, config_list, self.iteration, name])
        _, self.counts, keep, self.performance, weights = best
        self.left = self.cost(self.counts)
        self.base.model.load_state_dict(weights)
        self.base.set_masks(keep)
        self.iteration += 1
        self.rank()
        self.save()

    def attempt(self, keep):
        """Mask, fine-tune and score the model."""
        self.base.set_masks(keep)
        self.base.apply()
        if self.fine_tune is not None:
            self.base.hook()
            try:
                self.fine_tune(self.base.model)
            finally:
                self.base.unhook()
            self.base.apply()
            self.base.model.zero_grad()
        return self.score()

    # Files.

    def save(self):
        state = {'search': self.name, 'dense': self.dense, 'counts': self.counts, 'rows': self.rows, 'left': self.left}
        state |= {'iteration': self.iteration, 'performance': self.performance, 'weights': snapshot(self.base.model)}
        state |= {'keep': self.base.keep, 'rng': torch.get_rng_state(), 'importances': self.importances}
        write_tensors(state, self.folder / 'search_state.pt')
        lines = io.StringIO()
        csv.writer(lines).writerows([('sparsity', 'performance', 'config_list', 'iteration', 'layer'), *self.rows])
        if processes.rank() == 0:
            (self.folder / 'search_history.csv').write_text(lines.getvalue())

    def resume(self):
        """Take over search_state.pt, if it is of this search and the evaluator says the same of the model as it came."""
        path = self.folder / 'search_state.pt'
        if not path.exists():
            return
        state = read_tensors(path, next(self.base.model.parameters()).device)
        same = math.isclose(state['dense'], self.dense, rel_tol=1e-4, abs_tol=1e-12)
        if state['search'] != self.name or not (same or math.isnan(state['dense']) and math.isnan(self.dense)):
            return
        self.base.model.load_state_dict(state['weights'])
        self.base.set_masks(state['keep'])
        self.counts, self.rows, self.left = state['counts'], state['rows'], state['left']
        self.iteration, self.performance = state['iteration'], state['performance']
        self.importances = state['importances']
        torch.set_rng_state(state['rng'].cpu())


class Method(Searching):
    @classmethod
    def add_args(cls, parser):
        super().add_args(parser)
        add, shown = parser.add_argument, ' (default: %(default)s)'
        add('--sparsity-per-iteration', type=fraction, default=0.05, metavar='SHARE', help='of the cost, a step' + shown)
        add('--cost', choices=COSTS, default='params', help='what --ptarget is a share of' + shown)
        add('--short-term-steps', type=positive, default=100, metavar='N', help='training steps of each candidate' + shown)
        add('--short-term-lr', type=nonnegative, default=0.01, metavar='LR', help='their learning rate' + shown)

    def make_pruner(self, model):
        options = {'base_algo': self.args.base_algo, 'sparsity_per_iteration': self.args.sparsity_per_iteration}
        options |= {'experiment_data_dir': self.job.folder, 'cost': self.args.cost}
        options |= {'example_input': next(iter(self.job.test))[0][:1], 'dependency_aware': self.args.dependency_aware}
        return NetAdaptPruner(model, self.config_list(model), self.train_a_little, self.evaluator, **options)

    def train_a_little(self, model):
        """Some steps of SGD; all candidates of an iteration see the same images."""
        self.job.train.set_epoch(self.pruner.iteration)
        optimizer = torch.optim.SGD(self.param_groups(model, self.args), self.args.short_term_lr, momentum=self.args.momentum)
        train(model, self.job.train, self.args.short_term_steps, optimizer)
