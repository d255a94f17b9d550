"""AGP, NNI's AGP_Pruner (Zhu and Gupta, "To prune, or not to prune", 2017, arXiv 1710.01878): the share of zeros grows from
s_i to s_f along a cubic while the network trains; at each update a one-shot criterion chooses what goes next.

s = s_f + (s_i - s_f) (1 - (e - e_0) / span)^3     (equation 1), span = ((e_end - e_0 - 1) // frequency) * frequency

in epochs e = e_0, e_0 + frequency, ...: the last update before e_end reaches s_f, as in NNI. What is pruned stays pruned.
gmp.py has the same ramp in steps and ranks all layers together. The criteria that watch training batches watch those that
follow the update, and prune then.
On the command line AGP runs in the fine-tuning stage; --end-epoch is within it.
"""

from pruners.config_list import excludes, select_layers
from pruners.search import AroundPruner

from ._algorithms import ALGORITHMS, algorithm
from ._flags import count, nonnegative, positive
from ._one_shot import OneShot, add_dependency_flag
from ._search import refuse_to_watch_compiled

KEYS = ('initial_sparsity', 'start_epoch', 'end_epoch', 'frequency')
DEFAULTS = {'initial_sparsity': 0.0, 'start_epoch': 0, 'frequency': 1}


def sparsity_at(epoch, initial, final, start, end, frequency=1):
    """The target share of zeros at an epoch: the equation above, and `initial` before `start`."""
    span = max((end - start - 1) // frequency * frequency, 0)
    progress = min(max((epoch - start) / span, 0.0), 1.0) if span else float(epoch >= start)
    return final + (initial - final) * (1 - progress) ** 3


class AGP_Pruner(AroundPruner):  # noqa: N801  (NNI's name)
    """AGP_Pruner(model, config_list, optimizer, pruning_algorithm='level').

    Config keys final_sparsity, end_epoch, and with defaults initial_sparsity (0), start_epoch (0), frequency (1); op_types,
    op_names, exclude as the criterion takes them. pruning_algorithm: level, slim, l1, l2, fpgm, taylorfo, apoz,
    mean_activation. Call update_epoch(epoch) when an epoch of that number (from 0) begins. Everything else, as masks,
    export_model(), bind() or load_masks(), is that of the criterion's pruner, `base`.
    """

    def __init__(self, model, config_list, optimizer=None, pruning_algorithm='level'):
        kind = algorithm(pruning_algorithm)
        _, self.entries = select_layers(model, config_list, ('final_sparsity', 'end_epoch'), KEYS, kind.TYPES)
        for entry in self.entries.values():
            check_schedule(entry)
        self.base = kind(model, [one_shot_entry(entry) for entry in config_list], optimizer)
        schedules = {tuple(schedule(entry).items()) for entry in self.entries.values()}
        if getattr(self.base, 'global_sort', False) and len(schedules) > 1:
            raise ValueError(f'{pruning_algorithm} ranks all layers together, so all entries need the same schedule')
        self.base.sparsity = dict.fromkeys(self.base.layers, 0.0)
        self.base.pending = False  # nothing is due yet
        self.epoch = None

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
        self.epoch = epoch
        before = dict(self.base.sparsity)
        for name, entry in self.entries.items():
            times = schedule(entry)
            if epoch >= times['start'] and (epoch - times['start']) % times['frequency'] == 0:
                self.base.sparsity[name] = self.compute_target_sparsity(entry)
        if self.base.sparsity != before:
            self.base.refresh()


def one_shot_entry(entry):
    """An entry of the config list as the criterion's pruner takes it."""
    names = {key: entry[key] for key in ('op_types', 'op_names', 'exclude') if key in entry}
    return names if excludes(entry) else names | {'sparsity': entry['final_sparsity']}


def schedule(entry):
    """An entry of the config list -> the arguments of sparsity_at."""
    values = DEFAULTS | entry
    return {key.split('_')[0]: values[key] for key in ('final_sparsity', *KEYS)}


def check_schedule(entry):
    """Raises ValueError for a schedule that runs backwards."""
    times = schedule(entry)
    if times['initial'] > times['final']:
        raise ValueError(f'{entry}: initial_sparsity is above final_sparsity, but pruned weights do not return')
    if times['end'] < times['start']:
        raise ValueError(f'{entry}: end_epoch is before start_epoch')


class Method(OneShot):
    DEFAULTS = OneShot.DEFAULTS | {'ptarget': 0.8}

    def __init__(self, args):
        super().__init__(args)
        refuse_to_watch_compiled(args, 'algorithm')
        self.end = (args.finetune_epochs + 1) // 2 if args.end_epoch is None else args.end_epoch
        if not args.start_epoch < self.end <= args.finetune_epochs:
            raise ValueError(
                f'AGP prunes in fine-tuning, from epoch {args.start_epoch} to {self.end}, '
                f'which must lie in its {args.finetune_epochs} epochs'
            )

    @classmethod
    def add_args(cls, parser):
        super().add_args(parser)
        add_dependency_flag(parser)
        add = parser.add_argument
        shown = ' (default: %(default)s)'
        add('--algorithm', choices=list(ALGORITHMS), default='level', help='the criterion' + shown)
        add('--initial-sparsity', type=nonnegative, default=0.0, metavar='SHARE', help='s_i' + shown)
        add('--start-epoch', type=count, default=0, metavar='EPOCH', help='of fine-tuning, the first update' + shown)
        help = 'the epoch after the last update (default: half of fine-tuning)'
        add('--end-epoch', type=positive, metavar='EPOCH', help=help)
        add('--frequency', type=positive, default=1, metavar='EPOCHS', help='epochs from one update to the next' + shown)

    def criterion(self, args):
        return algorithm(args.algorithm)

    def config_list(self, model):
        return [
            {
                'op_names': self.layer_names(model)[0],
                'initial_sparsity': self.args.initial_sparsity,
                'final_sparsity': self.args.ptarget,
                'start_epoch': self.args.start_epoch,
                'end_epoch': self.end,
                'frequency': self.args.frequency,
            }
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
