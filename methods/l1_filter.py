"""L1 filter pruning, NNI's L1FilterPruner (Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, arXiv 1608.08710):
in each convolution the filters with the least sum of absolute weights go, at once; then the network is fine-tuned.

Deviations: filters, their biases and batch norms are set to zero where the paper removes them, with the next layer's kernels
that read them; what the network computes is the same, since a pruned filter's output is zero. The paper prunes layers of a
stage alike and spares sensitive ones: use several entries, or --layers and --exclude. Residual blocks are not treated apart.
"""

from pruners.compressor import FilterPruner

from ._one_shot import OneShot


class L1FilterPruner(FilterPruner):
    """L1FilterPruner(model, config_list, optimizer=None); config keys sparsity, op_types (Conv2d), op_names, exclude."""

    @staticmethod
    def scores(weights):
        """The sum of |w| of each filter."""
        return {name: weight.abs().flatten(1).sum(1) for name, weight in weights.items()}


class Method(OneShot):
    PRUNER = L1FilterPruner
