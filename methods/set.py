"""SET, sparse evolutionary training (Mocanu et al., "Scalable Training of Artificial Neural Networks with Adaptive Sparse
Connectivity inspired by Network Science", Nature Communications 2018, arXiv 1707.04780).

Training starts with random masks. After each epoch but the last, in each layer (algorithm 1 of the paper):
drop   the share zeta of the positive weights, and of the negative ones, that are nearest to zero (numbers rounded down)
grow   as many weights at random among all free places, those just dropped included; they start at 0 without momentum
So a layer always has the same number of weights. By default the last layer is dense, as in the authors' code.

Deviations from the authors' code: neither cut takes one weight more; the optimizer is not rebuilt each epoch, so that weights
that stay keep their momentum; densities are ERK's for a given share of zeros, exact in total, in place of eps = 20 (for linear
layers the same family). A weight that is still exactly zero, having had no gradient since it grew, is dropped too, as there.
At the end such a weight counts as a zero, so that a network with dead units can have a few zeros more than round(s n).
"""

import torch

from ._densities import add_flags
from ._flags import share
from .static import Method as Static


@torch.no_grad()
def survivors(weight, zeta):
    """The mask of the weights that are not dropped. weight: zero where it is pruned."""
    kept = (weight != 0).flatten()
    for signed in (weight.flatten(), -weight.flatten()):
        number = int(zeta * int((signed > 0).sum()))
        nearest = torch.where(signed > 0, signed, torch.inf).topk(number, largest=False).indices
        kept[nearest] = False
    return kept.view(weight.shape)


def grow(mask, number, generator):
    """The mask with `number` more places, drawn among those that are free."""
    free = (~mask).flatten().nonzero().flatten()
    chosen = free[torch.randperm(len(free), generator=generator)[:number].to(free.device)]
    return mask | torch.zeros_like(mask).flatten().index_fill_(0, chosen, True).view(mask.shape)


class Method(Static):
    def __init__(self, args):
        super().__init__(args)
        self.epochs = args.epochs

    @staticmethod
    def add_args(parser):
        add_flags(parser, dense=['last'])
        parser.add_argument('--zeta', type=share, default=0.3, help='share of the weights replaced each epoch (default: 0.3)')

    def prepare(self, model, steps, args):
        super().prepare(model, steps, args)
        self.epochs = args.epochs

    def after_epoch(self, epoch):
        if epoch + 1 < self.epochs:  # what grows after the last epoch would never be trained
            self.evolve(epoch)

    def evolve(self, epoch):
        masks = self.masks()
        open_layers = {name: mask for name, mask in masks.items() if not mask.all()}
        kept = {name: survivors(self.weights[name], self.args.zeta) for name in open_layers}
        self.set_masks(masks | kept)
        self.apply_to_all()  # also what comes back at once starts anew
        generator = torch.Generator().manual_seed(1000 * self.args.seed + epoch)
        grown = {name: grow(kept[name], int((mask & ~kept[name]).sum()), generator) for name, mask in open_layers.items()}
        self.set_masks(masks | grown)
