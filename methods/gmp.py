"""Gradual magnitude pruning (Zhu and Gupta, "To prune, or not to prune", 2017; arXiv 1710.01878).

s_t = s_f + (s_i - s_f) (1 - (t - t0) / (n dt))^3 for t0 <= t <= t0 + n dt                                    (the paper's eq. 1)

t counts finished optimizer steps. Every dt = --frequency steps, and at the last step of the ramp whatever dt is, the weights of
smallest magnitude are masked; after the ramp the masks stay. A pruned weight has no gradient, no momentum and is exactly zero
after every step; it never returns. Selection is by index, so ties never change the count: with --scope global exactly
round(s n) of all n weights, with --scope layer min(round(s n), n - 1) of the n weights of each layer.
--regrow is the non-sticky variant of ST-3's released code (its comparison prunes from epoch 5 to 80 of 160, the shares that are
the default here, with dt = 1): a layer computes with w * mask, its gradient is g * mask, w stays dense underneath and is what is
ranked, so weights return; and masks are renewed until training ends.
Deviation: the paper leaves the momentum of a pruned weight open; here it is cleared, or the weight would move.
"""

import torch

from sparse_utils import attach, bake, layers_to_prune

from . import Method as Base
from ._flags import nonnegative, positive


def sparsity_at(step, start, end, initial, final):
    """The target share of zeros once `step` steps are done, by equation 1; `initial` before the ramp, `final` after it."""
    progress = min(max((step - start) / (end - start), 0.0), 1.0)
    return final + (initial - final) * (1 - progress) ** 3


@torch.no_grad()
def magnitude_masks(weights, ratio, scope='global', previous=None):
    """{name: tensor} -> {name: bool mask}, False for the share `ratio` of smallest magnitude; exact counts as said above.

    previous: masks whose pruned weights are chosen first, so that none returns as long as `ratio` does not fall.
    """
    if not weights or not 0 <= ratio <= 1 or scope not in ('global', 'layer'):
        raise ValueError(f'needs weights, a ratio in [0, 1], scope global or layer; got {len(weights)}, {ratio}, {scope!r}')
    masks = {}
    for group in [weights] if scope == 'global' else [{name: weight} for name, weight in weights.items()]:
        ranks = [w.abs() if previous is None else torch.where(previous[name], w.abs(), -1) for name, w in group.items()]
        ranks = torch.cat([rank.reshape(-1) for rank in ranks])
        kept = max(ranks.numel() - round(ratio * ranks.numel()), int(scope == 'layer'))
        mask = torch.zeros_like(ranks, dtype=torch.bool).index_fill_(0, ranks.topk(kept, sorted=False).indices, True)
        for (name, w), part in zip(group.items(), mask.split([w.numel() for w in group.values()]), strict=True):
            masks[name] = torch.empty_like(w, dtype=torch.bool).copy_(part.view(w.shape))  # in the weight's memory layout
    return masks


class Masked(torch.nn.Module):  # a parametrization; the gradient is masked with it
    def __init__(self, mask):
        super().__init__()
        self.register_buffer('mask', mask, persistent=False)

    def forward(self, weight):
        return weight * self.mask


class Masking(Base):
    """What methods with masks share: a pruned weight has no gradient, no momentum, and is zero after every step."""

    regrow, fit = False, None
    layers, weights, factors = {}, {}, {}  # by name; factors are the masks as 0 and 1, which is fastest to multiply by

    def prepare(self, model, steps, args):
        self.finalize(model)
        self.layers = layers_to_prune(model, self.args.pthres)
        names = {layer.weight: name for name, layer in self.layers.items()}  # a tied weight counts once
        self.weights = {name: weight for weight, name in names.items()}
        self.factors = {name: torch.ones_like(weight).detach() for name, weight in self.weights.items()}
        for layer in self.layers.values() if self.regrow else ():
            attach(layer, Masked(self.factors[names[layer.weight]]))

    def attach(self, fit):
        self.fit = fit

    @torch.no_grad()
    def apply(self, tensors):
        """Multiply by the masks, in place: one tensor or None for each of the weights, in their order."""
        if pairs := [pair for pair in zip(tensors, self.factors.values(), strict=True) if pair[0] is not None]:
            torch._foreach_mul_(*map(list, zip(*pairs, strict=True)))

    def after_backward(self, step, batch):
        if not self.regrow:  # before clipping; alone it would not do, since momentum goes on moving the weights
            self.apply([weight.grad for weight in self.weights.values()])

    def after_step(self, step, batch):
        if not self.regrow:
            self.apply(self.weights.values())
            for key in ('momentum_buffer', 'exp_avg') if self.fit else ():  # of SGD and of Adam
                self.apply([self.fit.optimizer.state.get(weight, {}).get(key) for weight in self.weights.values()])

    def finalize(self, model):
        bake(self.layers.values())
        self.apply(self.weights.values())
        self.layers, self.weights, self.factors = {}, {}, {}
        return model

    def state_dict(self):
        return {'masks': {name: factor.bool() for name, factor in self.factors.items()}}

    def load_state_dict(self, state):
        for name, factor in self.factors.items():
            factor.copy_(state['masks'][name])
        if not self.regrow:
            self.apply(self.weights.values())


class Method(Masking):
    def __init__(self, args):
        super().__init__(args)
        self.regrow = args.regrow
        self.start = args.epochs / 32 if args.start_epoch is None else args.start_epoch
        self.end = args.epochs / 2 if args.end_epoch is None else args.end_epoch
        if not self.start < self.end <= args.epochs:
            raise ValueError(f'the ramp must lie in the {args.epochs} epochs, but goes from {self.start:g} to {self.end:g}')
        if args.initial_sparsity > args.ptarget:
            raise ValueError(f'--initial-sparsity {args.initial_sparsity:g} is above --ptarget {args.ptarget:g}')

    @staticmethod
    def add_args(parser):
        add, shown = parser.add_argument, ' (default: %(default)s)'
        add('--frequency', type=positive, default=100, metavar='STEPS', help='dt: steps between mask updates' + shown)
        add('--scope', choices=['global', 'layer'], default='global', help='rank all weights together, or by layer' + shown)
        add('--initial-sparsity', type=nonnegative, default=0.0, metavar='SHARE', help='s_i, zeros at the start' + shown)
        add('--start-epoch', type=nonnegative, metavar='EPOCH', help='t0, where the ramp starts (default: 1/32 of the epochs)')
        add('--end-epoch', type=nonnegative, metavar='EPOCH', help='t0 + n dt, where it ends (default: half of the epochs)')
        add('--regrow', action='store_true', help='mask only the forward pass and the gradient, so that weights can return')

    def prepare(self, model, steps, args):
        super().prepare(model, steps, args)
        end = max(round(self.end / self.args.epochs * steps), 1)
        self.ramp = min(round(self.start / self.args.epochs * steps), end - 1), end
        self.update(0)

    def after_step(self, step, batch):
        self.update(step + 1)
        super().after_step(step, batch)

    def update(self, t):
        """Renew the masks, if that is due once t steps are done."""
        (start, end), args = self.ramp, self.args
        if t == end or start <= t and (t < end or self.regrow) and (t - start) % args.frequency == 0:
            ratio = sparsity_at(t, start, end, args.initial_sparsity, args.ptarget)
            before = None if self.regrow else self.state_dict()['masks']
            self.load_state_dict({'masks': magnitude_masks(self.weights, ratio, args.scope, before)})
