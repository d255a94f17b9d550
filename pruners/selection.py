"""Which filters or weights go: the least scores of a layer or of all layers, chosen by index so that ties never change a count."""

import math

import torch


def num_pruned(n, sparsity):
    """floor(n sparsity); a product within 1e-6 below a whole number is that number, as 0.29 * 100 = 28.999999999999996 shows."""
    return math.floor(n * sparsity + 1e-6)


def least(scores, number):
    """Bool tensor of the shape of `scores`, True for its `number` least values; of equal ones the first go first."""
    flat = scores.reshape(-1)
    if number <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    last = flat.kthvalue(number).values
    chosen = flat < last
    ties = (flat == last).nonzero().squeeze(1)
    chosen[ties[: number - int(chosen.sum())]] = True
    return chosen.view(scores.shape)


def ranks(scores, keep=None):
    """{name: scores} in float, with minus infinity for what `keep` ({name: bool tensor}) has pruned already.

    Raises ValueError for a score that is not a number.
    """
    for name, score in scores.items():
        if bool(score.isnan().any()):
            raise ValueError(f'the importance of {name} is not a number: its weights or gradients hold NaN')
    scores = {
        name: score.float() if score.dtype in (torch.float16, torch.bfloat16) else score for name, score in scores.items()
    }
    return scores if keep is None else {name: torch.where(keep[name], score, -math.inf) for name, score in scores.items()}


@torch.no_grad()
def keep_by_layer(scores, sparsity, previous=None):
    """{name: scores}, {name: share to prune} -> {name: bool tensor}, False for the num_pruned(n, share) least of n scores.

    At least one of each layer is kept. previous: what is kept now, of the same form; what it has pruned is chosen first.
    """
    keep = {}
    for name, score in ranks(scores, previous).items():
        n = score.numel()
        keep[name] = ~least(score, min(num_pruned(n, sparsity[name]), n - 1))
    return keep


@torch.no_grad()
def keep_globally(scores, sparsity, previous=None, sizes=None):
    """The same with one ranking of all layers: False for the least of all scores, but each layer keeps its largest one.

    sparsity: a share of all scores. With sizes, {name: weights in a filter}, it is a share of the weights: the filters with the
    least scores go as long as they fit into it.
    """
    flat = {name: score.reshape(-1).clone() for name, score in ranks(scores, previous).items()}
    for score in flat.values():
        score[(score == score.max()).nonzero()[-1]] = math.inf  # the last one standing
    every = torch.cat(list(flat.values()))
    if sizes is None:
        number = num_pruned(every.numel(), sparsity)
    else:
        size = torch.cat([torch.full_like(score, sizes[name], dtype=torch.int64) for name, score in flat.items()])
        order = every.argsort(stable=True)
        number = int((size[order].cumsum(0) <= num_pruned(int(size.sum()), sparsity)).sum())
    kept = ~least(every, min(number, every.numel() - len(flat)))
    parts = kept.split([score.numel() for score in flat.values()])
    return {name: part.view(scores[name].shape) for name, part in zip(flat, parts, strict=True)}


def over(keep, weight):
    """What is kept of a weight's filters (1-d) or of its elements, as a bool mask of the weight's shape."""
    if keep.dim() < weight.dim():
        keep = keep.view(-1, *[1] * (weight.dim() - 1))
    return torch.empty_like(weight, dtype=torch.bool).copy_(keep.expand(weight.shape))  # in the weight's memory layout


def agree(values, groups):
    """Let the layers of each group decide alike: {layer name: tensor [out]} -> the same, with one tensor for all of a group.

    Importance scores are averaged over the group (NNI's dependency-aware pruners sum them, which ranks a layer's filters alike): a
    layer of larger weights has more say. Bool masks (True: kept) are
    united: what one layer keeps cannot be removed from the stream. Layers that are in no group, and names of a group that are
    not in `values`, are left alone. Raises ValueError for a group whose tensors differ in shape.
    """
    agreed = dict(values)
    for group in groups:
        members = [name for name in group if name in values]
        if len({values[name].shape for name in members}) > 1:
            raise ValueError(f'the layers {", ".join(members)} must have the same number of filters')
        if members:
            stacked = torch.stack([values[name] for name in members])
            together = stacked.any(0) if stacked.dtype == torch.bool else stacked.mean(0)
            agreed |= {name: together.clone() for name in members}
    return agreed
