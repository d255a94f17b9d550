"""AutoCompress, NNI's AutoCompressPruner (Liu et al., "AutoCompress: An Automatic DNN Structured Pruning Framework for
Ultra-High Compression Rates", AAAI 2020, arXiv 1907.03141): in each of num_iterations rounds, simulated annealing splits the
round's sparsity among the layers, ADMM training prepares the network for it, and the pruned filters are removed: the next
round works on a smaller network.

The target P, `sparsity`, is the share of the weights of the layers that config_list names that is gone in the end, counted in
the smaller network: with a filter the weights go that read its channel. Round k of n ends with at most (1 - P)^(k/n) of them,
so each removes the same share of what is left, 1 - (1 - P)^(1/n), and roundings do not add up; the budget is met, and exceeded
by less than one filter of a layer (of each layer, where layers that end in one residual stream lose the same filter together).
With base_algo 'level' single weights become zero, cumulatively, and only channels that have died on the way are removed.

Rounds.run() is the algorithm. It uses simulated_annealing.py, admm.py and deploy.shrink as they are; their deviations are its
own. Further ones: NNI counted the weights of the pruned filters alone, so that much more than P was gone in the end; entries of
config_list other than Conv2d were ignored. After the last round the network is as pruned; fine-tuning is the user's.

experiment_data_dir has a folder for each round with the files of its search, and, until the end, autocompress_state.pt, all
rounds that have ended, from where it goes on when it is started again with the same model and arguments.
"""

import copy
import tempfile
from functools import partial
from pathlib import Path

import torch

from deploy.files import write_json
from deploy.latency import gains
from deploy.network_file import save
from deploy.shrinking import decided_together, shrink
from pruners import search
from pruners.cost import filter_layers
from pruners.processes import say
from pruners.selection import num_filters
from pruners.trials import Progress

from ._flags import positive
from ._search import Searching, add_annealing_flags, annealing_options, largest_share, refuse_to_watch_compiled
from .admm import ADAM, Splitting, add_admm_flags, check_trainer, one_of_two_names, train_in_loop, train_with, trainer_arguments
from .level import LevelPruner
from .simulated_annealing import Annealing, SimulatedAnnealingPruner


class Rounds:
    """The algorithm on a network. The subclasses train it: with people's trainers, or with the loop of the command line.

    annealing: function of a model, a config list and more -> SimulatedAnnealingPruner. rounds: their number. row,
    training_epochs: of ADMM (Splitting). example_input: one image. Raises ValueError as SimulatedAnnealingPruner does.
    """

    dependency_aware = True

    def __init__(self, model, config_list, annealing, rounds, row, training_epochs, example_input, folder):
        whole = annealing(model, config_list)
        self.kind = type(whole.base)
        self.names = list(whole.base.layers)
        self.target = whole.target
        self.evaluation = whole.evaluation
        self.weights = weights_of(whole.base)
        self.annealing = annealing
        self.rounds = rounds
        self.row = row
        self.training_epochs = training_epochs
        self.example = example_input
        self.folder = Path(folder)

    def run(self, network):
        """All rounds -> the smaller network; `network` is pruned in place."""
        for number in range(1, self.rounds + 1):
            self.prune(network, number)
            network = shrink(network, self.example)
            self.end_round(network, number)
        return network

    def prune(self, network, number):
        """Split the sparsity of round `number` among the layers, train by ADMM, and mask the network, in place."""
        groups, parts = self.groups(network)
        config_list = self.split(network, number, groups, parts)
        splitting = Splitting(self.one_shot(network, config_list, groups, parts), self.row, self.training_epochs)
        splitting.solve(partial(self.train, splitting, number))

    def split(self, network, number, groups, parts=None):
        """Anneal -> a config list with which (1 - P)^(k/n) of all weights are left after the removal."""
        budget = self.weights * (1 - self.target) ** (number / self.rounds)
        present = sum(layer.weight.numel() for layer in filter_layers(self.one_shot(network)).values())
        target = max(1 - budget / present, 0.0)
        config_list = [{'sparsity': target, 'op_names': self.names}]
        options = {'max_sparsity': self.largest_share(target), 'experiment_data_dir': self.folder / f'round{number}'}
        pruner = self.annealing(network, config_list, groups=groups, parts=parts, example_input=self.example, **options)
        pruner.search()
        say(f'round {number}: found a split with a score of {pruner.result["performance"]:.4g}')
        return search.as_config_list(pruner.base, pruner.base.sparsity)

    def one_shot(self, network, config_list=None, groups=(), parts=None):
        """The one-shot pruner of the network of a round; without a config list it prunes nothing."""
        config_list = config_list or [{'sparsity': 0.0, 'op_names': self.names}]
        return search.base_pruner(self.kind, network, config_list, groups, parts=parts)

    def rehearse(self, network):
        """A copy without one filter of each layer. Raises ValueError where the network cannot be made smaller."""
        network = copy.deepcopy(network)
        base = self.one_shot(network, None, *self.groups(network))
        keep = {name: torch.ones(num_filters(layer), dtype=torch.bool) for name, layer in base.layers.items()}
        for kept in keep.values():
            kept[0] = len(kept) == 1
        base.set_masks(keep)
        base.apply()
        return shrink(network, self.example)

    def groups(self, network):
        """The layers whose filters can only be removed together, and those that lose equally many in each part."""
        return decided_together(network, self.example) if self.dependency_aware else ([], {})

    def largest_share(self, target):
        """The largest share of any layer where that of all is `target`."""
        return 1.0

    def train(self, splitting, number):
        """Train the network of round `number` for all epochs of all turns of ADMM."""
        raise NotImplementedError

    def end_round(self, network, number):
        """`network` is the smaller one."""


def weights_of(base):
    """The weights that the layers of a pruner have, or, where it prunes single weights, that are not zero."""
    weights = [layer.weight for layer in filter_layers(base).values()]
    return sum(weight.numel() if base.FILTERS else int(torch.count_nonzero(weight)) for weight in weights)


class AutoCompressPruner(Rounds):
    """AutoCompressPruner(model, config_list, trainer, evaluator, dummy_input, num_iterations=3, optimize_mode='maximize', ...).

    Config keys sparsity (one for all entries), op_types, op_names, exclude. trainer: as in ADMMPruner. evaluator: as in
    SimulatedAnnealingPruner. dummy_input: a batch on the model's device. Other names: iterations, rho. optimizer: a function
    of parameters, as each round has a new network; None for Adam. compress() makes `model` itself smaller: its layers stay the
    same objects but have other parameters, and an optimizer of the old ones is of no use.
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
        check_trainer(trainer)
        if not torch.is_tensor(dummy_input):
            raise ValueError(f'dummy_input must be a batch that the model takes, got {type(dummy_input).__name__}')
        num_iterations = one_of_two_names('num_iterations', num_iterations, 3, 'iterations', iterations)
        row = one_of_two_names('row', row, 1e-4, 'rho', rho)
        if min(num_iterations, admm_num_iterations, admm_training_epochs) < 1 or not 0 < row < float('inf'):
            raise ValueError('numbers of iterations and epochs must be 1 or more, and row above 0')
        numbers = (start_temperature, stop_temperature, cool_down_rate, perturbation_magnitude, search_steps, seed)
        options = Annealing(*numbers)._asdict() | {'optimize_mode': optimize_mode, 'base_algo': base_algo}
        annealing = partial(SimulatedAnnealingPruner, evaluator=evaluator, statistics=self.statistics, **options)
        admm = (row, admm_training_epochs)
        super().__init__(model, config_list, annealing, num_iterations, *admm, dummy_input[:1], experiment_data_dir)
        self.model = model
        self.trainer = trainer
        self.make_optimizer = optimizer or partial(torch.optim.Adam, **ADAM)
        self.criterion = criterion
        self.admm_num_iterations = admm_num_iterations
        self.settings = (options, num_iterations, self.target, self.names, admm, admm_num_iterations)
        self.result = None

    def compress(self):
        """Run all rounds; `model` is then the smaller network, which is returned too.

        Raises ValueError, before any training, where the network cannot be made smaller.
        """
        self.rehearse(self.model)
        search.open_folder(self.folder)
        network = copy.deepcopy(self.model)
        self.progress = Progress(self.folder / 'autocompress_state.pt', search.fingerprint(network, self.settings))
        self.ended = []  # the masked networks of the rounds that have ended
        state = self.progress.read(self.example.device)
        if state is not None:
            self.ended = state['rounds']
            torch.set_rng_state(state['rng'].cpu())
        search.replace_tensors(self.model, self.run(network))
        with search.trial(self.model):
            score = self.evaluation.score(self.model)
        self.result = {'performance': score, 'sparsity': 1 - weights_of(self.one_shot(self.model)) / self.weights}
        write_json(self.result, self.folder / 'search_result.json')
        self.progress.remove()
        return self.model

    def prune(self, network, number):
        """As Rounds.prune(), unless the round has ended already: its masked network is in the file then."""
        if number <= len(self.ended):
            network.load_state_dict(self.ended[number - 1])
            return
        super().prune(network, number)
        network.zero_grad()
        self.ended.append(search.snapshot(network))
        self.progress.write(rounds=self.ended)

    def train(self, splitting, number):
        optimizer = self.make_optimizer(splitting.base.model.parameters())
        train_with(self.trainer, splitting, self.admm_num_iterations, optimizer, self.criterion)

    def statistics(self, network):
        """What criteria that watch training batches see: the trainer, for an epoch."""
        optimizer = self.make_optimizer(network.parameters())
        self.trainer(network, epoch=0, **trainer_arguments(self.trainer, optimizer, self.criterion, lambda: None))

    def export_model(self, model_path, mask_path=None, onnx_path=None, input_shape=None, device=None):
        """Save the smaller network's state_dict, and as ONNX if asked; there are no masks, so mask_path is not written."""
        if self.result is None:
            raise ValueError('call compress() before export_model()')
        if mask_path is not None:
            say('AutoCompress exports the smaller network, which has no masks: mask_path is not written')
        prunes_nothing = LevelPruner(self.model, [{'sparsity': 0.0, 'op_names': self.names}])
        prunes_nothing.export_model(model_path, None, onnx_path, input_shape, device)


class RoundsInLoop(Rounds):
    """The rounds with the shared loop: job.model is the network of the round.

    Rounds that have ended are computed again from their searches' files and their ADMM stages, to the bit.
    """

    def __init__(self, method, job):
        args = job.args
        self.job = job
        self.dependency_aware = args.dependency_aware
        options = annealing_options(args) | {'base_algo': args.base_algo, 'statistics': method.statistics}
        annealing = partial(SimulatedAnnealingPruner, evaluator=method.evaluator, **options)
        admm = (args.rho, args.admm_epochs)
        config = method.config_list(job.model)
        super().__init__(job.model, config, annealing, args.num_iterations, *admm, job.example, job.folder)

    def largest_share(self, target):
        return largest_share(self.job.args, target)

    def train(self, splitting, number):
        train_in_loop(self.job, splitting, f'admm{number}')

    def end_round(self, network, number):
        self.job.model = network
        left = weights_of(self.one_shot(network))
        accuracy = self.job.evaluate(self.job.test)
        say(f'round {number}: {left:,} weights are left in the pruned layers, accuracy {accuracy:.2f} %')


class Method(Searching):
    gives = 'a smaller network'

    def __init__(self, args):
        super().__init__(args)
        refuse_to_watch_compiled(args, 'base_algo')
        self.filters = False  # what the smaller network gives is measured here, against the whole one
        self.gains = {}

    @classmethod
    def add_args(cls, parser):
        super().add_args(parser)
        help = 'rounds of search, ADMM and removal (default: %(default)s)'
        parser.add_argument('--num-iterations', '--iterations', type=positive, default=3, metavar='N', help=help)
        add_admm_flags(parser.add_argument)
        add_annealing_flags(parser.add_argument)

    def run(self, job):
        self.job = job
        rounds = RoundsInLoop(self, job)
        with tempfile.TemporaryDirectory() as folder:  # what is done at the end is tried before training
            save(rounds.rehearse(job.model), Path(folder) / 'small', rounds.example)
        dense = copy.deepcopy(job.model)
        self.pretrain(job)
        rounds.run(job.model)
        self.fine_tune(job)
        self.gains = gains(dense, job.model, rounds.example)
        save(job.model, job.folder / 'small', rounds.example, run=str(job.folder))

    def facts(self):
        return self.gains
