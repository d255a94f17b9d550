"""NetAdapt, NNI's NetAdaptPruner (Yang et al., "NetAdapt: Platform-Aware Neural Network Adaptation for Mobile Applications",
ECCV 2018, arXiv 1804.03230, Algorithm 1; here NetAdaptPruner.search()): in each iteration every layer in turn is pruned alone
until the network's cost has fallen by a fixed step, fine-tuned for a short time and evaluated; the next iteration starts from
the best of these networks.

The cost is that of the network as it would be without its dead channels (pruners/cost.py): the weights of all its convolutions
and linear layers, also of those that config_list does not name (cost='params'), or the multiply-accumulates of one example
(cost='macs'). The target `sparsity` is the share of this cost that goes; each iteration takes sparsity_per_iteration of it, the
last one what is missing. Layers that end in one residual stream are pruned together, as their filters can only be removed
together. With base_algo 'level' the cost is that of the weights that are not zero. With a budget of milliseconds it is the
time on this machine, by a table of measured layers (pruners/milliseconds.py).

A layer gives a step with the fewest filters whose removal saves as much. When no layer can give the step, it is halved until
one can; when none can give anything, each having one filter left, the search ends with what it has, and says so. Each
iteration lowers a cost that is a whole number, so it always ends. Among equal scores the layer that has lost the least goes on.

Deviations. From the paper: without a budget the cost is counted, not measured; there is no final long fine-tuning, which is the
user's; the step does not shrink from iteration to iteration. From NNI: it took the next layer in the order of the modules for
the one that reads this one, added up nominal steps instead of counting, and did not end when no layer could give a step.

The graph needs an example input: example_input, or else the first one that the evaluator sends through the model, or else
zeros of usual sizes. Where the model cannot be traced, only the weights of the pruned filters themselves are counted.

experiment_data_dir holds search_history.csv, a line for each candidate, search_result.json, and search_state.pt, everything
after the last iteration that has ended. Started again with the same model and arguments, the search goes on from there; the
random numbers that the fine-tuner takes from torch's generator on the CPU are then those of a search without interruption.
"""

import json
import math
from typing import NamedTuple

import torch
from tqdm import tqdm

from deploy.shrinking import decided_together
from pruners import processes, search
from pruners.cost import COSTS, OwnCost, ShrunkCost, first_inputs, own_cost, usual_example
from pruners.milliseconds import Budget, MillisecondsCost
from pruners.processes import say
from pruners.selection import pruned_first
from pruners.trials import History, Progress, same_score

from ._algorithms import algorithm
from ._flags import fraction, nonnegative, positive
from ._search import Searching, add_budget_flags, budget_of, train


class Proposal(NamedTuple):
    """The network in which one unit of layers was pruned further, after its fine-tuning."""

    unit: list  # layer names
    counts: dict  # {layer: number pruned}
    keep: dict  # {layer: bool tensor}
    score: float
    weights: dict  # its state dict


class NetAdaptPruner(search.Search):
    """NetAdaptPruner(model, config_list, short_term_fine_tuner, evaluator, optimize_mode='maximize', base_algo='l1', ...).

    Config keys sparsity (one for all entries: the share of the network's cost), op_types, op_names, exclude.
    short_term_fine_tuner: function of the masked model that trains it a little, or None. evaluator: function of the model -> a
    number. base_algo: level, l1, l2, slim, fpgm, taylorfo, apoz, mean_activation; the last three watch what
    short_term_fine_tuner does. cost: 'params' or 'macs'. example_input: a batch for the channel graph. dependency_aware=False:
    each layer alone, although the filters of a residual stream then save nothing until all of its layers have lost them.
    budget: pruners.milliseconds.Budget(milliseconds, batch, threads), which replaces `sparsity` and `cost`. The model ends
    with the weights of the best candidate of the last iteration, masked.
    """

    COLUMNS = ('sparsity', 'performance', 'config_list', 'iteration', 'layer')  # of search_history.csv
    STATE = ('dense', 'counts', 'rows', 'left', 'iteration', 'performance', 'importances')  # after an iteration

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
        budget: Budget | None = None,
    ):
        if short_term_fine_tuner is not None and not callable(short_term_fine_tuner):
            raise ValueError(f'short_term_fine_tuner must be a function of the model, got {short_term_fine_tuner!r}')
        kind = algorithm(base_algo)
        super().__init__(model, config_list, evaluator, optimize_mode, kind, experiment_data_dir, short_term_fine_tuner)
        if not 0 < sparsity_per_iteration < 1:
            raise ValueError(f'sparsity_per_iteration must lie between 0 and 1, got {sparsity_per_iteration}')
        if cost not in COSTS:
            raise ValueError(f'cost must be one of {", ".join(COSTS)}, got {cost!r}')
        if budget is not None:
            budget.check(self.base, example_input)
        self.budget = budget
        self.fine_tune = short_term_fine_tuner
        self.step = sparsity_per_iteration
        self.kind = cost
        self.example = example_input
        self.dependency_aware = dependency_aware
        self.settings = (type(self.base).__name__, optimize_mode, self.base.entries, self.step, cost, dependency_aware, budget)
        self.history = History(self.folder / 'search_history.csv', *self.COLUMNS)

    def search(self):
        """Algorithm 1 of the paper: the best network's weights are then those of the model, its masks those of `base`."""
        self.start()
        disable = True if processes.rank() else None
        with tqdm(total=self.whole - self.goal, desc='netadapt', leave=False, disable=disable, unit_scale=True) as bar:
            while self.left > self.goal:
                bar.update(min(self.whole - self.left, bar.total) - bar.n)
                choices = self.choose_filters()
                if not choices:
                    break
                proposals = (self.prune_and_fine_tune(unit, counts) for unit, counts in choices)
                self.accept(max(proposals, key=self.rank_of))
                bar.set_postfix(performance=self.performance)
        sparsity = 1 - self.left / self.whole
        if self.left > self.goal:
            target = f'{self.target}' if self.budget is None else f'{self.budget.milliseconds} ms'
            say(f'the target of {target} cannot be met: no layer can give more after {sparsity:.4f} of the cost')
        figures = {'performance': self.performance, 'sparsity': sparsity, 'met': self.left <= self.goal}
        keep = search.keep_counts(self.importances, self.counts)
        if self.budget is not None:
            figures |= self.cost.report(keep)
        self.finish(self.shares(self.counts), keep, figures)

    def choose_filters(self):
        """[(unit, counts)] of each unit that can give the step, or, halved as often as it takes, a part of it."""
        step = self.whole * self.step
        least = 0.5 if self.budget is None else self.whole / 1000  # a clock tells no less
        while step >= least:
            wanted = max(self.left - step, self.goal)
            found = [(unit, self.fewest_filters(unit, wanted)) for unit in search.units(self.base)]
            found = [(unit, counts) for unit, counts in found if counts is not None]
            if found:
                return found
            step /= 2
        return []

    def fewest_filters(self, unit, wanted):
        """The counts with the fewest further filters of one unit so that the cost is at most `wanted`, or None."""
        low = self.counts[unit[0]]
        high = self.numbers[unit[0]] - 1
        if high <= low or self.cost_of(self.with_count(unit, high)) > wanted:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            if self.cost_of(self.with_count(unit, middle)) <= wanted:
                high = middle
            else:
                low = middle
        return self.with_count(unit, high)

    def with_count(self, unit, count):
        return self.counts | dict.fromkeys(unit, count)

    def cost_of(self, counts):
        return self.cost(counts, self.importances)

    def prune_and_fine_tune(self, unit, counts):
        """Prune one unit, train for a short time and score -> Proposal; the model is then as it was."""
        before = self.base.keep
        keep = search.keep_counts(self.importances, counts)
        with search.trial(self.base.model):
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
            score = self.evaluation.score(self.base.model)
            weights = search.snapshot(self.base.model)
        self.base.set_masks(before)
        config_list = json.dumps(search.as_config_list(self.base, self.shares(counts)))
        self.rows.append([1 - self.cost_of(counts) / self.whole, score, config_list, self.iteration, unit[0]])
        return Proposal(unit, counts, keep, score, weights)

    def rank_of(self, proposal):
        """Better scores are larger; among equal ones the layer that has lost the least share."""
        return self.evaluation.utility(proposal.score), -self.shares(proposal.counts)[proposal.unit[0]]

    def shares(self, counts):
        """{layer: number pruned} -> {layer: share}"""
        return {name: count / self.numbers[name] for name, count in counts.items()}

    def accept(self, proposal):
        """Go on with the network of a proposal."""
        self.base.model.load_state_dict(proposal.weights)
        self.base.set_masks(proposal.keep)
        self.counts = proposal.counts
        self.left = self.cost_of(proposal.counts)
        self.performance = proposal.score
        self.iteration += 1
        self.importances = self.rank_filters()
        self.save()

    def rank_filters(self):
        """{layer: scores} of all filters, by the present weights; those that are pruned come first."""
        return pruned_first(search.importance(self.base, self.statistics), self.base.keep)

    def start(self):
        """Score the network as it comes, or go on after the last iteration of this search that has ended."""
        search.open_folder(self.folder)
        self.progress = Progress(self.folder / 'search_state.pt', search.fingerprint(self.base.model, self.settings))
        self.numbers = search.sizes(self.base)
        self.counts = dict.fromkeys(self.base.layers, 0)
        self.rows = []  # of the history
        self.iteration = 0
        self.dense = self.first_score()
        self.performance = self.dense
        example = usual_example(self.base.model) if self.example is None else self.example
        self.cost = self.choose_cost(example)
        if self.dependency_aware and not isinstance(self.cost, OwnCost):
            self.base.decide_together(*decided_together(self.base.model, example))
        self.importances = self.rank_filters()
        self.whole = self.cost_of(self.counts)
        self.left = self.whole
        self.goal = math.floor(self.whole * (1 - self.target) + 1e-6) if self.budget is None else self.budget.nanoseconds
        self.resume()

    def first_score(self):
        """The score of the network as it comes; the first input that it meets on the way may be the example."""
        with first_inputs(self.base.model) as found, search.trial(self.base.model):
            score = self.evaluation.score(self.base.model)
        if self.example is None and found:
            self.example = found[0]
        return score

    def choose_cost(self, example):
        """The cost as a function of counts and scores, of the network without its dead channels where its graph is known."""
        if self.budget is not None:
            return MillisecondsCost(self.base, example, self.folder / 'latency.csv', self.budget)
        if self.base.FILTERS and example is not None:
            try:
                return ShrunkCost(self.base, example, self.kind)
            except ValueError as error:
                say(f'{error}; only the weights of the pruned filters themselves are counted')
        if self.base.FILTERS and example is None:
            say('no example input is known, so only the weights of the pruned filters themselves are counted')
        return own_cost(self.base, example, self.kind)

    def save(self):
        """Write the history, and all that the next iteration needs."""
        state = {name: getattr(self, name) for name in self.STATE}
        self.progress.write(**state, weights=search.snapshot(self.base.model), keep=self.base.keep)
        self.history.write(self.rows)

    def resume(self):
        """Go on from search_state.pt, if it is of this search and the evaluator says the same of the model as it came."""
        state = self.progress.read(next(self.base.model.parameters()).device)
        if state is None or not same_score(state['dense'], self.dense):
            return
        for name in self.STATE:
            setattr(self, name, state[name])
        self.base.model.load_state_dict(state['weights'])
        self.base.set_masks(state['keep'])
        torch.set_rng_state(state['rng'].cpu())


class Method(Searching):
    @classmethod
    def add_args(cls, parser):
        super().add_args(parser)
        add = parser.add_argument
        shown = ' (default: %(default)s)'
        add('--sparsity-per-iteration', type=fraction, default=0.05, metavar='SHARE', help='of the cost, a step' + shown)
        add('--cost', choices=COSTS, default='params', help='what --ptarget is a share of' + shown)
        add_budget_flags(add)
        add('--short-term-steps', type=positive, default=100, metavar='N', help='training steps of each candidate' + shown)
        add('--short-term-lr', type=nonnegative, default=0.01, metavar='LR', help='their learning rate' + shown)

    def make_pruner(self, model):
        return NetAdaptPruner(
            model,
            self.config_list(model),
            self.train_a_little,
            self.evaluator,
            base_algo=self.args.base_algo,
            sparsity_per_iteration=self.args.sparsity_per_iteration,
            experiment_data_dir=self.job.folder,
            cost=self.args.cost,
            example_input=self.job.example,
            dependency_aware=self.args.dependency_aware,
            budget=budget_of(self.args),
        )

    def train_a_little(self, model):
        """Some steps of SGD; all candidates of an iteration see the same images."""
        self.job.train.set_epoch(self.pruner.iteration)
        optimizer = torch.optim.SGD(self.param_groups(model, self.args), self.args.short_term_lr, momentum=self.args.momentum)
        train(model, self.job.train, self.args.short_term_steps, optimizer)
