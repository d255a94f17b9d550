"""Mean activation, NNI's ActivationMeanRankFilterPruner (Molchanov et al., "Pruning Convolutional Neural Networks for Resource
Efficient Inference", ICLR 2017, arXiv 1611.06440, section 2.2): in each convolution the filters of least mean activation go.

Deviations: as in apoz.py; all at once, where the paper prunes one filter after another with training between.
"""

from pruners.compressor import ActivationPruner

from ._one_shot import Watching


class ActivationMeanRankFilterPruner(ActivationPruner):
    """ActivationMeanRankFilterPruner(model, config_list, optimizer=None, activation='relu', statistics_batch_num=1).

    Config keys sparsity, op_types (Conv2d), op_names, exclude. activation: 'relu' or 'relu6'.
    """

    @staticmethod
    def of_activation(activation):
        return activation


class Method(Watching):
    PRUNER = ActivationMeanRankFilterPruner
