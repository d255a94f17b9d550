"""ProbMask (Zhou, Zhang, Xu, Zhang, "Effective Sparsification of Neural Networks with Global Sparsity Constraint", CVPR 2021,
arXiv 2105.01571): a probability s per weight, trained with the weights under one budget for the network, sum(s) <= k n.

training forward:  w * sigmoid(T (log(s + e) - log(1 - s + e) + noise)),  noise = log(u / (1 - u)), u uniform on [0, 1)
temperature:       T = 1 / (0.97 (1 - t) + 0.03) at the share t of training, from 1 to 33
share kept:        k = 1 until ts = 16 %, then k_f + (1 - k_f) (1 - (t - ts) / (te - ts))^3 until te = 60 %, then k_f
each step:         gradients averaged over K = 2 draws and clipped to norm 3 together; SGD on w, Adam on s; then
projection:        s <- clamp(s - v, 0, 1) with the smallest v >= 0 for which sum clamp(s - v, 0, 1) <= k n, by bisection

As in the authors' code, t is the share of finished epochs, s starts at 1 (where its gradient is 0 in float32: s moves once k
falls below 1), decay is for all weights and biases but not for s, and batch norm's running statistics see all K forwards.

Evaluation. The authors draw a new Bernoulli mask for each test batch. Here nothing is drawn: the mask is the round(k n) most
probable weights, ties by magnitude, renewed after each epoch at the k of the next, so the last is exactly at the target.
End. The authors draw ten Bernoulli masks, keep the one most accurate on the training set (with the batch's own statistics in
batch norm), and fine-tune it for 20 epochs at lr 1e-3, in batches of 128. Here the mask of the last evaluation is fine-tuned,
in batches as before; --sample-masks 10 draws instead and keeps the mask with the lowest loss on the first training batches,
in evaluation mode, but the number of zeros is then right on average only.
Further deviations: the authors draw the same logistic noise from two uniform numbers, as -log(log(u0 + e) / log(u1 + e) + e),
which takes twice as long; bisection halves 30 times, where theirs stops after 20 or within 0.001 of the budget; --ramp-start
and --ramp-end are not rounded to whole epochs.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn

from pruners.momentum import MOMENTUM
from sparse_utils import attach, bake, layers_to_prune

from . import Method as Base
from ._flags import count, nonnegative, positive
from ._masks import keep_largest_magnitudes, threshold_between

EPS = 1e-20  # e: log(0 + e) is -46, so that probabilities of 0 and 1 have finite values and gradients in float32
SAMPLE_BATCHES = 10  # training batches on which --sample-masks compares


def temperature(progress):
    """T at the share `progress` of training."""
    return 1 / ((1 - 0.03) * (1 - progress) + 0.03)


def keep_ratio(progress, final, start=0.16, end=0.6):
    """k at the share `progress` of training: 1 until `start`, `final` (exactly) from `end` on."""
    left = 1 - min(max((progress - start) / (end - start), 0.0), 1.0)
    return final + (1 - final) * left**3


def relaxed_mask(score, temp, noise):
    """The concrete relaxation of a Bernoulli(score) draw; `noise` is logistic. Gradients are finite on all of [0, 1]."""
    return torch.sigmoid((torch.log(score + EPS) - torch.log(1 - score + EPS) + noise) * temp)


def noise_like(score):
    """Logistic noise from the global generator, log(u / (1 - u)); u = 0 is taken for 2^-25, half of the smallest other."""
    return torch.rand_like(score).logit_(2**-25)


@torch.no_grad()
def project(scores, budget):
    """Project tensors in place: s <- clamp(s - v, 0, 1), with the smallest v >= 0 that makes the sum at most `budget`.

    The sum over all tensors counts. Returns v, a 0-d tensor. Does not wait for a GPU.
    """
    v = scores[0].new_zeros(())
    if budget < sum(score.numel() for score in scores):
        every = torch.cat([score.reshape(-1) for score in scores])
        fits = every.clamp(0, 1).sum() <= budget
        low = v
        high = every.max().clamp(min=0)  # the sum at `high` is always within the budget
        for _ in range(30):  # halving [0, 1] so often is finer than float32
            middle = (low + high) / 2
            enough = (every - middle).clamp_(0, 1).sum() <= budget
            low = torch.where(enough, low, middle)
            high = torch.where(enough, middle, high)
        v = torch.where(fits, v, high)
    for score in scores:
        score.sub_(v).clamp_(0, 1)
    return v


@torch.no_grad()
def most_probable(scores, weights, kept):
    """Bool masks, True for the `kept` highest scores of all tensors; ties go to the larger |weight|, then to the first."""
    threshold = threshold_between(scores, kept)
    masks = [score > threshold for score in scores]
    missing = kept - sum(int(mask.sum()) for mask in masks)
    if missing > 0:
        equal = [score == threshold for score in scores]
        magnitudes = torch.cat([weight[places] for weight, places in zip(weights, equal, strict=True)])
        chosen = keep_largest_magnitudes({'equal': magnitudes}, missing)['equal']
        parts = chosen.split([int(places.sum()) for places in equal])
        for mask, places, part in zip(masks, equal, parts, strict=True):
            mask[places] = part
    return masks


class _RelaxedWeight(torch.autograd.Function):
    """weight * relaxed_mask(score, temp, noise), with the mask alone kept for the gradients (autograd keeps five tensors).

    With m the mask, dw = g m and ds = g w m (1 - m) T (1 / (s + e) + 1 / (1 - s + e)), in autograd's order: no bit differs.
    """

    @staticmethod
    def forward(weight, score, temp, noise):
        mask = relaxed_mask(score, temp, noise)
        return weight * mask, mask

    @staticmethod
    def setup_context(ctx, inputs, output):
        weight, score, temp, _ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(weight, score, temp, output[1])

    @staticmethod
    def backward(ctx, grad, _):
        weight, score, temp, mask = ctx.saved_tensors
        slope = (grad * weight).mul_(1 - mask).mul_(mask).mul_(temp)
        grad_score = slope / (score + EPS)
        grad_score += slope.div_(1 - score + EPS)
        return grad * mask, grad_score, None, None


def relaxed_weight(weight, score, temp):
    """The weight times a new relaxed mask, differentiable in weight and score."""
    return _RelaxedWeight.apply(weight, score, temp, noise_like(score))[0]


class Gate(nn.Module):
    """A parametrization: relaxed and random where a training forward is differentiated, else the hard mask."""

    def __init__(self, weight, temp):
        super().__init__()
        self.score = nn.Parameter(torch.ones_like(weight))
        self.register_buffer('mask', torch.ones_like(weight, dtype=torch.bool))
        self.register_buffer('temperature', temp, persistent=False)  # one tensor for all gates

    def forward(self, weight):
        if self.training and torch.is_grad_enabled():
            return relaxed_weight(weight, self.score, self.temperature)
        return torch.where(self.mask, weight, 0)


class Method(Base):
    DEFAULTS = {'model': 'resnet32', 'dataset': 'cifar10', 'epochs': 300, 'batch_size': 256, 'lr': 0.1, 'wd': 5e-4}
    DEFAULTS |= {'lr_update': 'epoch', 'wd_all': True}

    def __init__(self, args):
        super().__init__(args)
        if not 0 <= args.ramp_start < args.ramp_end <= 1:
            raise ValueError(f'the ramp must lie in [0, 1], but goes from {args.ramp_start:g} to {args.ramp_end:g}')
        if args.accumulate > 1 and args.samples > 1:
            raise ValueError('--accumulate needs --samples 1: further samples see the whole batch at once')
        self.gates = []
        self.masks = None  # a list, once they are fixed
        self.fit = None

    @staticmethod
    def add_args(parser):
        def add(flag, kind, default, text, metavar=None):
            parser.add_argument(flag, type=kind, default=default, metavar=metavar, help=f'{text} (default: %(default)s)')

        add('--score-lr', nonnegative, 6e-3, "learning rate of the probabilities' Adam, on a cosine")
        add('--samples', positive, 2, 'masks drawn for each step', 'K')
        add('--ramp-start', nonnegative, 0.16, 'ts, share of training after which weights are pruned', 'SHARE')
        add('--ramp-end', nonnegative, 0.6, 'te, share of training after which ptarget is reached', 'SHARE')
        add('--finetune-epochs', count, 20, 'epochs with the mask fixed, after --epochs', 'N')
        add('--finetune-lr', nonnegative, 1e-3, 'their learning rate, constant')
        add('--sample-masks', count, 0, 'draw N masks at the end, as the authors do; 0 takes the most probable weights', 'N')

    def prepare(self, model, steps, args):
        if self.gates:
            return  # fine-tuning goes on with the same layers
        self.layers = list(layers_to_prune(model, self.args.pthres).values())
        self.weights = list({id(layer.weight): layer.weight for layer in self.layers}.values())  # a tied weight has one score
        self.temperature = torch.ones((), device=self.weights[0].device)
        gates = {id(weight): Gate(weight, self.temperature) for weight in self.weights}
        for layer in self.layers:
            attach(layer, gates[id(layer.weight)])
        self.gates = list(gates.values())
        self.scores = [gate.score for gate in self.gates]
        self.total = sum(score.numel() for score in self.scores)
        self.batches = steps // self.args.epochs
        self.adam = torch.optim.Adam(self.scores, self.args.score_lr)

    def param_groups(self, model, args):
        groups = super().param_groups(model, args)
        if self.masks is not None:
            return groups
        scores = {id(score) for score in self.scores}
        for group in groups:
            group['params'] = [p for p in group['params'] if id(p) not in scores]
        # Parameters of the model, so that they are saved and clipped with it; but Adam moves them.
        return [*groups, {'params': self.scores, 'lr': 0.0, 'momentum': 0.0, 'weight_decay': 0.0}]

    def attach(self, fit):
        self.fit = fit

    def keep_at(self, progress):
        return keep_ratio(progress, 1 - self.args.ptarget, self.args.ramp_start, self.args.ramp_end)

    def before_step(self, step):
        if self.masks is None:
            progress = step // self.batches / self.args.epochs
            self.keep = self.keep_at(progress)
            self.temperature.fill_(temperature(progress))
            self.adam.param_groups[0]['lr'] = self.args.score_lr * 0.5 * (1 + math.cos(math.pi * progress))

    def after_backward(self, step, batch):
        if self.masks is not None:  # before clipping: the gradient of a pruned weight is zero
            self.apply_masks([weight.grad for weight in self.weights])
        elif self.args.samples > 1:
            self.average_draws(*batch)

    def average_draws(self, images, labels):
        """The mean gradient over K draws of the masks, of which the loop has made the first."""
        for _ in range(self.args.samples - 1):
            with self.fit.autocast:
                loss = self.fit.criterion(self.fit.forward(images), labels)
            loss.backward()
        for parameter in self.fit.model.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(self.args.samples)

    def after_step(self, step, batch):
        if self.masks is None:
            self.adam.step()
            self.adam.zero_grad()  # frees memory, which project() needs
            project(self.scores, self.keep * self.total)
        else:
            self.apply_masks(self.weights)
            for key in MOMENTUM:
                self.apply_masks([self.fit.optimizer.state[weight].get(key) for weight in self.weights])

    @torch.no_grad()
    def apply_masks(self, tensors):
        """Multiply by the masks, in place: one tensor or None for each of the weights."""
        for tensor, mask in zip(tensors, self.masks, strict=True):
            if tensor is not None:
                tensor.mul_(mask)

    def after_epoch(self, epoch):
        if self.masks is None:
            self.keep = self.keep_at((epoch + 1) / self.args.epochs)
            self.set_masks(most_probable(self.scores, self.weights, round(self.keep * self.total)))

    def set_masks(self, masks):
        for gate, mask in zip(self.gates, masks, strict=True):
            gate.mask.copy_(mask)

    def metrics(self):
        if self.masks is not None:
            return {}
        undecided = sum(((score > 0) & (score < 1)).sum() for score in self.scores) / self.total
        return {'keep': self.keep, 'temperature': self.temperature.item(), 'undecided': undecided.item()}

    @torch.no_grad()
    def draw_masks(self, job):
        """Of --sample-masks Bernoulli draws set the one with the lowest loss on the first training batches."""
        job.train.set_epoch(0)  # a resumed run must see the same images
        batches = list(itertools.islice(job.train, SAMPLE_BATCHES))
        job.model.eval()
        draws = [[torch.bernoulli(score) > 0 for score in self.scores] for _ in range(self.args.sample_masks)]
        losses = []
        for masks in draws:
            self.set_masks(masks)
            losses.append(sum(F.cross_entropy(job.model(images), labels) for images, labels in batches).item())
        self.set_masks(draws[losses.index(min(losses))])

    def fix_masks(self):
        """Leave plain layers; from here on the masks hold their weights at zero."""
        bake(self.layers)
        self.masks = [gate.mask for gate in self.gates]

    def finalize(self, model):
        if self.masks is None:
            self.fix_masks()
        return model

    def state_dict(self):
        return {'adam': self.adam.state_dict()} if self.masks is None else {'masks': self.masks}

    def load_state_dict(self, state):
        if self.masks is not None:
            self.masks = state['masks']
            return
        self.adam.load_state_dict(state['adam'])
        for values in self.adam.state.values():  # with its step count on the GPU, Adam would wait for it at each step
            values['step'] = values['step'].cpu()

    def run(self, job):
        job.fit(self)
        if self.args.sample_masks:
            self.draw_masks(job)
        self.fix_masks()
        self.fine_tune(job)
