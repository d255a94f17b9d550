"""Gradual magnitude pruning (Zhu and Gupta, "To prune, or not to prune", 2017; arXiv 1710.01878).

s_t = s_f + (s_i - s_f) (1 - (t - t0) / (n dt))^3 for t0 <= t <= t0 + n dt                                   (the paper's eq. 1)

t counts finished optimizer steps. Every dt = --frequency steps, and at the last step of the ramp whatever dt is, the weights of
smallest magnitude are masked; after the ramp the masks stay. A pruned weight has no gradient, no momentum and is exactly zero
after every step; it never returns. Selection is by index, so ties never change the count: with --scope global exactly
round(s n) of all n weights, with --scope layer min(round(s n), n - 1) of the n weights of each layer, with --scope erk
round(s n) of all, spread over the layers as _densities.py says.
--regrow is the non-sticky variant of ST-3's released code (its comparison prunes from epoch 5 to 80 of 160, the shares that are
the default here, with dt = 1): a layer computes with w * mask, its gradient is g * mask, w stays dense underneath and is what
is ranked, so weights return; and masks are renewed until training ends.
Deviation: the paper leaves the momentum of a pruned weight open; here it is cleared, or the weight would move.
"""

from ._densities import add_scope_flag
from ._flags import nonnegative, positive
from ._masks import SCOPES, Masking, magnitude_masks


def sparsity_at(step, start, end, initial, final):
    """The target share of zeros once `step` steps are done, by equation 1; `initial` before the ramp, `final` after it."""
    progress = min(max((step - start) / (end - start), 0.0), 1.0)
    return final + (initial - final) * (1 - progress) ** 3


class Method(Masking):
    FREQUENCY = 100
    RAMP = (1 / 32, 1 / 2)  # its default start and end, as shares of training

    def __init__(self, args):
        super().__init__(args)
        self.regrow = self.regrow or args.regrow
        self.start = args.epochs * self.RAMP[0] if args.start_epoch is None else args.start_epoch
        self.end = args.epochs * self.RAMP[1] if args.end_epoch is None else args.end_epoch
        if not self.start < self.end <= args.epochs:
            raise ValueError(f'the ramp must lie in the {args.epochs} epochs, but goes from {self.start:g} to {self.end:g}')
        if args.initial_sparsity > args.ptarget:
            raise ValueError(f'--initial-sparsity {args.initial_sparsity:g} is above --ptarget {args.ptarget:g}')

    @classmethod
    def add_args(cls, parser):
        cls.add_ramp_flags(parser)
        text = 'mask only the forward pass and the gradient, so that weights can return'
        parser.add_argument('--regrow', action='store_true', help=text)

    @classmethod
    def add_ramp_flags(cls, parser):
        add = parser.add_argument
        shown = ' (default: %(default)s)'
        start, end = (f' (default: {share:g} of the epochs)' for share in cls.RAMP)
        add('--frequency', type=positive, default=cls.FREQUENCY, metavar='STEPS', help='dt: steps between mask updates' + shown)
        add_scope_flag(parser, SCOPES)
        add('--initial-sparsity', type=nonnegative, default=0.0, metavar='SHARE', help='s_i, zeros at the start' + shown)
        add('--start-epoch', type=nonnegative, metavar='EPOCH', help='t0, where the ramp starts' + start)
        add('--end-epoch', type=nonnegative, metavar='EPOCH', help='t0 + n dt, where it ends' + end)

    def prepare(self, model, steps, args):
        super().prepare(model, steps, args)
        end = max(round(self.end / self.args.epochs * steps), 1)
        self.ramp = (min(round(self.start / self.args.epochs * steps), end - 1), end)
        self.update(0)

    def after_step(self, step, batch):
        self.update(step + 1)
        super().after_step(step, batch)

    def update(self, t):
        """Renew the masks, if that is due once t steps are done."""
        args = self.args
        start, end = self.ramp
        renewing = start <= t and (t < end or self.regrow)
        if t == end or renewing and (t - start) % args.frequency == 0:
            ratio = sparsity_at(t, start, end, args.initial_sparsity, args.ptarget)
            before = None if self.regrow else self.masks()
            self.set_masks(magnitude_masks(self.weights, ratio, args.scope, before))
