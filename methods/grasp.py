"""GraSP (Wang, Zhang, Grosse, "Picking Winning Tickets Before Training by Preserving Gradient Flow", ICLR 2020,
arXiv 2002.07376).

Before training, weights are ranked all together by what removing them does to the norm of the gradient (equation 8):
S = -w (H g),  g the gradient and H the Hessian of the loss of logits / 200
The round(s n) weights of n with the largest S are pruned, and the network is trained as usual with the masks fixed.
g and H g are means over the first training batches, about ten images of each class.

Deviations from the authors' code: the images are batches as in training, with which batch norm computes, where theirs are
sorted by class and cut into halves, each with half of the classes; g is one mean over all of them; the number pruned is exact;
no layer is drawn anew for ranking alone; pruned weights have no gradient and no momentum.
"""

import math

import torch
import torch.nn.functional as F

from pruners import processes

from ._at_init import AtInit, first_batches, gradients, training_mode
from ._flags import positive

TEMPERATURE = 200


def hessian_product(loss, weights, vectors):
    """[H v], of a loss that is differentiable twice."""
    first = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
    product = sum((gradient * vector).sum() for gradient, vector in zip(first, vectors, strict=True))
    return torch.autograd.grad(product, weights, materialize_grads=True)


def removal_scores(weights, products):
    """[w], [H g] -> [S]"""
    return [-weight.detach() * product for weight, product in zip(weights, products, strict=True)]


class Method(AtInit):
    @staticmethod
    def add_args(parser):
        text = 'rank on so many whole training batches that they have about N images of each class (default: %(default)s)'
        parser.add_argument('--images-per-class', type=positive, default=10, metavar='N', help=text)

    def scores(self, job):
        weights = list(self.weights.values())
        number = math.ceil(self.args.images_per_class * job.data.num_classes / self.args.batch_size)
        batches = first_batches(job, number)
        with training_mode(job.model):
            mean = gradients(job.model, weights, batches, TEMPERATURE)
            products = [torch.zeros_like(weight) for weight in weights]
            for images, labels, share in batches:
                loss = F.cross_entropy(job.model(images) / TEMPERATURE, labels) * share
                for total, product in zip(products, hessian_product(loss, weights, mean), strict=True):
                    total += product
        processes.average(products)
        # the smallest S are kept
        return {name: -score for name, score in zip(self.weights, removal_scores(weights, products), strict=True)}
