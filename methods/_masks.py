"""Masks that keep an exact number of weights, and what the methods that train with such masks share."""

import math

import torch

from pruners.momentum import MOMENTUM
from sparse_utils import attach, bake, global_threshold, layers_to_prune

from . import Method as Base
from ._densities import kept_counts

SCOPES = ('global', 'layer', 'erk')


@torch.no_grad()
def keep_largest(scores, kept):
    """{name: tensor} -> {name: bool mask}, True for the `kept` largest of all scores: by index, so ties never add one."""
    ranks = torch.cat([score.reshape(-1) for score in scores.values()])
    mask = torch.zeros_like(ranks, dtype=torch.bool)
    mask[ranks.topk(kept, sorted=False).indices] = True
    parts = mask.split([score.numel() for score in scores.values()])
    return {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}


@torch.no_grad()
def magnitude_masks(weights, ratio, scope='global', previous=None):
    """{name: tensor} -> {name: bool mask}, False for the share `ratio` of smallest magnitude.

    Exact counts of zeros: with scope global round(ratio n) of all n weights, with scope layer min(round(ratio n), n - 1) of
    the n weights of each layer, with scope erk round(ratio n) of all, spread over the layers as _densities.py says.
    previous: masks whose pruned weights are chosen first, so that none returns as long as `ratio` does not fall.
    """
    if not weights or not 0 <= ratio <= 1 or scope not in SCOPES:
        raise ValueError(f'needs weights, a ratio in [0, 1], a scope of {SCOPES}; got {len(weights)}, {ratio}, {scope!r}')
    if previous is not None:
        weights = {name: pruned_to_zero(weight, previous[name]) for name, weight in weights.items()}
    sizes = {name: weight.numel() for name, weight in weights.items()}
    if scope == 'global':
        total = sum(sizes.values())
        return keep_largest_magnitudes(weights, total - round(ratio * total), previous)
    if scope == 'layer':
        kept = {name: max(size - round(ratio * size), 1) for name, size in sizes.items()}
    else:
        survivors = None if previous is None else {name: int(mask.sum()) for name, mask in previous.items()}
        kept = kept_counts({name: weight.shape for name, weight in weights.items()}, ratio, 'erk', limits=survivors)
    masks = {}
    for name, weight in weights.items():
        before = None if previous is None else {name: previous[name]}
        masks |= keep_largest_magnitudes({name: weight}, kept[name], before)
    return masks


def pruned_to_zero(weight, mask):
    """The weight with zeros where the mask is False; the same tensor where they are there already, as a copy takes memory."""
    return torch.where(mask, weight, 0) if weight[~mask].any() else weight


def threshold_between(weights, kept):
    """A threshold above which the `kept` largest magnitudes of a list of tensors lie, or all but those that are equal to it."""
    total = sum(weight.numel() for weight in weights)
    if kept == total:
        return -1.0
    quantile = min((total - kept - 0.5) / max(total - 1, 1), 1)  # between the last that is pruned and the first that is kept
    return global_threshold(weights, quantile)


def keep_largest_magnitudes(weights, kept, previous=None):
    """{name: tensor} -> {name: bool mask}, True for the `kept` largest magnitudes of all; of equal ones, for the first.

    previous: masks; of equal magnitudes those that they keep come first. Needs little memory beside the masks.
    """
    threshold = threshold_between(list(weights.values()), kept)
    masks = {name: weight.abs() > threshold for name, weight in weights.items()}
    missing = kept - sum(int(mask.sum()) for mask in masks.values())
    return masks if missing == 0 else keep_equal(weights, threshold, masks, missing, previous)


def keep_equal(weights, threshold, masks, missing, previous):
    """Add to the masks `missing` of the weights whose magnitude equals the threshold, in the order that is said above."""
    for of_previous in [True, False] if previous is not None else [None]:
        for name, weight in weights.items():
            equal = weight.abs() == threshold
            if of_previous is not None:
                equal &= previous[name] == of_previous
            places = equal.flatten().nonzero().flatten()[:missing]
            masks[name] |= torch.zeros_like(equal).flatten().index_fill_(0, places, True).view(weight.shape)
            missing -= len(places)
    return masks


def random_masks(shapes, counts, generator, device):
    """{name: shape}, {name: count} -> {name: bool mask}, True at `count` random places, drawn on the CPU by `generator`."""
    masks = {}
    for name, shape in shapes.items():
        mask = torch.zeros(math.prod(shape), dtype=torch.bool)
        mask[torch.randperm(len(mask), generator=generator)[: counts[name]]] = True
        masks[name] = mask.view(shape).to(device)
    return masks


class Masked(torch.nn.Module):
    """A parametrization: the layer computes with weight * mask, and the gradient is masked with it."""

    def __init__(self, mask):
        super().__init__()
        self.register_buffer('mask', mask, persistent=False)

    def forward(self, weight):
        return weight * self.mask


class _PassThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, mask):
        return weight * mask

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class PassThrough(Masked):
    """A parametrization: the layer computes with weight * mask, and the gradient goes to the whole weight."""

    def forward(self, weight):
        return _PassThrough.apply(weight, self.mask)


class Masking(Base):
    """What methods with masks share: a pruned weight has no gradient, no momentum, and is zero after every step.

    regrow: instead, layers compute with `operator`(weight), and the dense weight stays underneath.
    """

    regrow = False
    operator = Masked
    replays = True

    def __init__(self, args):
        super().__init__(args)
        self.fit = None
        self.layers = {}  # by name; a tied weight has one name
        self.weights = {}
        self.factors = {}  # the masks as 0 and 1, which is fastest to multiply by

    def prepare(self, model, steps, args):
        self.finalize(model)
        self.layers = layers_to_prune(model, self.args.pthres)
        names = {layer.weight: name for name, layer in self.layers.items()}
        self.weights = {name: weight for weight, name in names.items()}
        self.factors = {name: torch.ones_like(weight).detach() for name, weight in self.weights.items()}
        if self.regrow:
            for layer in self.layers.values():
                attach(layer, self.operator(self.factors[names[layer.weight]]))

    def attach(self, fit):
        self.fit = fit

    @torch.no_grad()
    def apply(self, tensors):
        """Multiply by the masks, in place: one tensor or None for each of the weights, in their order."""
        pairs = [(tensor, factor) for tensor, factor in zip(tensors, self.factors.values(), strict=True) if tensor is not None]
        if pairs:
            torch._foreach_mul_([tensor for tensor, _ in pairs], [factor for _, factor in pairs])

    def apply_to_all(self):
        """Zero the pruned weights, and what the optimizer remembers of them."""
        self.apply(self.weights.values())
        if self.fit is not None:
            for key in (*MOMENTUM, 'exp_avg_sq'):
                self.apply([self.fit.optimizer.state.get(weight, {}).get(key) for weight in self.weights.values()])

    def after_backward(self, step, batch):
        if not self.regrow:  # before clipping; alone it would not do, since momentum goes on moving the weights
            self.apply([weight.grad for weight in self.weights.values()])

    def after_step(self, step, batch):
        if not self.regrow:
            self.apply_to_all()

    def finalize(self, model):
        bake(self.layers.values())
        if not self.regrow:
            self.apply(self.weights.values())
        self.layers = {}
        self.weights = {}
        self.factors = {}
        return model

    def masks(self):
        """{name: bool mask}"""
        return {name: factor.bool() for name, factor in self.factors.items()}

    def set_masks(self, masks):
        """{name: bool mask}, for each of the weights; pruned weights become zero."""
        for name, factor in self.factors.items():
            factor.copy_(masks[name])
        if not self.regrow:
            self.apply(self.weights.values())

    def state_dict(self):
        return {'masks': self.masks()}

    def load_state_dict(self, state):
        self.set_masks(state['masks'])
