"""Compiled kernels for what Feather and ST-3 do with all weights in each step; the same results but for rounding.

The formulas are those of sparse_utils.py and methods/st3.py, which run where there is no compiler, on a GPU, in other number
formats and with --no-kernels.
"""

import ctypes
from argparse import BooleanOptionalAction
from functools import cache
from pathlib import Path

import torch

from deploy.engine.build import CompilerError, compile_kernels
from pruners.processes import say
from sparse_utils import Feather, Pruner, dense_weight, global_threshold

SOURCE = Path(__file__).with_name('_kernels.cpp')


@cache
def library():
    """The kernels, compiled when they are needed for the first time on this machine. Raises CompilerError.

    Where the compiler has no OpenMP, or its runtime is not found, they are made for one thread.
    """
    try:
        kernels = ctypes.CDLL(str(compile_kernels(['-fopenmp'], source=SOURCE)))
    except (CompilerError, OSError):
        kernels = ctypes.CDLL(str(compile_kernels(source=SOURCE)))
    pointer = ctypes.c_void_p
    whole = ctypes.c_int64
    real = ctypes.c_float
    threads = ctypes.c_int
    kernels.feather_forward.argtypes = [pointer, whole, real, pointer, threads]
    kernels.feather_backward.argtypes = [pointer, pointer, whole, real, pointer, threads]
    kernels.st3_forward.argtypes = [pointer, whole, whole, real, whole, whole, pointer, threads]
    kernels.count_between.argtypes = [pointer, whole, real, real, pointer, whole, ctypes.POINTER(whole), threads]
    kernels.count_between.restype = whole
    return kernels


def add_kernel_flag(parser):
    text = 'compute with compiled kernels, the same but for rounding (default: on a CPU, where there is a C++ compiler)'
    parser.add_argument('--kernels', action=BooleanOptionalAction, default=None, help=text)


def choose_kernels(args, layers, able=True):
    """Whether a run computes with kernels, which it says. able: whether there are kernels for this method's settings.

    Raises ValueError where --kernels asks for them in vain.
    """
    reason = why_not(args, [dense_weight(layer) for layer in layers], able)
    if reason and args.kernels:
        raise ValueError(f'--kernels: {reason}')
    say(f'{args.method} computes in plain PyTorch: {reason}' if reason else f'{args.method} computes with compiled kernels')
    return reason is None


def why_not(args, weights, able):
    """Why a run with these weights cannot compute with kernels, or None."""
    if args.kernels is False:
        return '--no-kernels'
    if not able:
        return 'there are no kernels for these settings'
    if any(weight.dtype != torch.float32 or weight.device.type != 'cpu' for weight in weights):
        return 'kernels are for float32 on a CPU'
    if args.compile:
        return 'torch.compile cannot look into kernels'
    try:
        library()
    except CompilerError as error:
        return f'{error}'
    return None


def as_begun(had, have):
    """Whether a run goes on with kernels: as it was begun, or it would not end with the same bits.

    had: what its checkpoint says. have: what choose_kernels() said. Raises ValueError where it cannot.
    """
    if had and not have:
        raise ValueError('this run was begun with compiled kernels, and they cannot be used now: see the line above')
    if have and not had:
        say('it goes on in plain PyTorch, as it was begun')
    return had


def lies_densely(tensor):
    """Whether the elements lie side by side in memory, filter after filter."""
    if tensor.is_contiguous():
        return True
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


class _FastFeather(torch.autograd.Function):
    """sparse_utils.feather() for p = 3."""

    @staticmethod
    def forward(ctx, weight, threshold, theta):
        ctx.theta = theta
        sparse = torch.empty_like(weight)
        threads = torch.get_num_threads()
        library().feather_forward(weight.data_ptr(), weight.numel(), threshold, sparse.data_ptr(), threads)
        if theta != 1:
            ctx.save_for_backward(sparse)
        return sparse

    @staticmethod
    def backward(ctx, grad):
        if ctx.theta == 1:
            return grad, None, None
        (sparse,) = ctx.saved_tensors
        if grad.stride() != sparse.stride():
            grad = torch.empty_like(sparse).copy_(grad)
        result = torch.empty_like(sparse)
        threads = torch.get_num_threads()
        library().feather_backward(grad.data_ptr(), sparse.data_ptr(), grad.numel(), ctx.theta, result.data_ptr(), threads)
        return result, None, None


class FastFeather(Feather):
    """The operator with compiled kernels."""

    kernels = True

    def forward(self, weight):
        if not self.kernels or not lies_densely(weight):
            return super().forward(weight)
        return _FastFeather.apply(weight, self.threshold.item(), self.theta)


def count_between(weights, low, high):
    """sparse_utils.count_between() in one pass: (how many magnitudes lie below `low`, those from `low` to `high`)."""
    room = sum(weight.numel() for weight in weights) // 64 + 1024  # brackets are narrow
    below, inside, found = _count(weights, low, high, room)
    if found > room:
        below, inside, found = _count(weights, low, high, found)
    return below, inside[:found]


def _count(weights, low, high, room):
    inside = torch.empty(room)
    found = ctypes.c_int64(0)
    below = 0
    threads = torch.get_num_threads()
    for weight in weights:
        place = ctypes.byref(found)
        data = weight.data_ptr()
        below += library().count_between(data, weight.numel(), low, high, inside.data_ptr(), room, place, threads)
    return below, inside, found.value


def fast_threshold(weights, ratio, previous=None):
    """sparse_utils.global_threshold() with compiled kernels; the same to the bit."""
    return global_threshold(weights, ratio, previous, between=count_between)


class FastPruner(Pruner):
    """sparse_utils.Pruner with compiled kernels."""

    OPERATOR = FastFeather
    kernels = True

    def find_threshold(self, weights, ratio, guess):
        if not self.kernels:
            return super().find_threshold(weights, ratio, guess)
        return fast_threshold(weights, ratio, guess)

    def leave_kernels(self):
        """Go on with plain PyTorch."""
        self.kernels = False
        for module in self.model.modules():
            if isinstance(module, FastFeather):
                module.kernels = False


class _FastSoftThreshold(torch.autograd.Function):
    """methods.st3.effective_weight()."""

    @staticmethod
    def forward(ctx, weight, threshold, soft, rescale):
        sparse = torch.empty_like(weight)
        size = weight.numel() // len(weight)
        threads = torch.get_num_threads()
        library().st3_forward(weight.data_ptr(), len(weight), size, threshold, soft, rescale, sparse.data_ptr(), threads)
        return sparse

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None, None


def fast_soft_threshold(weight, threshold, soft, rescale):
    """methods.st3.effective_weight() of a weight that lies densely. threshold: a 0-d tensor."""
    return _FastSoftThreshold.apply(weight, threshold.item(), soft, rescale)
