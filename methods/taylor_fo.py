"""Taylor, first order on weights, NNI's TaylorFOWeightFilterPruner: a filter's importance is the sum of (g w)^2 over its
weights, the squared first-order change of the loss when a weight becomes zero, averaged over batches; in each convolution the
least important filters go.

Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, arXiv 1906.10771, section 3.1. g is the
gradient that the optimizer's step is about to use and w the weight before that step (NNI took the weight after it). Without an
optimizer every backward pass is a batch; with a GradScaler give the optimizer, so that the scale is known. global_sort=True
ranks the filters of all layers together, as the paper does: the sparsity is then a share of the weights, as in NNI 2.4, and
each layer keeps a filter. Deviations: the paper has variants on batch norm scales and on gates, and prunes in many small
steps; here it is once.
"""

from functools import partial

import torch

from pruners.compressor import StatisticsPruner
from pruners.selection import filters_first, keep_globally, num_filters

from ._one_shot import Watching


class TaylorFOWeightFilterPruner(StatisticsPruner):
    """TaylorFOWeightFilterPruner(model, config_list, optimizer=None, statistics_batch_num=1, global_sort=False).

    Config keys sparsity, op_types (of convolutions), op_names, exclude; one sparsity for all entries with global_sort.
    """

    def __init__(self, model, config_list, optimizer=None, statistics_batch_num=1, global_sort=False):
        super().__init__(model, config_list, optimizer, statistics_batch_num)
        self.global_sort = global_sort
        if global_sort:
            self.one_sparsity()

    def choose(self, scores):
        if not self.global_sort:
            return super().choose(scores)
        sizes = {name: layer.weight.numel() // num_filters(layer) for name, layer in self.layers.items()}
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

    def before_step(self, optimizer, args, kwargs):
        """Add the gradients of this step. Where it has a closure, they come with that: returns the arguments that do it."""
        closure = args[1] if len(args) > 1 else kwargs.get('closure')
        if closure is None:
            self.add_gradients(optimizer)
            return None

        def closure_and_more():
            loss = closure()
            self.add_gradients(optimizer)
            return loss

        return (args[0],), kwargs | {'closure': closure_and_more}

    def add_gradients(self, optimizer):
        """Add what the optimizer is about to use, and count a batch.

        A GradScaler lets fused optimizers step with scaled gradients, and with infinite ones, which they then skip.
        """
        if getattr(optimizer, 'found_inf', None) is not None and bool(optimizer.found_inf):
            return
        scale = getattr(optimizer, 'grad_scale', None)
        reached = {name: layer for name, layer in self.layers.items() if layer.weight.grad is not None}
        if self.watchers and self.model.training and reached:  # a step without gradients, as of some warm-ups, shows nothing
            for name, layer in reached.items():
                gradient = layer.weight.grad if scale is None else layer.weight.grad / scale
                self.add(name, self.contributions(name, gradient))
            self.batch_done()

    def after_gradient(self, name, weight):
        """Add the gradient of a layer, and count a batch when all layers have one more; one that overflows is left out."""
        if not self.model.training:
            return
        values = self.contributions(name, weight.grad)
        if bool(values.isfinite().all()):
            self.add(name, values)
        if not self.old and all(self.counts.get(layer, 0) > self.batches for layer in self.layers):
            self.batch_done()

    def contributions(self, name, gradient):
        layer = self.layers[name]
        return contributions(filters_first(layer, layer.weight.detach()), filters_first(layer, gradient))


def contributions(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """sum (g w)^2, of each filter, in dimension 0 of the weight w and its gradient g."""
    return (gradient * weight).float().square().flatten(1).sum(1)


class Method(Watching):
    PRUNER = TaylorFOWeightFilterPruner
    SCOPES = ('layer', 'global')
