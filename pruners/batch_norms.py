"""Which batch norm follows which convolution."""

import itertools

import torch
from torch import nn

from deploy.graph import plain_copy
from deploy.live import norms_behind
from deploy.outputs import run
from deploy.ties import read_channels

SIZES = (32, 28, 64, 224)  # of images to try, where none is given
CONV = nn.modules.conv._ConvNd


def batch_norms(model: nn.Module, example_input: torch.Tensor | None = None) -> dict[str, str]:
    """{name of a convolution: name of the batch norm that takes its output, and nothing else, and is all that takes it}.

    Only batch norms with scale and shift count. example_input: what the model is called with; where none is given, zeros of a
    size that the model takes. Found as torch.export reads the network. Where it cannot be read: the batch norm that comes next
    among the modules without children, if its size fits.
    """
    modules = dict(model.named_modules())
    by_order = next_modules(model)
    if not by_order and not any(feeds(conv, norm) for conv in modules.values() for norm in modules.values()):
        return {}
    try:
        example = example_of(model) if example_input is None else example_input
        found = norms_behind(read_channels(model, example))
    except ValueError:
        return by_order
    return {conv: norm for conv, norm in found.items() if feeds(modules[conv], modules[norm])}


def example_of(model: nn.Module) -> torch.Tensor:
    """Zeros [1, C, ...] that the model takes. Raises ValueError where none of the usual sizes fits."""
    network = plain_copy(model)
    first = next(module for module in network.modules() if isinstance(module, CONV))
    for size in SIZES:
        example = first.weight.new_zeros(1, first.in_channels, *[size] * (first.weight.dim() - 2))
        try:
            run(network, example)
        except Exception:  # whatever its forward raises when it meets another size
            continue
        return example
    raise ValueError('the network takes images of no usual size')


def next_modules(model: nn.Module) -> dict[str, str]:
    """The same by the order of the modules alone."""
    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    norms = {}
    for (name, module), (next_name, next_module) in itertools.pairwise(leaves):
        if feeds(module, next_module):
            norms[name] = next_name
    return norms


def feeds(conv: nn.Module, norm: nn.Module) -> bool:
    """Whether the one is a convolution and the other a batch norm of its size, with scale and shift."""
    return (
        isinstance(conv, CONV)
        and isinstance(norm, nn.modules.batchnorm._BatchNorm)
        and norm.num_features == conv.out_channels
        and norm.affine
    )
