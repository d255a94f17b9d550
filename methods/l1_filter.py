"""L1 filter pruning, NNI's L1FilterPruner: in each convolution the filters with the smallest sum of absolute weights go, at
once; then the network is fine-tuned.

Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, arXiv 1608.08710. Deviations: filters, their biases and batch
norms are set to zero; the paper removes them, and the kernels of the next layer that read them. What the network computes is
the same, since a pruned filter's output is zero. The paper prunes the layers of a stage alike and spares sensitive ones: use
several entries, or --layers and --exclude. Residual blocks are not treated apart.
"""

import torch

from pruners.compressor import FilterPruner

from ._one_shot import OneShot


class L1FilterPruner(FilterPruner):
    """L1FilterPruner(model, config_list, optimizer=None); config keys sparsity, op_types (convolutions), op_names, exclude."""

    @staticmethod
    def score(weight: torch.Tensor) -> torch.Tensor:
        """sum |w|, of each filter."""
        return weight.abs().flatten(1).sum(1)


class Method(OneShot):
    PRUNER = L1FilterPruner
