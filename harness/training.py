"""One step of training, in which every hook of a method has its place; device, optimizer and course of the learning rate."""

import contextlib
import ctypes
import math
import os

import torch
from torch import nn

from pruners import processes


def one_step(method, fit, step, batch, size=None):
    """Train on one batch -> the sum of its losses, a 0-d tensor.

    fit: what Job.fit() gives to Method.attach(). step: 0, 1, ... of the stage. batch: (images [B, C, H, W], labels [B]).
    size: images in this batch over all processes (default: B).
    """
    args = fit.args
    method.before_step(step)
    fit.optimizer.zero_grad()
    total = backward(method, fit, batch, size or len(batch[1]))
    method.after_backward(step, batch)
    if args.clip:
        nn.utils.clip_grad_norm_(fit.model.parameters(), args.clip)
    factor = lr_factor(args, step, fit.batches)
    for group in fit.optimizer.param_groups:
        group['lr'] = group['initial_lr'] * factor
    fit.optimizer.step()
    method.after_step(step, batch)
    return total


def backward(method, fit, batch, size):
    """Gradients of a step's mean loss over the `size` images that all processes have -> the sum of this process's losses.

    The batch goes through the network in --accumulate pieces, as many in every process.
    """
    if fit.replayed is not None and size == fit.args.batch_size:
        return fit.replayed(*batch) * size
    world = processes.world()
    parts = min(fit.args.accumulate, max(size // world, 1))
    pieces = zip(*(tensor.tensor_split(parts) for tensor in batch), strict=True)
    total = 0.0
    for number, (images, labels) in enumerate(pieces):
        with fit.autocast:
            loss = fit.criterion(fit.forward(images), labels)
        extra = method.loss() if number == 0 else None
        share = len(labels) * world / size  # 1 in one piece and one process; gradients are averaged over processes
        (loss * share if extra is None else loss * share + extra).backward()
        total = total + loss.detach() * len(labels)
    return total


def pick_device(args):
    """--device, or the GPU number --gpu where there is one, else the CPU."""
    if args.device is None and (args.no_cuda or not torch.cuda.is_available()):
        return torch.device('cpu')
    device = torch.device(args.device or f'cuda:{args.gpu}')
    if device.type == 'cuda' and 'LOCAL_RANK' in os.environ:  # torchrun: a GPU for each process
        device = torch.device('cuda', int(os.environ['LOCAL_RANK']))
    if device.type == 'cuda' and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f'there is no device {device}: PyTorch finds {torch.cuda.device_count()} CUDA devices')
    torch.backends.cudnn.benchmark = True
    return device


def keep_freed_memory():
    """Let glibc keep the memory of freed tensors for the next step; it would return large ones, and fault in each page anew.

    That costs about 6 % of a small step. Nothing happens where the C library is another one.
    """
    trim_threshold = -1  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    mmap_threshold = -3
    with contextlib.suppress(OSError, AttributeError):
        c_library = ctypes.CDLL('libc.so.6')
        c_library.mallopt(mmap_threshold, 2**30)
        c_library.mallopt(trim_threshold, 2**31 - 1)


def make_optimizer(args, groups):
    """SGD or Adam over the method's parameter groups; a group without an `lr` has --lr."""
    if args.optimizer == 'adam':
        optimizer = torch.optim.Adam(groups, args.lr)
    else:
        optimizer = torch.optim.SGD(groups, args.lr, momentum=args.momentum, nesterov=args.nesterov)
    for group in optimizer.param_groups:
        group['initial_lr'] = group['lr']
    return optimizer


def lr_factor(args, step, batches):
    """The learning rate at a step, as a share of its initial value: a pure function, so there is no state to resume.

    batches: steps in an epoch.
    """
    if args.lr_update == 'epoch':
        step = step // batches * batches
    total = args.epochs * batches
    warmup = args.warmup_epochs * batches
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if args.lr_schedule == 'multistep':
        return args.lr_gamma ** sum(step >= milestone * total for milestone in args.lr_milestones)
    if args.lr_schedule == 'cosine':
        span = total - warmup
        phase = (step - warmup) * (args.lr_restarts + 1) % span / span  # exactly 0 at a restart
        return 0.5 * (1 + math.cos(math.pi * phase))
    return 1.0
