"""AGP, NNI's AGP_Pruner (Zhu and Gupta, "To prune, or not to prune", 2017, arXiv 1710.01878): the share of zeros grows from s_i to
s_f along a cubic while the network trains; at each update a one-shot criterion chooses what goes next.

s = s_f + (s_i - s_f) (1 - (e - e_0) / span)^3     (equation 1), span = ((e_end - e_0 - 1) // frequency) * frequency

in epochs e = e_0, e_0 + frequency, ...: the last update before e_end reaches s_f, as in NNI. What is pruned stays pruned.
gmp.py has the same ramp in steps and ranks all layers together. The criteria that watch training batches watch those that
follow the update, and prune then.
On the command line AGP runs in the fine-tuning stage; --end-epoch is within it.
"""

from pruners.compressor import ActivationPruner
from pruners.config_list import excludes, select_layers

from ._algorithms import ALGORITHMS, algorithm
from ._flags import count, nonnegative, positive
from ._one_shot import OneShot, add_dependency_flag

KEYS = ('initial_sparsity', 'start_epoch', 'end_epoch', 'frequency')
DEFAULT = {'initial_sparsity': 0.0, 'start_epoch': 0, 'frequency': 1}


def sparsity_at(epoch, initial, final, start, end, frequency=1):
    """The target share of zeros at an epoch: the equation above, and `initial` before `start`."""
    span = max((end - start - 1) // frequency * frequency, 0)
    progress = min(max((epoch - start) / span, 0.0), 1.0) if span else float(epoch >= start)
    return final + (initial - final) * (1 - progress) ** 3


class AGP_Pruner:  # noqa: N801  (NNI's name)
    """AGP_Pruner(model, config_list, optimizer, pruning_algorithm='level').

    Config keys final_sparsity, end_epoch, and with defaults initial_sparsity (0), start_epoch (0), frequency (1); op_types,
    op_names, exclude as the criterion takes them. pruning_algorithm: level, slim, l1, l2, fpgm, taylorfo, apoz, mean_activation.
    Call update_epoch(epoch) when an epoch of that number (from 0) begins. Everything else, as masks, export_model(), bind() or
    load_masks(), is that of the criterion's pruner, `base`.
    """

    def __init__(self, model, config_list, optimizer=None, pruning_algorithm='level'):
        kind = algorithm(pruning_algorithm)
        _, self.entries = select_layers(model, config_list, ('final_sparsity', 'end_epoch'), KEYS, kind.TYPES)
        for entry in self.entries.values():
            check(entry)
        keys = ('op_types', 'op_names', 'exclude')
        plain = [
            {key: entry[key] for key in keys if key in entry}
            | ({} if excludes(entry) else {'sparsity': entry['final_sparsity']})
            for entry in config_list
        ]
        self.base = kind(model, plain, optimizer)
        schedules = {tuple(schedule(entry).items()) for entry in self.entries.values()}
        if getattr(self.base, 'global_sort', False) and len(schedules) > 1:
            raise ValueError(f'{pruning_algorithm} ranks all layers together, so all entries need the same schedule')
        self.base.sparsity = dict.fromkeys(self.base.layers, 0.0)
        self.base.pending, self.epoch = False, None  # nothing is due yet

    def __getattr__(self, name):
        if name == 'base':  # not there yet, or in a copy
            raise AttributeError(name)
        return getattr(self.base, name)

    def compress(self):
        """Let the masks hold, and make those of epoch 0; returns the model."""
        self.base.hook()
        self.update_epoch(0)
        return self.base.model

    def compute_target_sparsity(self, config):
        """The share of zeros that an entry of the config list asks for in the present epoch."""
        return sparsity_at(self.epoch or 0, **schedule(config))

    def update_epoch(self, epoch):
        """Prune as the schedule says for this epoch; a call for the same epoch does nothing."""
        if epoch == self.epoch:
            return
        self.epoch, due = epoch, False
        for name, entry in self.entries.items():
            start, frequency = (schedule(entry)[key] for key in ('start', 'frequency'))
            if epoch >= start and (epoch - start) % frequency == 0:
                target = self.compute_target_sparsity(entry)
                due = due or target != self.base.sparsity[name]
                self.base.sparsity[name] = target
        if due:
            self.base.refresh()

    def update_mask(self):
        self.base.update_mask()


def check(entry):
    """Raises ValueError for a schedule that runs backwards."""
    times = schedule(entry)
    if times['initial'] > times['final']:
        raise ValueError(f'{entry}: initial_sparsity is above final_sparsity, but pruned weights do not return')
    if times['end'] < times['start']:
        raise ValueError(f'{entry}: end_epoch is before start_epoch')


def schedule(entry):
    """An entry of the config list -> the arguments of sparsity_at."""
    return {key.split('_')[0]: (DEFAULT | entry)[key] for key in ('final_sparsity', *KEYS)}


class Method(OneShot):
    DEFAULTS = OneShot.DEFAULTS | {'ptarget': 0.8}

    def __init__(self, args):
        super().__init__(args)
        self.end = (args.finetune_epochs + 1) // 2 if args.end_epoch is None else args.end_epoch
        if not args.start_epoch < self.end <= args.finetune_epochs:
            raise ValueError(
                f'AGP prunes in fine-tuning, from epoch {args.start_epoch} to {self.end}, which must lie in its {args.finetune_epochs} epochs'
            )

        if args.compile and issubclass(self.criterion(args), ActivationPruner):
            raise ValueError(f'--algorithm {args.algorithm} watches the layers in training, which --compile does not let it')

    def criterion(self, args):
        return algorithm(args.algorithm)

    @classmethod
    def add_args(cls, parser):
        super().add_args(parser)
        add, shown = parser.add_argument, ' (default: %(default)s)'
        add_dependency_flag(parser)
        add('--algorithm', choices=list(ALGORITHMS), default='level', help='the criterion' + shown)
        add('--initial-sparsity', type=nonnegative, default=0.0, metavar='SHARE', help='s_i' + shown)
        add('--start-epoch', type=count, default=0, metavar='EPOCH', help='of fine-tuning, the first update' + shown)
        add(
            '--end-epoch', type=positive, metavar='EPOCH', help='the epoch after the last update (default: half of fine-tuning)'
        )
        add('--frequency', type=positive, default=1, metavar='EPOCHS', help='epochs from one update to the next' + shown)

    def config_list(self, model):
        entry, args = super().config_list(model)[0], self.args
        times = {'start_epoch': args.start_epoch, 'end_epoch': self.end, 'frequency': args.frequency}
        return [
            {'op_names': entry['op_names'], 'initial_sparsity': args.initial_sparsity, 'final_sparsity': args.ptarget} | times
        ]

    def make_pruner(self, model):
        return AGP_Pruner(model, self.config_list(model), None, self.args.algorithm)

    def prune(self, job):
        """Nothing at once: before_step() does it."""

    def prepare(self, model, steps, args):
        self.batches = steps // args.epochs

    def before_step(self, step):
        if self.pruner is not None and step % self.batches == 0:
            self.pruner.update_epoch(step // self.batches)
