"""What each operation of ATen does to the shadows of its inputs: the rules by which ties.Channels walks through a network.

A rule takes (channels, node, arguments by name) and gives the shadow of the output (a list of them for several outputs), or
None:
then everything the operation reads stays. Operations that torch itself tags as pointwise need no rule of their own.
"""

import math

import torch
from torch import fx

from . import constants, moves
from .graph import functional, name_of, number_of, shape_of

SAME = 'contiguous clone alias detach lift_fresh_copy lift_fresh'.split()
SAME += 'dropout feature_dropout alpha_dropout feature_alpha_dropout'.split()
CASTS = 'to _to_copy type_as float double half bfloat16'.split()
POINTWISE = 'hardswish masked_fill prelu rsub log_sigmoid softsign celu clip square float_power leaky_relu'.split()
SUMMING = 'mean sum amax amin max min var std norm linalg_vector_norm logsumexp prod nansum'.split()
SOFTMAX = 'softmax log_softmax _softmax _log_softmax cumsum cumprod sort'.split()
SPATIAL = (
    'max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d'
    ' adaptive_avg_pool3d _adaptive_avg_pool2d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d'
    ' max_pool2d_with_indices max_pool3d_with_indices upsample_nearest1d upsample_nearest2d upsample_nearest3d'
    ' upsample_linear1d'
    ' upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d _upsample_nearest_exact2d reflection_pad1d reflection_pad2d'
    ' reflection_pad3d replication_pad1d replication_pad2d replication_pad3d _upsample_bilinear2d_aa'
).split()


def shadow_of(channels, node):
    """The shadow of an operation's output, or None where no rule knows it."""
    name = name_of(node)
    args = arguments(node)
    if name == 'getitem':
        parts = channels.shadow(node.args[0])
        return parts[node.args[1]] if isinstance(parts, list) else None
    if name in SAME or name in CASTS:
        return same(channels, node, args)
    rule = RULES.get(name) or (spatial if name in SPATIAL else None) or (reduced if name in SUMMING else None)
    rule = rule or (normalised if name in SOFTMAX else None) or moves.MOVES.get(name)
    if rule is None and is_pointwise(node):
        rule = pointwise
    return rule(channels, node, args) if rule is not None else None


def is_pointwise(node):
    """Whether an operation works element by element, as torch says by a tag that in-place operations do not always have."""
    tags = [getattr(target, 'tags', ()) for target in (node.target, functional(node.target))]
    return name_of(node) in POINTWISE or any(torch.Tag.pointwise in some for some in tags)


def arguments(node):
    """{name of the argument in ATen's schema: value}, with defaults; sizes as plain numbers, tensors as nodes."""
    schema = getattr(node.target, '_schema', None)
    if schema is None:
        return {}
    found = {}
    for i, argument in enumerate(schema.arguments):
        value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
        found[argument.name] = number_of(value)
    return found


def first(args):
    """The tensor that an operation works on."""
    return next((value for value in args.values() if isinstance(value, fx.Node)), None)


def same(channels, node, args):
    """Nothing happens in eval mode; a cast to whole numbers changes values."""
    source = first(args)
    value = node.meta.get('val')
    if not (torch.is_tensor(value) and value.is_floating_point()) and name_of(node) in CASTS:
        shadow = channels.shadow(source)
        return channels.each(node, [(shadow, shadow)], shadow.shape, constants.unknown)
    return channels.shadow(source)


# ---------------------------------------------------------------------------------------------------- element by element


def pointwise(channels, node, args):
    """Element by element, with broadcasting: equal sizes are tied, a size of one serves all."""
    sources = [value for value in args.values() if isinstance(value, fx.Node)]
    shape = shape_of(node)
    shadows = [channels.shadow(source) for source in sources]
    if any(shadow is None or isinstance(shadow, list) for shadow in shadows):
        return None
    if all(bool((shadow < 0).all()) for shadow in shadows):
        return torch.full([1] * len(shape), -1)
    sizes = [_lined_up(shape_of(source), len(shape)) for source in sources]
    if name_of(node) == 'prelu' and shape_of(sources[1]) != (1,):
        sizes[1] = (1, *shape_of(sources[1]), *[1] * (len(shape) - 2))
    seen = [shadow.reshape(_lined_up(shadow.shape, len(shape))) for shadow in shadows]
    if name_of(node) == 'prelu':
        seen[1] = shadows[1].view(1, -1, *[1] * (len(shape) - 2)) if len(shape) > 1 else shadows[1]
    out = [max(shadow.shape[d] for shadow in seen) for d in range(len(shape))]
    for d, size in enumerate(out):
        if size > 1 and any(own[d] == shape[d] and bool((shadow < 0).all()) for own, shadow in zip(sizes, seen, strict=True)):
            stranger = next(
                s for s, own, shadow in zip(sources, sizes, seen, strict=True) if own[d] == shape[d] and (shadow < 0).all()
            )
            for shadow in seen:
                channels.pin(shadow, node if stranger not in channels.origin else channels.origin[stranger])
    tied = [all(own[d] == shape[d] or out[d] == 1 for d in range(len(shape))) for own in sizes]
    function = constants.pointwise(node, args)
    result = channels.each(node, list(zip(seen, seen, strict=True)), out, function, tied=tied)
    moves.rectangle(channels, result)
    return result


def _lined_up(sizes, dims):
    """Sizes with leading ones, as broadcasting lines them up."""
    return (*[1] * (dims - len(sizes)), *sizes)


# ------------------------------------------------------------------------------------------------ channel by channel


def spatial(channels, node, args):
    """Over the positions of a channel: pooling, interpolation, padding. What it makes of a constant is tried."""
    source = first(args)
    shadow = channels.shadow(source)
    shape = shape_of(source)
    value = node.meta['val']
    out = shape_of(value if torch.is_tensor(value) else value[0])
    if len(out) != len(shape) or out[:2] != shape[:2] or any(size > 1 for size in shadow.shape[2:]):
        return None
    result = channels.each(node, [(shadow, shadow)], shadow.shape, constants.uniform(node, args, shape))
    return result if torch.is_tensor(value) else [result, *(torch.full([1] * len(out), -1) for _ in value[1:])]


def batch_norm(channels, node, args):
    """Scale and shift channel by channel. With a scale of zero it emits its shift, whatever its input."""
    source = args['input']
    dims = len(shape_of(args['input']))
    numbers = channels.along(source, 1)
    tensors = {key: channels.program.names.get(args[key]) for key in ('weight', 'bias', 'running_mean', 'running_var')}
    if any(args[key] is not None and tensors[key] is None for key in tensors):
        return None if shape_of(source)[0] == 1 else _derived_norm(channels, node, args, numbers)
    values = {key: channels.program.tensors[name].detach().double().cpu() for key, name in tensors.items() if name is not None}
    batch = args.get('training') or args.get('use_input_stats') or 'running_mean' not in values

    def function(c):
        scale = values.get('weight', torch.ones_like(c))
        shift = values.get('bias', torch.zeros_like(c))
        if batch:
            return torch.where(c.isnan() & (scale != 0), math.nan, shift)
        normed = (c - values['running_mean']) / (values['running_var'] + args['eps']).sqrt() * scale + shift
        return torch.where(scale == 0, shift, normed)

    out = channels.each(node, [(numbers, numbers)], numbers.shape, function, fed=lambda c: c)
    for name in tensors.values():
        if name is not None:
            channels.own(name, 0, out)
    return out.view(1, -1, *[1] * (dims - 2))


def _derived_norm(channels, node, args, numbers):
    """A batch norm whose scale or shift is computed: nothing is known of its constants."""
    out = channels.each(node, [(numbers, numbers)], numbers.shape, constants.unknown)
    for key in ('weight', 'bias', 'running_mean', 'running_var'):
        if args[key] is not None:
            shadow = channels.shadow(args[key])
            if shadow.numel() != len(out):
                channels.pin(out, node)
                channels.pin(shadow, node)
            else:
                channels.tie(shadow.flatten(), out)
                channels.depends(node, shadow.flatten(), out)
    return out.view(1, -1, *[1] * (len(shape_of(node)) - 2))


def normalised_whole(channels, node, args):
    """Layer and group norm: a channel that goes changes the mean of the others, so all stay."""
    shadow = channels.shadow(args['input'])
    for key in ('input', 'weight', 'bias'):
        if isinstance(args[key], fx.Node):
            channels.pin(channels.shadow(args[key]), node)
    return channels.each(node, [(shadow, shadow)], shadow.shape, constants.unknown)


def normalised(channels, node, args):
    """Softmax and sums along one dimension: where that is followed, all of it is needed."""
    shadow = channels.shadow(args['self'])
    shape = shape_of(args['self'])
    dim = args['dim'] % max(shadow.dim(), 1)
    function = constants.along(node, args, shape, dim) if shadow.shape[dim] == 1 else constants.unknown
    out = channels.each(node, [(shadow, shadow)], shadow.shape, function)
    moves.whole(channels, shadow, dim, node)
    if shadow.shape[dim] > 1:  # each depends on all, by way of their sum
        total = channels.new([1], torch.tensor([math.nan]))
        channels.depends(node, shadow.flatten(), total.expand(shadow.numel()))
        channels.depends(node, total.expand(out.numel()), out.flatten())
    value = node.meta['val']
    return out if torch.is_tensor(value) else [out for _ in value]


def reduced(channels, node, args):
    """Mean, sum, maximum over dimensions: those that are followed are needed whole."""
    source = args.get('self', args.get('input'))
    shadow = channels.shadow(source)
    shape = shape_of(source)
    value = node.meta['val']
    if not torch.is_tensor(value) and name_of(node) not in ('max', 'min'):
        return None
    dims = args.get('dim')
    if 'other' in args:
        return pointwise(channels, node, args)
    dims = [dims] if isinstance(dims, int) else list(range(len(shape))) if dims is None or dims == [] else dims
    dims = [d % len(shape) for d in dims]
    out_shape = [1 if d in dims else size for d, size in enumerate(shadow.shape)]
    for d in dims:
        moves.whole(channels, shadow, d, node)
    key = 'self' if 'self' in args else 'input'

    def function(c):
        if c.isnan().all():
            return torch.full(out_shape, math.nan, dtype=torch.float64)
        full = c.expand([shape[d] if d in dims else size for d, size in enumerate(shadow.shape)])
        result = constants.call(node.target, args | {key: full})
        result = result if torch.is_tensor(result) else result[0]
        return result.double().reshape(out_shape)

    out = (
        channels.each(node, [(shadow, shadow)], out_shape, function)
        if all(shadow.shape[d] == 1 for d in dims)
        else _merged(channels, node, shadow, out_shape, function)
    )
    if not args.get('keepdim', False):
        out = out.view([size for d, size in enumerate(out_shape) if d not in dims])
    return out if torch.is_tensor(value) else [out, torch.full([1] * out.dim(), -1)]


def _merged(channels, node, shadow, shape, function):
    """Several channels become one, which depends on all of them; they go and stay together."""
    out = channels.each(node, [(shadow, shadow[tuple(slice(0, size) for size in shape)])], shape, function)
    step = channels.steps[-1]
    source, target = torch.broadcast_tensors(shadow, out)
    channels.tie(source, target)
    channels.steps[-1] = step._replace(source=source.flatten(), target=target.flatten())
    return out


# ------------------------------------------------------------------------------------------------------- contractions


def convolution(channels, node, args):
    """A convolution: its filters are new channels; a depthwise one keeps those of its input."""
    source = args['input']
    weight = args['weight']
    swapped = 'transpose' in name_of(node) or bool(args.get('transposed'))
    groups = args['groups']
    shape = shape_of(source)
    filters = shape_of(node)[1]
    if len(shape) != len(shape_of(weight)) or swapped and groups > 1:
        return None
    inputs = channels.along(source, 1)
    tail = [1] * (len(shape) - 2)
    if weight not in channels.program.names:
        return _computed_weight(channels, node, args, inputs, filters)
    depthwise = groups == len(inputs) > 1 and len(inputs) <= filters and not swapped
    out = channels.mix(node, weight, args['bias'], inputs, groups, swapped or _pads(args, shape_of(weight)), swapped, depthwise)
    return out.view(1, -1, *tail)


def _computed_weight(channels, node, args, inputs, filters):
    """A convolution or linear layer whose weight is computed: its rows may go, all that it reads stays."""
    shadow = channels.shadow(args['weight'])
    dims = len(shape_of(args['input']))
    channels.pin(inputs, node)
    rows = shadow.numel() == shadow.shape[0] == filters and 'transpose' not in name_of(node) and args.get('groups', 1) == 1
    out = channels.new([filters], torch.full([filters], math.nan))
    if rows:
        channels.tie(shadow.flatten(), out)
        channels.depends(node, shadow.flatten(), out)
        dead = channels.constant(shadow.flatten()) == 0
        bias = args['bias']
        known = (
            channels.constant(channels.shadow(bias)).flatten()
            if bias is not None
            else torch.zeros(filters, dtype=torch.float64)
        )
        channels.constants[out] = torch.where(dead, known, math.nan)
    else:
        channels.pin(shadow, node)
        channels.pin(out, node)
    if args['bias'] is not None:
        channels.tie(channels.shadow(args['bias']).flatten(), out)
        channels.depends(node, channels.shadow(args['bias']).flatten(), out)
    out = out.view(-1, *[1] * (dims - 2))[None] if name_of(node) != 'linear' else out.view(*[1] * (dims - 1), -1)
    return out


def _pads(args, kernel):
    if isinstance(args['padding'], str):
        return args['padding'] == 'same' and any(size > 1 for size in kernel[2:])
    return any(args['padding'])


def linear(channels, node, args):
    """A linear layer over the last dimension."""
    source = args['input']
    weight = args['weight']
    bias = args['bias']
    dims = len(shape_of(args['input']))
    inputs = channels.along(source, dims - 1)
    if weight not in channels.program.names:
        return _computed_weight(channels, node, args, inputs, shape_of(node)[-1])
    return channels.mix(node, weight, bias, inputs).view(*[1] * (dims - 1), -1)


def product(channels, node, args):
    """x @ weight, and bias + x @ weight, with a weight [in, out]; between computed tensors, where one side is not followed."""
    one, other = ('mat1', 'mat2') if 'mat1' in args else ('self', 'mat2' if 'mat2' in args else 'other')
    one = args[one]
    other = args[other]
    dims = len(shape_of(one))
    bias = args['self'] if name_of(node) == 'addmm' else None
    if other in channels.program.names and len(shape_of(other)) == 2 and args.get('alpha', 1) == args.get('beta', 1) == 1:
        if any(size > 1 for size in channels.shadow(one).shape[:-1]) or bias is not None and len(shape_of(bias)) != 1:
            return None
        inputs = channels.along(one, dims - 1)
        return channels.mix(node, other, bias, inputs, swapped=True).view(*[1] * (dims - 1), -1)
    left = channels.shadow(one)
    right = channels.shadow(other)
    if bias is not None or dims != len(shape_of(other)) or dims < 2:
        return None
    if bool((left < 0).all()) and right.shape[-1] == right.numel():
        return channels.each(node, [(right, right)], right.shape, constants.zeros_only)
    if bool((right < 0).all()) and left.shape[-2] == left.numel():
        return channels.each(node, [(left, left)], left.shape, constants.zeros_only)
    return None


RULES = {
    **dict.fromkeys('conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution'.split(), convolution),
    **dict.fromkeys('batch_norm instance_norm'.split(), batch_norm),
    **dict.fromkeys('layer_norm group_norm rms_norm'.split(), normalised_whole),
    **dict.fromkeys('addmm mm matmul bmm'.split(), product),
    'linear': linear,
}
