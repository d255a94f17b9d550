"""L2 filter pruning, NNI's L2FilterPruner: as l1_filter.py, with the Euclidean norm of a filter as its score.

The criterion of He et al., "Soft Filter Pruning", IJCAI 2018, arXiv 1808.06866, equation 2 at p = 2. Deviation: their pruned
filters may grow again; here a pruned filter stays pruned.
"""

import torch

from pruners.compressor import FilterPruner

from ._one_shot import OneShot


class L2FilterPruner(FilterPruner):
    """L2FilterPruner(model, config_list, optimizer=None); config keys sparsity, op_types (convolutions), op_names, exclude."""

    @staticmethod
    def score(weight: torch.Tensor) -> torch.Tensor:
        """sqrt(sum w^2), of each filter."""
        return weight.flatten(1).norm(dim=1)


class Method(OneShot):
    PRUNER = L2FilterPruner
