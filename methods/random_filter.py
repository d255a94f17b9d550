"""The control of the filter pruners: in each convolution random filters go, as many as the others would prune.

Mittal et al., "Recovering from Random Pruning", WACV 2018, arXiv 1801.10447, find it hard to beat after fine-tuning.
"""

import torch

from pruners.compressor import FilterPruner
from pruners.selection import num_filters

from ._one_shot import OneShot


class RandomFilterPruner(FilterPruner):
    """RandomFilterPruner(model, config_list, optimizer=None, seed=0); the same seed prunes the same filters."""

    def __init__(self, model, config_list, optimizer=None, seed=0):
        super().__init__(model, config_list, optimizer)
        self.seed = seed

    def importance(self):
        generator = torch.Generator().manual_seed(self.seed)  # on the CPU, the same for every device
        scores = {}
        for name, layer in self.layers.items():
            scores[name] = torch.rand(num_filters(layer), generator=generator).to(layer.weight)
        return scores


class Method(OneShot):
    PRUNER = RandomFilterPruner

    def options(self):
        return {'seed': self.args.seed}
