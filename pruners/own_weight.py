"""Whether a layer computes with its weight as it is, so that a zero there is a zero in the computation."""

import copy

import torch
from torch import nn
from torch.nn.utils import parametrize

OTHER_NAMES = ('weight_orig', 'weight_g')  # of what torch.nn.utils.prune, spectral_norm and weight_norm compute `weight` from


def why_not_own(layer: nn.Module) -> str | None:
    """The reason why `weight` of a layer cannot be pruned, as the end of a sentence, or None where it can.

    Weights that parametrizations, weight_norm, spectral_norm or torch.nn.utils.prune compute are made anew in each forward pass;
    a layer such as timm's ScaledStdConv2d computes with something else than its weight.
    """
    if parametrize.is_parametrized(layer, 'weight'):
        return 'computes its weight by torch.nn.utils.parametrize: make it a plain layer first, or exclude it'
    for name in OTHER_NAMES:
        if name in layer._parameters:
            return f'computes its weight from {name}: make it a plain layer first, or exclude it'
    if not isinstance(layer._parameters.get('weight'), nn.Parameter):
        return 'has no weight to prune'
    if not zeros_count(layer):
        return 'does not compute with its weight as it is, so zeros there would be none in the computation: exclude it'
    return None


def zeros_count(layer: nn.Module) -> bool:
    """Whether a weight of zero adds nothing to the output of a convolution or linear layer; True where that cannot be tried.

    A copy of the layer has a single weight that is not zero, so that an element of its output may depend on one element of the input.
    """
    if type(layer).__module__.startswith('torch.') or not isinstance(layer, (nn.modules.conv._ConvNd, nn.Linear)):
        return True
    try:
        probe = copy.deepcopy(layer).eval()
        with torch.enable_grad():
            probe.weight.data.zero_()
            probe.weight.data[(0,) * probe.weight.dim()] = 1
            x = example_of(probe).requires_grad_()
            output = probe(x)[0, 0].flatten()
            (gradient,) = torch.autograd.grad(output[len(output) // 2], x)
    except Exception:  # whatever a layer raises that wants other arguments
        return True
    return int(gradient.count_nonzero()) <= 1


def example_of(layer: nn.Module) -> torch.Tensor:
    """A small input for a convolution or linear layer."""
    if isinstance(layer, nn.Linear):
        return layer.weight.new_ones(1, layer.in_features)
    reach = [1 + dilation * (size - 1) for dilation, size in zip(layer.dilation, layer.kernel_size, strict=True)]
    return layer.weight.new_ones(1, layer.in_channels, *[size + 1 for size in reach])
