"""L2 filter pruning, NNI's L2FilterPruner: as l1_filter.py, with the Euclidean norm of a filter in place of the sum of absolute
weights (the criterion of He et al., "Soft Filter Pruning", IJCAI 2018, arXiv 1808.06866, equation 2 at p = 2, without its
softness: here a pruned filter stays pruned).
"""

from pruners.compressor import FilterPruner

from ._one_shot import OneShot


class L2FilterPruner(FilterPruner):
    """L2FilterPruner(model, config_list, optimizer=None); config keys sparsity, op_types (Conv2d), op_names, exclude."""

    @staticmethod
    def scores(weights):
        """The square root of the sum of w^2 of each filter."""
        return {name: weight.flatten(1).norm(dim=1) for name, weight in weights.items()}


class Method(OneShot):
    PRUNER = L2FilterPruner
