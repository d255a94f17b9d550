"""FPGM, NNI's FPGMPruner: in each convolution those filters go whose Euclidean distances to all filters of the layer have the
smallest sum. They are nearest to the geometric median, so the others can best replace them (section 3.3).

He et al., "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration", CVPR 2019,
arXiv 1811.00250. Deviations: filters are pruned at once and for good, then the network is fine-tuned, as NNI does; the paper
prunes again in each epoch and lets pruned filters grow meanwhile, and its released code mixes in a norm criterion. Distances
are computed with matrix products in double precision, without a loop over filters.
"""

import torch

from pruners.compressor import FilterPruner

from ._one_shot import OneShot


class FPGMPruner(FilterPruner):
    """FPGMPruner(model, config_list, optimizer=None); config keys sparsity, op_types (of convolutions), op_names, exclude."""

    @staticmethod
    def score(weight: torch.Tensor) -> torch.Tensor:
        """sum_j ||w_i - w_j||, of each filter i over all filters j of its layer."""
        return distances(weight.flatten(1))


def distances(filters: torch.Tensor) -> torch.Tensor:
    """[F, D] -> [F]: the sum over j of ||f_i - f_j||.

    Computed in float64, as cancellation would spoil the distances of near filters.
    """
    wide = filters.double()
    return torch.cdist(wide, wide, compute_mode='use_mm_for_euclid_dist').sum(1).to(filters.dtype)


class Method(OneShot):
    PRUNER = FPGMPruner
