"""Pools, means and padding as steps of the engine. False: PyTorch does it."""

import torch

from . import build
from .layers import pair_of


def max_pool2d(lowering, node):
    return pool(lowering, node, build.MAX_POOL, 0)


def avg_pool2d(lowering, node):
    arguments = lowering.arguments(node)
    kernel = pair_of(arguments['kernel_size'])
    divisor = arguments['divisor_override'] or (kernel[0] * kernel[1] if arguments['count_include_pad'] else 0)
    return not arguments['ceil_mode'] and pool(lowering, node, build.AVERAGE_POOL, divisor)


def pool(lowering, node, kind, divisor):
    arguments = lowering.arguments(node)
    source = arguments['self']
    if source in lowering.known or lowering.found[source].dim() != 4:
        return False
    kernel = pair_of(arguments['kernel_size'])
    pairs = {'kernel': kernel, 'stride': pair_of(arguments['stride'] or kernel), 'pad': pair_of(arguments['padding'])}
    pairs['dilation'] = pair_of(arguments.get('dilation', 1))
    fields = {f'{name}_{letter}': pair[axis] for axis, letter in enumerate('hw') for name, pair in pairs.items()}
    lowering.step(node, kind, source, node.name, mode=divisor, **fields)
    return True


def adaptive_avg_pool2d(lowering, node):
    source = node.args[0]
    size = list(node.args[1])
    if source in lowering.known or lowering.found[source].dim() != 4:
        return False
    height, width = lowering.found[source].shape[2:]
    if size == [1, 1]:
        lowering.step(node, build.MEAN, source, node.name)
        return True
    if height % size[0] or width % size[1]:
        return False
    kernel = height // size[0], width // size[1]
    fields = {f'{name}_{letter}': kernel[axis] for axis, letter in enumerate('hw') for name in ('kernel', 'stride')}
    lowering.step(node, build.AVERAGE_POOL, source, node.name, mode=kernel[0] * kernel[1], **fields)
    return True


def mean(lowering, node):
    arguments = lowering.arguments(node)
    source = arguments['self']
    if (
        source in lowering.known
        or lowering.found[source].dim() != 4
        or arguments.get('dim') is None
        or arguments['dtype'] is not None
    ):
        return False
    if sorted(axis % 4 for axis in arguments['dim']) != [2, 3]:
        return False
    lowering.step(node, build.MEAN, source, node.name, out_height=1, out_width=1, filters=lowering.found[source].shape[1])
    return True


def pad(lowering, node):
    arguments = lowering.arguments(node)
    source = arguments['self']
    amounts = list(arguments['pad'])
    if source in lowering.known or lowering.found[source].dim() != 4 or len(amounts) > 4:
        return False
    amounts = amounts + [0] * (4 - len(amounts))
    mode = arguments.get('mode', 'constant')
    height, width = lowering.found[source].shape[2:]
    maps = [pad_map(height, *amounts[2:], mode), pad_map(width, *amounts[:2], mode)]
    work = lowering.step(node, build.PAD, source, node.name, low=arguments['value'] or 0.0)
    work.maps = [torch.tensor(values, dtype=torch.int32) for values in maps]
    return True


def pad_map(size, before, after, mode):
    """The input position of each padded position, -1 where a constant goes."""
    positions = range(-before, size + after)
    if mode == 'reflect':
        positions = [-p if p < 0 else 2 * (size - 1) - p if p >= size else p for p in positions]
    elif mode == 'replicate':
        positions = [min(max(p, 0), size - 1) for p in positions]
    elif mode == 'circular':
        positions = [p % size for p in positions]
    return [p if 0 <= p < size else -1 for p in positions]


OPERATIONS = {
    'max_pool2d': max_pool2d,
    'avg_pool2d': avg_pool2d,
    'adaptive_avg_pool2d': adaptive_avg_pool2d,
    'mean': mean,
    'pad': pad,
    'constant_pad_nd': pad,
}
