"""Network slimming, NNI's SlimPruner (Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017,
arXiv 1708.06519): train with lambda sum |gamma| added to the loss, gamma the scales of all batch norms (equation 1), which begin
at 0.5; then the channels of least |gamma| in the whole network go, at once; then fine-tune without that term.

A pruned channel has scale and shift zero, so that its output is zero. The convolution that feeds the batch norm has that filter
set to zero with it, which changes no output; `masks` names the batch norms only. --bn-l1 is lambda; with --from, the run named
has to have been trained with it. --scope layer prunes the share in every batch norm instead.
Deviations: a batch norm keeps at least one channel; the paper removes channels, and in networks with pre-activation selects
them on the input of a layer; there the convolutions stay whole here.
"""

import torch
from torch import nn

from pruners.compressor import GlobalPruner

from ._flags import nonnegative
from ._one_shot import OneShot


class SlimPruner(GlobalPruner):
    """SlimPruner(model, config_list, optimizer=None); config keys sparsity, op_types (BatchNorm2d), op_names, exclude.

    One sparsity for all entries, as channels are ranked together; global_sort=False ranks them within each layer.
    """

    TYPES, GLOBAL = ('BatchNorm2d',), True

    @staticmethod
    def scores(weights):
        """|gamma|"""
        return {name: weight.abs() for name, weight in weights.items()}

    def follow(self, name, kept):
        for conv in (self.model.get_submodule(conv) for conv, norm in self.norms.items() if norm == name):
            self.part(conv, 'weight', kept.view(-1, *[1] * (conv.weight.dim() - 1)))
            self.part(conv, 'bias', kept)


class Method(OneShot):
    PRUNER, SCOPES = SlimPruner, ('global', 'layer')
    DEFAULTS = OneShot.DEFAULTS | {'model': 'vgg19', 'batch_size': 64, 'wd': 1e-4, 'ptarget': 0.7}

    @classmethod
    def add_args(cls, parser):
        super().add_args(parser)
        add, shown = parser.add_argument, ' (default: %(default)s)'
        add('--bn-l1', type=nonnegative, default=1e-4, help='lambda, in pretraining' + shown)
        add('--bn-init', type=nonnegative, default=0.5, help='gamma at the start of pretraining' + shown)

    def prepare(self, model, steps, args):
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d) and module.affine]
        self.scales = [norm.weight for norm in norms] if self.pruner is None else []
        for scale in self.scales:
            nn.init.constant_(scale, self.args.bn_init)

    def loss(self):
        """lambda sum |gamma|, until there are masks."""
        if self.scales:
            return self.args.bn_l1 * torch.cat(self.scales).abs().sum()

    def pretrain(self, job):
        if vars(self.args).get('from') is None:
            job.fit(self, 'pretrain')
