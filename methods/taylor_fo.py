"""Taylor, first order on weights, NNI's TaylorFOWeightFilterPruner: a filter's importance is the sum of (g w)^2 over its
weights, the squared first-order change of the loss when a weight becomes zero, averaged over batches; in each convolution the
least important filters go.

Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, arXiv 1906.10771, section 3.1. g is the
gradient that the optimizer's step is about to use and w the weight before that step (NNI took the weight after it). Without an
optimizer every backward pass is a batch. global_sort=True ranks the filters of all layers together, as the paper does: the
sparsity is then a share of the weights, as in NNI 2.4, and each layer keeps a filter. Deviations: the paper has variants on
batch norm scales and on gates, and prunes in many small steps; here it is once.
"""

from functools import partial

import torch

from pruners.compressor import StatisticsPruner
from pruners.selection import keep_globally

from ._one_shot import Watching


class TaylorFOWeightFilterPruner(StatisticsPruner):
    """TaylorFOWeightFilterPruner(model, config_list, optimizer=None, statistics_batch_num=1, global_sort=False).

    Config keys sparsity, op_types (Conv2d), op_names, exclude; one sparsity for all entries with global_sort.
    """

    def __init__(self, model, config_list, optimizer=None, statistics_batch_num=1, global_sort=False):
        super().__init__(model, config_list, optimizer, statistics_batch_num)
        self.global_sort = global_sort
        if global_sort:
            self.one_sparsity()

    def choose(self, scores):
        if not self.global_sort:
            return super().choose(scores)
        sizes = {name: layer.weight[0].numel() for name, layer in self.layers.items()}
        return keep_globally(scores, self.one_sparsity(), self.keep, sizes)

    def listen(self):
        if frozen := [name for name, layer in self.layers.items() if not layer.weight.requires_grad]:
            raise ValueError(f'{", ".join(frozen)} is not trained (requires_grad is False), so it has no gradient to judge by')
        if self.optimizer is not None:
            return [self.optimizer.register_step_pre_hook(self.before_step)]
        return [
            layer.weight.register_post_accumulate_grad_hook(partial(self.after_gradient, name))
            for name, layer in self.layers.items()
        ]

    def before_step(self, *_):
        reached = {name: layer for name, layer in self.layers.items() if layer.weight.grad is not None}
        if self.model.training and reached:  # a step without gradients, as some warm-ups begin with, shows nothing
            for name, layer in reached.items():
                self.add(name, contributions(layer.weight))
            self.batch_done()

    def after_gradient(self, name, weight):
        if self.model.training:
            self.add(name, contributions(weight))
            if not self.old and all(self.counts.get(layer, 0) > self.batches for layer in self.layers):
                self.batch_done()


def contributions(weight: torch.Tensor) -> torch.Tensor:
    """sum (g w)^2, of each filter; g is the gradient of the weight."""
    return (weight.grad * weight.detach()).float().square().flatten(1).sum(1)


class Method(Watching):
    PRUNER = TaylorFOWeightFilterPruner
    SCOPES = ('layer', 'global')
