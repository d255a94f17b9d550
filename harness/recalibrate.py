"""--recalibrate N: the statistics of batch norms, estimated again on N training images before the final evaluation.

Pruning moves what a layer puts out, and the running means and variances lag behind. Here they are reset, and become the plain
average over batches of N training images, augmented as in training, with the network in training mode and the weights as they
are: what torch.optim.swa_utils.update_bn does.
"""

import torch
from torch import nn

from pruners import processes


def batch_norms_of(model):
    """{name: batch norm that keeps running statistics}"""
    kinds = (nn.modules.batchnorm._BatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
    return {
        name: module for name, module in model.named_modules() if isinstance(module, kinds) and module.running_mean is not None
    }


def check(model, number):
    """Raises ValueError where there is nothing to recalibrate."""
    if number and not batch_norms_of(model):
        raise ValueError('--recalibrate estimates the statistics of batch norms again, and this network has none')


@torch.no_grad()
def recalibrate(model, loader, number, epoch, seed):
    """Reset the statistics and average them over batches of `number` images, or of all -> how many images were seen.

    loader: of training, its order and augmentation are those of `epoch`. Every process sees the same whole batches, so that
    all have the statistics that one process has. The last batch is as small as `number` says, but of two images or more. A
    batch counts as much as another, whatever its size. Draws of the network, as dropout's, depend on the seed alone.
    """
    norms = batch_norms_of(model).values()
    momenta = [(norm, norm.momentum) for norm in norms]
    modes = [(module, module.training) for module in model.modules()]
    seen = 0
    loader.set_epoch(epoch)
    loader.whole = True
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
        model.train()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for images, _ in loader:
                images = images[: number - seen]
                if len(images) > 1:
                    model(images)
                    seen += len(images)
                if number - seen < 2:
                    break
    finally:
        loader.whole = False
        for norm, momentum in momenta:
            norm.momentum = momentum
        for module, training in modes:
            module.training = training
    processes.same_buffers(model)  # equal to the last bit
    return seen
