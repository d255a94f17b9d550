"""RigL (Evci, Gale, Menick, Castro, Elsen, "Rigging the Lottery: Making All Tickets Winners", ICML 2020, arXiv 1911.11134).

Training starts with random masks (ERK densities). At the steps t = 0, dt, 2 dt, ... <= T_end, in each layer (algorithm 1):
f(t) = alpha / 2 (1 + cos(pi t / T_end))                          the share that is replaced
drop the k = int(f nnz) weights of smallest magnitude; grow the k of largest |g| among all weights that are inactive then
g is the dense gradient of the batch's cross-entropy, at the masked weights. A weight dropped and grown in the same update
keeps its value and momentum, other new ones start at 0 without. The update takes the place of that batch's optimizer step.
A layer's number of weights never changes, so round(s n) of all n are zero (and what grew but had no gradient since, if there
are dead units). Defaults of the paper: alpha 0.3, dt 100, T_end 3/4 of training (25k of 32k steps on ImageNet, 75k of 97.7k on
CIFAR-10).

Deviations from the authors' code: no noise in the ranking, for which inactive weights never stand; the count is exact in total,
and --dense-layers sets the layers apart (see static.py).
"""

import math

import torch

from ._densities import add_flags
from ._flags import fraction, positive, share
from .static import Method as Static


def drop_share(t, end, alpha=0.3):
    """f(t)"""
    return alpha / 2 * (1 + math.cos(math.pi * t / end))


@torch.no_grad()
def rewire(weight, mask, gradient, k):
    """The mask without the k active weights of smallest magnitude, and then with the k inactive ones of largest |gradient|."""
    dropped = torch.where(mask, weight.abs(), torch.inf).flatten().topk(k, largest=False).indices
    new = mask.flatten().index_fill(0, dropped, False)
    grown = torch.where(new, -1, gradient.abs().flatten()).topk(k).indices
    return new.index_fill_(0, grown, True).view(mask.shape)


class Method(Static):
    @staticmethod
    def add_args(parser):
        add = parser.add_argument
        shown = ' (default: %(default)s)'
        add_flags(parser)
        add('--alpha', type=fraction, default=0.3, help='share of the weights replaced in the first update' + shown)
        add('--frequency', type=positive, default=100, metavar='STEPS', help='dt: steps between updates' + shown)
        add('--rewire-end', type=share, default=0.75, metavar='SHARE', help='T_end, as a share of training' + shown)

    def prepare(self, model, steps, args):
        super().prepare(model, steps, args)
        self.end = max(round(self.args.rewire_end * steps), 1)

    def after_backward(self, step, batch):
        if step % self.args.frequency == 0 and step <= self.end:
            self.update(drop_share(step, self.end, self.args.alpha))
            self.fit.optimizer.zero_grad()  # sets gradients to None: the optimizer then leaves all as it is
        super().after_backward(step, batch)

    def update(self, f):
        masks = self.masks()
        for name, weight in self.weights.items():
            if weight.grad is not None and not masks[name].all():
                masks[name] = rewire(weight, masks[name], weight.grad, int(f * int(masks[name].sum())))
        self.set_masks(masks)
