"""What convolutions read, borders of zeros, and strides split into phases."""

import torch

from . import build
from .work import Made, Work

MOST_SPLIT = 1 << 18  # floats of an image's phases
MOST_BORDER = 3  # a border of zeros is at most so wide; other convolutions copy what they need


def split_strides(works, found):
    """The works with a step that splits the input into its phases before convolutions with strides small enough to gain."""
    split = {}  # by source and stride: the number of phases
    for work in works:
        if can_split(work):
            key = work.sources[0], work.step.stride_h, work.step.stride_w
            split[key] = max(split.get(key, 1), phases(work.step))
    made = {}
    result = []
    for work in works:
        if can_split(work):
            old = work.step
            key = work.sources[0], old.stride_h, old.stride_w
            if key not in made:
                made[key] = Made(f'phases of {work.name}')
                shape = torch.Size([old.images, old.channels * split[key], old.out_height, old.out_width])
                found[made[key]] = torch.empty(shape, device='meta')
                step = build.Step(kind=build.PHASES, phases=split[key])
                for name in build.INTEGERS:
                    setattr(step, name, getattr(old, name))
                result.append(Work(made[key], str(made[key]), work.sources[:1], work.shapes[:1], step, shape=shape))
            work.sources[0] = made[key]
            work.shapes[0] = found[made[key]].shape
            work.step.phases = split[key]
        result.append(work)
    return result


def borders_of(works):
    """{height and width: border of the tensors of that size}: as wide as the convolutions need that keep the size."""
    borders = {}
    for work in works:
        step = work.step
        if step is None or step.kind != build.CONV or step.mode:
            continue
        if step.phases or keeps_size(step) and step.height > 1:
            size = step.out_height, step.out_width
            borders[size] = max(borders.get(size, 0), reach(step))
    return {size: border for size, border in borders.items() if border <= MOST_BORDER}


def keeps_size(step):
    """Whether a convolution's output has the size of its input, pixel by pixel."""
    same = step.out_height == step.height and step.out_width == step.width
    return same and step.stride_h == step.stride_w == 1


def reach(step):
    """How far a convolution reads over the edge, in pixels of its output."""
    found = 0
    for letter in 'hw':
        kernel, stride, pad, dilation = (getattr(step, f'{name}_{letter}') for name in ('kernel', 'stride', 'pad', 'dilation'))
        found = max(found, -(-pad // stride), ((kernel - 1) * dilation - pad) // stride)
    return found


def phases(step):
    """Into how many phases a convolution with strides needs its input split: only one where each output reads one pixel."""
    return 1 if step.kernel_h == step.kernel_w == 1 and step.pad_h == step.pad_w == 0 else step.stride_h * step.stride_w


def can_split(work):
    """Whether a convolution has strides, its phases hold the whole input, and they fit into the second cache."""
    step = work.step
    if step is None or step.kind != build.CONV or step.mode or step.stride_h == step.stride_w == 1:
        return False
    whole = step.out_height * step.stride_h >= step.height and step.out_width * step.stride_w >= step.width
    floats = step.channels * phases(step) * step.out_height * step.out_width
    return whole and reach(step) <= MOST_BORDER and floats <= MOST_SPLIT


def plane_sizes(shape):
    """The fields of a step that copies a tensor: with four axes by planes, else an image at a time."""
    if len(shape) == 4:
        sizes = dict(zip(('images', 'channels', 'height', 'width'), shape, strict=True))
    else:
        inner = torch.Size(shape[1:]).numel()
        sizes = {'images': shape[0] if shape else 1, 'channels': 1, 'height': 1, 'width': inner}
    return sizes | {'out_height': sizes['height'], 'out_width': sizes['width'], 'filters': sizes['channels']}
