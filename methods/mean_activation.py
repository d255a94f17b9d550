"""Mean activation, NNI's ActivationMeanRankFilterPruner: in each convolution the filters of the smallest mean activation go.

Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference", ICLR 2017, arXiv 1611.06440,
section 2.2. Deviations: as in apoz.py; all filters go at once, while the paper prunes one after another, with training between.
"""

import torch

from pruners.compressor import ActivationPruner

from ._one_shot import Watching


class ActivationMeanRankFilterPruner(ActivationPruner):
    """ActivationMeanRankFilterPruner(model, config_list, optimizer=None, activation='relu', statistics_batch_num=1).

    Config keys sparsity, op_types (of convolutions), op_names, exclude. activation: 'relu' or 'relu6'.
    """

    @staticmethod
    def of_activation(activation: torch.Tensor) -> torch.Tensor:
        """The activation itself."""
        return activation


class Method(Watching):
    PRUNER = ActivationMeanRankFilterPruner
