"""What the one-shot pruners do on the command line: pretrain, prune, fine-tune with the masks."""

import itertools
import math
from argparse import BooleanOptionalAction
from fnmatch import fnmatchcase

import torch.nn.functional as F

from deploy.shrinking import decided_together
from pruners.config_list import DEFAULT_TYPES, is_of_type, suggestion
from pruners.processes import say

from . import Method as Base
from ._densities import add_scope_flag, kept_counts
from ._flags import count, nonnegative, positive


def add_layer_flags(parser):
    add = parser.add_argument
    add('--layers', nargs='+', metavar='NAME', help='prune these layers only; a name may be a pattern: layer1.*.conv1')
    add('--exclude', nargs='+', default=[], metavar='NAME', help='do not prune these layers; patterns as in --layers')


def add_dependency_flag(parser):
    parser.add_argument(
        '--dependency-aware',
        action=BooleanOptionalAction,
        default=True,
        help='layers whose filters can only be removed together, as those of a residual stream, have one mask (default: on)',
    )


def densities_as_entries(shapes, ratio):
    """{layer: shape of its weight} -> a config list that leaves each as many weights as ERK gives it.

    A share of (n - k + 1/2) / n of n weights, rounded down, are n - k.
    """
    entries = []
    for name, kept in kept_counts(shapes, ratio, 'erk').items():
        n = math.prod(shapes[name])
        entries.append({'sparsity': (n - kept + 0.5) / n, 'op_names': [name]})
    return entries


def matches_any(name, patterns):
    return any(fnmatchcase(name, pattern) for pattern in patterns)


class OneShot(Base):
    """Pretrain for --epochs (or --from a run), prune once to --ptarget, fine-tune with the masks."""

    PRUNER = None  # the class, where it is the same for all flags
    SCOPES = ()  # what --scope offers; the first is the default
    DEFAULTS = {'model': 'vgg16', 'dataset': 'cifar10', 'epochs': 160, 'lr_schedule': 'multistep', 'ptarget': 0.5}

    def __init__(self, args):
        super().__init__(args)
        self.pruner = None
        kind = self.criterion(args)
        self.types = kind.TYPES or DEFAULT_TYPES  # of layers that it is given
        self.filters = kind.FILTERS

    def criterion(self, args):
        """The class that judges weights or filters."""
        return self.PRUNER

    @classmethod
    def add_args(cls, parser):
        add = parser.add_argument
        shown = ' (default: %(default)s)'
        add('--finetune-epochs', type=count, default=40, metavar='N', help='epochs with the masks, after --epochs' + shown)
        add('--finetune-lr', type=nonnegative, default=1e-3, help='their learning rate, constant' + shown)
        add_layer_flags(parser)
        if cls.PRUNER is not None and cls.PRUNER.FILTERS:
            add_dependency_flag(parser)
        if cls.SCOPES:
            add_scope_flag(parser, cls.SCOPES)

    def layer_names(self, model):
        """(names to prune, names of the same types that are left out). Raises ValueError for a name that matches nothing."""
        layers = {name: module for name, module in model.named_modules() if is_of_type(module, self.types)}
        kinds = ' or '.join(sorted({type(module).__name__ for module in layers.values()}) or self.types[:2])
        for pattern in [*(self.args.layers or []), *self.args.exclude]:
            if not any(fnmatchcase(name, pattern) for name in layers):
                raise ValueError(f'{pattern!r} matches no {kinds} layer{suggestion(pattern, layers)}')
        chosen = []
        for name, layer in layers.items():
            wanted = matches_any(name, self.args.layers or ['*']) and not matches_any(name, self.args.exclude)
            if wanted and layer.weight.numel() >= self.args.pthres:
                chosen.append(name)
        if not chosen:
            raise ValueError(f'--layers, --exclude and --pthres leave no {kinds} layer to prune')
        return chosen, [name for name in layers if name not in chosen]

    def config_list(self, model):
        """The config list that the flags mean."""
        names = self.layer_names(model)[0]
        if vars(self.args).get('scope') == 'erk':
            return densities_as_entries({name: model.get_submodule(name).weight.shape for name in names}, self.args.ptarget)
        return [{'sparsity': self.args.ptarget, 'op_names': names}]

    def options(self):
        """Further arguments of the class."""
        return {'global_sort': self.args.scope == 'global'} if 'global' in self.SCOPES else {}

    def make_pruner(self, model):
        return self.PRUNER(model, self.config_list(model), **self.options())

    def announce(self, model):
        chosen, others = self.layer_names(model)
        kinds = ' and '.join(sorted({type(model.get_submodule(name)).__name__ for name in chosen}))
        if others:
            say(f'prunes {len(chosen)} layers: {", ".join(chosen)}; leaves out {", ".join(others)}')
        else:
            say(f'prunes all {len(chosen)} layers of type {kinds}')

    def run(self, job):
        self.make_pruner(job.model)  # a faulty configuration is to show before training
        self.pretrain(job)
        self.pruner = self.make_pruner(job.model)
        self.pruner.decide_together(*self.groups(job, job.model))
        self.prune(job)
        self.fine_tune(job)

    def groups(self, job, model):
        """(lists of layers whose filters go together, as those of one residual stream; {layer: parts that lose equally many});
        both are empty where they are not asked for."""
        if not (self.filters and self.args.dependency_aware):
            return [], {}
        return decided_together(model, job.example)

    def prune(self, job):
        self.pruner.update_mask()
        say(f'pruned: accuracy {job.evaluate(job.test):.2f} % before fine-tuning')

    def attach(self, fit):
        if self.pruner is not None:
            self.pruner.bind(fit.optimizer)

    def after_backward(self, step, batch):
        if self.pruner is not None and self.args.clip:
            self.pruner.mask_gradients()

    def finalize(self, model):
        if self.pruner is not None:
            self.pruner.apply()
            self.pruner.unhook()
        return model

    def state_dict(self):
        return {} if self.pruner is None else {'masks': self.pruner.masks}

    def load_state_dict(self, state):
        if self.pruner is not None:
            self.pruner.load_masks(state['masks'])


class Watching(OneShot):
    """One-shot pruners of filters that first watch training batches, with the pretrained weights."""

    @classmethod
    def add_args(cls, parser):
        super().add_args(parser)
        help = 'training batches on which filters are judged, before fine-tuning (default: %(default)s)'
        parser.add_argument('--statistics-batches', type=positive, default=10, metavar='N', help=help)

    def options(self):
        return super().options() | {'statistics_batch_num': self.args.statistics_batches}

    def prune(self, job):
        model = job.model
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        job.train.set_epoch(0)  # a resumed run must see the same images
        number = min(self.args.statistics_batches, len(job.train))
        self.pruner.statistics_batch_num = number
        self.pruner.watch()
        model.train()
        for images, labels in itertools.islice(job.train, number):
            model.zero_grad()
            F.cross_entropy(model(images), labels).backward()
        model.zero_grad()
        model.load_state_dict(state)  # batch norm has seen these batches: not now
        self.pruner.unhook()
        super().prune(job)
