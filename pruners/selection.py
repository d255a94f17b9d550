"""Which filters or weights go: those of the lowest scores, of a layer or of all layers.

They are chosen by index, so that ties never change a count.
"""

import math

import torch
from torch import nn

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
Scores = dict[str, torch.Tensor]  # {layer name: scores, [filters] or of the weight's shape}
Keep = dict[str, torch.Tensor]  # {layer name: bool tensor of the shape of its scores}, True for what is kept


def num_pruned(n: int, sparsity: float) -> int:
    """floor(n sparsity).

    A product within 1e-6 below a whole number is that number: 0.29 * 100 = 28.999999999999996 means 29.
    """
    return math.floor(n * sparsity + 1e-6)


def mark_lowest(scores: torch.Tensor, number: int) -> torch.Tensor:
    """A bool tensor of the shape of `scores`: True for its `number` lowest values; of equal ones the first are taken."""
    flat = scores.reshape(-1)
    if number <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    last = flat.kthvalue(number).values
    chosen = flat < last
    ties = (flat == last).nonzero().squeeze(1)
    chosen[ties[: number - int(chosen.sum())]] = True
    return chosen.view(scores.shape)


def pruned_first(scores: Scores, keep: Keep | None = None) -> Scores:
    """The scores in float, with minus infinity for what `keep` has pruned already, so that it is chosen first.

    Raises ValueError for a score that is not a number.
    """
    comparable = {}
    for name, score in scores.items():
        if bool(score.isnan().any()):
            raise ValueError(f'the importance of {name} is not a number: its weights or gradients hold NaN')
        if score.dtype in (torch.float16, torch.bfloat16):
            score = score.float()
        comparable[name] = score if keep is None else torch.where(keep[name], score, -math.inf)
    return comparable


@torch.no_grad()
def keep_by_layer(scores: Scores, sparsity: dict[str, float], previous: Keep | None = None) -> Keep:
    """Keep all but the num_pruned(n, share) lowest of the n scores of each layer, and at least one.

    sparsity: {name: share to prune}. previous: what is kept now; what it has pruned stays pruned, and counts.
    """
    keep = {}
    for name, score in pruned_first(scores, previous).items():
        n = score.numel()
        keep[name] = ~mark_lowest(score, min(num_pruned(n, sparsity[name]), n - 1))
    return both_keep(keep, previous)


@torch.no_grad()
def keep_globally(scores: Scores, sparsity: float, previous: Keep | None = None, sizes: dict[str, int] | None = None) -> Keep:
    """The same with one ranking of all layers: the lowest of all scores go, but each layer keeps its largest one.

    sparsity: a share of all scores. With sizes, {name: weights in a filter}, it is a share of the weights: the filters with
    the lowest scores go as long as they fit into it.
    """
    flat = {name: score.reshape(-1).clone() for name, score in pruned_first(scores, previous).items()}
    for score in flat.values():
        largest = (score == score.max()).nonzero()[-1]
        score[largest] = math.inf
    everything = torch.cat(list(flat.values()))
    if sizes is None:
        number = num_pruned(everything.numel(), sparsity)
    else:
        size = torch.cat([torch.full_like(score, sizes[name], dtype=torch.int64) for name, score in flat.items()])
        order = everything.argsort(stable=True)
        number = int((size[order].cumsum(0) <= num_pruned(int(size.sum()), sparsity)).sum())
    kept = ~mark_lowest(everything, min(number, everything.numel() - len(flat)))
    pieces = kept.split([score.numel() for score in flat.values()])
    keep = {name: piece.view(scores[name].shape) for name, piece in zip(flat, pieces, strict=True)}
    return both_keep(keep, previous)


def both_keep(keep: Keep, previous: Keep | None) -> Keep:
    """What both keep: more than was asked for may be pruned already."""
    return keep if previous is None else {name: kept & previous[name] for name, kept in keep.items()}


def num_filters(layer: nn.Module) -> int:
    """The filters of a convolution, rows of a matrix, or channels of a batch norm."""
    return getattr(layer, 'out_channels', len(layer.weight))


def filters_first(layer: nn.Module, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the shape of the layer's weight, with one index of dimension 0 for each filter.

    It is the tensor itself but for transposed convolutions, whose weight is [in, out / groups, ...].
    """
    if not isinstance(layer, TRANSPOSED):
        return tensor
    grouped = tensor.reshape(layer.groups, -1, *tensor.shape[1:])  # [groups, in / groups, out / groups, ...]
    return grouped.transpose(1, 2).reshape(layer.out_channels, -1, *tensor.shape[2:])


def expand_mask(kept: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """What is kept of a layer's filters, [out], or of its weights, as a bool mask of the weight's shape and memory layout."""
    weight = layer.weight
    if kept.dim() < weight.dim():
        if isinstance(layer, TRANSPOSED):
            kept = kept.view(layer.groups, 1, -1).expand(-1, layer.in_channels // layer.groups, -1).reshape(weight.shape[:2])
        kept = kept.view(*kept.shape, *[1] * (weight.dim() - kept.dim()))
    return torch.empty_like(weight, dtype=torch.bool).copy_(kept.expand(weight.shape))


def join_groups(values: dict[str, torch.Tensor], groups: list[list[str]]) -> dict[str, torch.Tensor]:
    """Let the layers of each group decide alike: {layer name: tensor [out]} -> the same, with one tensor for all of a group.

    Importance scores are averaged over the group, so that a layer of larger weights has more say. (NNI's dependency-aware
    pruners sum them, which ranks the filters of a group alike.) Bool masks (True: kept) are united: what one layer keeps
    cannot be removed from the stream. Layers that are in no group, and names of a group that are not in `values`, are left
    alone. Raises ValueError for a group whose tensors differ in shape.
    """
    joined = dict(values)
    for group in groups:
        members = [name for name in group if name in values]
        if len({values[name].shape for name in members}) > 1:
            raise ValueError(f'the layers {", ".join(members)} must have the same number of filters')
        if members:
            stacked = torch.stack([values[name] for name in members])
            together = stacked.any(0) if stacked.dtype == torch.bool else stacked.mean(0)
            joined |= {name: together.clone() for name in members}
    return joined


@torch.no_grad()
def even_scores(scores: Scores, parts: dict[str, int]) -> Scores:
    """Let equal parts of a layer's filters rank alike, so that about as many go in each: {layer name: scores [out]} -> the
    same.

    parts: {layer name: number of parts}, as deploy.even_parts() finds them: the groups of a grouped convolution lose as many
    filters each, or the fullest decides for all. The k-th lowest score of each part becomes their mean. Layers that are not in
    `parts`, and scores of weights, are left alone.
    """
    even = dict(scores)
    for name, number in parts.items():
        if name in scores and scores[name].dim() == 1 and len(scores[name]) % number == 0:
            values, order = scores[name].double().view(number, -1).sort(dim=1, stable=True)
            levels = values.mean(0, keepdim=True).expand_as(values).contiguous()
            even[name] = torch.empty_like(values).scatter_(1, order, levels).view(-1).to(scores[name].dtype)
    return even
