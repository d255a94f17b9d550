"""Static sparse training: random masks drawn before training, which never change; the control of RigL's paper (Evci et al.,
"Rigging the Lottery: Making All Tickets Winners", ICML 2020, arXiv 1911.11134), there with the ERK and with uniform densities.

round(s n) of all n weights are zero; how many in which layer, says _densities.py. Pruned weights are zero after every step.
RigL's paper keeps the first convolution dense under uniform densities, and its code for CIFAR under all of them: --dense-layers
first does so at the same number of zeros in all, --pthres with a number above the layer's weights leaves it out of the count.
Deviations: the masks depend on the seed alone, not on the initial weights; the count is exact (see _densities.py).
"""

import torch

from ._densities import add_flags, dense_names, kept_counts
from ._masks import Masking, random_masks

STREAM = 10**6  # added to the seed, so that masks are drawn from other random numbers than the initial weights


class Method(Masking):
    @staticmethod
    def add_args(parser):
        add_flags(parser)

    def prepare(self, model, steps, args):
        masks = self.masks()  # a stage goes on with the masks of the one before
        super().prepare(model, steps, args)
        self.set_masks(masks or self.draw(self.args.ptarget))

    def draw(self, ratio):
        """Random masks for the present weights, with a share `ratio` of zeros."""
        shapes = {name: weight.shape for name, weight in self.weights.items()}
        dense = dense_names(list(shapes), self.args.dense_layers)
        counts = kept_counts(shapes, ratio, self.args.distribution, dense)
        generator = torch.Generator().manual_seed(STREAM + self.args.seed)
        return random_masks(shapes, counts, generator, next(iter(self.weights.values())).device)
