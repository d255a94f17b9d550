"""What the methods that prune once, before training, share: batches to score weights on, and masks that a resumed run keeps."""

import contextlib
import itertools

import torch
import torch.nn.functional as F

from pruners import processes
from pruners.processes import say

from ._masks import Masking, keep_largest


class AtInit(Masking):
    """Before training prune the weights of least score, ranked all together: exactly round(s n) of n. Then train the others."""

    def scores(self, job):
        """{name: tensor} of scores for self.weights; the largest are kept."""
        raise NotImplementedError

    def choose_masks(self, job):
        total = sum(weight.numel() for weight in self.weights.values())
        return keep_largest(self.scores(job), total - round(self.args.ptarget * total))

    def prepare(self, model, steps, args):
        masks = self.masks()
        super().prepare(model, steps, args)
        if masks:
            self.set_masks(masks)

    def run(self, job):
        self.prepare(job.model, 0, job.args)
        if not (job.folder / 'checkpoint.pt').exists():  # which has the masks of a run that goes on
            self.set_masks(self.choose_masks(job))
            if empty := [name for name, mask in self.masks().items() if not mask.any()]:
                say(f'no weight is left in {", ".join(empty)}')
        job.fit(self)


def first_batches(job, number):
    """The first training batches -> [(images, labels, share of this process in the mean over all of them)].

    The shares of all processes average to 1 over the batches, so that mean gradients can be summed and averaged.
    """
    job.train.set_epoch(0)
    number = min(number, len(job.train))
    batches = enumerate(itertools.islice(job.train, number))
    return [(x, labels, len(labels) * processes.world() / job.train.size(index) / number) for index, (x, labels) in batches]


def gradients(model, weights, batches, temperature=1.0):
    """The gradients of the mean cross-entropy of logits / temperature, over the batches of all processes: a list of tensors."""
    total = [torch.zeros_like(weight) for weight in weights]
    for images, labels, share in batches:
        loss = F.cross_entropy(model(images) / temperature, labels) * share
        for part, gradient in zip(total, torch.autograd.grad(loss, weights, materialize_grads=True), strict=True):
            part += gradient
    processes.average(total)
    return total


@contextlib.contextmanager
def training_mode(model):
    """Batch norm uses the statistics of each batch; its running ones are afterwards as before."""
    state = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    try:
        yield
    finally:
        for name, buffer in model.named_buffers():
            buffer.copy_(state[name])
