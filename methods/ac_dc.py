"""AC/DC (Peste, Iofinova, Vladu, Alistarh, "AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural Networks",
NeurIPS 2021, arXiv 2106.12379).

Training alternates between phases, which begin with an epoch (algorithm 1):
compressed    the round(s n) weights of n that have the smallest magnitude at its start are zero until its end
decompressed  all weights are trained; those that were pruned begin at 0, and all momentum at 0
It begins decompressed and ends compressed. The schedule of the learning rate knows nothing of the phases.
--phases are the shares of training at which the phase changes; by default those of the authors' CIFAR runs of 200 epochs,
compressed in epochs 10-29, 50-69, 90-109, 130-149 and 170-199. ImageNet, 100 epochs: 0.1 0.15 0.2 0.25 ... 0.65 0.7 0.75 0.85.
Deviations: exact counts (the authors keep one weight too few); in runs too short for a phase the last epoch is compressed.
"""

import torch

from pruners.momentum import momenta

from ._densities import add_scope_flag
from ._flags import fraction
from ._masks import SCOPES, Masking, magnitude_masks

PHASES = [0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85]


def is_compressed(epoch, epochs, phases=PHASES):
    """Whether epoch 0, 1, ... of `epochs` is compressed: an odd number of changes lies before it, or it is the last."""
    changes = sum(epoch >= share * epochs - 1e-9 for share in phases)
    return changes % 2 == 1 or epoch == epochs - 1


class Method(Masking):
    def __init__(self, args):
        super().__init__(args)
        if args.phases != sorted(args.phases) or len(args.phases) % 2 == 0:
            raise ValueError('--phases are rising shares of training, an odd number, as training ends compressed')

    @staticmethod
    def add_args(parser):
        text = f'when the phase changes, as shares of training (default: {" ".join(map(str, PHASES))})'
        parser.add_argument('--phases', type=fraction, nargs='+', default=PHASES, metavar='SHARE', help=text)
        add_scope_flag(parser, SCOPES)

    def prepare(self, model, steps, args):
        super().prepare(model, steps, args)
        self.batches = steps // args.epochs
        self.epochs = args.epochs

    def before_step(self, step):
        epoch = step // self.batches
        if step % self.batches == 0:
            before = epoch > 0 and is_compressed(epoch - 1, self.epochs, self.args.phases)
            now = is_compressed(epoch, self.epochs, self.args.phases)
            if now and not before:
                self.compress()
            if before and not now:
                self.decompress()

    def compress(self):
        self.set_masks(magnitude_masks(self.weights, self.args.ptarget, self.args.scope))
        self.apply_to_all()

    def decompress(self):
        self.set_masks({name: torch.ones_like(weight, dtype=torch.bool) for name, weight in self.weights.items()})
        optimizer = self.fit.optimizer
        for parameter in optimizer.state:  # all of them, batch norms included
            for momentum in momenta(optimizer, parameter):
                momentum.zero_()
