"""How long a network takes for a forward pass."""

import statistics
import time

import torch

from sparse_utils import count_macs

from .outputs import eval_mode

SECONDS, THREADS = 0.5, 2  # to measure the latency of one batch size, on a CPU


@torch.no_grad()
def measure_latency(model, example_input, batches=(1, 32), threads=None, dense=None, seconds=None):
    """Median milliseconds of a forward pass in eval mode: {'ms_1': ..., 'ms_32': ...}, one for each batch size.

    example_input: a batch whose first example is repeated. threads: of the CPU (default: THREADS), set back afterwards. dense: another network,
    measured in turn with the first so that a disturbance hits both alike; adds 'dense_ms_1', ... seconds: how long to measure
    each batch size (default: SECONDS), but at least 5 and at most 100 passes after 3 that warm up.
    """
    networks = {'ms': model} | ({} if dense is None else {'dense_ms': dense})
    before, results = torch.get_num_threads(), {}
    torch.set_num_threads(threads or THREADS)
    try:
        for batch in batches:
            images = example_input[:1].expand(batch, *example_input.shape[1:]).contiguous()
            for name, values in _times(networks, images, SECONDS if seconds is None else seconds).items():
                results[f'{name}_{batch}'] = round(1000 * statistics.median(values), 3)
    finally:
        torch.set_num_threads(before)
    return results


def _times(networks, images, seconds):
    """{name: [seconds of a pass]}, one pass of each network in turn."""
    times, start = {name: [] for name in networks}, None
    for repeat in range(103):
        start = time.perf_counter() if repeat == 3 else start
        for name, network in networks.items():
            with eval_mode(network):
                began = time.perf_counter()
                network(images)
                if images.is_cuda:
                    torch.cuda.synchronize(images.device)
                if repeat >= 3:
                    times[name].append(time.perf_counter() - began)
        if repeat >= 7 and time.perf_counter() - start > seconds:
            break
    return times


def gains(model, small, example_input, threads=None, **options):
    """What shrinking gave, for a result line: parameters, MACs and milliseconds of `small`, and those of `model` as dense_*."""
    result = {}
    for prefix, network in (('small_', small), ('dense_', model)):
        result[f'{prefix}parameters'] = sum(parameter.numel() for parameter in network.parameters())
        result[f'{prefix}macs'] = sum(dense for dense, _ in count_macs(network, example_input[:1]).values())
    times = measure_latency(small, example_input, threads=threads, dense=model, **options)
    return result | {name if name.startswith('dense') else f'small_{name}': value for name, value in times.items()}
