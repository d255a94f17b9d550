"""Dynamic Structure Pruning: groups of filters are learned with the weights, then each group loses its least important input
channels. Park, Kim, Kim, Choi and Lee, "Dynamic Structure Pruning for Compressing CNNs", AAAI 2023, arXiv 2303.09736.

    from methods.dsp import *      # GroupWrapper, PruneWrapper and pack, for your own training loop

The equations are in pruners/group_learning.py and pruners/group_pruning.py.

--method dsp is the authors' pipeline, in stages that --stage runs alone, each from the weights that --from names:
pretrain   the dense network, --epochs
group      group learning, --group-epochs: a second pass of the network a step
prune      group channel pruning, down to a share --prune of the FLOPs
finetune   prune, then --cycles cosine cycles over --finetune-epochs; each further one prunes 0.1 % more FLOPs
pack       from a pruned run: the smaller network in files of its own
--stage all begins after what --from has: after pretraining, or after group learning where the weights come with groups. A stage
hands on the network of one epoch, as --select says, and so does each cycle: the best on the validation split, the last, or the
best on the test set as the authors do, which is no honest figure and is named in the result.

Pruned FLOPs and weights are counted over the grouped convolutions alone, as in the paper's tables: without the first one, those
of shortcuts, and the classifier; the whole network's share is printed beside it. masks.pt holds their masks.
CIFAR-10 is normalised by the authors' --mean and --std, so the run that --from names should have been trained with these.
Deviations: pruned weights stay at zero with their momentum; the learning rate warms up linearly in the first two epochs, where
the authors take a quarter of it; the best network of a cycle is that of this cycle's epochs. The two files
above name those of group learning and pruning.
"""

from torch import nn

from deploy.files import write_tensors
from deploy.formats import write_pt2, write_torchscript
from deploy.latency import gains
from deploy.network_file import save
from deploy.outputs import TOLERANCE, compare
from deploy.packing import pack
from pruners.group_learning import GroupWrapper, group_convs, remove_groups, set_group
from pruners.group_pruning import PruneWrapper, convs_that_lose_filters, shares_pruned
from pruners.processes import say
from sparse_utils import count_macs

from . import Method as Base
from ._flags import count, fraction, nonnegative, positive

__all__ = ['GroupWrapper', 'PruneWrapper', 'pack']

STAGES = ['all', 'pretrain', 'group', 'prune', 'finetune', 'pack']
COSINE = {'lr_schedule': 'cosine', 'lr_restarts': 0, 'warmup_epochs': 0.0}
CYCLE_STEP = 0.001  # of the FLOPs, pruned with each further cycle


def default_fp_every(model):
    """Every how many convolutions one ends a residual block, by the network's name; -1 where there are no such blocks."""
    if model == 'resnet50':
        return 3
    if model.startswith(('resnet', 'wrn')):
        return 2
    return -1


class Method(Base):
    idle = True  # the group logits
    DEFAULTS = {
        'model': 'resnet20',
        'dataset': 'cifar10',
        'epochs': 164,
        'batch_size': 128,
        'lr': 0.1,
        'lr_schedule': 'multistep',
    }
    DATASET_DEFAULTS = {'cifar10': {'mean': (0.4914, 0.4822, 0.4465), 'std': (0.2470, 0.2435, 0.2616)}}  # the authors'
    DEFAULTS |= {'warmup_epochs': 2.0, 'wd': 1e-4, 'wd_all': True, 'clip': 0.0, 'drop_last': True, 'val_size': 5000}

    def __init__(self, args):
        super().__init__(args)
        if args.stage in ('group', 'prune', 'finetune', 'pack') and not self.started:
            raise ValueError(f'--stage {args.stage} goes on from the weights of another run: name it with --from')
        if 0 < args.finetune_epochs < args.cycles:
            raise ValueError(f'--cycles {args.cycles} takes at least as many --finetune-epochs, not {args.finetune_epochs}')
        if not args.temperature:
            raise ValueError('--temperature must be above 0')
        if args.select == 'val' and not args.val_size:
            raise ValueError('--select val takes a validation split: give --val-size, or --select last')
        self.select = args.select or ('val' if args.val_size else 'last')
        self.learned = {}  # {convolution: its group logits} of the run that --from names
        self.stage = None  # of training, by its name in run()
        self.steps = 0  # of that stage
        self.fit = None
        self.grouper = None
        self.pruner = None
        self.best = None  # the state dict of the stage's selected epoch
        self.best_score = -1.0
        self.figures = {}
        self.packed = False
        if args.stage in ('pretrain', 'group'):
            self.gives = 'the dense network'

    @property
    def filters(self):
        """What packing gives is measured here, and is more than shrinking would."""
        return not self.packed

    @staticmethod
    def add_args(parser):
        def add(*flags, kind, default=None, text, **more):
            parser.add_argument(*flags, type=kind, default=default, help=f'{text} (default: %(default)s)', **more)

        add('-g', '--groups', kind=positive, default=4, text='filter groups of a convolution')
        add('-r', '--regularize', kind=nonnegative, default=2e-3, text='lambda, strength of the regulariser at the end')
        add('-t', '--temperature', kind=nonnegative, default=0.5, text="of the groups' Gumbel softmax")
        add('-p', '--prune', kind=fraction, default=0.5, text="share of the grouped convolutions' FLOPs to prune")
        add('-c', '--cycles', kind=positive, default=5, text='cosine cycles of fine-tuning')
        add('--group-epochs', kind=positive, default=120, text='epochs of group learning')
        add('--group-lr', kind=nonnegative, default=0.05, text='its learning rate, on a cosine')
        add('--group-wd', kind=nonnegative, default=1e-3, text='its weight decay')
        add('--finetune-epochs', kind=count, default=400, text='epochs of fine-tuning, all cycles together')
        add('--finetune-lr', kind=nonnegative, default=0.015, text='learning rate at the start of each cycle')
        add('--finetune-wd', kind=nonnegative, default=1e-3, text='weight decay of fine-tuning')
        add(
            '--round-to',
            kind=positive,
            default=1,
            text='keep channels and filters of a group in multiples of this',
            metavar='N',
        )
        add = parser.add_argument
        add(
            '--stage',
            choices=STAGES,
            default='all',
            help='run this stage alone, on the weights of --from (default: %(default)s)',
        )
        add(
            '--select',
            choices=['val', 'last', 'test-best'],
            help="the epoch whose network a stage hands on; test-best is the authors' protocol (default: val, or last without "
            '--val-size)',
        )
        add(
            '--fp-every',
            type=int,
            metavar='N',
            help='prune whole filters in every N-th convolution, -1 for none (default: the last of each residual block)',
        )
        add('--fp-layers', type=int, nargs='+', metavar='I', help='or in the convolutions with these indices, from 0')
        add('--exclude', nargs='+', metavar='LAYER', help='convolutions left whole (default: the first and those of shortcuts)')
        add('--pack', action='store_true', help='pack the network at the end, as --stage pack does')
        add('--pack-batch', type=positive, default=1, metavar='N', help='images at a time to pack for (default: %(default)s)')
        add(
            '--pack-how',
            choices=['measured', 'whole', 'gathered', 'branches'],
            default='measured',
            help="how convolutions run: each in the way that measures fastest, or all in one; branches is the authors' "
            '(default: %(default)s)',
        )
        add('--torchscript', action='store_true', help='when packing, write packed.ts too')

    def start_from(self, model, state, called='--from'):
        """Plain weights, or group-learned ones: then group learning is done."""
        extras = {name: tensor for name, tensor in state.items() if name.endswith(('.group', '.mask'))}
        super().start_from(model, {name: tensor for name, tensor in state.items() if name not in extras}, called)
        self.learned = {name.removesuffix('.group'): logits for name, logits in extras.items() if name.endswith('.group')}
        if wrong := [len(logits) for logits in self.learned.values() if len(logits) != self.args.groups]:
            raise ValueError(f'the run of --from learned {wrong[0]} groups, not {self.args.groups}: give it as --groups')
        if self.args.stage in ('prune', 'finetune') and not self.learned:
            raise ValueError(
                f'--stage {self.args.stage} needs learned groups, and the run of --from has none: name one of --stage group'
            )

    # ------------------------------------------------------------------------------------------------ hooks of the loop

    def prepare(self, model, steps, args):
        self.steps = steps

    def attach(self, fit):
        self.fit = fit
        if self.stage == 'group':
            args = self.args
            self.grouper = GroupWrapper(
                fit.model,
                fit.optimizer,
                fit.criterion,
                regularization_power=args.regularize,
                total_num_iterations=self.steps,
                num_groups=args.groups,
                temperature=args.temperature,
                example_input=fit.example,
                exclude=args.exclude,
                autocast=fit.autocast,
                forward=fit.forward,
                accumulate=args.accumulate,
                say=say,
            )
            self.set_learned_groups(self.grouper.convs)

    def before_step(self, step):
        if self.grouper is not None:
            self.grouper.initialize()

    def after_step(self, step, batch):
        if self.grouper is not None:
            self.grouper.after_step(*batch)
        elif self.pruner is not None:
            self.pruner.after_step(self.fit.optimizer)

    def metrics(self):
        return self.figures

    def after_evaluation(self, line):
        """Keep the network of the best epoch of a stage, before it is saved."""
        key = {'val': 'val_accuracy', 'test-best': 'accuracy'}.get(self.select)
        if key is not None and line[key] > self.best_score:
            self.best = {name: tensor.clone() for name, tensor in self.fit.model.state_dict().items()}
            self.best_score = line[key]

    def state_dict(self):
        state = {} if self.grouper is None else {'grouper': self.grouper.state_dict()}
        return state if self.best is None else state | {'best': self.best, 'best_score': self.best_score}

    def load_state_dict(self, state):
        self.best = state.get('best')
        self.best_score = state.get('best_score', -1.0)
        if self.grouper is not None:
            self.grouper.load_state_dict(state['grouper'])

    def finalize(self, model):
        """The plain network; after --stage group and --stage prune with the groups, which the next stage needs."""
        convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
        groups = {name: conv.group.detach() for name, conv in convs.items() if hasattr(conv, 'group')}
        if self.pruner is not None:
            self.pruner.remove()
        remove_groups(model)
        if self.args.stage in ('group', 'prune'):
            for name, group in groups.items():
                set_group(convs[name], group)
        return model

    def facts(self):
        """What the result says beside the counted figures."""
        return {'stage': self.args.stage, 'selected': self.select, **self.figures}

    def announce(self, model):
        pass  # its wrappers say it

    # ------------------------------------------------------------------------------------------------------- the stages

    def run(self, job):
        args = job.args
        stage = args.stage
        self.check(job)
        if stage == 'pretrain' or stage == 'all' and not self.started:
            self.train(job, 'pretrain')
        if stage == 'group' or stage == 'all' and not self.learned:
            self.train(job, 'group', epochs=args.group_epochs, lr=args.group_lr, wd=args.group_wd, **COSINE)
            self.grouper = None
        if stage in ('all', 'prune', 'finetune'):
            self.prune(job, args.prune)
            if args.finetune_epochs and stage != 'prune':
                self.finetune(job, args.cycles)
            write_tensors({name: mask.cpu() for name, mask in self.pruner.masks().items()}, job.folder / 'masks.pt')
        if stage == 'pack' or args.pack:
            self.finalize(job.model)
            job.recalibrate()
            if stage == 'pack':
                self.figures = self.shares_of_zeros(job)
            self.figures |= write_packed(job) | {'saved': 'packed.pt'}
            self.packed = True
            self.gives = 'a smaller network, packed'

    def shares_of_zeros(self, job):
        """What the run that --from names has pruned of the grouped convolutions, counted in its weights."""
        convs = group_convs(job.model, job.example, job.args.exclude, say=lambda text: None)
        flops, weights = shares_pruned(convs, count_macs(job.model, job.example))
        return {'flops_pruned': flops, 'weights_pruned': weights}

    def check(self, job):
        """Raise ValueError for layers that are not there now, not after hours of pretraining."""
        convs = group_convs(job.model, job.example, job.args.exclude, say=lambda text: None)
        convs_that_lose_filters(list(convs), self.fp_every(), job.args.fp_layers)

    def fp_every(self):
        return default_fp_every(self.args.model) if self.args.fp_every is None else self.args.fp_every

    def train(self, job, stage, **changes):
        """One stage of training; the model is then that of the selected epoch."""
        self.stage = stage
        self.best = None
        self.best_score = -1.0
        job.fit(self, stage, **changes)
        if self.best is not None:
            job.model.load_state_dict(self.best)

    def prune(self, job, rate):
        """Prune a share of the FLOPs, by the present weights and groups."""
        if self.pruner is None:
            args = job.args
            self.pruner = PruneWrapper(
                job.model,
                args.groups,
                self.fp_every(),
                args.fp_layers,
                job.example,
                args.round_to,
                exclude=args.exclude,
                say=say,
            )
            self.set_learned_groups(self.pruner.convs)
        flops, weights = self.pruner.initialize(rate)
        self.figures = {'flops_pruned': flops / 100, 'weights_pruned': weights / 100}

    def set_learned_groups(self, convs):
        """Begin with the groups that the run of --from has learned, if it has."""
        if self.learned and set(self.learned) != set(convs):
            odd = sorted(set(self.learned) ^ set(convs))[0]
            raise ValueError(f'the run of --from has grouped other convolutions ({odd}): give the same --exclude')
        for name, logits in self.learned.items():
            convs[name].group.data.copy_(logits)

    def finetune(self, job, cycles):
        args = job.args
        for cycle in range(cycles):
            if cycle:
                self.prune(job, min(self.figures['flops_pruned'] + CYCLE_STEP, 0.9999))
            first = args.finetune_epochs * cycle // cycles
            last = args.finetune_epochs * (cycle + 1) // cycles
            self.train(job, f'cycle{cycle + 1}', epochs=last - first, lr=args.finetune_lr, wd=args.finetune_wd, **COSINE)


def write_packed(job):
    """Pack the finished network, whose pruned kernels are exactly zero, for this device and --pack-batch images at a time.

    Into the run's folder go packed.pt and packed.json, from which it is rebuilt without running stored code, packed.pt2 and,
    asked for, packed.ts. Returns what is gained, as deploy.latency.gains() does. Raises ValueError where the network cannot be
    packed, or where the packed one has other outputs on test images.
    """
    images = next(iter(job.test))[0]
    example = images[: job.args.pack_batch]
    packed = pack(job.model, example, how=job.args.pack_how)
    difference = compare(job.model, packed, images)
    if not difference <= TOLERANCE:
        raise ValueError(f'the outputs of the packed network differ by {difference:.1e} of the largest')
    save(packed, job.folder / 'packed', example)
    write_pt2(packed, example, job.folder / 'packed.pt2')
    if job.args.torchscript:
        write_torchscript(packed, example, job.folder / 'packed.ts')
    result = gains(job.model, packed, example)
    say(
        '\n'.join(packed.meta['layers'])
        + f'\npacked: {result["small_parameters"]:,} of {result["dense_parameters"]:,} parameters, '
        + f'outputs equal to {difference:.0e} of the largest'
    )
    return result
