"""Network slimming, NNI's SlimPruner: train with lambda sum |gamma| added to the loss, gamma the scales of all batch norms
(equation 1), which begin at 0.5; then the channels of the smallest |gamma| in the whole network go, at once; then fine-tune
without that term.

Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017, arXiv 1708.06519.

A pruned channel has scale and shift zero, so that its output is zero. The convolution that feeds the batch norm loses that
filter with it, which changes no output; `masks` names the batch norms only. --bn-l1 is lambda; with --from, the run named has
to have been trained with it. --scope layer prunes the share in every batch norm instead. Deviations: a batch norm keeps at
least one channel; the paper removes channels, and in networks with pre-activation selects them on the input of a layer; there
the convolutions stay whole here.
"""

import torch
from torch import nn

from pruners.compressor import GlobalPruner
from pruners.selection import expand_mask

from ._flags import nonnegative
from ._one_shot import OneShot


class SlimPruner(GlobalPruner):
    """SlimPruner(model, config_list, optimizer=None); config keys sparsity, op_types (BatchNorm2d, ...), op_names, exclude.

    One sparsity for all entries, as channels are ranked together; global_sort=False ranks them within each layer.
    """

    TYPES = ('BatchNorm1d', 'BatchNorm2d', 'BatchNorm3d', 'SyncBatchNorm')
    GLOBAL = True

    @staticmethod
    def score(weight: torch.Tensor) -> torch.Tensor:
        """|gamma|, of each channel."""
        return weight.abs()

    def mask_neighbour(self, name, kept):
        """What goes with the channels of a batch norm, kept [out]: the filters of the convolution before it."""
        for conv_name in [conv for conv, norm in self.norms.items() if norm == name]:
            conv = self.model.get_submodule(conv_name)
            self.mask_parameter(conv, 'weight', expand_mask(kept, conv))
            self.mask_parameter(conv, 'bias', kept)


class Method(OneShot):
    PRUNER = SlimPruner
    SCOPES = ('global', 'layer')
    DEFAULTS = OneShot.DEFAULTS | {'model': 'vgg19', 'batch_size': 64, 'wd': 1e-4, 'ptarget': 0.7}

    @classmethod
    def add_args(cls, parser):
        super().add_args(parser)
        add = parser.add_argument
        shown = ' (default: %(default)s)'
        add('--bn-l1', type=nonnegative, default=1e-4, help='lambda, in pretraining' + shown)
        add('--bn-init', type=nonnegative, default=0.5, help='gamma at the start of pretraining' + shown)

    def prepare(self, model, steps, args):
        self.scales = []  # gammas in the loss
        if self.pruner is None:
            norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d) and module.affine]
            self.scales = [norm.weight for norm in norms]
        for scale in self.scales:
            nn.init.constant_(scale, self.args.bn_init)

    def loss(self):
        """lambda sum |gamma|, until there are masks."""
        if self.scales:
            return self.args.bn_l1 * torch.cat(self.scales).abs().sum()

    def pretrain(self, job):
        if not self.started:
            job.fit(self, 'pretrain')
