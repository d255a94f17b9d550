"""ST-3 and ST-3-sigma: "Are Straight-Through gradients and Soft-Thresholding all you need for Sparse Training?" (WACV 2023,
arXiv 2212.01076).

Every step computes with the soft-thresholded and rescaled weights, and updates the dense ones with the gradient of those:

forward:    w~ = s (w - sign(w) T) 1[|w| > T], s = 1.01 / (0.01 + (mean(|w| 1[|w| > T]) + 1e-6) / (mean|w| + 1e-6)) per filter
backward:   dL/dw = dL/dw~
threshold:  T is the quantile of all |w| together (ST-3), or std times that of |w| / std, std = 1 / sqrt(sum(weight.shape))
            (ST-3-sigma: the same ratio spread more evenly; the authors' std is not 1 / sqrt(fan-in), which it resembles)
ratio:      ptarget (1 - (1 - t)^3), set after each step, with t from 0 at epoch 5 to 1 at epoch 80 of 160 (ImageNet: 50 of 100)

Protocol on CIFAR, the defaults here: 160 epochs, batch 128, SGD 0.9, lr 0.1, divided by 10 at epochs 80 and 120, decay 1e-4 on
weights alone, gradients clipped to norm 3, crops padded with the edge's pixels; the last 5000 training images are set aside
(--val-size 5000), and ResNet-20 begins with 16 channels (--width 16). ImageNet: configs/st3/imagenet.yaml.

Deviations from the authors' code:
- training ends after --epochs: theirs runs 10 epochs more, and on ImageNet, where it rewinds, 210 instead of the paper's 100;
- the accuracy reported is that of the last epoch, not of the best validation epoch after 81;
- batch norm keeps PyTorch's momentum of 0.1: theirs sets 0.99, the last batch alone (--bn-momentum 0.99 for parity);
- thresholds are buffers, not parameters, so parameter counts stay; forward never waits for the GPU to read one;
- biases, padding modes, groups and dilation stay as they are in the layer, dropout is off in evaluation, tied weights count
  once, and MACs come from the real output shapes. A filter of a transposed convolution is an output channel too;
- sigma's thresholds are moved by a rounding error, so that they too prune exactly floor((n - 1) ptarget) + 1 of n weights.
"""

import argparse
import math

import torch
from torch import nn

from sparse_utils import attach, bake, global_threshold, layers_to_prune, next_threshold

from . import Method as Base
from ._kernels import add_kernel_flag, as_begun, choose_kernels, fast_soft_threshold, fast_threshold, lies_densely


def l1(weights: dict, ratio: float, previous: dict | None = None, find=global_threshold) -> dict:
    """ST-3's thresholds: {name: weight} -> {name: 0-d tensor}, one for all: see sparse_utils.global_threshold.

    floor((n-1)*ratio) + 1 of all n weights have |w| <= T, more only where magnitudes tie. previous: a guess, for speed.
    find: global_threshold(), or something faster with its results.
    """
    guess = next(iter(previous.values())) if previous else None
    return dict.fromkeys(weights, find(list(weights.values()), ratio, guess))


def l1std(weights: dict, ratio: float, previous: dict | None = None, find=global_threshold) -> dict:
    """ST-3-sigma's thresholds: as l1, of |w| / std with std = 1 / sqrt(sum(weight.shape)), times each layer's std again."""
    inverse_stds = torch.stack([weight.new_full((), inverse_std(weight)) for weight in weights.values()])
    guess = next(iter(previous.values())) * inverse_stds[0] if previous else None
    scaled = [weight.detach() * inverse for weight, inverse in zip(weights.values(), inverse_stds, strict=True)]
    limit = find(scaled, ratio, guess)
    return dict(zip(weights, largest_within(limit, inverse_stds), strict=True))


def inverse_std(weight: torch.Tensor) -> float:
    """1 / std."""
    return math.sqrt(sum(weight.shape))


def largest_within(limit: torch.Tensor, inverse_stds: torch.Tensor) -> torch.Tensor:
    """The largest T of each layer whose rounded T / std is within the limit: |w| <= T just where |w| / std <= limit."""
    threshold = limit / inverse_stds
    for _ in range(2):  # two floats up is beyond it, and four down again are enough
        threshold = threshold.nextafter(torch.full_like(threshold, math.inf))
    for _ in range(4):
        below = threshold.nextafter(torch.zeros_like(threshold))
        threshold = torch.where(threshold * inverse_stds > limit, below, threshold)
    return threshold


def soft_threshold(weight: torch.Tensor, threshold: torch.Tensor | float) -> torch.Tensor:
    """sign(w) (|w| - T) where |w| > T, else 0."""
    return weight.sign() * (weight.abs() - threshold).relu()


def rescaling(weight: torch.Tensor, threshold: torch.Tensor | float) -> torch.Tensor:
    """s of each filter, shape [filters, 1, ...]: 1.01 / (0.01 + (mean(|w| 1[|w| > T]) + 1e-6) / (mean|w| + 1e-6))."""
    dims = tuple(range(1, weight.dim()))
    kept = torch.where(weight.abs() > threshold, weight, 0).abs().mean(dims, keepdim=True)
    return 1.01 / (0.01 + (kept + 1e-6) / (weight.abs().mean(dims, keepdim=True) + 1e-6))


class _SoftThreshold(torch.autograd.Function):
    """rescaling(w, T) * soft_threshold(w, T) in one buffer.

    Memory traffic is the cost: a second buffer, or a mask of bools, more than doubles it.
    """

    @staticmethod
    def forward(ctx, weight, threshold, soft, rescale):
        dims = tuple(range(1, weight.dim()))
        kept = weight.abs()
        if rescale:
            dense_mean = kept.mean(dims, keepdim=True)
        kept.gt_(threshold).mul_(weight).abs_()  # |w| 1[|w| > T], and NaN where w is
        if rescale:
            share = (kept.mean(dims, keepdim=True) + 1e-6) / (dense_mean + 1e-6)
            scale = 1 + (1 - share) / (0.01 + share)  # = 1.01 / (0.01 + share), and exactly 1 where nothing is pruned
        if soft:
            kept.sub_(threshold).relu_()
        sparse = kept.copysign_(weight)
        return sparse.mul_(scale) if rescale else sparse

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None, None


def effective_weight(
    weight: torch.Tensor, threshold: torch.Tensor | float, soft: bool = True, rescale: bool = True
) -> torch.Tensor:
    """What a layer computes with under ST-3, of the weight's shape and dtype, with the gradient passed straight through.

    weight: [filters, ...]. threshold: T >= 0, a 0-d tensor on the weight's device or a float; 0 returns the weight unchanged.
    soft: subtract T from the magnitudes that are kept. rescale: restore each filter's mean magnitude, by up to 101 times.
    """
    if not torch.is_tensor(threshold):
        threshold = torch.tensor(threshold, dtype=weight.dtype, device=weight.device)
    return _SoftThreshold.apply(weight, threshold, soft, rescale)


class STEPrunedLayer(nn.Module):
    """effective_weight as a parametrization of a layer's weight.

    groups: those of a transposed convolution, else None. kernels: compute with compiled kernels where they can.
    """

    def __init__(self, soft=True, rescale=True, groups=None, kernels=False):
        super().__init__()
        self.soft = soft
        self.rescale = rescale
        self.groups = groups
        self.kernels = kernels
        self.register_buffer('threshold', torch.zeros(()))

    def forward(self, weight):
        if self.kernels and self.groups is None and lies_densely(weight):
            return fast_soft_threshold(weight, self.threshold, self.soft, self.rescale)
        sparse = _SoftThreshold.apply(self._swapped(weight), self.threshold, self.soft, self.rescale)
        return self._swapped(sparse)

    def _swapped(self, weight):
        """[in, out / groups, ...] <-> [out, in / groups, ...]: a transposed convolution has its filters second."""
        return weight if self.groups is None else weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)


def progress(done, start, end, power):
    """1 - (1 - t)^power after `done` steps, with t from 0 at `start` to 1 at `end`, in steps."""
    share = min(max((done - start) / (end - start), 0.0), 1.0)
    return 1 - (1 - share) ** power


class Method(Base):
    replays = True
    DEFAULTS = {
        'model': 'resnet20',
        'dataset': 'cifar10',
        'epochs': 160,
        'batch_size': 128,
        'lr': 0.1,
        'lr_schedule': 'multistep',
        'wd': 1e-4,
        'clip': 3.0,
        'pad_mode': 'edge',
    }

    def __init__(self, args):
        super().__init__(args)
        self.start = args.epochs / 32 if args.start_epoch is None else args.start_epoch
        latest = args.epochs / 2 if args.ramp else args.epochs  # without a ramp the end is not used
        self.end = latest if args.end_epoch is None else args.end_epoch
        if not 0 <= self.start < self.end <= args.epochs:
            raise ValueError(
                f'the ratio rises from epoch {self.start:g} to epoch {self.end:g} of {args.epochs}: '
                'choose 0 <= --start-epoch < --end-epoch <= --epochs'
            )
        if not args.power > 0:
            raise ValueError(f'--power must be positive, got {args.power:g}')
        self.criterion = l1std if args.sigma else l1
        self.kernels = False
        self.layers = {}
        self.weights = {}
        self.operators = {}
        self.ratio = 0.0

    @staticmethod
    def add_args(parser):
        add = parser.add_argument
        switch = argparse.BooleanOptionalAction
        add('--sigma', action=switch, default=False, help='ST-3-sigma: rank |w| in units of 1 / sqrt(sum(weight.shape))')
        epoch = {'type': float, 'metavar': 'EPOCH'}
        add('--start-epoch', **epoch, help='where the ramp starts (default: 1/32 of the epochs; the paper: 5 of 160)')
        add('--end-epoch', **epoch, help='where the ramp reaches ptarget (default: half of the epochs; the paper: 80 of 160)')
        add('--power', type=float, default=3.0, help='exponent of the ramp (default: %(default)g)')
        add('--soft', action=switch, default=True, help='soft thresholding, or hard (default: soft)')
        add('--rescale', action=switch, default=True, help="restore each filter's mean magnitude (default: yes)")
        add(
            '--ramp',
            action=switch,
            default=True,
            help='raise the ratio step by step, or at once at --start-epoch (default: ramp)',
        )
        add_kernel_flag(parser)

    def prepare(self, model, steps, args):
        self.finalize(model)  # of a stage before this one
        self.batches = steps / self.args.epochs
        self.layers = layers_to_prune(model, self.args.pthres)
        self.kernels = choose_kernels(self.args, self.layers.values())
        owners = {}  # a tied weight has one name, and the same threshold in all its layers
        for name, layer in self.layers.items():
            owner = owners.setdefault(id(layer.weight), name)
            groups = layer.groups if getattr(layer, 'transposed', False) else None
            operator = STEPrunedLayer(self.args.soft, self.args.rescale, groups, self.kernels).to(layer.weight)
            if owner == name:
                self.weights[name] = layer.weight
            self.operators.setdefault(owner, []).append(operator)
            attach(layer, operator)
        self.before = None
        self.update(0)

    def update(self, done):
        """The ratio, and the thresholds for the weights as they are, after `done` steps."""
        start = self.start * self.batches
        end = self.end * self.batches
        share = progress(done, start, end, self.args.power) if self.args.ramp else float(done >= start)
        self.ratio = self.args.ptarget * share
        first = next(iter(self.operators.values()))[0]
        guess = {'first': next_threshold(first.threshold, self.before)}
        self.before = first.threshold.clone()
        if self.ratio == 0:
            thresholds = dict.fromkeys(self.weights, 0.0)
        else:
            find = fast_threshold if self.kernels else global_threshold
            thresholds = self.criterion(self.weights, self.ratio, guess, find)
        for name, operators in self.operators.items():
            for operator in operators:
                operator.threshold.fill_(thresholds[name])

    def after_step(self, step, batch):
        self.update(step + 1)  # no weight changes from here to the next forward: after_epoch has nothing left to do

    def metrics(self):
        name, operators = next(iter(self.operators.items()))
        unit = inverse_std(self.weights[name]) if self.args.sigma else 1.0  # sigma: the threshold in units of std
        return {'ratio': self.ratio, 'threshold': operators[0].threshold.item() * unit}

    def finalize(self, model):
        bake(self.layers.values())
        self.layers = {}
        self.weights = {}
        self.operators = {}
        return model

    def facts(self):
        return {'kernels': self.kernels}

    def state_dict(self):
        return {'ratio': self.ratio, 'kernels': self.kernels}  # the thresholds are buffers of the model

    def load_state_dict(self, state):
        self.kernels = as_begun(state.get('kernels', False), self.kernels)
        for operators in self.operators.values():
            for operator in operators:
                operator.kernels = self.kernels
        self.ratio = state['ratio']
