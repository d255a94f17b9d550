"""What a finished run is worth: counted and measured on its network, nothing taken from the request."""

import contextlib
import platform
import subprocess
from argparse import Namespace
from pathlib import Path

import torch

from deploy import latency
from deploy.outputs import eval_mode
from deploy.shrinking import shrink
from pruners import processes
from pruners.processes import say
from sparse_utils import count_macs, count_zeros


def commit():
    """The short git commit of this code, with a + when files differ from it; None outside a git checkout.

    What recording a run writes, results/ and the README that repeats it, is no code.
    """
    here = Path(__file__).resolve().parent
    try:
        git = ['git', '-C', str(here)]
        name = subprocess.run([*git, 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True, check=True)
        code = ['--', ':(top)', ':(top,exclude)results', ':(top,exclude)README.md']
        dirty = subprocess.run([*git, 'status', '--porcelain', '-uno', *code], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return name.stdout.strip() + ('+' if dirty.stdout.strip() else '')


def hardware(device):
    """The name of the GPU, or of the CPU with its number of threads."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    name = platform.processor() or 'CPU'
    with contextlib.suppress(OSError):  # where there is no such file
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        name = next((line.split(':')[1].strip() for line in lines if line.startswith('model name')), name)
    return f'{name}, {torch.get_num_threads()} threads'


def trained_on(epochs_on, here):
    """The hardware a run names: that of this process, or, of a run that went on elsewhere, how many epochs each did.

    trained_on({'NVIDIA H200': 84, 'EPYC, 1 threads': 76}, 'EPYC, 1 threads')
    -> '84 epochs on NVIDIA H200, 76 epochs on EPYC, 1 threads'
    """
    if set(epochs_on) <= {here}:
        return here
    return ', '.join(f'{number} epochs on {name}' for name, number in epochs_on.items())


def totals(counts):
    """{name: (a, b)} -> (sum of a, sum of b)."""
    return sum(a for a, _ in counts.values()), sum(b for _, b in counts.values())


def accuracy(model, loader, forward=None):
    """Accuracy in percent over a loader, in float32 and eval mode; the model's modes are afterwards as before.

    forward: computes what the model does, in another way.
    """
    forward = forward or model
    correct = 0
    with torch.no_grad(), eval_mode(model):
        for images, labels in loader:
            correct = correct + (forward(images).argmax(1) == labels).sum()
    correct = processes.total(torch.as_tensor(correct, device=labels.device))
    return 100 * correct.item() / loader.num_images


def measure(job, method):
    """The result line: everything in it is counted or measured on the finished model, nothing is taken from the request."""
    model = job.model
    zeros = count_zeros(model, job.args.pthres)
    macs = count_macs(model, job.example)
    pruned, weights = totals(zeros)
    smaller = gains(model, job.example) if method.filters else {}
    parameters = list(model.parameters())
    everything = sum(p.numel() for p in parameters)
    macs_dense, macs_nonzero = totals(macs)
    return {
        'status': 'finished',
        'accuracy': job.evaluate(job.test),
        'best_accuracy': job.done['best'],
        'zeros': pruned,
        'weights': weights,
        'sparsity': pruned / weights,
        'parameters': everything,
        'sparsity_all': 1 - sum(int(torch.count_nonzero(p)) for p in parameters) / everything,
        'macs_dense': macs_dense,
        'macs_nonzero': macs_nonzero,
        'gives': method.gives,
        'epochs': job.done['epochs'],
        'seconds': round(job.done['seconds'], 3),
        'device': trained_on(job.done['epochs_on'], hardware(job.device)),
        'torch': torch.__version__,
        'commit': commit(),
        'data': job.data.source,
        'num_classes': job.data.num_classes,
        'in_channels': job.data.in_channels,
        'image_size': job.data.image_size,
        **smaller,
        **job.recalibrated,
        **method.started_with,
        **method.facts(),
        'layers': {name: [*count, *macs.get(name, (0, 0))] for name, count in zeros.items()},
        'args': vars(job.args),
    }


def gains(model, example):
    """Parameters, MACs and milliseconds without the pruned filters and of the whole network; or why there are none."""
    try:
        return latency.gains(model, shrink(model, example), example)
    except ValueError as error:
        return {'not_smaller': str(error)}


def report(result, folder):
    """Print a finished run."""
    r = Namespace(**result)
    epoch = {
        'val': 'of the epoch that was best on the validation split',
        'test-best': 'of the epoch that was BEST ON THE TEST SET',
    }.get(result.get('selected'), 'after the last epoch')
    epoch += ', and recalibration' if 'recalibrated_images' in result else ''
    best = f' (best of any epoch, at whatever sparsity: {r.best_accuracy:.2f} %)' if r.epochs else ''
    say(f'accuracy   {r.accuracy:.2f} % {epoch}{best}')
    share = f'{100 * r.sparsity:.4f} %; {100 * r.sparsity_all:.4f} % of all parameters'
    say(f'zeros      {r.zeros:,} of {r.weights:,} prunable weights, {share}')
    say(f'MACs       {r.macs_nonzero:,} with non-zero weights, {r.macs_dense:,} dense, for one image')
    if 'small_macs' in result:
        fewer = f'{r.small_parameters:,} of {r.dense_parameters:,} parameters, {r.small_macs:,} of {r.dense_macs:,} MACs'
        one = f'{r.dense_ms_1:.2f} -> {r.small_ms_1:.2f} ms for one image'
        many = f'{r.dense_ms_32:.2f} -> {r.small_ms_32:.2f} ms for 32'
        say(f'{"packed    " if "saved" in result else "shrunk    "} {fewer}; {one}, {many}, on {r.latency_on}')
    if 'not_smaller' in result:
        say(f'shrunk     not: {r.not_smaller}')
    saved = result.get('saved', 'model.pt')
    say(f'this gives {r.gives}; saved in {folder}/{saved}, all figures in {folder}/result.json')
