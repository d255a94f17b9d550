"""ADMM, NNI's ADMMPruner (Zhang et al., "A Systematic DNN Weight Pruning Framework using Alternating Direction Method of
Multipliers", ECCV 2018, arXiv 1804.03294, section 4): min f(W) subject to W = Z, Z sparse, by turns of

W  training of the loss + row / 2 ||W - Z + U||^2: in each step, before the optimizer's, W -= row (W - Z + U)    (subproblem 1)
Z  the projection of W + U: the criterion of base_algo keeps its share of the weights or filters of each layer   (subproblem 2)
U  U + W - Z

for num_iterations turns of training_epochs epochs, from Z = W, U = 0. Then base_algo prunes the network once, which by then
loses little, as W is near to Z: distances holds ||W - Z|| over all layers, one figure a turn. Fine-tuning is the user's.

Each criterion projects as it judges: level keeps the largest weights of W + U, l1, l2 and fpgm its filters with the largest
scores (NNI took the L1 norm for l2 too). Criteria that watch training batches judge by those of the turn. Z is a copy of W; in
NNI it was the weight itself, so that there was no penalty in the first turn. As in NNI the penalty is not scaled by the
learning rate; the paper has it in the loss. The optimizer is Adam, 1e-3 with a decay of 5e-5, as NNI's.

Splitting.solve() is the algorithm. W is trained by people's trainers, train_with(), or on the command line by a stage of the
shared loop, train_in_loop(), between pretraining and fine-tuning.
"""

import inspect

import torch
from torch import nn
from tqdm import tqdm

from pruners import processes
from pruners.compressor import StatisticsPruner
from pruners.processes import say
from pruners.search import AroundPruner, base_pruner, watched_importance
from pruners.selection import expand_mask, join_groups

from . import Method as Base
from ._algorithms import algorithm
from ._flags import nonnegative, positive
from ._one_shot import OneShot, add_dependency_flag
from ._search import add_base_flag, refuse_to_watch_compiled

ADAM = {'lr': 1e-3, 'weight_decay': 5e-5}


def penalized(weight, z, u, row):
    """Subproblem 1, the penalty's part of a step, for one layer. Splitting.penalize() makes the same of all layers at once."""
    return weight - row * (weight - z + u)


class Splitting:
    """W, Z and U for the layers of a one-shot pruner, `base`, whose criterion and shares say what Z may be.

    Whoever trains W calls penalize() in each step and end_epoch() after each epoch. distances: ||W - Z|| after each turn.
    """

    def __init__(self, base, row=1e-4, training_epochs=1):
        self.base = base
        self.row = row
        self.training_epochs = training_epochs
        self.W = {name: layer.weight for name, layer in base.layers.items()}
        self.Z = {name: weight.detach().clone() for name, weight in self.W.items()}
        self.U = {name: torch.zeros_like(weight) for name, weight in self.Z.items()}
        self.distances = []
        self.penalties = 0  # calls of penalize()
        self.watches = isinstance(base, StatisticsPruner)

    def solve(self, train):
        """All turns; then the criterion prunes W. train: function that trains W for all epochs of all turns."""
        self.watch()
        train()
        keep = self.project(self.W)
        if self.watches:
            self.base.unwatch()
        self.base.set_masks(keep)
        self.base.apply()

    @torch.no_grad()
    def penalize(self, *_):
        """W -= row (W - Z + U), between backward() and the optimizer's step."""
        W = list(self.W.values())
        difference = torch._foreach_sub(W, list(self.Z.values()))
        torch._foreach_add_(difference, list(self.U.values()))
        torch._foreach_add_(W, difference, alpha=-self.row)
        self.penalties += 1

    def end_epoch(self, epoch):
        """Count an epoch (from 0) of subproblem 1: every training_epochs of them end a turn."""
        if (epoch + 1) % self.training_epochs == 0:
            self.update()

    @torch.no_grad()
    def update(self):
        """Subproblem 2, Z = the projection of W + U; then U += W - Z."""
        sums = {name: weight + self.U[name] for name, weight in self.W.items()}
        keep = self.project(sums)
        squares = 0.0
        for name, weight in self.W.items():
            self.Z[name] = sums[name] * expand_mask(keep[name], self.base.layers[name])
            self.U[name] += weight - self.Z[name]
            squares += (weight - self.Z[name]).double().square().sum().item()
        self.distances.append(squares**0.5)
        self.watch()

    @torch.no_grad()
    def project(self, tensors):
        """{layer: weights} -> {layer: bool tensor} of what the criterion keeps of them."""
        if self.watches:
            scores = watched_importance(self.base)
        else:
            scores = self.base.scores({name: tensor.detach() for name, tensor in tensors.items()})
        return join_groups(self.base.choose(self.base.joined(scores)), self.base.groups)

    def watch(self):
        """Let a criterion that judges by training batches see those of the turn that begins."""
        if self.watches:
            self.base.watch()

    def state_dict(self):
        state = {'Z': self.Z, 'U': self.U, 'distances': self.distances}
        if self.watches:
            state |= self.base.watched()
        return state

    def load_state_dict(self, state):
        self.Z = {name: state['Z'][name].to(tensor) for name, tensor in self.Z.items()}
        self.U = {name: state['U'][name].to(tensor) for name, tensor in self.U.items()}
        self.distances = list(state['distances'])
        if self.watches:
            self.base.load_watched(state)


def train_with(trainer, splitting, num_iterations, optimizer, criterion=None):
    """All epochs of all turns, with a trainer(model, optimizer=, criterion=, epoch=, callback=).

    A trainer without `callback` is helped by a hook on the optimizer. Raises ValueError for one that takes it, trains, and does
    not call it.
    """
    arguments = trainer_arguments(trainer, optimizer, criterion, splitting.penalize)
    steps = []
    handles = [optimizer.register_step_post_hook(lambda *_: steps.append(1))]
    if 'callback' not in arguments:
        handles.append(optimizer.register_step_pre_hook(splitting.penalize))
    epochs = range(num_iterations * splitting.training_epochs)
    try:
        for epoch in tqdm(epochs, 'ADMM', leave=False, disable=True if processes.rank() else None):
            trainer(splitting.base.model, epoch=epoch % splitting.training_epochs, **arguments)
            if steps and splitting.penalties == 0:
                raise ValueError('the trainer does not call callback() between loss.backward() and optimizer.step()')
            splitting.end_epoch(epoch)
    finally:
        for handle in handles:
            handle.remove()


def trainer_arguments(trainer, optimizer, criterion, callback):
    """What a trainer is called with, beside the model and the epoch: the callback only if it takes one."""
    arguments = {'optimizer': optimizer, 'criterion': criterion or nn.CrossEntropyLoss()}
    return arguments | {'callback': callback} if takes_callback(trainer) else arguments


def takes_callback(trainer):
    try:
        parameters = inspect.signature(trainer).parameters.values()
    except (TypeError, ValueError):  # something of C, which does not tell
        return True
    return any(parameter.name == 'callback' or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def check_trainer(trainer):
    if not callable(trainer):
        raise ValueError(f'trainer must be a function of model, optimizer, criterion, epoch and callback, got {trainer!r}')


def one_of_two_names(name, value, default, other, given):
    """The value of an argument that has a second name. Raises ValueError where both are given and differ."""
    if given is None:
        return value
    if value not in (default, given):
        raise ValueError(f'{name} and {other} are two names for one argument, but {value} and {given} were given')
    return given


class ADMMPruner(AroundPruner):
    """ADMMPruner(model, config_list, trainer, num_iterations=30, training_epochs=5, row=1e-4, base_algo='l1').

    Config keys sparsity (may differ from layer to layer), op_types, op_names, exclude, as the class of base_algo takes them.
    trainer: function of model, optimizer, criterion, epoch, callback, called with these names; it trains one epoch and calls
    callback() between backward() and step(). base_algo: level, l1, l2, slim, fpgm, taylorfo, apoz, mean_activation. Other
    names: iterations, epochs or epochs_per_iteration, rho. optimizer, criterion: instead of Adam and the cross-entropy.
    groups: lists of layers whose filters can only be removed together. distances: ||W - Z|| after each iteration. Everything
    else, as masks, export_model() or bind(), is that of the class of base_algo, `base`.
    """

    def __init__(
        self,
        model,
        config_list,
        trainer,
        num_iterations=30,
        training_epochs=5,
        row=1e-4,
        base_algo='l1',
        *,
        iterations=None,
        epochs=None,
        epochs_per_iteration=None,
        rho=None,
        optimizer=None,
        criterion=None,
        groups=(),
        parts=None,
    ):
        check_trainer(trainer)
        self.num_iterations = one_of_two_names('num_iterations', num_iterations, 30, 'iterations', iterations)
        training_epochs = one_of_two_names('training_epochs', training_epochs, 5, 'epochs', epochs)
        self.training_epochs = one_of_two_names(
            'training_epochs', training_epochs, 5, 'epochs_per_iteration', epochs_per_iteration
        )
        self.row = one_of_two_names('row', row, 1e-4, 'rho', rho)
        if self.num_iterations < 1 or self.training_epochs < 1 or not 0 < self.row < float('inf'):
            raise ValueError('num_iterations and training_epochs must be 1 or more, and row above 0')
        self.base = base_pruner(algorithm(base_algo), model, config_list, groups, by_layer=False, parts=parts)
        self.trainer = trainer
        self.given_optimizer = optimizer
        self.criterion = criterion
        self.distances = []

    def compress(self):
        """Run all iterations on the model, prune it, and let the masks hold; returns the model."""
        optimizer = self.given_optimizer or torch.optim.Adam(self.base.model.parameters(), **ADAM)
        splitting = Splitting(self.base, self.row, self.training_epochs)
        self.distances = splitting.distances
        splitting.solve(lambda: train_with(self.trainer, splitting, self.num_iterations, optimizer, self.criterion))
        self.base.hook()
        return self.base.model


class Turns(Base):
    """A stage of the shared loop in which W is drawn to Z."""

    def __init__(self, args, splitting):
        super().__init__(args)
        self.splitting = splitting

    def after_backward(self, step, batch):
        self.splitting.penalize()

    def after_epoch(self, epoch):
        self.splitting.end_epoch(epoch)

    def metrics(self):
        return {'distance': self.splitting.distances[-1]} if self.splitting.distances else {}

    def state_dict(self):
        return self.splitting.state_dict()

    def load_state_dict(self, state):
        self.splitting.load_state_dict(state)


def train_in_loop(job, splitting, stage):
    """All epochs of all turns as one stage of job.fit()."""
    args = job.args
    changes = {'epochs': args.admm_iterations * args.admm_epochs, 'optimizer': 'adam', 'lr': args.admm_lr, 'wd': 5e-5}
    job.fit(Turns(args, splitting), stage, **changes, lr_schedule='constant', warmup_epochs=0.0)


def add_admm_flags(add, *names):
    """names: further names of --admm-iterations and --admm-epochs."""
    shown = ' (default: %(default)s)'
    add('--admm-iterations', *names[:1], type=positive, default=30, metavar='N', help='turns of W, Z and U' + shown)
    add('--admm-epochs', *names[1:], type=positive, default=5, metavar='N', help='epochs of W in a turn' + shown)
    add('--admm-lr', type=nonnegative, default=1e-3, metavar='LR', help='their learning rate, of Adam' + shown)
    add('--rho', type=nonnegative, default=1e-4, help="strength of the penalty a step, NNI's row" + shown)


class Method(OneShot):
    def __init__(self, args):
        super().__init__(args)
        refuse_to_watch_compiled(args, 'base_algo')

    @classmethod
    def add_args(cls, parser):
        super().add_args(parser)
        add_dependency_flag(parser)
        add_base_flag(parser, 'projects and prunes')
        add_admm_flags(parser.add_argument, '--num-iterations', '--training-epochs')

    def criterion(self, args):
        return algorithm(args.base_algo)

    def run(self, job):
        base = base_pruner(algorithm(self.args.base_algo), job.model, self.config_list(job.model), by_layer=False)
        self.pretrain(job)
        base.decide_together(*self.groups(job, job.model))
        splitting = Splitting(base, self.args.rho, self.args.admm_epochs)
        splitting.solve(lambda: train_in_loop(job, splitting, 'admm'))
        self.pruner = base
        say(f'pruned: accuracy {job.evaluate(job.test):.2f} % before fine-tuning')
        self.fine_tune(job)
