"""What a set of masks leaves alive: dead filters and channels found from the masks alone, in milliseconds, without a forward.

    channels = read_channels(model, example_input)  # once
    masks = live_masks(channels, masks)             # as often as wanted
    dead = dead_norms(channels, masks)              # the batch norm channels that go with them

Dynamic Structure Pruning (Park et al., "Dynamic Structure Pruning for Compressing CNNs", AAAI 2023, arXiv 2303.09736) removes
filters that nobody reads and inputs that nobody feeds. Deviation from the authors' code, which looks for them by sending 125
batches of noise through the network in training mode for each setting it tries: the masks alone decide, without a forward.

A channel is fed while something that depends on the input reaches it, and read while something on the way to the output uses
it. Convolutions take part kernel by kernel, linear layers read and feed everything, a sum is fed while any summand is. The
batch
norm of a dead channel, and the bias of a dead filter, count as zero. One pass in each direction finds all, since what nobody
reads feeds nobody.
"""

import math

import torch

from .graph import name_of, owner_of
from .ties import Each, Mix


def convolutions(channels):
    """{name of a convolution: (filters, inputs of each, groups)}, those that masks can be given for, in order of execution."""
    steps = [step for step in channels.steps if _is_conv(step)]
    return {layer_of(step): (step.reads.shape[0] * step.reads.shape[1], step.reads.shape[2], step.groups) for step in steps}


def norms_behind(channels):
    """{name of a convolution: name of the batch norm that takes its output, and nothing else, and is all that takes it}.

    Transposed convolutions count, too.
    """
    names = channels.program.names
    found = {}
    norms = {step.node: norm_of(channels, step) for step in channels.steps if isinstance(step, Each) and is_norm(step)}
    convs = [node for node in channels.program.nodes if name_of(node).startswith('conv') and node.args[1] in names]
    weights = [names[node.args[1]] for node in convs]
    for node, weight in zip(convs, weights, strict=True):
        norm = norms.get(next(iter(node.users), None)) if len(node.users) == 1 else None
        if norm and weights.count(weight) == 1 and list(norms.values()).count(norm) == 1:
            found[weight.rpartition('.')[0]] = norm
    return found


def layer_of(step):
    """The name of the layer that a Mix step is."""
    return step.weight.rpartition('.')[0]


def _is_conv(step):
    return isinstance(step, Mix) and name_of(step.node).startswith('conv') and not step.swapped


def is_norm(step):
    return name_of(step.node) in ('batch_norm', 'instance_norm')


def norm_of(channels, step):
    """The name of the batch norm that a step is."""
    names = [channels.program.names[node] for node in step.node.all_input_nodes if node in channels.program.names]
    return names[0].rpartition('.')[0] if names else owner_of(step.node)


def live_masks(channels, masks):
    """Remove everything dead from the masks of convolutions.

    masks: {conv name: bool [out, in / groups], or with further dimensions of size 1}, True where the kernel is kept; a
    convolution that is not named keeps all of its kernels. Returns new masks of the same names and shapes, in which a kernel
    is True when it was True, its input channel is fed and its filter is read. Raises ValueError for a name that is no
    convolution, and for a wrong shape.
    """
    kept = _sweep(channels, _checked(channels, masks))[0]
    return {name: kept[name].view(mask.shape).to(mask.device) for name, mask in masks.items()}


def live_filters(channels, filters):
    """The same for whole filters: {conv name: bool [out]} -> {name of every convolution: bool [out]}."""
    given = {name: mask.cpu().view(-1, 1) for name, mask in filters.items()}
    return {name: mask.flatten() for name, mask in _sweep(channels, given)[0].items()}


def dead_norms(channels, masks):
    """{batch norm name: bool [channels]}, True where the channel is dead: nothing feeds it, or nobody reads it.

    masks: as for live_masks. All batch norms of the network are there, also those that follow no convolution.
    """
    _, fed, read = _sweep(channels, _checked(channels, masks))
    device = next((mask.device for mask in masks.values()), None)
    dead = {}
    for step in channels.steps:
        if isinstance(step, Each) and is_norm(step):  # one that is used twice is dead where it is dead in both uses
            numbers = step.out.flatten()
            name = norm_of(channels, step)
            dead[name] = ~(fed[numbers] & read[numbers]).to(device) & dead.get(name, torch.tensor(True, device=device))
    return dead


def _sweep(channels, masks):
    """({conv name: kept kernels [out, in / groups]}, fed, read: bool of all numbers)."""
    rules = _rules(channels)
    fed = torch.ones(channels.count, dtype=torch.bool)
    for shadow in channels.zeros:
        fed[shadow] = False
    for step, rule in zip(channels.steps, rules, strict=True):
        if rule == 'conv':
            fed[step.out] = _fed(step, _kernels(step, masks), fed[step.inputs].view(step.groups, 1, -1)).flatten()
        elif rule == 'all':
            fed[step.target[~fed[step.source]]] = False
        elif rule == 'any':
            fed[step.out] = False
            fed[step.target[fed[step.source]]] = True
    read = channels.pinned_numbers()
    kept = {}
    for step, rule in zip(reversed(channels.steps), reversed(rules), strict=True):
        if isinstance(step, Each):
            read[step.source[read[step.target]]] = True
        elif rule == 'conv':
            live = _kernels(step, masks) & (fed[step.out] & read[step.out]).view(step.groups, -1, 1)
            inputs = fed[step.inputs].view(step.groups, 1, -1)
            if live.shape[2] == 1:
                live = live & inputs.any(2, keepdim=True)
                wanted = live.any(1, keepdim=True) & inputs
            else:
                live = live & inputs
                wanted = live.any(1)
            name = layer_of(step)
            flat = live.flatten(0, 1)
            kept[name] = kept[name] | flat if name in kept else flat
            read[step.inputs[wanted.flatten()]] = True
        else:
            read[step.inputs] = True
    return kept, fed, read


def _rules(channels):
    """When each step feeds a channel: 'conv' by its kernels, when 'any' or 'all' of its inputs are fed, or 'always'."""
    if not hasattr(channels, 'feeding'):
        channels.feeding = [_rule(step) for step in channels.steps]
    return channels.feeding


def _rule(step):
    """Of a step that is no convolution, by what it makes of zeros."""
    if isinstance(step, Mix):
        return 'conv' if _is_conv(step) else 'always'
    zeros = [torch.zeros(shadow.shape, dtype=torch.float64) for shadow in step.inputs]
    if not bool((step.fed(*zeros) == 0).all()):
        return 'always'
    for i, zero in enumerate(zeros):
        if not bool((step.fed(*zeros[:i], torch.full_like(zero, math.nan), *zeros[i + 1 :]) == 0).all()):
            return 'always' if any(bool((shadow < 0).any()) for shadow in step.inputs) else 'any'
    return 'all'


def _fed(step, kernels, inputs):
    """Bool [groups, out / groups]: filters that have a kernel on a channel that is fed."""
    if kernels.shape[2] == 1:
        return (kernels & inputs.any(2, keepdim=True)).squeeze(2)
    return (kernels & inputs).any(2)


def _kernels(step, masks):
    """The mask of a convolution as [groups, out / groups, in / groups], or with a last size of 1 for whole filters."""
    mask = masks.get(layer_of(step))
    (groups, filters, _) = step.reads.shape
    return torch.ones(groups, filters, 1, dtype=torch.bool) if mask is None else mask.view(groups, filters, -1)


def _checked(channels, masks):
    """{conv name: bool [out, in / groups]} on the CPU, where the numbers are."""
    shapes = convolutions(channels)
    for name, mask in masks.items():
        if name not in shapes:
            raise ValueError(f'there is a mask for {name!r}, which is no convolution of the network')
        if tuple(mask.shape[:2]) != shapes[name][:2] or mask.numel() != shapes[name][0] * shapes[name][1]:
            raise ValueError(f'the mask of {name} has shape {list(mask.shape)}, its kernels are {list(shapes[name][:2])}')
    return {name: mask.reshape(mask.shape[:2]).cpu() for name, mask in masks.items()}
