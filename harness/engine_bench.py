"""How fast zeros run: the sparse engine beside dense engines, each in a process of its own.

Several engines in one process disturb one another (threads that spin, caches), so every engine waits in its own process, and
blocks of calls are timed in turn: all engines, ROUNDS rounds, median of the medians of blocks. The parent asks, the workers
answer, one at a time.

python bench.py sparse                              the table
python -m harness.engine_bench ENGINE FILE BATCH THREADS      a worker: answers a line on standard input by milliseconds
"""

import copy
import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch import nn

import archs
from deploy import sparse_compile, write_onnx
from deploy.engine import build
from deploy.files import read_published
from sparse_utils import count_macs

from .published import WEIGHTS, rebuild
from .rebuild import network_of, rebuild_run
from .training import keep_freed_memory

ROUNDS = 5
PASSES = 2
SECONDS = 0.3  # of a block
OURS = 'sparse engine'
INT8 = 'PyTorch int8'
PUBLISHED = {
    'feather-90': 'ResNet-20, feather-90',
    'feather-98': 'ResNet-20, feather-98',
    'st3-sigma-98': 'ResNet-20, st3-sigma-98',
}
# ResNet-50 with zeros placed so that as many multiply-accumulates are left as ST-3 and ST-3-sigma leave: sparsity, million MACs
PLACED = {'resnet50-90-764': (0.90, 764), 'resnet50-95-436': (0.95, 436), 'resnet50-98-220': (0.98, 220)}
PLACED |= {'resnet50-90-397': (0.90, 397), 'resnet50-98-116': (0.98, 116)}
RANDOM = {'vgg16': 0.95, 'mobilenet_v1': 0.95, 'wrn16_8': 0.95, 'densenet': 0.95}
# channels, filters, height and width, kernel: the layers whose share of the machine's peak is measured
SHAPES = [(16, 16, 32, 3), (64, 64, 8, 3), (128, 128, 28, 3), (256, 256, 14, 3), (256, 64, 56, 1), (64, 256, 56, 1)]
SHAPES += [(512, 128, 28, 1), (1024, 256, 14, 1), (256, 1024, 14, 1), (512, 512, 7, 3), (2048, 512, 7, 1)]
SPARSITIES = (0.8, 0.9, 0.95, 0.98)
CASES = [(name, batch) for batch in (1, 16) for name in PUBLISHED] + [(name, 1) for name in (*PLACED, *RANDOM)]


def place_zeros(model, sparsity, macs, example):
    """Zero the weights of all layers but the first where |w| / std(layer) * fan_in ** a is smallest.

    a is found by bisection, so that `macs` million multiply-accumulates are left.
    """
    dense = count_macs(model, example)
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))][1:]
    fixed = sum(left for _, left in dense.values()) - sum(dense[name][0] for name, _ in layers)
    each = torch.cat([torch.full([layer.weight.numel()], dense[name][0] / layer.weight.numel()) for name, layer in layers])
    size = torch.cat([(layer.weight.abs() / layer.weight.std()).flatten() for _, layer in layers]).detach()
    fan_in = torch.cat([torch.full([layer.weight.numel()], float(layer.weight[0].numel())) for _, layer in layers])
    kept = round(len(size) * (1 - sparsity))
    low = -2.0  # the larger a, the more weights stay in the late layers, whose images are small
    high = 2.0
    for _ in range(20):
        a = (low + high) / 2
        mask = torch.zeros(len(size), dtype=torch.bool)
        mask[(size * fan_in**a).topk(kept).indices] = True
        left = fixed + each[mask].sum().item()
        low, high = (a, high) if left > macs * 1e6 else (low, a)
    with torch.no_grad():
        for (_, layer), part in zip(layers, mask.split([layer.weight.numel() for _, layer in layers]), strict=True):
            layer.weight *= part.view_as(layer.weight)
    return model


def network(name):
    """(the network in eval mode, an example image) of a name, a run's folder or a published file."""
    torch.manual_seed(0)
    if Path(name).is_dir():
        return rebuild_run(name)
    if Path(name).is_file():
        state, about = read_published(name)
        model, _ = rebuild(state, about)
        _, shape = network_of(about['args'], about)
        return model.to(memory_format=torch.contiguous_format), torch.randn(1, *shape)
    if name in PUBLISHED:
        model, _ = rebuild(*read_published(WEIGHTS / 'cifar10_10ep' / f'{name}-s0.pt'))
        return model.to(memory_format=torch.contiguous_format), torch.randn(1, 3, 32, 32)
    if name in PLACED:
        example = torch.randn(1, 3, 224, 224)
        return place_zeros(archs.build('resnet50', 1000).eval(), *PLACED[name], example), example
    model = archs.build(name, 10).eval()
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.weight *= torch.rand_like(layer.weight) > RANDOM[name]
    return model, torch.randn(1, 3, 32, 32)


def runner(engine, model, images, threads):
    """A function that runs the network once."""
    if engine == OURS:
        compiled = sparse_compile(model, images, threads)
        return lambda: compiled(images)
    if engine == 'PyTorch':
        return lambda: model(images)
    if engine == 'channels-last':
        model = model.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
        return lambda: model(images)
    if engine == 'torch.compile':
        compiled = torch.compile(model)
        return lambda: compiled(images)
    if engine == INT8:
        quantized = in_int8(model, [images])  # its speed does not depend on the images that ranges are taken from
        return lambda: quantized(images)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'network.onnx')
        write_onnx(model, torch.cat([images, images]), path)
        if engine == 'ONNX Runtime':
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
            return lambda: session.run(None, {'input': images.numpy()})
        import openvino

        settings = {'INFERENCE_NUM_THREADS': threads, 'INFERENCE_PRECISION_HINT': 'f32', 'PERFORMANCE_HINT': 'LATENCY'}
        core = openvino.Core()
        description = core.read_model(path)
        description.reshape({'input': list(images.shape)})
        request = core.compile_model(description, 'CPU', settings).create_infer_request()
        return lambda: request.infer({'input': images.numpy()})


def in_int8(model, batches):
    """A copy of a network with PyTorch's int8 kernels for this CPU, ranges of activations taken from batches of images."""
    from torch.ao.quantization import quantize_fx  # takes a second

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # PyTorch moves its tools for this to another package
        torch.backends.quantized.engine = 'x86'
        mapping = torch.ao.quantization.get_default_qconfig_mapping('x86')
        watched = quantize_fx.prepare_fx(copy.deepcopy(model), mapping, (batches[0],))
        with torch.no_grad():
            for images in batches:
                watched(images)
        return quantize_fx.convert_fx(watched)


def missing():
    """The engines that are not installed."""
    packages = {'ONNX Runtime': 'onnxruntime', 'OpenVINO': 'openvino'}
    return [name for name, own in packages.items() if not all(map(importlib.util.find_spec, (own, 'onnx', 'onnxscript')))]


def engines():
    """The engines that are installed; the sparse one last."""
    every = ['PyTorch', 'channels-last', 'torch.compile', 'ONNX Runtime', 'OpenVINO', OURS]
    return [name for name in every if name not in missing()]


@torch.no_grad()
def work(engine, path, batch, threads):
    """A worker: load the network that measure() saved, say so, then time a block of calls for each line on standard input."""
    torch.set_num_threads(threads)
    keep_freed_memory()  # else PyTorch waits for fresh pages in every pass, up to as long as it computes
    model, example = torch.load(path, weights_only=False)
    run = runner(engine, model, example.repeat(batch, 1, 1, 1), threads)
    for _ in range(3):
        run()
    print('ready', flush=True)
    for _ in sys.stdin:
        times = []
        began = time.perf_counter()
        while not times or time.perf_counter() - began < SECONDS:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        print(1000 * statistics.median(times), flush=True)


def measure(name, batch, threads, chosen=None, rounds=ROUNDS, failed=None):
    """{engine: milliseconds} of a network: the median over the rounds of each block's median.

    name: what network() takes, or what it gives: (a network in eval mode, an example image).
    failed: a list that takes the names of dense engines that cannot run the network; without it they raise RuntimeError.
    """
    workers = {}
    blocks = {}
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name, 'network.pt')  # built once, and the same for all
    torch.save(network(name) if isinstance(name, str) else name, path)
    try:
        for engine in chosen or engines():
            command = [sys.executable, '-m', 'harness.engine_bench', engine, str(path), str(batch), str(threads)]
            pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE, 'text': True}
            workers[engine] = subprocess.Popen(command, cwd=WEIGHTS.parents[1], stderr=subprocess.DEVNULL, **pipes)
            if _answer(workers[engine]) != 'ready':  # one at a time, so that nothing else is measured or compiled meanwhile
                if failed is not None and engine not in (OURS, 'PyTorch'):
                    failed.append(engine)
                    workers.pop(engine).wait()
                    continue
                raise RuntimeError(
                    f'the worker of {engine} ended before it was ready: run it alone to see why: {" ".join(command)}'
                )
            blocks[engine] = []
        for _ in range(rounds):
            for engine, worker in workers.items():
                worker.stdin.write('go\n')
                worker.stdin.flush()
                blocks[engine].append(float(_answer(worker)))
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
        folder.cleanup()
    return {engine: statistics.median(values) for engine, values in blocks.items()}


def _answer(worker):
    """The next line that is meant for the parent; engines print other things too."""
    for line in worker.stdout:
        text = line.strip()
        if text == 'ready' or text.replace('.', '', 1).replace('e-', '', 1).isdigit():
            return text
    return None


@torch.no_grad()
def share_of_peak(channels, filters, size, kernel, sparsity):
    """Multiply-accumulates a second with the non-zero weights of one layer, zeros at random, by those that registers allow.

    None where PyTorch is faster, so that the engine leaves all to it.
    """
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, filters, kernel, padding=kernel // 2)
    conv.weight *= torch.rand_like(conv.weight) > sparsity
    image = torch.randn(1, channels, size, size)
    after = nn.Conv2d(filters, filters, 3, padding=1, groups=filters)  # planes lie as in a network with 3x3 convolutions
    network = sparse_compile(nn.Sequential(conv, nn.ReLU(), after, nn.AdaptiveAvgPool2d(1)), image, 1)
    if any('PyTorch' in record['kernel'] for record in network.report()):
        return None
    milliseconds = min(network.report(image)[1]['ms'] for _ in range(5))  # after the copy of the input
    return int(conv.weight.count_nonzero()) * size * size / milliseconds / 1e6 / peak()


def peak():
    """Billions of multiply-accumulates a second of one thread whose numbers stay in registers."""
    kernels = build.library()
    numbers = torch.full([kernels.lanes()], 0.5)
    rounds = 100_000
    return rounds * 64 * kernels.lanes() / min(kernels.peak(rounds, numbers.data_ptr()) for _ in range(5))


def bench_layers(say=print, shapes=SHAPES):
    """The shares of single layers, one thread."""
    say(f'\nnon-zero multiply-accumulates of one layer, batch 1, one thread, as a share of the peak of {peak():.0f} GMAC/s')
    for channels, filters, size, kernel in shapes:
        shares = [share_of_peak(channels, filters, size, kernel, sparsity) for sparsity in SPARSITIES]
        row = '  '.join(
            f'{sparsity:.0%} {"dense" if share is None else f"{share:.2f}"}'
            for sparsity, share in zip(SPARSITIES, shares, strict=True)
        )
        say(f'  {channels}->{filters}, {size}x{size}, {kernel}x{kernel}: {row}')


def bench_sparse(device, repeats, names, say=print, cases=None):
    """The table of `python bench.py sparse`: milliseconds of each engine, and the ratio to the fastest dense one.

    Every network is measured in each of PASSES over the table, and of each engine the fastest reading counts: a machine that is
    shared may be slow for some minutes, and not alike for all engines.
    """
    threads = torch.get_num_threads()
    chosen = engines()
    say(
        f'\nmilliseconds, {threads} thread(s), float32; each engine in a process of its own, the faster of {PASSES} passes; '
        'gain: over the fastest dense one'
    )
    if missing():
        say(f'  not measured, not installed: {", ".join(missing())}')
    say(line('network, batch', [*chosen, 'gain']))
    cases = cases or CASES
    best = dict.fromkeys(cases, {})
    for _ in range(PASSES - 1):
        best = {case: faster(measure(*case, threads, chosen), best[case]) for case in cases}
    for name, batch in cases:
        times = faster(measure(name, batch, threads, chosen), best[name, batch])
        fastest = min(ms for engine, ms in times.items() if engine != OURS)
        say(line(f'{name}, {batch}', [*(f'{times[engine]:.3f}' for engine in chosen), f'{fastest / times[OURS]:.2f}x']))


def faster(now, earlier):
    """Of two readings {engine: milliseconds} the faster one of each engine."""
    return {engine: min(time, earlier.get(engine, time)) for engine, time in (earlier | now).items()}


def line(name, cells):
    """A line of the table, in columns."""
    return f'  {name:<20}' + ''.join(f'{cell:>15}' for cell in cells)


if __name__ == '__main__':
    work(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
