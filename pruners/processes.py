"""Several processes, one model: what DistributedDataParallel does not do by itself.

    torchrun --nproc_per_node=8 main.py ...        or: NPROC=8 ./launch configs/st3/imagenet

Every process has a share of each batch and of each evaluation, and draws the same random numbers, so that weights, thresholds,
masks and probabilities are the same in all of them. The first process (rank 0) alone prints and writes. With one process each
function here does nothing.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm


def start(device: torch.device) -> None:
    """Join the processes that torchrun has started, if it has."""
    if int(os.environ.get('WORLD_SIZE', 1)) > 1 and not dist.is_initialized():
        if device.type == 'cuda':
            torch.cuda.set_device(device)  # where nccl moves what it sends
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')


def rank() -> int:
    """The number of this process, 0 for the first or only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wrap(model: nn.Module, idle: bool = False) -> nn.Module:
    """The model whose backward averages the gradients over the processes.

    idle: it has parameters that a forward pass does not use.
    """
    if world() == 1:
        return model
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=idle)


def total(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over the processes of a tensor, in place; returns it."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def average(tensors: list[torch.Tensor]) -> None:
    """Replace each floating-point tensor by its mean over the processes, in place."""
    if world() == 1:
        return
    for tensor in tensors:
        dist.all_reduce(tensor)
        tensor /= world()


def same_buffers(model: nn.Module) -> None:
    """Give all processes the buffers of rank 0: each has batch norm statistics of its own share of the images."""
    if world() == 1:
        return
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)


def same(value):
    """The value (of plain types) that rank 0 has."""
    box = [value]
    if world() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def wait() -> None:
    """Go on when all processes are here: what rank 0 has written can be read then."""
    if world() > 1:
        dist.barrier()


def say(text: str) -> None:
    """Print without disturbing a progress bar, and at once; rank 0 alone does."""
    if rank() == 0:
        tqdm.write(text)
        sys.stdout.flush()
