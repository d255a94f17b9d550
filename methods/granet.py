"""GraNet (Liu et al., "Sparse Training via Boosting Pruning Plasticity with Neuroregeneration", NeurIPS 2021,
arXiv 2106.10404).

Training starts with random ERK masks at sparsity s_i. After every dt = --frequency steps, t steps being done (algorithm 1):
prune    until t_f, the end of the ramp: the smallest weights of the whole network, to s(t) = s_f + (s_i - s_f) (1 - t / t_f)^3
rewire   until the end of training: in each layer drop the ceil(p nnz) smallest weights and grow as many of largest |g|, where
         g is the gradient of the step just done and p(t) = p_1 + (p_0 - p_1) / 2 (1 + cos(pi t / T)), p_0 = 0.5, p_1 = 0.005
A weight dropped and grown in one rewiring keeps value and momentum; one that pruning takes starts at 0 when it returns.
With s_i = 0 training starts dense. Authors: dt 1000 and t_f epoch 80 of 160 on CIFAR-10, 4000 and 30 of 100 on ImageNet.

Deviations from the authors' code: the last pruning is at t_f itself, rounded down to a multiple of dt, and leaves exactly
round(s n) zeros of all n weights, where theirs stops one update earlier; nothing is rewired after the last step, as what grows
would never be trained.
"""

import math

from ._densities import add_flags
from ._flags import fraction, positive, share
from .gmp import magnitude_masks, sparsity_at
from .rigl import rewire
from .static import Method as Static


def rewired_share(t, total, first=0.5, last=0.005):
    """p(t)"""
    return last + (first - last) / 2 * (1 + math.cos(math.pi * t / total))


class Method(Static):
    def __init__(self, args):
        super().__init__(args)
        if args.initial_sparsity > args.ptarget:
            raise ValueError(f'--initial-sparsity {args.initial_sparsity:g} is above --ptarget {args.ptarget:g}')
        self.gradients = {}

    @staticmethod
    def add_args(parser):
        add = parser.add_argument
        shown = ' (default: %(default)s)'
        add_flags(parser)
        add('--frequency', type=positive, default=1000, metavar='STEPS', help='dt: steps between updates' + shown)
        add('--initial-sparsity', type=share, default=0.5, metavar='SHARE', help='s_i, zeros at the start' + shown)
        add('--prune-end', type=fraction, default=0.5, metavar='SHARE', help='t_f, as a share of training' + shown)
        add('--rewire-first', type=share, default=0.5, metavar='SHARE', help='p_0' + shown)
        add('--rewire-last', type=share, default=0.005, metavar='SHARE', help='p_1' + shown)

    def draw(self, ratio):
        return super().draw(self.args.initial_sparsity)

    def prepare(self, model, steps, args):
        super().prepare(model, steps, args)
        self.steps = steps
        self.end = max(round(self.args.prune_end * steps), 1)
        self.end -= self.end % self.args.frequency if self.end >= self.args.frequency else 0

    def due(self, t):
        return t % self.args.frequency == 0 or t == self.end

    def after_backward(self, step, batch):
        if self.due(step + 1):  # before the masks are applied to the gradients
            self.gradients = {name: weight.grad.clone() for name, weight in self.weights.items() if weight.grad is not None}
        super().after_backward(step, batch)

    def after_step(self, step, batch):
        super().after_step(step, batch)
        t = step + 1
        if self.due(t):
            if t <= self.end:
                self.prune(sparsity_at(t, 0, self.end, self.args.initial_sparsity, self.args.ptarget))
            if t < self.steps:
                self.rewire(rewired_share(t, self.steps, self.args.rewire_first, self.args.rewire_last))
            self.gradients = {}

    def prune(self, ratio):
        self.set_masks(magnitude_masks(self.weights, ratio, previous=self.masks()))
        self.apply_to_all()

    def rewire(self, p):
        masks = self.masks()
        for name, gradient in self.gradients.items():
            active = int(masks[name].sum())
            if active < masks[name].numel():
                masks[name] = rewire(self.weights[name], masks[name], gradient, math.ceil(p * active))
        self.set_masks(masks)
        self.apply_to_all()
