"""Running networks side by side: in eval mode, and how far their outputs are apart."""

import contextlib
import math

import torch
from torch.utils import _pytree as pytree

TOLERANCE = 1e-5  # of the largest output


@contextlib.contextmanager
def eval_mode(model):
    """The model in eval mode; afterwards each module has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:  # eval() is not there in a network read from a .pt2 file
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


def arguments(example_input):
    """(positional, by name) of an example: a tensor, or a tuple or dict of arguments."""
    if isinstance(example_input, dict):
        return (), example_input
    return (tuple(example_input), {}) if isinstance(example_input, (tuple, list)) else ((example_input,), {})


def change_tensors(function, example_input):
    """The same example with function(tensor) in the place of each tensor."""
    return pytree.tree_map(lambda value: function(value) if torch.is_tensor(value) else value, example_input)


def tensors_of(outputs):
    """All tensors of an output of any nesting, also of dataclasses with fields, in their order."""
    if hasattr(outputs, '__dataclass_fields__') and not isinstance(outputs, dict):
        outputs = [getattr(outputs, name) for name in outputs.__dataclass_fields__]
    return [value for value in pytree.tree_leaves(outputs) if torch.is_tensor(value)]


@torch.no_grad()
def run(model, example_input):
    """The tensors that a model puts out in eval mode; the example is left as it is."""
    args, kwargs = arguments(change_tensors(torch.clone, example_input))
    with eval_mode(model):
        return tensors_of(model(*args, **kwargs))


def noise_like(model, example_input):
    """Random numbers in the place of the example, which may be all zeros; or the example, if it is of whole numbers or the
    network wants another range."""
    generator = torch.Generator().manual_seed(0)

    def random(tensor):
        return torch.randn(tensor.shape, generator=generator).to(tensor) if tensor.is_floating_point() else tensor

    noise = change_tensors(random, example_input)
    finite = all(bool(tensor.isfinite().all()) for tensor in run(model, noise))
    return noise if finite else example_input


def compare(one, other, example_input):
    """The largest difference of two networks' outputs in eval mode, each as a share of the largest value of that output."""
    return difference(run(one, example_input), run(other, example_input))


def difference(expected, found):
    """The largest difference between two lists of tensors, as a share of each one's largest value; inf for other shapes.

    A tensor that is rounding noise throughout, next to the others, counts as 1e-6 of the largest: noise differs from noise.
    NaN where one of them holds it.
    """
    if not expected:
        raise ValueError('the network puts out no tensor')
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in found]:
        return math.inf
    sizes = [one.double().abs().max().item() if one.numel() else 0.0 for one in expected]
    least = max(1e-6 * max(sizes), 1e-30)
    worst = 0.0
    for one, other, size in zip(expected, found, sizes, strict=True):
        gap = (one.double() - other.double()).abs().max().item() if one.numel() else 0.0
        if math.isnan(gap):
            return gap
        worst = max(worst, gap / max(size, least))
    return worst
