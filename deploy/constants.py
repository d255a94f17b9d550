"""What operations make of constants: called on them, in double precision; NaN is a channel that is not constant."""

import math

import torch
from torch import fx

from .graph import name_of


def unknown(constants):
    """Whatever comes in, nothing is known of what comes out."""
    return torch.full_like(constants, math.nan)


def zeros_only(constants):
    """Only zeros stay what they are."""
    return torch.where(constants == 0, constants, math.nan)


def pointwise(node, args):
    """What the operation makes of constants; unknown stays unknown, but a product with zero is zero."""
    names = [name for name, value in args.items() if isinstance(value, fx.Node)]
    product = name_of(node) in ('mul', 'multiply')
    target = node.target
    prelu = name_of(node) == 'prelu'

    def function(*constants):
        shape = torch.broadcast_shapes(*(c.shape for c in constants))
        constants = [c.expand(shape) for c in constants]
        unknown = torch.stack([c.isnan() for c in constants]).any(0)
        if unknown.all() and not product:
            return torch.full(shape, math.nan, dtype=torch.float64)
        if prelu:
            result = torch.where(constants[0] < 0, constants[0] * constants[1], constants[0])
        else:
            given = {name: _typed(args[name], c.nan_to_num(0.0).clone()) for name, c in zip(names, constants, strict=True)}
            result = call(target, args | given).double()
        result = torch.where(unknown, math.nan, result)
        if product:
            zero = torch.stack([c == 0 for c in constants]).any(0)
            result = torch.where(zero, 0.0, result)
        return result

    return function


def _typed(node, values):
    """Numbers in the type of a traced tensor, where that is not a floating one."""
    dtype = node.meta['val'].dtype
    return values if dtype.is_floating_point else values.to(dtype)


def along(node, args, shape, dim):
    """constants -> what an operation over one dimension makes of them, NaN where that differs along the dimension."""

    def function(constants):
        full = constants.expand([shape[d] if d == dim else size for d, size in enumerate(constants.shape)])
        result = call(node.target, {name: full if isinstance(value, fx.Node) else value for name, value in args.items()})
        result = (result if torch.is_tensor(result) else result[0]).double()
        first = result.narrow(dim, 0, 1)
        even = ((result - first).abs() <= 1e-12 * first.abs()).all(dim, keepdim=True)
        return torch.where(even, first, math.nan)

    return function


def call(target, args):
    """An operation with its arguments by the names of the schema."""
    schema = target._schema.arguments
    args = {
        a.name: float(args[a.name]) if isinstance(args[a.name], bool) and 'Scalar' in str(a.type) else args[a.name]
        for a in schema
    }
    plain = [args[argument.name] for argument in schema if not argument.kwarg_only]
    named = {argument.name: args[argument.name] for argument in schema if argument.kwarg_only}
    return target(*plain, **named)


def uniform(node, args, shape):
    """constants -> what the operation makes of channels that hold them everywhere, NaN where that is not one number."""
    key = next(name for name, value in args.items() if isinstance(value, fx.Node))

    def function(constants):
        values = constants[~constants.isnan()].unique()
        if not len(values):
            return constants.clone()
        image = values.view(1, -1, *[1] * (len(shape) - 2)).expand(1, len(values), *shape[2:]).contiguous()
        others = {name: value for name, value in args.items() if not isinstance(value, fx.Node)}
        result = call(node.target, others | {key: image} | {n: None for n in args if n not in others and n != key})
        result = (result if torch.is_tensor(result) else result[0]).reshape(len(values), -1)
        spread = result.amax(1) - result.amin(1)  # a mean may be rounded
        even = torch.where(spread <= 1e-12 * result.abs().amax(1), result[:, 0], math.nan)
        places = torch.searchsorted(values, constants.nan_to_num(0.0)).clamp(max=len(values) - 1)
        return torch.where(constants.isnan(), math.nan, even[places])

    return function


def alike(*constants):
    constants = torch.broadcast_tensors(*constants)
    same = torch.stack([one == constants[0] for one in constants]).all(0)
    return torch.where(same, constants[0], math.nan)
