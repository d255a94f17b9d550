"""Whether a layer computes with its weight as it is, so that a zero there is a zero in the computation."""

from torch import nn
from torch.nn.utils import parametrize

from sparse_utils import PRUNABLE, keeps_zeros

OTHER_NAMES = ('weight_orig', 'weight_g')  # of what torch.nn.utils.prune, spectral_norm and weight_norm compute `weight` from


def why_not_own(layer: nn.Module) -> str | None:
    """The reason why `weight` of a layer cannot be pruned, as the end of a sentence, or None where it can.

    Weights that parametrizations, weight_norm, spectral_norm or torch.nn.utils.prune compute are made anew in each forward
    pass; a layer such as timm's ScaledStdConv2d computes with something else than its weight.
    """
    if parametrize.is_parametrized(layer, 'weight'):
        return 'computes its weight by torch.nn.utils.parametrize: make it a plain layer first, or exclude it'
    for name in OTHER_NAMES:
        if name in layer._parameters:
            return f'computes its weight from {name}: make it a plain layer first, or exclude it'
    if not isinstance(layer._parameters.get('weight'), nn.Parameter):
        return 'has no weight to prune'
    own_forward = isinstance(layer, PRUNABLE) and not type(layer).__module__.startswith('torch.')
    if own_forward and not keeps_zeros(layer):
        return 'does not compute with its weight as it is, so zeros there would be none in the computation: exclude it'
    return None
