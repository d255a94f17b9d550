"""Adaptive Sparsity Loss (Retsinas, Elafrou, Goumas, Maragos: "Weight Pruning via Adaptive Sparsity Loss", ICIP 2021, arXiv
2006.02768). One trained threshold r a layer, in standard deviations of its weights; the mathematics is in sparse_utils.py.

The loss is task + lv * L(s), with s_l = erf(r_l / sqrt 2) the analytic sparsity of layer l:
    fixed     mean over layers of (s_l - starget)^2
    adaptive  (S - starget)^2, S the mean of s_l weighted by layer size
    budget    relu(starget - S)
    flops     (S - starget)^2, S weighted by each layer's MACs; named by the paper, missing in its code
Protocol of the authors' example, which is DEFAULTS: WRN-16-8 on CIFAR-100, 60 epochs, batch 128, SGD with momentum 0.9, lr 0.1
on a cosine per epoch with one restart, decay 5e-4 on everything but r, whose learning rate is lr / 100.

The Gaussian assumption costs accuracy of the count: trained weights have heavier tails and more mass near zero than a Gaussian,
so the measured sparsity differs from the analytic one by a point or two, and the end is close to the target but not on it.
`--exact` closes the gap after the last epoch: all thresholds are scaled by one factor, such that
floor((n - 1) starget) + 1 of the n weights are zero.

Deviations from the authors' code: those named in sparse_utils.py; r is found by object and not by a ".r" in its name; the
initial r of frozen thresholds is sqrt(2) erfinv(starget), where their commented line would give erfinv(1 - starget).
"""

import torch

from sparse_utils import (
    adaptive_layers,
    adaptive_loss,
    count_macs,
    global_threshold,
    initial_thresh,
    iter_desparsify,
    iter_sparsify,
)

from . import Method as Base
from ._flags import fraction, nonnegative


class Method(Base):
    DEFAULTS = {
        'model': 'wrn16_8',
        'epochs': 60,
        'lr_restarts': 1,
        'lr_update': 'epoch',
        'wd_all': True,
        'clip': 0.0,
        'pthres': 1000,
        'ptarget': 0.9,
    }

    def __init__(self, args):
        super().__init__(args)
        self.model = None
        self.shares = None
        self.analytic = None
        self.steps_left = 0

    @staticmethod
    def add_args(parser):
        add = parser.add_argument
        add(
            '--sparsity',
            choices=['fixed', 'adaptive', 'budget', 'flops'],
            default='adaptive',
            help='the sparsity loss (default: %(default)s)',
        )
        add('--starget', dest='ptarget', type=fraction, help='another spelling of --ptarget')
        add_loss_args(parser)
        add('--no-trainable', dest='trainable', action='store_false', help='freeze the thresholds at the target')
        add('--exact', action='store_true', help='end on the exact count of zeros')

    def prepare(self, model, steps, args):
        iter_desparsify(model)
        target = self.args.ptarget
        thresh = initial_thresh(target, 0.6 if self.args.trainable else 1.0)
        iter_sparsify(model, thresh, self.args.trainable, self.args.pthres, say=None)
        self.model = model
        self.steps_left = steps

    def param_groups(self, model, args):
        return threshold_groups(super().param_groups(model, args), model, self.args)

    def attach(self, fit):
        if self.args.sparsity == 'flops':
            macs = count_macs(fit.model, fit.example)
            self.shares = torch.tensor([macs[name][0] for name in adaptive_layers(fit.model)], device=fit.example.device)
            self.shares = self.shares / self.shares.sum()

    def loss(self):
        if not self.args.trainable:
            return None
        target = self.args.ptarget
        layers = adaptive_loss(self.model, reduce=False)
        if self.args.sparsity == 'fixed':
            return self.args.lv * (layers - target).square().mean()
        overall = (layers * self.shares).sum() if self.args.sparsity == 'flops' else adaptive_loss(self.model)
        if self.args.sparsity == 'budget':
            return self.args.lv * torch.relu(target - overall)
        return self.args.lv * (overall - target).square()

    def after_step(self, step, batch):
        self.steps_left -= 1

    def after_epoch(self, epoch):
        self.analytic = adaptive_loss(self.model).item()
        if self.args.exact and self.steps_left <= 0:
            finish_exactly(self.model, self.args.ptarget)

    def metrics(self):
        return {'analytic_sparsity': self.analytic}

    def finalize(self, model):
        return iter_desparsify(model)

    def state_dict(self):
        return {'steps_left': self.steps_left, 'analytic': self.analytic}

    def load_state_dict(self, state):
        self.steps_left = state['steps_left']
        self.analytic = state['analytic']


def add_loss_args(parser):
    """Add the flags that every user of adaptive thresholds has."""
    add = parser.add_argument
    add('--lv', type=nonnegative, default=10.0, help='weight of the sparsity loss (default: %(default)s)')
    add('--r-lr', type=nonnegative, help='learning rate of the thresholds (default: lr / 100); short runs need a larger one')


def threshold_groups(groups, model, args):
    """Take the thresholds out of the parameter groups, into one of their own: --r-lr or lr / 100, no decay."""
    thresholds = [operator.r for operator, _ in adaptive_layers(model).values() if operator.r.requires_grad]
    own = {id(r) for r in thresholds}
    groups = [group | {'params': [p for p in group['params'] if id(p) not in own]} for group in groups]
    rate = args.lr / 100 if args.r_lr is None else args.r_lr
    groups.append({'params': thresholds, 'weight_decay': 0.0, 'lr': rate})
    return [group for group in groups if group['params']]


@torch.no_grad()
def finish_exactly(model, target):
    """Scale all thresholds by one factor c so that the count of zeros is exact, and write the zeros into the weights.

    With b_l the thresholds, c is the global quantile of |w| / b_l; a weight is pruned where |w| <= c b_l. The thresholds are
    then set to half of that, well away from every weight, so that no rounding can change the count.
    """
    layers = {
        name: (operator, model.get_submodule(name).parametrizations.weight.original)
        for name, (operator, _) in adaptive_layers(model).items()
    }
    relative = {name: weight / operator.threshold(weight) for name, (operator, weight) in layers.items()}
    factor = global_threshold(list(relative.values()), target)
    for name, (operator, weight) in layers.items():
        threshold = factor * operator.threshold(weight)
        weight.mul_(relative[name].abs() > factor)
        operator.r.copy_(((threshold / 2 - 1e-6) / weight.std()).clamp(0, 5))
