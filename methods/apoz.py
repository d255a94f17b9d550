"""APoZ, NNI's ActivationAPoZRankFilterPruner: in each convolution the filters go whose activations are zero most often
(equation 1, the average percentage of zeros).

Hu et al., "Network Trimming: A Data-Driven Neuron Pruning Approach towards Efficient Deep Architectures", 2016,
arXiv 1607.03250. Deviations: as in NNI, the activation is `activation` (relu) of the convolution's own output, also where the
network has a batch norm between the two; and the share to prune is given, while the paper prunes what lies a standard
deviation above the mean, in rounds. Zeros are counted in the first training batches after compress(), on the command line
before fine-tuning.
"""

import torch

from pruners.compressor import ActivationPruner

from ._one_shot import Watching


class ActivationAPoZRankFilterPruner(ActivationPruner):
    """ActivationAPoZRankFilterPruner(model, config_list, optimizer=None, activation='relu', statistics_batch_num=1).

    Config keys sparsity, op_types (of convolutions), op_names, exclude. activation: 'relu' or 'relu6'.
    """

    @staticmethod
    def of_activation(activation: torch.Tensor) -> torch.Tensor:
        """1 where it is not zero; the average is one minus APoZ."""
        return activation != 0


class Method(Watching):
    PRUNER = ActivationAPoZRankFilterPruner
