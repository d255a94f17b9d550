"""Feather (Glentis Georgoulakis, Retsinas, Maragos; BMVC 2023; arXiv 2310.02448). The mathematics is in sparse_utils.py.

Protocol of the authors' example, which the common defaults of args.py follow: 160 epochs, batch 128, SGD with momentum 0.9, lr
0.1 on a cosine per step, decay 5e-4 on weights alone, gradients clipped to norm 3. The threshold is recomputed at every step
and at the end of every epoch. Deviations: those named in sparse_utils.py.
"""

import math

from sparse_utils import Pruner, adaptive_loss, layers_to_prune

from . import Method as Base
from ._kernels import FastPruner, add_kernel_flag, as_begun, choose_kernels
from .asl import add_loss_args, threshold_groups


class Method(Base):
    def __init__(self, args):
        super().__init__(args)
        self.pruner = None
        self.kernels = False
        self.replays = args.backbone != 'asl'  # which has a loss of its own
        if not 0 <= args.t1 < args.ramp_end * args.epochs:
            end = args.ramp_end * args.epochs
            raise ValueError(f'--t1 {args.t1} is not before epoch {end:g}, where the ramp ends (--ramp-end times --epochs)')

    @staticmethod
    def add_args(parser):
        parser.add_argument(
            '--t1', type=int, default=0, metavar='EPOCH', help='epoch at which the ramp starts (default: %(default)s)'
        )
        parser.add_argument(
            '--ramp-end',
            type=float,
            default=0.5,
            metavar='SHARE',
            help='share of training after which the ramp has reached ptarget (default: %(default)s)',
        )
        parser.add_argument(
            '--p',
            type=exponent,
            default=3.0,
            help='exponent of the thresholding operator: 1 is soft, inf hard (default: %(default)s)',
        )
        parser.add_argument(
            '--theta', type=float, help='gradient scale of pruned weights (default: 0.5 above 95 %% sparsity, else 1)'
        )
        parser.add_argument(
            '--backbone',
            choices=['global', 'layerwise', 'asl'],
            default='global',
            help='one threshold for the network, the same ratio in each layer, or thresholds trained by Adaptive Sparsity Loss '
            '(default: %(default)s)',
        )

        add_loss_args(parser)
        add_kernel_flag(parser)

    def prepare(self, model, steps, args):
        if self.pruner is not None:
            self.pruner.desparsify()
        args = self.args
        able = args.p == 3 and args.backbone != 'asl'
        self.kernels = choose_kernels(args, layers_to_prune(model, args.pthres).values(), able)
        kind = FastPruner if self.kernels else Pruner
        self.pruner = kind(
            model,
            final_rate=args.ptarget,
            nbatches=steps // args.epochs,
            epochs=args.epochs,
            pthres=args.pthres,
            t1=args.t1,
            p=args.p,
            theta=args.theta,
            ramp_end=args.ramp_end,
            backbone=args.backbone,
            say=None,
        )

    def param_groups(self, model, args):
        groups = super().param_groups(model, args)
        return threshold_groups(groups, model, self.args) if self.args.backbone == 'asl' else groups

    def before_step(self, step):
        self.pruner.update_thresh()

    def loss(self):
        if self.args.backbone != 'asl':
            return None
        return self.args.lv * (adaptive_loss(self.pruner.model) - self.args.ptarget).square()

    def after_epoch(self, epoch):
        self.pruner.update_thresh(end_of_batch=True)

    def metrics(self):
        metrics = {'ratio': self.pruner.ratio}
        if self.args.backbone == 'global':  # the others have a threshold a layer
            metrics['threshold'] = self.pruner.threshold
        return metrics

    def finalize(self, model):
        return self.pruner.desparsify()

    def facts(self):
        return {'kernels': self.kernels}

    def state_dict(self):
        return self.pruner.state_dict() | {'kernels': self.kernels}

    def load_state_dict(self, state):
        kernels = as_begun(state.get('kernels', False), self.kernels)
        if self.kernels and not kernels:
            self.pruner.leave_kernels()
        self.kernels = kernels
        self.pruner.load_state_dict({name: value for name, value in state.items() if name != 'kernels'})


def exponent(text):
    value = float(text)
    if not value >= 1:
        raise ValueError
    return math.inf if math.isinf(value) else value
