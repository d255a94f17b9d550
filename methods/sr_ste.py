"""SR-STE, N:M sparsity trained from scratch (Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From
Scratch", ICLR 2021, arXiv 2102.04010).

In each group of M weights that follow one another along the input channels, the N of largest magnitude are kept, chosen anew in
each forward pass; the others are zero, and decayed (lambda = 2e-4):
forward   w m
gradient  g + lambda (1 - m) w,  g = dL/d(w m)
The share of zeros is 1 - N/M of the layers whose input channels (in each group of the convolution) are a multiple of M,
whatever --ptarget says; the others stay dense. With 2:4 the masks are those that PyTorch's semi-structured kernels take.

Deviations from the authors' code: linear layers are pruned, with the same N and M, and keep their biases; groups do not
straddle filters, as layers of other widths stay dense.
"""

import torch

from pruners.processes import say
from sparse_utils import attach, bake, layers_to_prune

from . import Method as Base
from ._flags import nonnegative, positive


def nm_mask(weight, n, m, dim=1):
    """Bool, True for exactly the n largest magnitudes in each group of m weights along `dim`, whose size is a multiple of m."""
    groups = weight.detach().abs().movedim(dim, -1).unflatten(-1, (-1, m))
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, groups.topk(n, sorted=False).indices, True)
    return mask.flatten(-2).movedim(-1, dim)


class _Refined(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, mask, decay):
        ctx.save_for_backward(weight, mask)
        ctx.decay = decay
        return weight * mask

    @staticmethod
    def backward(ctx, grad):
        weight, mask = ctx.saved_tensors
        return grad + ctx.decay * ~mask * weight, None, None


class NM(torch.nn.Module):
    """The parametrization of a layer's weight. dim: of its input channels."""

    def __init__(self, n, m, decay, dim):
        super().__init__()
        self.n = n
        self.m = m
        self.decay = decay
        self.dim = dim

    def forward(self, weight):
        return _Refined.apply(weight, nm_mask(weight, self.n, self.m, self.dim), self.decay)


def input_dim(layer):
    """The dimension of the weight that runs along the input channels: the first of a transposed convolution."""
    return 0 if getattr(layer, 'transposed', False) else 1


def divides(m, layer):
    """Whether the input channels of the layer, in each group of a convolution, are a multiple of m."""
    size = layer.weight.shape[input_dim(layer)]
    return size % m == 0 and (input_dim(layer) == 1 or size // layer.groups % m == 0)


class Method(Base):
    def __init__(self, args):
        super().__init__(args)
        if args.n >= args.m:
            raise ValueError(f'--n {args.n} of --m {args.m} weights are to be kept: it must be less')
        self.layers = {}

    @staticmethod
    def add_args(parser):
        add = parser.add_argument
        shown = ' (default: %(default)s)'
        add('--n', type=positive, default=2, metavar='N', help='N, weights kept of each M' + shown)
        add('--m', type=positive, default=4, metavar='M', help='M, weights in a group' + shown)
        add('--sparse-decay', type=nonnegative, default=2e-4, metavar='LAMBDA', help='lambda, decay of pruned weights' + shown)

    def prepare(self, model, steps, args):
        self.finalize(model)
        able = layers_to_prune(model, self.args.pthres)
        self.layers = {name: layer for name, layer in able.items() if divides(self.args.m, layer)}
        if not self.layers:
            raise ValueError(f'no layer has a multiple of {self.args.m} input channels: choose another --m')
        for layer in self.layers.values():
            attach(layer, NM(self.args.n, self.args.m, self.args.sparse_decay, input_dim(layer)))
        dense = [name for name in able if name not in self.layers]
        rest = f'; {", ".join(dense)} stay dense, their input channels being no multiple of {self.args.m}' if dense else ''
        say(f'{self.args.n}:{self.args.m} in {len(self.layers)} of {len(able)} layers, whatever --ptarget is{rest}')

    def finalize(self, model):
        bake(self.layers.values())
        self.layers = {}
        return model

    def facts(self):
        return {'pattern': f'{self.args.n}:{self.args.m}'}
