"""ADMM, NNI's ADMMPruner (Zhang et al., "A Systematic DNN Weight Pruning Framework using Alternating Direction Method of
Multipliers", ECCV 2018, arXiv 1804.03294, section 4): min f(W) subject to W = Z, Z sparse, by turns of

W  training of the loss + row / 2 ||W - Z + U||^2: in each step, before the optimizer's, W -= row (W - Z + U)    (subproblem 1)
Z  the projection of W + U: the criterion of base_algo keeps its share of the weights or filters of each layer   (subproblem 2)
U  U + W - Z

for num_iterations turns of training_epochs epochs, from Z = W, U = 0. Then base_algo prunes the network once, which by then loses
little, as W is near to Z: distances holds ||W - Z|| over all layers, one figure a turn. Fine-tuning is the user's.

Each criterion projects as it judges: level keeps the largest weights, l1, l2 and fpgm the filters with the largest scores at
W + U (NNI took the L1 norm for l2 too). Criteria that watch training batches judge by those of the turn. Z is a copy of W; in NNI
it was the weight itself, so that there was no penalty in the first turn. As in NNI the penalty is not scaled by the learning
rate; the paper has it in the loss. The optimizer is Adam, 1e-3 with a decay of 5e-5, as NNI's.

On the command line the turns are a stage of the shared loop, `admm`, between pretraining and fine-tuning.
"""

import inspect

import torch
from torch import nn
from tqdm import tqdm

from pruners import processes
from pruners.compressor import ActivationPruner, StatisticsPruner
from pruners.processes import say
from pruners.search import FOREVER
from pruners.selection import expand_mask, join_groups

from ._algorithms import algorithm
from ._flags import nonnegative, positive
from ._one_shot import OneShot, add_dependency_flag
from ._search import add_base_flag

ADAM = {'lr': 1e-3, 'weight_decay': 5e-5}


class Splitting:
    """W, Z and U for the layers of a one-shot pruner, whose criterion and shares say what Z may be.

    groups: lists of layers whose filters go together. distances: ||W - Z|| after each update().
    """

    def __init__(self, base, row=1e-4, groups=()):
        base.decide_together(groups if base.FILTERS else [])
        self.base, self.row, self.groups = base, row, base.groups
        self.W = {name: layer.weight for name, layer in base.layers.items()}
        self.Z = {name: weight.detach().clone() for name, weight in self.W.items()}
        self.U = {name: torch.zeros_like(weight) for name, weight in self.Z.items()}
        self.distances, self.calls = [], 0
        self.watch()

    def watch(self):
        if isinstance(self.base, StatisticsPruner):
            self.base.statistics_batch_num = FOREVER
            self.base.watch()

    @torch.no_grad()
    def penalize(self, *_):
        """W -= row (W - Z + U): the trainer's callback, between backward() and the optimizer's step."""
        self.calls += 1
        W, Z, U = (list(tensors.values()) for tensors in (self.W, self.Z, self.U))
        torch._foreach_add_(W, torch._foreach_add(torch._foreach_sub(W, Z), U), alpha=-self.row)

    @torch.no_grad()
    def choose(self, tensors):
        """{layer: weights} -> {layer: bool tensor} of what the criterion keeps of them."""
        scores = self.base.scores(tensors) if not isinstance(self.base, StatisticsPruner) else self.base.importance()
        if scores is None:
            raise ValueError(f'{type(self.base).__name__} judges by training batches, and the trainer has run none')
        if isinstance(self.base, StatisticsPruner):
            processes.average(list(scores.values()))
        return join_groups(self.base.choose(join_groups(scores, self.groups)), self.groups)

    @torch.no_grad()
    def update(self):
        """End a turn: Z = projection of W + U, U += W - Z."""
        wanted = {name: self.W[name] + self.U[name] for name in self.W}
        keep, total = self.choose(wanted), 0.0
        for name, weight in self.W.items():
            self.Z[name] = wanted[name] * expand_mask(keep[name], weight)
            self.U[name] += weight - self.Z[name]
            total += (weight - self.Z[name]).double().square().sum().item()
        self.distances.append(total**0.5)
        self.watch()

    def prune(self):
        """Mask the weights as they are now by the criterion, and end."""
        keep = self.choose({name: weight.detach() for name, weight in self.W.items()})
        if isinstance(self.base, StatisticsPruner):
            self.base.unwatch()
        self.base.set_masks(keep)
        self.base.pending = False
        self.base.apply()

    def state_dict(self):
        state = {'Z': self.Z, 'U': self.U, 'distances': self.distances}
        if isinstance(self.base, StatisticsPruner):
            state |= {'sums': self.base.sums, 'counts': self.base.counts, 'old': sorted(self.base.old)}
        return state

    def load_state_dict(self, state):
        for mine, other in ((self.Z, state['Z']), (self.U, state['U'])):
            for name, tensor in mine.items():
                mine[name] = other[name].to(tensor)
        self.distances = list(state['distances'])
        if 'sums' in state:
            self.base.sums, self.base.counts, self.base.old = dict(state['sums']), dict(state['counts']), set(state['old'])


def optimize(splitting, trainer, num_iterations, training_epochs, optimizer=None, criterion=None):
    """Run the turns with a trainer(model, optimizer=, criterion=, epoch=, callback=) on splitting.base.model.

    A trainer without `callback` is helped by a hook on the optimizer. Raises ValueError for one that takes it, trains, and does
    not call it.
    """
    model = splitting.base.model
    optimizer = optimizer or torch.optim.Adam(model.parameters(), **ADAM)
    criterion = criterion or nn.CrossEntropyLoss()
    further, steps = {'callback': splitting.penalize}, []
    handles = [optimizer.register_step_post_hook(lambda *_: steps.append(1))]
    if not takes_callback(trainer):
        further = {}
        handles.append(optimizer.register_step_pre_hook(splitting.penalize))
    try:
        for _ in tqdm(range(num_iterations), 'ADMM', leave=False, disable=True if processes.rank() else None):
            for epoch in range(training_epochs):
                trainer(model, optimizer=optimizer, criterion=criterion, epoch=epoch, **further)
                if steps and not splitting.calls:
                    raise ValueError('the trainer does not call callback() between loss.backward() and optimizer.step()')
            splitting.update()
    finally:
        for handle in handles:
            handle.remove()


def takes_callback(trainer):
    try:
        parameters = inspect.signature(trainer).parameters.values()
    except (TypeError, ValueError):  # something of C, which does not tell
        return True
    return any(parameter.name == 'callback' or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def either(name, value, default, other, given):
    """The value of an argument that has a second name. Raises ValueError where both are given and differ."""
    if given is None:
        return value
    if value not in (default, given):
        raise ValueError(f'{name} and {other} are two names for one argument, but {value} and {given} were given')
    return given


class ADMMPruner:
    """ADMMPruner(model, config_list, trainer, num_iterations=30, training_epochs=5, row=1e-4, base_algo='l1').

    Config keys sparsity (may differ from layer to layer), op_types, op_names, exclude, as the class of base_algo takes them.
    trainer: function of model, optimizer, criterion, epoch, callback, called with these names; it trains one epoch and calls
    callback() between backward() and step(). base_algo: level, l1, l2, slim, fpgm, taylorfo, apoz, mean_activation. Other names:
    iterations, epochs or epochs_per_iteration, rho. optimizer, criterion: instead of Adam and the cross-entropy. groups: lists of
    layers whose filters can only be removed together. distances: ||W - Z|| after each iteration. Everything else, as masks,
    export_model() or bind(), is that of the class of base_algo, `base`.
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
    ):
        if not callable(trainer):
            raise ValueError(f'trainer must be a function of model, optimizer, criterion, epoch and callback, got {trainer!r}')
        self.num_iterations = either('num_iterations', num_iterations, 30, 'iterations', iterations)
        training_epochs = either('training_epochs', training_epochs, 5, 'epochs', epochs)
        self.training_epochs = either('training_epochs', training_epochs, 5, 'epochs_per_iteration', epochs_per_iteration)
        self.row = either('row', row, 1e-4, 'rho', rho)
        if self.num_iterations < 1 or self.training_epochs < 1 or not 0 < self.row < float('inf'):
            raise ValueError('num_iterations and training_epochs must be 1 or more, and row above 0')
        self.base = algorithm(base_algo)(model, config_list)
        self.trainer, self.adam, self.criterion, self.groups = trainer, optimizer, criterion, groups
        self.distances = []

    def __getattr__(self, name):
        if name == 'base':  # not there yet, or in a copy
            raise AttributeError(name)
        return getattr(self.base, name)

    def compress(self):
        """Run all iterations on the model, prune it, and let the masks hold; returns the model."""
        splitting = Splitting(self.base, self.row, self.groups)
        self.distances = splitting.distances
        optimize(splitting, self.trainer, self.num_iterations, self.training_epochs, self.adam, self.criterion)
        splitting.prune()
        self.base.hook()
        return self.base.model


# ------------------------------------------------------------------------------------------------------ the command line


class Penalized(OneShot):
    """Methods with a stage of training in which W is drawn to Z."""

    splitting = None

    def __init__(self, args):
        super().__init__(args)
        if args.compile and issubclass(self.criterion(args), ActivationPruner):
            raise ValueError(f'--base-algo {args.base_algo} watches the layers in training, which --compile does not let it')

    def criterion(self, args):
        return algorithm(args.base_algo)

    def split(self, job, stage, base, groups):
        """The stage: --admm-iterations turns of --admm-epochs epochs; then the masks are made."""
        args = self.args
        self.splitting = Splitting(base, args.rho, groups)
        changes = {'epochs': args.admm_iterations * args.admm_epochs, 'optimizer': 'adam', 'lr': args.admm_lr, 'wd': 5e-5}
        changes |= {'lr_schedule': 'constant', 'warmup_epochs': 0.0}
        job.fit(self, stage, **changes)
        self.splitting.prune()
        self.splitting = None

    def after_backward(self, step, batch):
        super().after_backward(step, batch)
        if self.splitting is not None:
            self.splitting.penalize()

    def after_epoch(self, epoch):
        if self.splitting is not None and (epoch + 1) % self.args.admm_epochs == 0:
            self.splitting.update()

    def metrics(self):
        return {'distance': self.splitting.distances[-1]} if self.splitting is not None and self.splitting.distances else {}

    def state_dict(self):
        return super().state_dict() if self.splitting is None else self.splitting.state_dict()

    def load_state_dict(self, state):
        if self.splitting is None:
            super().load_state_dict(state)
        else:
            self.splitting.load_state_dict(state)


def add_admm_flags(add, *names):
    """names: further names of --admm-iterations and --admm-epochs."""
    shown = ' (default: %(default)s)'
    add('--admm-iterations', *names[:1], type=positive, default=30, metavar='N', help='turns of W, Z and U' + shown)
    add('--admm-epochs', *names[1:], type=positive, default=5, metavar='N', help='epochs of W in a turn' + shown)
    add('--admm-lr', type=nonnegative, default=1e-3, metavar='LR', help='their learning rate, of Adam' + shown)
    add('--rho', type=nonnegative, default=1e-4, help="strength of the penalty a step, NNI's row" + shown)


class Method(Penalized):
    @classmethod
    def add_args(cls, parser):
        super().add_args(parser)
        add_dependency_flag(parser)
        add_base_flag(parser, 'projects and prunes')
        add_admm_flags(parser.add_argument, '--num-iterations', '--training-epochs')

    def make_pruner(self, model):
        return algorithm(self.args.base_algo)(model, self.config_list(model))

    def run(self, job):
        self.announce(job.model)
        base = self.make_pruner(job.model)
        self.pretrain(job)
        self.split(job, 'admm', base, self.groups(job, job.model))
        self.pruner = base
        say(f'pruned: accuracy {job.evaluate(job.test):.2f} % before fine-tuning')
        self.fine_tune(job)
