"""FPGM, NNI's FPGMPruner (He et al., "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration",
CVPR 2019, arXiv 1811.00250): in each convolution those filters go whose Euclidean distances to all filters of the layer sum to
the least, as they are nearest to the geometric median and so best replaced by the others (section 3.3).

Deviations: pruned at once and for good, then fine-tuned, as NNI does; the paper repeats pruning each epoch and lets pruned
filters grow meanwhile, and its released code mixes in a norm criterion. Distances are computed with matrix products in double
precision, without a loop over filters.
"""

import torch

from pruners.compressor import FilterPruner

from ._one_shot import OneShot


class FPGMPruner(FilterPruner):
    """FPGMPruner(model, config_list, optimizer=None); config keys sparsity, op_types (Conv2d), op_names, exclude."""

    @staticmethod
    def scores(weights):
        """The sum of the distances of each filter to all filters of its layer."""
        return {name: distances(weight.flatten(1)) for name, weight in weights.items()}


def distances(filters):
    """[F, D] -> [F]: the sum over j of ||f_i - f_j||. In float64 inside, or cancellation would spoil distances of near filters."""
    wide = filters.double()
    return torch.cdist(wide, wide, compute_mode='use_mm_for_euclid_dist').sum(1).to(filters.dtype)


class Method(OneShot):
    PRUNER = FPGMPruner
