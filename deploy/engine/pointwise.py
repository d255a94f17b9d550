"""Sums, products, concatenations and activations as steps of the engine. False: PyTorch does it."""

import math

import torch

from . import build
from .work import Work


def add(lowering, node):
    arguments = lowering.arguments(node)
    one = arguments['self']
    other = arguments['other']
    if arguments['alpha'] != 1 or not lowering.same_shape(node, one, other):
        return False
    for first, second in ((other, one), (one, other)):
        work = lowering.open(first, (build.CONV, build.LINEAR, build.POINTWISE))
        fits = work is not None and len(work.sources) == 1 and lowering.root_of(first) is not lowering.root_of(second)
        if fits and work.step.kind == build.POINTWISE and work.step.mode != 3:
            continue
        if fits:
            if work.step.kind == build.POINTWISE:
                work.step.mode = 0
            lowering.works.remove(work)  # it runs where the sum was: the other summand may have been computed after it
            lowering.works.append(work)
            lowering.read(work, second)
            lowering.extend(work, node)
            return True
    work = lowering.pointwise(node, one, mode=0)
    lowering.read(work, other)
    return True


def mul(lowering, node):
    arguments = lowering.arguments(node)
    one = arguments['self']
    other = arguments['other']
    if lowering.same_shape(node, one, other):
        work = lowering.pointwise(node, one, mode=1)
        lowering.read(work, other)
        return True
    if not isinstance(other, torch.fx.Node) or not isinstance(one, torch.fx.Node) or {one, other} & lowering.known:
        return False
    small, large = sorted((one, other), key=lambda n: lowering.found[n].numel())
    shape = lowering.found[large].shape
    if len(shape) != 4 or lowering.found[large].shape != lowering.found[node].shape:
        return False
    if lowering.found[small].shape != (*shape[:2], 1, 1):
        return False
    work = lowering.step(node, build.POINTWISE, large, node.name, mode=2)
    lowering.read(work, small)
    return True


def cat(lowering, node):
    arguments = lowering.arguments(node)
    sources = [lowering.root_of(source) for source in arguments['tensors']]
    shapes = [lowering.found[source].shape for source in arguments['tensors']]
    ranks = {len(shape) for shape in shapes}
    if set(arguments['tensors']) & lowering.known or ranks != {len(lowering.found[node].shape)} or min(ranks) < 2:
        return False
    if arguments['dim'] % min(ranks) != 1 or not all(lowering.is_float(source) for source in arguments['tensors']):
        return False
    work = Work(node, node.name, sources, shapes, parts=True)
    lowering.works.append(work)
    return True


def activate(lowering, node, kind, low=0.0, high=0.0):
    source = node.args[0]
    if source in lowering.known:
        return False
    work = lowering.open(source, (build.CONV, build.LINEAR, build.POINTWISE, build.MEAN, build.MAX_POOL, build.AVERAGE_POOL))
    if work is None:
        work = lowering.pointwise(node, source)
    else:
        lowering.extend(work, node)
    work.step.activation = kind
    work.step.low = low
    work.step.high = high
    return True


def relu(lowering, node):
    return activate(lowering, node, build.CLAMP, 0, math.inf)


def relu6(lowering, node):
    return activate(lowering, node, build.CLAMP, 0, 6)


def hardtanh(lowering, node):
    arguments = lowering.arguments(node)
    return activate(lowering, node, build.CLAMP, arguments['min_val'], arguments['max_val'])


def leaky_relu(lowering, node):
    return activate(lowering, node, build.LEAKY, lowering.arguments(node)['negative_slope'])


def elu(lowering, node):
    arguments = lowering.arguments(node)
    plain = arguments['scale'] == 1 and arguments['input_scale'] == 1
    return plain and activate(lowering, node, build.ELU, arguments['alpha'])


def gelu(lowering, node):
    exact = lowering.arguments(node)['approximate'] == 'none'
    return activate(lowering, node, build.GELU if exact else build.GELU_TANH)


def hardswish(lowering, node):
    return activate(lowering, node, build.HARDSWISH)


def hardsigmoid(lowering, node):
    return activate(lowering, node, build.HARDSIGMOID)


def sigmoid(lowering, node):
    return activate(lowering, node, build.SIGMOID)


def silu(lowering, node):
    return activate(lowering, node, build.SILU)


def tanh(lowering, node):
    return activate(lowering, node, build.TANH)


OPERATIONS = {
    'add': add,
    'mul': mul,
    'cat': cat,
    'relu': relu,
    'relu6': relu6,
    'hardtanh': hardtanh,
    'leaky_relu': leaky_relu,
    'elu': elu,
    'gelu': gelu,
    'hardswish': hardswish,
    'hardsigmoid': hardsigmoid,
    'sigmoid': sigmoid,
    'silu': silu,
    'tanh': tanh,
}
