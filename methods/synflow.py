"""SynFlow (Tanaka, Kunin, Yamins, Ganguli, "Pruning neural networks without any data by iteratively conserving synaptic flow",
NeurIPS 2020, arXiv 2006.05467).

Before training, in rounds k = 1, ..., K (algorithm 1; K = 100), with the network of all absolute values, |w| in place of w:
R = sum f(ones),  score = |w| dR/d|w|
The share (1 - s)^(k / K) of largest scores of all weights is kept. No data is used. Then the network is trained as usual with
the masks fixed.
The network is in evaluation mode, where a new batch norm is the identity: prune before training.

Deviations from the authors' code: the last round leaves exactly round(s n) zeros, by index (theirs prunes ties together, and
what has no flow); all is computed in float64 (theirs, with that line commented out, in float32, which deep networks leave); K
is 100 by default, as in the paper (1 in their code).
"""

import copy

import torch

from ._at_init import AtInit
from ._flags import positive
from ._masks import keep_largest


def kept_share(k, density, rounds=100):
    """The share of weights that is kept after round k of `rounds`."""
    return density ** (k / rounds)


def absolute(model):
    """A copy of the model in float64 and evaluation mode, with the absolute values of all it holds."""
    model = copy.deepcopy(model).double().eval()
    for tensor in model.state_dict().values():
        tensor.abs_()
    return model


def flow(model, weights, ones):
    """[|w| dR/d|w|] of a model of absolute values. ones: [1, C, H, W]"""
    slopes = torch.autograd.grad(model(ones).sum(), weights, materialize_grads=True)
    return [weight.detach() * slope for weight, slope in zip(weights, slopes, strict=True)]


class Method(AtInit):
    @staticmethod
    def add_args(parser):
        text = 'K, the rounds of pruning (default: %(default)s)'
        parser.add_argument('--rounds', type=positive, default=100, metavar='K', help=text)

    def choose_masks(self, job):
        return self.iterate(job.model, torch.ones_like(job.example, dtype=torch.float64))

    def iterate(self, model, ones):
        model = absolute(model)
        weights = {name: model.get_submodule(name).weight for name in self.weights}
        total = sum(weight.numel() for weight in weights.values())
        last = total - round(self.args.ptarget * total)
        masks = self.masks()
        for k in range(1, self.args.rounds + 1):
            scores = dict(zip(weights, flow(model, list(weights.values()), ones), strict=True))
            if not all(score.isfinite().all() for score in scores.values()):
                raise ValueError('the synaptic flow of this network leaves float64: prune a new network, before it is trained')
            ranks = {name: torch.where(masks[name], score, -1) for name, score in scores.items()}  # what is pruned stays so
            share = kept_share(k, 1 - self.args.ptarget, self.args.rounds)
            masks = keep_largest(ranks, last if k == self.args.rounds else max(round(share * total), last))
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.mul_(masks[name])
        return masks
