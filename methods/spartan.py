"""Spartan (Tai, Tian, Lim, "Spartan: Differentiable Sparsity via Regularized Transportation", NeurIPS 2022, arXiv 2205.14107).

soft mask  m = sigmoid(beta |w| + mu), with mu such that sum m = k over all weights            (their cost vector is 1 here)
forward    w m, cut to the weights of largest |w|: exactly n - round(s n) of n
backward   through the soft mask, the cut being the identity: dL/dw = g m + sign(w) dv,
           dv = beta m (1 - m) (G - C),  G = g w,  C = sum(G m (1 - m)) / sum(m (1 - m))
g is the gradient of the weight that the layers compute with. The mask is renewed after each step; the share of zeros grows
linearly in the first 20 % of training, beta from 1 to 10 in the first 80 %; then the mask is frozen: m stays a factor of the
weights.

Deviations from the authors' code: the sum is k to 1e-6 of it (their Sinkhorn iteration stops at a change of 1 %, and gives .919
for |w| = .9, .5, .1, k = 1, beta = 20); biases and batch norms are not counted in the target; costs by FLOPs or blocks are left
out.
"""

import math

import torch

from ._flags import fraction, nonnegative
from ._masks import Masking, PassThrough, magnitude_masks


def soft_mask(weight, beta, mu):
    """m, of the weight's shape."""
    return torch.sigmoid(beta * weight.detach().abs() + mu)


def mask_gradient(mask, gradient, mean, beta):
    """dv from m, G and C: what raises one soft mask lowers the others, as their sum is k."""
    return beta * mask * (1 - mask) * (gradient - mean)


@torch.no_grad()
def find_mu(weights, beta, k, mu=0.0):
    """The mu for which the soft masks of a list of weights add up to k, above 0 and below their number.

    Newton's method from a guess, held in a bracket that each step narrows.
    """
    level = math.log(k / (sum(weight.numel() for weight in weights) - k))  # the answer where all weights are 0
    largest = float(torch.stack([weight.abs().max() for weight in weights]).max())
    low = level - beta * largest
    high = level
    mu = min(max(mu, low), high)
    for _ in range(100):
        excess = -k
        slope = 0.0
        for weight in weights:
            mask = soft_mask(weight, beta, mu)
            excess = excess + mask.sum(dtype=torch.float64)
            slope = slope + (mask * (1 - mask)).sum(dtype=torch.float64)
        excess = float(excess)
        slope = float(slope)
        if abs(excess) <= 1e-6 * k or high - low <= 1e-9 * max(1, abs(mu)):
            break
        low, high = (low, mu) if excess > 0 else (mu, high)
        newton = mu - excess / max(slope, 1e-30)
        mu = newton if low < newton < high else (low + high) / 2
    return mu


class Method(Masking):
    regrow = True
    operator = PassThrough

    @staticmethod
    def add_args(parser):
        add = parser.add_argument
        shown = ' (default: %(default)s)'
        add('--beta', type=nonnegative, default=10.0, help='sharpness of the mask at the end, from 1 at the start' + shown)
        add('--ramp-end', type=fraction, default=0.2, metavar='SHARE', help='of training, when ptarget is reached' + shown)
        add('--freeze', type=fraction, default=0.8, metavar='SHARE', help='of training, when the mask is frozen' + shown)

    def prepare(self, model, steps, args):
        super().prepare(model, steps, args)
        self.ramp_end = max(round(self.args.ramp_end * steps), 1)
        self.frozen_at = max(round(self.args.freeze * steps), self.ramp_end)
        self.mu = 0.0
        self.update(0)

    def update(self, t):
        """The mask for the weights as they are after t steps, until it is frozen."""
        if t > self.frozen_at:
            return
        self.beta = 1 + (self.args.beta - 1) * t / self.frozen_at
        ratio = self.args.ptarget * min(t / self.ramp_end, 1)
        masks = magnitude_masks(self.weights, ratio)
        total = sum(weight.numel() for weight in self.weights.values())
        self.soft = 0 < round(ratio * total) < total  # before anything is pruned, all factors are 1
        if self.soft:
            self.mu = find_mu(list(self.weights.values()), self.beta, total - round(ratio * total), self.mu)
        for name, factor in self.factors.items():
            factor.copy_(soft_mask(self.weights[name], self.beta, self.mu) * masks[name] if self.soft else masks[name])

    @torch.no_grad()
    def after_backward(self, step, batch):
        """From g, which the layers pass on, to the gradient through the soft mask, or through the factor it is once frozen."""
        trained = {name: weight for name, weight in self.weights.items() if weight.grad is not None}
        if step >= self.frozen_at or not self.soft:
            for name, weight in trained.items():
                weight.grad.mul_(self.factors[name])
            return
        above = 0.0
        below = 0.0
        for weight in trained.values():
            mask = soft_mask(weight, self.beta, self.mu)
            above = above + (weight.grad * weight * mask * (1 - mask)).sum()
            below = below + (mask * (1 - mask)).sum()
        for weight in trained.values():
            mask = soft_mask(weight, self.beta, self.mu)
            to_magnitude = mask_gradient(mask, weight.grad * weight, above / below, self.beta)
            weight.grad.mul_(mask).add_(weight.sign() * to_magnitude)

    def after_step(self, step, batch):
        self.update(step + 1)

    def metrics(self):
        return {'beta': self.beta, 'mu': self.mu}

    def state_dict(self):
        return {'factors': self.factors, 'beta': self.beta, 'mu': self.mu, 'soft': self.soft}

    def load_state_dict(self, state):
        self.beta = state['beta']
        self.mu = state['mu']
        self.soft = state['soft']
        for name, factor in self.factors.items():
            factor.copy_(state['factors'][name])
