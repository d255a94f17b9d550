"""What the searches do on the command line."""

import itertools

import torch
from torch import nn

from deploy.latency import THREADS
from pruners import processes
from pruners.compressor import ActivationPruner
from pruners.milliseconds import Budget
from pruners.processes import say

from ._algorithms import ALGORITHMS, algorithm
from ._flags import count, fraction, nonnegative, positive
from ._one_shot import OneShot, add_dependency_flag

STATISTICS_BATCHES = 10  # for the criteria that watch training


def add_annealing_flags(add):
    shown = ' (default: %(default)s)'
    add('--start-temperature', type=nonnegative, default=100.0, metavar='T', help='of the annealing' + shown)
    add('--stop-temperature', type=nonnegative, default=20.0, metavar='T', help='it ends there' + shown)
    add('--cool-down-rate', type=fraction, default=0.9, metavar='RATE', help='factor from one temperature to the next' + shown)
    add('--perturbation-magnitude', type=nonnegative, default=0.35, metavar='M', help='of shares, at the start' + shown)
    add('--search-steps', type=positive, default=10, metavar='N', help='candidates at each temperature' + shown)
    add('--max-sparsity', type=fraction, metavar='SHARE', help='of any layer (default: it keeps a quarter of 1 - the target)')
    help = 'training batches from which a candidate has its batch norm statistics anew, before it is scored' + shown
    add('--search-recalibrate', dest='recalibrate', type=count, default=10, metavar='N', help=help)


def add_budget_flags(add):
    shown = ' (default: %(default)s)'
    text = 'milliseconds that the network without its dead filters may take on this machine, instead of --ptarget'
    add('--budget-ms', type=nonnegative, metavar='MS', help=text)
    add('--budget-batch', type=positive, default=1, metavar='N', help='images at once, for --budget-ms' + shown)
    add('--budget-threads', type=positive, default=THREADS, metavar='N', help='of the CPU, for --budget-ms' + shown)


def budget_of(args):
    """The Budget that the flags ask for, or None."""
    return None if args.budget_ms is None else Budget(args.budget_ms, args.budget_batch, args.budget_threads)


def annealing_options(args):
    names = ('start_temperature', 'stop_temperature', 'cool_down_rate', 'perturbation_magnitude', 'search_steps', 'seed')
    return {name: vars(args)[name] for name in names}


def largest_share(args, target):
    return 1 - (1 - target) / 4 if args.max_sparsity is None else max(args.max_sparsity, target)


def add_base_flag(parser, does):
    """does: what the criterion of base_algo does in this method."""
    help = f'the criterion that {does} (default: %(default)s)'
    parser.add_argument('--base-algo', choices=list(ALGORITHMS), default='l1', help=help)


def refuse_to_watch_compiled(args, flag):
    """Raises ValueError where --compile would hide the activations that the criterion of a flag watches."""
    name = vars(args)[flag]
    if args.compile and issubclass(algorithm(name), ActivationPruner):
        flag = flag.replace('_', '-')
        raise ValueError(f'--{flag} {name} watches the layers in training, which --compile does not let it')


class Searching(OneShot):
    """Pretrain, search on the validation split, fine-tune with the masks that were found."""

    DEFAULTS = OneShot.DEFAULTS | {'val_size': 5000}

    def __init__(self, args):
        super().__init__(args)
        if not args.val_size:
            raise ValueError(f'{args.method} scores its candidates on a validation split: give it images with --val-size')
        self.job = None

    def criterion(self, args):
        return algorithm(args.base_algo)

    @classmethod
    def add_args(cls, parser):
        super().add_args(parser)
        add_dependency_flag(parser)
        add_base_flag(parser, 'chooses filters, or weights')

    def run(self, job):
        self.job = job
        super().run(job)

    def evaluator(self, model):
        """Accuracy in percent on the validation split."""
        recalibrate(model, self.job.train, vars(self.args).get('recalibrate', 0))
        return self.job.evaluate(self.job.val)

    def statistics(self, model):
        """Training batches for the criteria that watch them."""
        self.job.train.set_epoch(0)
        train(model, self.job.train, STATISTICS_BATCHES)

    def prune(self, job):
        self.pruner.search()
        self.pruner.apply()
        found = self.pruner.result
        say(f'found sparsity {100 * found["sparsity"]:.2f} %, validation accuracy {found["performance"]:.2f} %')
        say(f'pruned: accuracy {job.evaluate(job.test):.2f} % before fine-tuning')

    def facts(self):
        """What the search says of its target, and the score of what it found."""
        found = None if self.pruner is None else self.pruner.result
        return {f'search_{key}': value for key, value in (found or {}).items() if key != 'config_list'}


@torch.no_grad()
def recalibrate(model, batches, number):
    """Set the statistics of batch norms to the means over the first `number` training batches, seen in eval mode otherwise."""
    model.eval()
    if number == 0:
        return
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean
        norm.train()
    batches.set_epoch(0)
    for images, _ in itertools.islice(batches, number):
        model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        processes.average([norm.running_mean, norm.running_var])
    model.eval()


def train(model, batches, steps, optimizer=None):
    """`steps` training steps, as many epochs as that takes; without an optimizer, forward and backward passes only."""
    model.train()
    while steps > 0:
        for images, labels in itertools.islice(batches, steps):
            model.zero_grad()
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            processes.average([p.grad for p in model.parameters() if p.grad is not None])
            if optimizer is not None:
                optimizer.step()
        steps -= len(batches)
    model.zero_grad()
    processes.same_buffers(model)
