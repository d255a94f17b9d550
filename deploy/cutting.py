"""Cutting the modules of a network to the channels that stay."""

from typing import NamedTuple

import torch
from torch import nn

from .decisions import along
from .ties import Mix

# Attributes of layers that hold a number of channels: {attribute: (tensor, dimension)}.
CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Kept(NamedTuple):
    """What is left of a tensor: rows of dimension 0 and, unless None, columns of dimension 1 ([groups, in / groups] for a
    grouped convolution: those of each group that is left). Where `dimension` is not 0, the rows are those of that dimension."""

    rows: torch.Tensor
    columns: torch.Tensor = None
    dimension: int = 0


def take(tensor, kept):
    """The part of a tensor that stays."""
    rows = kept.rows.to(tensor.device)
    columns = kept.columns
    tensor = tensor.index_select(kept.dimension, rows)
    if columns is None:
        return tensor
    columns = columns.to(tensor.device)
    if columns.dim() == 1:
        return tensor.index_select(1, columns)
    parts = zip(tensor.chunk(len(columns)), columns, strict=True)
    return torch.cat([part.index_select(1, own) for part, own in parts])


@torch.no_grad()
def cut(network, decision):
    """Cut all parameters and buffers of a network, in place, to what a decision keeps -> {tensor name: Kept}.

    network: a copy of the one that was read. Tensors that stay whole are not in the result.
    """
    channels = decision.channels
    keep = decision.keep
    weights = dict(channels.weights)
    for reader in decision.readers:
        if not (keep[reader.filters].all() and keep[reader.inputs].all()):
            weights |= _absorb(network, decision, reader)
    kept = {}
    groups = {step.weight: step for step in channels.steps if isinstance(step, Mix)}
    for name, dimensions in weights.items():
        part = _kept_of(channels, keep, dimensions, groups.get(name))
        if part is not None:
            kept[name] = part
    for name, shadow in channels.bare.items():
        classes = channels.classes[shadow]
        if classes.dim() and not keep[classes].all():
            dimension = along(classes)
            rows = keep[classes].movedim(dimension, 0).flatten(1).all(1) if classes.dim() > 1 else keep[classes]
            kept[name] = Kept(rows.nonzero().view(-1), None, dimension)
    result = {}
    for name, part in kept.items():
        for alias in channels.program.aliases.get(name, [name]):
            if _replace(network, alias, part):
                result[alias] = part
    for name, dimensions in weights.items():
        for alias in channels.program.aliases.get(name, [name]):
            _set_sizes(network, alias, groups.get(name), dimensions, keep, channels.classes)
    return result


def _kept_of(channels, keep, dimensions, step):
    rows, columns = (keep[channels.classes[dimensions[d]]] if d in dimensions else None for d in (0, 1))
    if all(part is None or part.all() for part in (rows, columns)):
        return None
    kept_rows = None if rows is None else rows.nonzero().view(-1)
    if columns is None:
        return Kept(kept_rows)
    kept_columns = columns.nonzero().view(-1)
    if rows is None:
        return Kept(kept_columns, None, 1)
    if step is not None and step.groups > 1 and not step.depthwise:
        by_group = columns.view(step.groups, -1)
        kept_columns = torch.stack([group.nonzero().view(-1) for group in by_group[by_group.any(1)]])
    return Kept(kept_rows, kept_columns)


def _replace(network, name, part):
    """Cut one parameter or buffer -> whether it is there and any smaller."""
    owner, _, last = name.rpartition('.')
    module = network.get_submodule(owner)
    tensor = getattr(module, last)
    smaller = take(tensor.detach(), part)
    if smaller.shape == tensor.shape:
        return False
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        smaller = smaller.contiguous(memory_format=torch.channels_last)
    setattr(module, last, nn.Parameter(smaller, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else smaller)
    return True


def _set_sizes(network, name, step, dimensions, keep, classes):
    """Let the attributes of a layer (out_channels, in_features, num_features, groups, ...) say what its tensors are."""
    owner, _, last = name.rpartition('.')
    module = network.get_submodule(owner)
    counts = {d: int(keep[classes[numbers]].sum()) for d, numbers in dimensions.items()}
    if step is not None:
        made = counts.get(1 if step.swapped else 0)
        read = int(keep[classes[step.inputs]].sum())
        for attribute, value in (('out_channels', made), ('in_channels', read), ('out_features', made), ('in_features', read)):
            if attribute in vars(module):
                setattr(module, attribute, value)
        if step.groups > 1 and 'groups' in vars(module):
            alive = keep[classes[step.inputs]].view(step.groups, -1).any(1)
            module.groups = read if step.depthwise else int(alive.sum())
    elif last in ('weight', 'running_mean'):
        for attribute in ('num_features', 'num_parameters', 'num_channels'):
            if attribute in vars(module) and getattr(module, attribute) == len(dimensions[0]):
                setattr(module, attribute, counts[0])


def _absorb(network, decision, reader):
    """Let a layer do without the constants that are removed from its input: its bias makes up for them or, before zero
    padding, the weights on one constant that stays -> {name of a bias that had to be made: its channels}."""
    keep = decision.keep
    step = reader.step
    use = ~keep[reader.inputs] & (reader.constants != 0) & ~reader.constants.isnan()
    if not use.any():
        return {}
    module = network.get_submodule(step.weight.rpartition('.')[0])
    weight = getattr(module, step.weight.rpartition('.')[2])
    if reader.padded:
        _merge(weight, reader, use & reader.read(keep), keep)
        return {}
    added = decision.channels.sums(step, reader.constants, use).view(-1)
    if step.bias is None and not added.any():
        return {}
    if step.bias is None:
        module.bias = nn.Parameter(weight.new_zeros(len(added)), requires_grad=weight.requires_grad)
    bias = module.bias if step.bias is None else network.get_parameter(step.bias)
    bias.copy_(bias.double() + added.to(bias.device))
    return {f'{step.weight.rpartition(".")[0]}.bias': {0: step.out}} if step.bias is None else {}


def _merge(weight, reader, use, keep):
    """sum_i w_i c_i = (sum_i w_i c_i / c) c: the weights of removed constants c_i move to a constant c that stays."""
    groups = reader.groups
    weight = weight.transpose(0, 1) if reader.step.swapped else weight
    inputs, constants, use = (part.view(groups, -1) for part in (keep[reader.inputs], reader.constants, use))
    for group, rows in enumerate(weight.chunk(groups)):
        if use[group].any():
            c = constants[group]
            own = use[group].to(weight.device)
            carrier = int((c.nan_to_num(0.0).abs() * inputs[group]).argmax())
            share = (c[use[group]] / c[carrier]).to(weight.device)
            rows[:, carrier] += (rows[:, own].double() * share.view(1, -1, *[1] * (rows.dim() - 2))).sum(1)
