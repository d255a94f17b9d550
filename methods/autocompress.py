"""AutoCompress, NNI's AutoCompressPruner (Liu et al., "AutoCompress: An Automatic DNN Structured Pruning Framework for Ultra-High
Compression Rates", AAAI 2020, arXiv 1907.03141): in each of num_iterations rounds, simulated annealing splits the round's sparsity
among the layers, ADMM training prepares the network for it, and the pruned filters are removed: the next round works on a smaller
network.

The target P, `sparsity`, is the share of the weights of the layers that config_list names that is gone in the end, counted in
the smaller network: with a filter the weights go that read its channel. Round k of n ends with at most (1 - P)^(k/n) of them, so
each removes the same share of what is left, 1 - (1 - P)^(1/n), and roundings do not add up; the budget is met, and exceeded by
less than one filter of a layer (of each layer, where layers that end in one residual stream lose the same filter together).
With base_algo 'level' single weights become zero, cumulatively, and only channels that have died on the way are removed.

It uses simulated_annealing.py, admm.py and shrink.py as they are; their deviations are its own. Further ones: NNI counted the
weights of the pruned filters alone, so that much more than P was gone in the end; entries of config_list other than Conv2d
were ignored. After the last round the network is as pruned; fine-tuning is the user's.

experiment_data_dir has a folder for each round with the files of its search, and, until the end, autocompress_state.pt, all
rounds that have ended, from where it goes on when it is started again with the same model and arguments.
"""

import copy
import json
from functools import partial

import torch
from torch import nn

from deploy.files import read_tensors, write_json, write_tensors
from deploy.latency import gains
from deploy.network_file import save
from deploy.shrinking import dependency_groups, shrink
from pruners import processes
from pruners.cost import Cost, convolutions
from pruners.processes import say
from pruners.search import CAP, base_pruner, fingerprint, keep_counts, snapshot, trial

from ._algorithms import algorithm
from ._flags import positive
from ._search import Searching, add_annealing_flags, annealing_options, largest_share
from .admm import ADAM, Penalized, Splitting, add_admm_flags, either, optimize, takes_callback
from .simulated_annealing import SimulatedAnnealingPruner


def find_shares(model, names, budget, example_input, evaluator, groups, cap=lambda target: 1.0, **options):
    """Anneal: (a config list for the layers `names` with which `budget` of their weights are left after shrinking, the result)."""
    pruner = SimulatedAnnealingPruner(model, [{'sparsity': 0.0, 'op_names': names}], evaluator, groups=groups, **options)
    base = pruner.base
    if base.FILTERS:
        cost = Cost(model, example_input[:1], 'params', [name for name, _ in pruned_weights(base)])
        pruner.left = lambda counts: cost(convolutions(base, keep_counts(pruner.importances, counts)))
    pruner.target = max(1 - budget / size(base), 0.0)
    pruner.cap = min(cap(pruner.target), CAP)
    pruner.settings += (pruner.target, pruner.cap)
    pruner.search()
    return json.loads(pruner.result['config_list']), pruner.result


def pruned_weights(base):
    """(name, weight) of the layers of a pruner, or of the convolutions whose batch norms it prunes."""
    names = convolutions(base, dict.fromkeys(base.layers))
    return [(name, base.model.get_submodule(name).weight) for name in names]


def size(base):
    return sum(weight.numel() for _, weight in pruned_weights(base))


def weights_left(base):
    """The weights that the layers of a pruner have, or, where it prunes single weights, that are not zero."""
    return size(base) if base.FILTERS else sum(int(torch.count_nonzero(weight)) for _, weight in pruned_weights(base))


class AutoCompressPruner:
    """AutoCompressPruner(model, config_list, trainer, evaluator, dummy_input, num_iterations=3, optimize_mode='maximize', ...).

    Config keys sparsity (one for all entries), op_types, op_names, exclude. trainer: as in ADMMPruner. evaluator: as in
    SimulatedAnnealingPruner. dummy_input: a batch on the model's device. Other names: iterations, rho. optimizer: a function of
    parameters, as each round has a new network; None for Adam. compress() makes `model` itself smaller: its layers are other
    objects then, and an optimizer of the old ones is of no use.
    """

    def __init__(
        self,
        model,
        config_list,
        trainer,
        evaluator,
        dummy_input,
        num_iterations=3,
        optimize_mode='maximize',
        base_algo='l1',
        start_temperature=100,
        stop_temperature=20,
        cool_down_rate=0.9,
        perturbation_magnitude=0.35,
        admm_num_iterations=30,
        admm_training_epochs=5,
        row=1e-4,
        experiment_data_dir='./',
        *,
        iterations=None,
        rho=None,
        search_steps=10,
        seed=0,
        optimizer=None,
        criterion=None,
    ):
        if not callable(trainer):
            raise ValueError(f'trainer must be a function of model, optimizer, criterion, epoch and callback, got {trainer!r}')
        if not torch.is_tensor(dummy_input):
            raise ValueError(f'dummy_input must be a batch that the model takes, got {type(dummy_input).__name__}')
        self.num_iterations = either('num_iterations', num_iterations, 3, 'iterations', iterations)
        self.row = either('row', row, 1e-4, 'rho', rho)
        if min(self.num_iterations, admm_num_iterations, admm_training_epochs) < 1 or not 0 < self.row < float('inf'):
            raise ValueError('numbers of iterations and epochs must be 1 or more, and row above 0')
        self.annealing = {'optimize_mode': optimize_mode, 'base_algo': base_algo, 'start_temperature': start_temperature}
        self.annealing |= {'stop_temperature': stop_temperature, 'cool_down_rate': cool_down_rate, 'seed': seed}
        self.annealing |= {'perturbation_magnitude': perturbation_magnitude, 'search_steps': search_steps}
        # Its checks, and the layers; the search itself is made anew for the network of each round.
        found = SimulatedAnnealingPruner(
            model, config_list, evaluator, **self.annealing, experiment_data_dir=experiment_data_dir, statistics=self.statistics
        )
        self.base, self.target, self.folder, self.evaluator = found.base, found.target, found.folder, evaluator
        self.model, self.example, self.names, self.kind = model, dummy_input, list(found.base.layers), algorithm(base_algo)
        self.open_folder, self.score, self.result = found.open_folder, found.score, None
        self.trainer, self.optimizer, self.criterion = trainer, optimizer, criterion
        self.admm = admm_num_iterations, admm_training_epochs

    def compress(self):
        """Run all rounds; `model` is then the smaller network, which is returned too."""
        self.open_folder()
        network, whole, done = copy.deepcopy(self.model), size(self.base), []
        name = fingerprint(network, self.annealing, self.target, self.num_iterations, self.names, self.row, self.admm)
        for state in self.resume(name):
            network, done = self.smaller(network, state), [*done, state]
        for number in range(len(done), self.num_iterations):
            budget = whole * (1 - self.target) ** ((number + 1) / self.num_iterations)
            self.round(network, number, budget)
            done.append(snapshot(network))
            write_tensors({'search': name, 'rounds': done, 'rng': torch.get_rng_state()}, self.folder / 'autocompress_state.pt')
            network = self.smaller(network, done[-1])
        self.model.__dict__ = network.__dict__
        self.base = base_pruner(self.kind, self.model, [{'sparsity': 0.0, 'op_names': self.names}])
        with trial(self.model):
            self.result = {'performance': self.score(), 'sparsity': 1 - weights_left(self.base) / whole}
        write_json(self.result, self.folder / 'search_result.json')
        if processes.rank() == 0:
            (self.folder / 'autocompress_state.pt').unlink(missing_ok=True)
        return self.model

    def round(self, network, number, budget):
        """Search, train with ADMM, and mask the network, in place."""
        groups = dependency_groups(network, self.example[:1], depthwise=True)
        folder = self.folder / f'round{number + 1}'
        options = {**self.annealing, 'experiment_data_dir': folder, 'statistics': self.statistics}
        config_list, _ = find_shares(network, self.names, budget, self.example, self.evaluator, groups, **options)
        splitting = Splitting(base_pruner(self.kind, network, config_list), self.row, groups)
        optimizer = None if self.optimizer is None else self.optimizer(network.parameters())
        optimize(splitting, self.trainer, *self.admm, optimizer, self.criterion)
        splitting.prune()
        network.zero_grad()

    def smaller(self, network, state):
        """The masked network of a round without what is dead."""
        network.load_state_dict(state)
        return shrink(network, self.example[:1])

    def statistics(self, network):
        """What criteria that watch training batches see: the trainer, for an epoch."""
        make = self.optimizer or (lambda parameters: torch.optim.Adam(parameters, **ADAM))
        criterion = self.criterion or nn.CrossEntropyLoss()
        further = {'callback': lambda: None} if takes_callback(self.trainer) else {}
        self.trainer(network, optimizer=make(network.parameters()), criterion=criterion, epoch=0, **further)

    def resume(self, name):
        """The masked networks of the rounds that have ended, [] if there are none of the same model and arguments."""
        path = self.folder / 'autocompress_state.pt'
        if not path.exists():
            return []
        state = read_tensors(path, self.example.device)
        if state['search'] != name:
            return []
        torch.set_rng_state(state['rng'].cpu())
        return state['rounds']

    def export_model(self, model_path, mask_path=None, onnx_path=None, input_shape=None, device=None):
        """Save the smaller network's state_dict, and as ONNX if asked; there are no masks, so mask_path is not written."""
        if self.result is None:
            raise ValueError('call compress() before export_model()')
        if mask_path is not None:
            say('AutoCompress exports the smaller network, which has no masks: mask_path is not written')
        self.base.pending = False
        self.base.export_model(model_path, None, onnx_path, input_shape, device)


# ------------------------------------------------------------------------------------------------------ the command line


class Method(Penalized, Searching):
    gives = 'a smaller network'
    figures = {}

    def __init__(self, args):
        super().__init__(args)
        self.filters = False  # what the smaller network gives is measured here, against the whole one

    def facts(self):
        return self.figures

    @classmethod
    def add_args(cls, parser):
        super().add_args(parser)
        add, help = parser.add_argument, 'rounds of search, ADMM and removal (default: %(default)s)'
        add('--num-iterations', '--iterations', type=positive, default=3, metavar='N', help=help)
        add_admm_flags(add)
        add_annealing_flags(add)

    def run(self, job):
        """Rounds that have ended are computed again from their searches' files and their ADMM stages, to the bit."""
        self.job = job
        self.announce(job.model)
        names = self.layer_names(job.model)[0]
        base = base_pruner(self.criterion(self.args), job.model, [{'sparsity': 0.0, 'op_names': names}])
        dense = copy.deepcopy(job.model)
        self.pretrain(job)
        whole, rounds = size(base), self.args.num_iterations
        for number in range(rounds):
            self.round(job, names, number + 1, whole * (1 - self.args.ptarget) ** ((number + 1) / rounds))
        self.fine_tune(job)
        self.figures = gains(dense, job.model, self.example())
        save(job.model, job.folder / 'small', self.example(), run=str(job.folder))

    def example(self):
        return next(iter(self.job.test))[0][:1]

    def round(self, job, names, number, budget):
        args, groups = self.args, self.groups(job, job.model)
        options = annealing_options(args) | {'base_algo': args.base_algo, 'statistics': self.statistics}
        options['experiment_data_dir'] = job.folder / f'round{number}'
        options['cap'] = partial(largest_share, args)
        config_list, found = find_shares(job.model, names, budget, self.example(), self.evaluator, groups, **options)
        say(f'round {number}: found a split of validation accuracy {found["performance"]:.2f} %')
        self.split(job, f'admm{number}', base_pruner(self.criterion(args), job.model, config_list), groups)
        job.model = shrink(job.model, self.example())
        left = weights_left(base_pruner(self.criterion(args), job.model, config_list))
        say(f'round {number}: {left:,} weights are left in the pruned layers, accuracy {job.evaluate(job.test):.2f} %')
