"""Level pruning, NNI's LevelPruner: in each layer the weights of smallest magnitude go, at once.

Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015, arXiv 1506.02626, without its
iterations. floor(s n) of the n weights of a layer are zero, however many are equal (see pruners/compressor.py). Biases stay.
--scope global, which NNI does not have, ranks the weights of all layers together; --scope erk gives each layer ERK's density.
"""

import torch

from pruners.compressor import GlobalPruner

from ._one_shot import OneShot


class LevelPruner(GlobalPruner):
    """LevelPruner(model, config_list, optimizer=None); config keys sparsity, op_types, op_names, exclude.

    global_sort: rank the weights of all layers together; all entries then have one sparsity.
    """

    FILTERS = False

    @staticmethod
    def score(weight: torch.Tensor) -> torch.Tensor:
        """|w|, of each weight."""
        return weight.abs()


class Method(OneShot):
    PRUNER = LevelPruner
    SCOPES = ('layer', 'global', 'erk')
