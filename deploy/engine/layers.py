"""Convolutions, linear layers and batch norms as steps of the engine. False: PyTorch does it."""

import torch

from . import build

MANY_TOKENS = 8  # from here on a linear layer runs as a 1x1 convolution over its tokens


def conv2d(lowering, node):
    arguments = lowering.arguments(node)
    source = arguments['input']
    weight = lowering.constant(arguments['weight'])
    bias = lowering.constant(arguments['bias'])
    padding = arguments['padding']
    if source in lowering.known or weight is False or bias is False or lowering.found[source].dim() != 4:
        return False
    stride = pair_of(arguments['stride'])
    dilation = pair_of(arguments['dilation'])
    kernel = list(weight.shape[2:])
    if isinstance(padding, str):
        total = [0 if padding == 'valid' else dilation[axis] * (kernel[axis] - 1) for axis in (0, 1)]
        padding = [amount // 2 for amount in total]  # what is missing behind is outside the image: zero
    fields = {'groups': arguments['groups']}
    for axis, letter in enumerate('hw'):
        pairs = {'kernel': kernel, 'stride': stride, 'pad': pair_of(padding), 'dilation': dilation}
        fields |= {f'{name}_{letter}': pair[axis] for name, pair in pairs.items()}
    work = lowering.step(node, build.CONV, source, lowering.layer(arguments['weight'], node), **fields)
    lowering.set_weight(work, weight, bias)
    return True


def conv1d(lowering, node):
    arguments = lowering.arguments(node)
    source = arguments['input']
    weight = lowering.constant(arguments['weight'])
    bias = lowering.constant(arguments['bias'])
    unusual = source in lowering.known or weight is False or bias is False or lowering.found[source].dim() != 3
    if unusual or isinstance(arguments['padding'], str):
        return False
    fields = {'kernel_w': weight.shape[2], 'groups': arguments['groups'], 'stride_w': pair_of(arguments['stride'])[0]}
    fields |= {'pad_w': pair_of(arguments['padding'])[0], 'dilation_w': pair_of(arguments['dilation'])[0]}
    shapes = {
        'height': 1,
        'width': lowering.found[source].shape[2],
        'out_height': 1,
        'out_width': lowering.found[node].shape[2],
    }
    work = lowering.step(node, build.CONV, source, lowering.layer(arguments['weight'], node), **fields | shapes)
    lowering.set_weight(work, weight, bias)
    return True


def conv_transpose2d(lowering, node):
    """A plain convolution with the kernel turned around, over the inputs with zeros spread between them."""
    arguments = lowering.arguments(node)
    source = arguments['input']
    weight = lowering.constant(arguments['weight'])
    bias = lowering.constant(arguments['bias'])
    if source in lowering.known or weight is False or bias is False or lowering.found[source].dim() != 4:
        return False
    groups = arguments['groups']
    stride = pair_of(arguments['stride'])
    dilation = pair_of(arguments['dilation'])
    per_group = weight.shape[1]
    turned = weight.flip(2, 3).unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    kernel = weight.shape[2:]
    padding = pair_of(arguments['padding'])
    before = [dilation[axis] * (kernel[axis] - 1) - padding[axis] for axis in (0, 1)]
    out = lowering.found[node].shape
    wide = [out[2 + axis] + dilation[axis] * (kernel[axis] - 1) for axis in (0, 1)]
    spread = Made(lowering.found[source].shape[:2] + torch.Size(wide))
    lowering.found[spread] = torch.empty(spread.shape, device='meta')
    lowering.consumers[spread] = 1
    name = lowering.layer(arguments['weight'], node)
    fields = {
        f'{key}_{letter}': pair[axis] for axis, letter in enumerate('hw') for key, pair in (('stride', stride), ('pad', before))
    }
    lowering.step(spread, build.SPREAD, source, f'{name} (zeros between inputs)', **fields)
    fields = {
        f'{key}_{letter}': pair[axis]
        for axis, letter in enumerate('hw')
        for key, pair in (('kernel', kernel), ('dilation', dilation))
    }
    work = lowering.step(node, build.CONV, spread, name, groups=groups, **fields)
    assert turned.shape[0] == per_group * groups
    lowering.set_weight(work, turned, bias)
    return True


def linear(lowering, node):
    arguments = lowering.arguments(node)
    source = arguments['input']
    weight = lowering.constant(arguments['weight'])
    bias = lowering.constant(arguments['bias'])
    if source in lowering.known or weight is False or bias is False:
        return False
    tokens = lowering.found[source].numel() // weight.shape[1]
    shapes = {'channels': weight.shape[1], 'filters': weight.shape[0], 'height': 1, 'out_height': 1}
    name = lowering.layer(arguments['weight'], node)
    if tokens < MANY_TOKENS:
        work = lowering.step(node, build.LINEAR, source, name, images=tokens, width=1, out_width=1, **shapes)
    else:
        work = lowering.step(node, build.CONV, source, name, images=1, width=tokens, out_width=tokens, mode=1, **shapes)
    lowering.set_weight(work, weight, bias)
    return True


def batch_norm(lowering, node):
    arguments = lowering.arguments(node)
    names = ('weight', 'bias', 'running_mean', 'running_var')
    gamma, beta, mean, variance = (lowering.constant(arguments[name]) for name in names)
    source = arguments['input']
    varying = any(value is False for value in (gamma, beta, mean, variance))
    if varying or arguments['training'] or mean is None or source in lowering.known:
        return False
    scale = (variance.double() + arguments['eps']).rsqrt() * (1 if gamma is None else gamma.double())
    shift = -mean.double() * scale + (0 if beta is None else beta.double())
    work = lowering.open(source, (build.CONV, build.LINEAR))
    if work is not None and len(work.sources) == 1 and lowering.found[source].shape[1] == len(scale) == len(work.weight):
        old = 0 if work.bias is None else work.bias.double()
        shape = [-1] + [1] * (work.weight.dim() - 1)
        lowering.set_weight(work, (work.weight.double() * scale.view(shape)).float(), (old * scale + shift).float())
        lowering.extend(work, node)
        return True
    if lowering.found[source].dim() > 4:
        return False
    work = lowering.step(node, build.POINTWISE, source, lowering.layer(arguments['weight'], node), mode=3)
    lowering.set_weight(work, scale.float(), shift.float())
    return True


class Made:
    """Stands for a value that is no node of the graph."""

    def __init__(self, shape):
        self.shape = shape


def pair_of(value):
    """(height, width) of an argument that may be one number."""
    values = [value] if isinstance(value, int) else list(value)
    return values * 2 if len(values) == 1 else values


OPERATIONS = {
    'conv2d': conv2d,
    'conv1d': conv1d,
    'conv_transpose2d': conv_transpose2d,
    'linear': linear,
    'batch_norm': batch_norm,
}
