"""Rules for operations that move elements about and change none: they are performed on the shadow.

Where the model's own code takes sizes from its tensors, a smaller tensor goes through the same line. Two kinds of lines need
more: one that splits a dimension (a channel shuffle, `chunk`) wants equal parts, and one that names places (`x[:, 2]`) wants
the
dimension as it is.
"""

import math

import torch
from torch import fx

from . import constants
from .graph import number_of, shape_of


def followed(shadow, dimension, size):
    return shadow.shape[dimension] == size and bool((shadow >= 0).any())


def compact(shadow):
    """The same with size one along each dimension in which nothing changes."""
    for dimension, size in enumerate(shadow.shape):
        if size > 1:
            part = shadow.narrow(dimension, 0, 1)
            if bool((shadow == part).all()):
                shadow = part
    return shadow.contiguous()


def rectangle(channels, shadow):
    """Where several dimensions are followed, what is kept must be a rectangle: all but the longest stay whole."""
    long = [d for d, size in enumerate(shadow.shape) if size > 1]
    if len(long) > 1:
        free = max(long, key=lambda d: shadow.shape[d])
        channels.tie(shadow, shadow[tuple(slice(None) if d == free else slice(0, 1) for d in range(shadow.dim()))])


def whole(channels, shadow, dimension, node):
    """What lies along a dimension goes and stays together."""
    if shadow.shape[dimension] > 1:
        channels.tie(shadow, shadow.narrow(dimension, 0, 1))
        channels.reasons.append((shadow[shadow >= 0].unique(), node))


def expanded(shadow, shape, dimensions=None):
    """The shadow at its full size, along these dimensions or all."""
    dimensions = range(len(shape)) if dimensions is None else [d % len(shape) for d in dimensions]
    return shadow.expand([shape[d] if d in dimensions else size for d, size in enumerate(shadow.shape)])


def view(channels, node, args):
    """Dimensions are split or merged; where a followed one takes part, all of its group are."""
    source = args['self']
    before = shape_of(source)
    after = shape_of(node)
    shadow = channels.shadow(source)
    targets_in = list(shadow.shape)
    targets_out = [1] * len(after)
    split = False
    for ins, outs in _groups(before, after):
        if any(shadow.shape[d] > 1 for d in ins):
            for d in ins:
                targets_in[d] = before[d]
            for d in outs:
                targets_out[d] = after[d]
            split = split or sum(after[d] > 1 for d in outs) > 1
    result = compact(shadow.expand(targets_in).reshape(targets_out))
    if split or list(before) != list(after):
        channels.guesses[node] = shadow
    if split:
        rectangle(channels, result)
    return result


def _groups(before, after):
    """[(dimensions of the input, dimensions of the output)] that hold the same elements."""
    found = []
    i = 0
    j = 0
    while i < len(before) and j < len(after):
        ins = [i]
        outs = [j]
        one = before[i]
        other = after[j]
        i = i + 1
        j = j + 1
        while one != other:
            if one < other:
                ins = [*ins, i]
                one = one * before[i]
                i = i + 1
            else:
                outs = [*outs, j]
                other = other * after[j]
                j = j + 1
        found.append((ins, outs))
    if i < len(before):
        found.append((list(range(i, len(before))), []))
    if j < len(after):
        found.append(([], list(range(j, len(after)))))
    return found


def permute(channels, node, args):
    return node.target(channels.shadow(args['self']), *[number_of(a) for a in node.args[1:]], **number_of(dict(node.kwargs)))


def squeeze(channels, node, args):
    shadow = channels.shadow(args['self'])
    shape = shape_of(args['self'])
    dims = args.get('dim')
    dims = range(len(shape)) if dims is None else [dims] if isinstance(dims, int) else dims
    dims = [d % len(shape) for d in dims if shape[d] == 1]
    return shadow.reshape([size for d, size in enumerate(shadow.shape) if d not in dims])


def expand(channels, node, args):
    shadow = channels.shadow(args['self'])
    return shadow.reshape([*[1] * (len(shape_of(node)) - shadow.dim()), *shadow.shape])


def repeat(channels, node, args):
    """Copies side by side: along a dimension that is not followed nothing is to do."""
    shadow = channels.shadow(args['self'])
    shape = shape_of(args['self'])
    times = args['repeats'] if 'repeats' in args else args['dims']
    lead = [1] * (len(times) - len(shape))
    shadow = shadow.reshape([*lead, *shadow.shape])
    shape = (*lead, *shape)
    return shadow.repeat([t if followed(shadow, d, shape[d]) and shape[d] > 1 else 1 for d, t in enumerate(times)])


def joined(channels, node, args):
    """cat: along a followed dimension the channels line up; along another one, each channel goes on in the next tensor."""
    sources = args['tensors']
    dim = args['dim'] % len(shape_of(node))
    sources = [source for source in sources if shape_of(source) != (0,)]
    shadows = [channels.shadow(source) for source in sources]
    shapes = [shape_of(source) for source in sources]
    if any(shadow is None for shadow in shadows):
        return None
    apart = all(shadow.shape[dim] == shape[dim] for shadow, shape in zip(shadows, shapes, strict=True))
    apart = apart or any(shadow.shape[dim] == shape[dim] > 1 for shadow, shape in zip(shadows, shapes, strict=True))
    others = [max(shadow.shape[d] for shadow in shadows) if d != dim else 1 for d in range(len(shapes[0]))]
    for i, (source, shadow, shape) in enumerate(zip(sources, shadows, shapes, strict=True)):
        if bool((shadow < 0).all()):  # unknown: its channels are new ones, which stay
            sizes = [shape[d] if d == dim and apart else others[d] for d in range(len(shape))]
            shadows[i] = channels.new(sizes)
            channels.pin(shadows[i], channels.origin.get(source, source))
    if not apart:
        seen = [(shadow, shadow) for shadow in shadows]
        return channels.each(node, seen, others, constants.alike)
    parts = []
    for shadow, shape in zip(shadows, shapes, strict=True):
        parts.append(shadow.expand([shape[d] if d == dim else others[d] for d in range(len(shape))]))
    result = torch.cat(parts, dim)
    rectangle(channels, result)
    return result


def stacked(channels, node, args):
    """stack: a new dimension."""
    sources = args['tensors']
    dim = args['dim'] % len(shape_of(node))
    shadows = [channels.shadow(source) for source in sources]
    if any(shadow is None for shadow in shadows):
        return None
    shape = [max(sizes) for sizes in zip(*(shadow.shape for shadow in shadows), strict=True)]
    for i, (source, shadow) in enumerate(zip(sources, shadows, strict=True)):
        if bool((shadow < 0).all()):
            shadows[i] = channels.new(shape)
            channels.pin(shadows[i], channels.origin.get(source, source))
    result = torch.stack([shadow.expand(shape) for shadow in shadows], dim)
    for shadow in shadows:
        channels.tie(shadow, shadows[0])
    rectangle(channels, result)
    return result


def parts(channels, node, args):
    """chunk, split, unbind: equal parts must stay equal; others need the dimension as it is."""
    source = args['self']
    shadow = channels.shadow(source)
    dim = args['dim'] % len(shape_of(source))
    values = node.meta['val']
    removed = len(shape_of(values[0])) < len(shape_of(source))
    if shadow.shape[dim] == 1:
        one = shadow.squeeze(dim) if removed else shadow
        return [one for _ in values]
    if removed:
        whole(channels, shadow, dim, node)
        return [compact(part) for part in shadow.unbind(dim)]
    sizes = [shape_of(value)[dim] for value in values]
    _blocks(channels, node, shadow, dim, sizes)
    return list(shadow.split(sizes, dim))


def _blocks(channels, node, shadow, dim, sizes):
    """Parts of these sizes along a dimension: as many channels must stay in each, or all of them."""
    if len(set(sizes)) == 1 and shadow.numel() == shadow.shape[dim]:
        channels.blocks.append((node, shadow.reshape(len(sizes), -1)))
        channels.guesses[node] = shadow
    else:
        whole(channels, shadow, dim, node)


def sliced(channels, node, args):
    """x[:, start:end:step]: a half or a quarter of a dimension stays one; else the dimension is needed as it is."""
    source = args['self']
    shadow = channels.shadow(source)
    shape = shape_of(source)
    dim = args['dim'] % len(shape)
    out = shape_of(node)
    if shadow.shape[dim] == 1 or out[dim] == shape[dim]:
        return shadow
    size = shape[dim]
    length = out[dim]
    start = 0 if args.get('start') is None else args['start']
    start = max(start + size, 0) if start < 0 else min(start, size)
    step = args.get('step', 1)
    if length and step == 1 and size in (2 * length, 3 * length, 4 * length) and start % length == 0:
        _blocks(channels, node, shadow, dim, [length] * (size // length))
    else:
        whole(channels, shadow, dim, node)
    stop = start + length * step
    return shadow[tuple(slice(start, stop, step) if d == dim else slice(None) for d in range(len(shape)))]


def chosen(channels, node, args):
    """x[:, 3]: one place of a dimension, which is needed as it is."""
    shadow = channels.shadow(args['self'])
    dim = args['dim'] % len(shape_of(args['self']))
    if shadow.shape[dim] == 1:
        return shadow.squeeze(dim)
    whole(channels, shadow, dim, node)
    return compact(shadow.select(dim, args['index']))


def flipped(channels, node, args):
    return channels.shadow(args['self']).flip(args['dims'])


def moved(channels, node, args):
    """Any other move: performed on the shadow at full size. The followed dimensions are needed as they are, where it changes
    them."""
    source = args['self']
    shadow = channels.shadow(source)
    shape = shape_of(source)
    full = expanded(shadow, shape).contiguous()
    values = {}
    for name, value in args.items():
        values[name] = full if value is source else _values(channels, value)
        if values[name] is None and value is not None:
            return None
    result = compact(constants.call(node.target, values))
    if not torch.equal(result.flatten(), shadow.flatten()):
        for dimension in range(shadow.dim()):
            whole(channels, shadow, dimension, node)
    return result


def _values(channels, value):
    """Constant index tensors as they are; None where they are computed."""
    if isinstance(value, (list, tuple)):
        found = [part if part is None else _values(channels, part) for part in value]
        return None if any(part is not None and own is None for part, own in zip(value, found, strict=True)) else found
    if isinstance(value, fx.Node):
        name = channels.program.names.get(value)
        return None if name is None else channels.program.tensors[name].detach().cpu()
    return value


def padded(channels, node, args):
    """F.pad: zeros beside the positions of a channel make it vary; beside the channels they are channels of their own."""
    source = args['self']
    pad = args['pad']
    shadow = channels.shadow(source)
    shape = shape_of(source)
    sides = {len(shape) - 1 - i: (pad[2 * i], pad[2 * i + 1]) for i in range(len(pad) // 2)}
    beside = {d: side for d, side in sides.items() if shadow.shape[d] > 1 and any(side)}
    if not beside:
        if not any(any(side) for side in sides.values()):
            return shadow
        if all(d > 1 for d, side in sides.items() if any(side)) and all(size == 1 for size in shadow.shape[2:]):
            return channels.each(node, [(shadow, shadow)], shadow.shape, constants.uniform(node, args, shape))
        value = args.get('value') or 0.0
        return channels.each(node, [(shadow, shadow)], shadow.shape, lambda c: torch.where(c == value, c, math.nan))
    if args.get('mode', 'constant') != 'constant' or any(low < 0 or high < 0 for low, high in beside.values()):
        return None
    value = args.get('value') or 0.0
    if any(any(side) for d, side in sides.items() if d not in beside):
        shadow = channels.each(node, [(shadow, shadow)], shadow.shape, lambda c: torch.where(c == value, c, math.nan))
    for d, (low, high) in beside.items():
        rows = []
        for size in (low, high):
            sizes = [size if k == d else n for k, n in enumerate(shadow.shape)]
            rows.append(channels.new(sizes, torch.full(sizes, float(value))))
            channels.pin(rows[-1], node)
            if value == 0:
                channels.zeros.append(rows[-1])
        shadow = torch.cat([rows[0], shadow, rows[1]], d)
    return shadow


def pixel_shuffle(channels, node, args):
    """r * r neighbouring channels become one of r times the size: they go and stay together."""
    shadow = channels.shadow(args['self'])
    factor = args['upscale_factor']
    if shadow.numel() != shape_of(args['self'])[-3] or shadow.dim() != 4:
        return None
    blocks = shadow.view(-1, factor * factor)
    channels.guesses[node] = shadow
    channels.tie(blocks, blocks[:, :1])
    out = channels.each(
        node, [(blocks[:, k : k + 1], blocks[:, k : k + 1]) for k in range(factor * factor)], [len(blocks), 1], constants.alike
    )
    return out.view(1, -1, 1, 1)


def channel_shuffle(channels, node, args):
    shadow = channels.shadow(args['self'])
    groups = args['groups']
    if shadow.numel() != shadow.shape[1]:
        return None
    parts = shadow.view(groups, -1)
    channels.tie(parts, parts[:1])
    return parts.t().reshape(shadow.shape)


MOVES = {
    **dict.fromkeys('view reshape flatten unflatten _unsafe_view reshape_as view_as'.split(), view),
    **dict.fromkeys('permute transpose t numpy_T movedim moveaxis swapaxes swapdims unsqueeze'.split(), permute),
    **dict.fromkeys('expand expand_as broadcast_to'.split(), expand),
    **dict.fromkeys('repeat tile'.split(), repeat),
    **dict.fromkeys('cat concat concatenate'.split(), joined),
    **dict.fromkeys('chunk split split_with_sizes tensor_split unbind unsafe_chunk unsafe_split'.split(), parts),
    **dict.fromkeys('index index_select roll repeat_interleave narrow_copy rot90 pixel_unshuffle unfold im2col'.split(), moved),
    **dict.fromkeys('pad constant_pad_nd'.split(), padded),
    'squeeze': squeeze,
    'stack': stacked,
    'slice': sliced,
    'narrow': sliced,
    'select': chosen,
    'flip': flipped,
    'pixel_shuffle': pixel_shuffle,
    'channel_shuffle': channel_shuffle,
}
