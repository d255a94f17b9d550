"""SNIP (Lee, Ajanthan, Torr, "SNIP: Single-shot Network Pruning based on Connection Sensitivity", ICLR 2019, arXiv 1810.02340).

Before training, one batch is passed through the network, and weights are ranked all together by their connection sensitivity
(equations 4 and 5; c = 1 is a gate on each weight):
s = |dL/dc| / sum |dL/dc|,  dL/dc = g w
The round(s n) weights of n with the smallest are pruned, and the network is trained as usual with the masks fixed.

Deviations from the authors' code: biases are not ranked (theirs, which are 0, go first and count); the weights that were ranked
are those that are trained (theirs are drawn again); batch norm uses the batch's statistics, as in training (theirs: the initial
running ones); the batch is augmented as in training.
"""

from ._at_init import AtInit, first_batches, gradients, training_mode
from ._flags import positive


def sensitivity(weights, gradients):
    """[w], [g] -> [|g w|, divided by their sum over all]"""
    saliencies = [(gradient * weight.detach()).abs() for weight, gradient in zip(weights, gradients, strict=True)]
    total = sum(saliency.sum() for saliency in saliencies)
    return [saliency / total for saliency in saliencies]


class Method(AtInit):
    @staticmethod
    def add_args(parser):
        text = 'training batches on which weights are ranked (default: %(default)s)'
        parser.add_argument('--score-batches', type=positive, default=1, metavar='N', help=text)

    def scores(self, job):
        weights = list(self.weights.values())
        with training_mode(job.model):
            mean = gradients(job.model, weights, first_batches(job, self.args.score_batches))
        return dict(zip(self.weights, sensitivity(weights, mean), strict=True))
