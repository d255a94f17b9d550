"""How long a network takes for a forward pass, and what a smaller network gains."""

import contextlib
import statistics
import time

import torch
from torch import nn

from sparse_utils import count_macs

from .outputs import eval_mode

SECONDS = 0.5  # how long to measure one batch size
THREADS = 2  # of the CPU, while measuring
WARM_UP = 3  # passes: not counted, and the bounds for those that are
FEWEST = 5
MOST = 100


@torch.no_grad()
def measure_latency(
    model: nn.Module,
    example_input: torch.Tensor,
    batches: tuple = (1, 32),
    threads: int | None = None,
    dense: nn.Module | None = None,
    seconds: float | None = None,
) -> dict:
    """Median milliseconds of a forward pass in eval mode: {'ms_1': ..., 'ms_32': ...}, one for each batch size.

    example_input: a batch whose first example is repeated. threads: of the CPU (default: THREADS), set back afterwards.
    dense: another network, measured in turn with the first so that a disturbance hits both alike; adds 'dense_ms_1', ...
    seconds: how long to measure each batch size (default: SECONDS), but at least 5 and at most 100 passes after 3 that warm up.
    """
    networks = {'ms': model}
    if dense is not None:
        networks['dense_ms'] = dense
    results = {}
    for batch in batches:
        images = example_input[:1].expand(batch, *example_input.shape[1:]).contiguous()
        for name, median in median_seconds(networks, images, threads, seconds).items():
            results[f'{name}_{batch}'] = round(1000 * median, 3)
    return results


@torch.no_grad()
def median_seconds(
    networks: dict[str, nn.Module], images: torch.Tensor, threads: int | None = None, seconds: float | None = None
) -> dict[str, float]:
    """{name: median seconds of a forward pass of a batch}; networks in turn, threads and seconds as in measure_latency()."""
    with threads_of_the_cpu(threads or THREADS):
        times = _passes_in_turn(networks, images, SECONDS if seconds is None else seconds)
    return {name: statistics.median(passes) for name, passes in times.items()}


@contextlib.contextmanager
def threads_of_the_cpu(number: int):
    """Inside, PyTorch computes on so many threads; afterwards on as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _passes_in_turn(networks, images, seconds):
    """{name: [seconds of a pass]}, one pass of each network in turn."""
    times = {name: [] for name in networks}
    for repeat in range(WARM_UP + MOST):
        if repeat == WARM_UP:
            start = time.perf_counter()
        for name, network in networks.items():
            passed = _seconds_of_a_pass(network, images)
            if repeat >= WARM_UP:
                times[name].append(passed)
        if repeat + 1 >= WARM_UP + FEWEST and time.perf_counter() - start > seconds:
            break
    return times


def _seconds_of_a_pass(network, images):
    with eval_mode(network):
        began = time.perf_counter()
        network(images)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        return time.perf_counter() - began


def gains(
    model: nn.Module, small: nn.Module, example_input: torch.Tensor, threads: int | None = None, seconds: float | None = None
) -> dict:
    """What shrinking gave, for a result line: parameters, MACs and milliseconds of `small`, and those of `model` as dense_*."""
    result = {}
    for prefix, network in (('small_', small), ('dense_', model)):
        result[f'{prefix}parameters'] = sum(parameter.numel() for parameter in network.parameters())
        result[f'{prefix}macs'] = sum(dense for dense, _ in count_macs(network, example_input[:1]).values())
    result['latency_on'] = 'the GPU' if example_input.is_cuda else f'{threads or THREADS} threads of the CPU'
    times = measure_latency(small, example_input, threads=threads, dense=model, seconds=seconds)
    for name, milliseconds in times.items():
        result[name if name.startswith('dense') else f'small_{name}'] = milliseconds
    return result
