"""The run folder: what a run leaves, written so that a kill at any moment loses at most the epoch it was in.

args.json        the arguments, every default spelled out
log.jsonl        a line an epoch
checkpoint.pt    everything to continue from, replaced atomically after each epoch
stage-*.pt       the end of each finished stage but the last, for methods of several stages
events.*         the log again, for TensorBoard
masks.pt         of dsp: the masks that packing works from
packed.*         of dsp: the packed network, see export.py
small.*          of --shrink: the smaller network, see export.py
model.pt         plain state dict of the finished network: original names and order, exact zeros
result.json      what came out, or why the run failed; written last
"""

import contextlib
import json
import os
import platform
import subprocess
import sys
import zipfile
from argparse import Namespace
from datetime import datetime
from pathlib import Path

import torch
from tqdm import tqdm

import distributed
from args import differences
from export import eval_mode
from sparse_utils import count_macs, count_zeros

try:
    import fcntl
except ImportError:  # not on Windows: runs there are not protected against a second one in the same folder
    fcntl = None


class RunError(Exception):
    """One sentence for the user: why this run cannot start or go on."""


def write_atomically(path, write):
    """Call write(file) on a temporary file beside `path`, then put it in place of `path` in one step; only rank 0 does."""
    if distributed.rank():
        return
    temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
    try:
        with open(temporary, 'wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        reason = getattr(error, 'strerror', None) or ' '.join(str(error).split())[:100]
        raise RunError(f'cannot write {path} ({reason}); what stood there before is as it was') from None


def save(state, path):
    """torch.save, atomically."""
    write_atomically(path, lambda file: torch.save(state, file))


def load(path, device='cpu'):
    """Read what save() wrote: tensors and plain types only, never code. Raises RunError for a damaged file."""
    try:
        with zipfile.ZipFile(path) as parts:  # torch.load does not look at the checksums
            if damaged := parts.testzip():
                raise ValueError(f'the checksum of {damaged} is wrong')
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch reports damage as RuntimeError, EOFError, UnpicklingError, KeyError, ...
        reason = str(error).strip().split('\n')[0][:100]
        raise RunError(f'{path} is damaged ({reason}): delete it to start over, or take another --out') from None


def weights(run):
    """The state dict of a finished run, named by its folder or by the file. Raises RunError where there is none."""
    path = Path(run) / 'model.pt' if Path(run).is_dir() else Path(run)
    if not path.is_file():
        raise RunError(f'--from {run}: there is no {path}; name the folder of a finished run')
    return load(path)


def write_json(value, path):
    text = json.dumps(value, indent=1) + '\n'
    write_atomically(path, lambda file: file.write(text.encode()))


def read_json(path):
    """The object in a JSON file, or None when there is none or it is cut short."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def open_run(args):
    """Make or reopen the run's folder -> (Path, lock). Raises RunError when it holds another run, or one that is running."""
    args.out = distributed.same(str(args.out or f'runs/{datetime.now():%Y-%m-%d_%H-%M-%S}_{args.sname}'))
    folder = Path(args.out)
    if distributed.rank():
        distributed.wait()  # until rank 0 has the folder; if it fails, torchrun ends this process too
        return folder, contextlib.nullcontext()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / 'lock', 'w')
    except OSError as error:
        raise RunError(f'cannot write the run folder {folder}: {error.strerror}') from None
    try:
        claim(folder, lock, args)
    except RunError:
        lock.close()
        raise
    distributed.wait()
    return folder, lock


def claim(folder, lock, args):
    """Take the lock and write args.json, or see that the one that is there is the same."""
    if fcntl is not None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f'another run is writing to {folder}; wait for it, or take another --out') from None
    for leftover in folder.glob('*.tmp'):  # of a run that was killed while it wrote
        leftover.unlink()
    before = read_json(folder / 'args.json')
    if before is None:
        if (folder / 'checkpoint.pt').exists():
            raise RunError(f'{folder} has a checkpoint but no readable args.json: take another --out')
        write_json(vars(args), folder / 'args.json')
    elif changed := differences(before, vars(args)):
        raise RunError(
            f'{folder} belongs to a run with other arguments ({"; ".join(changed)}); '
            f'take another --out, or continue that run with --resume {folder}'
        )


def finished(folder):
    """The result of a run that ended well, or None."""
    result = read_json(Path(folder) / 'result.json')
    return result if isinstance(result, dict) and result.get('status') == 'finished' else None


def log(folder, line, number):
    """Write `line` as line `number` (from 0) of log.jsonl: what stood there or after it was never saved, and is repeated now."""
    path = folder / 'log.jsonl'
    lines = path.read_text(errors='replace').splitlines(keepends=True)[:number] if path.exists() else []
    if len(lines) < number or not all(line.endswith('\n') for line in lines):
        raise RunError(
            f'{path} is damaged: it should have {number} lines; take another --out, or delete the folder to start over'
        )
    write_atomically(path, lambda file: file.write((''.join(lines) + json.dumps(line) + '\n').encode()))


def commit():
    """The short git commit of this code, with a + when files differ from it; None outside a git checkout."""
    here = Path(__file__).parent
    try:
        git = ['git', '-C', str(here)]
        name = subprocess.run([*git, 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True, check=True)
        dirty = subprocess.run([*git, 'status', '--porcelain', '-uno'], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return name.stdout.strip() + ('+' if dirty.stdout.strip() else '')


def hardware(device):
    """The name of the GPU, or of the CPU with its number of threads."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    try:
        names = [line.split(':')[1] for line in Path('/proc/cpuinfo').read_text().splitlines() if line.startswith('model name')]
    except OSError:
        names = []
    return f'{(names or [platform.processor() or "CPU"])[0].strip()}, {torch.get_num_threads()} threads'


def totals(counts):
    """{name: (a, b)} -> (sum of a, sum of b)."""
    return sum(a for a, _ in counts.values()), sum(b for _, b in counts.values())


def accuracy(model, loader):
    """Accuracy in percent over a loader, in float32 and eval mode; the model's modes are afterwards as before."""
    correct = 0
    with torch.no_grad(), eval_mode(model):
        for images, labels in loader:
            correct = correct + (model(images).argmax(1) == labels).sum()
    correct = distributed.total(torch.as_tensor(correct, device=labels.device))
    return 100 * correct.item() / loader.num_images


def measure(job, method):
    """The result line: everything in it is counted or measured on the finished model, nothing is taken from the request."""
    model = job.model
    zeros, macs = count_zeros(model, job.args.pthres), count_macs(model, next(iter(job.test))[0][:1])
    pruned, weights = totals(zeros)
    smaller = gains(model, next(iter(job.test))[0][:1]) if method.FILTERS else {}
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
        'gives': method.GIVES,
        'epochs': job.done['epochs'],
        'seconds': round(job.done['seconds'], 3),
        'device': hardware(job.device),
        'torch': torch.__version__,
        'commit': commit(),
        'data': job.source,
        **smaller,
        **method.facts(),
        'layers': {name: [*count, *macs.get(name, (0, 0))] for name, count in zeros.items()},
        'args': vars(job.args),
    }


def gains(model, example):
    """Parameters, MACs and milliseconds of the network without its pruned filters and of the whole one; or why there is none."""
    import shrink  # which imports this module

    try:
        return shrink.gains(model, shrink.shrink(model, example), example)
    except ValueError as error:
        return {'not_smaller': str(error)}


def report(result, folder):
    """Print a finished run."""
    r = Namespace(**result)
    chosen = {
        'val': 'of the epoch that was best on the validation split',
        'test-best': 'of the epoch that was BEST ON THE TEST SET',
    }
    chosen = chosen.get(result.get('selected'), 'after the last epoch')
    say(f'accuracy   {r.accuracy:.2f} % {chosen} (best of any epoch, at whatever sparsity: {r.best_accuracy:.2f} %)')
    say(
        f'zeros      {r.zeros:,} of {r.weights:,} prunable weights, {100 * r.sparsity:.4f} %; {100 * r.sparsity_all:.4f} % of all parameters'
    )
    say(f'MACs       {r.macs_nonzero:,} with non-zero weights, {r.macs_dense:,} dense, for one image')
    if 'small_macs' in result:
        fewer = f'{r.small_parameters:,} of {r.dense_parameters:,} parameters, {r.small_macs:,} of {r.dense_macs:,} MACs'
        times = (
            f'{r.dense_ms_1:.2f} -> {r.small_ms_1:.2f} ms for one image, {r.dense_ms_32:.2f} -> {r.small_ms_32:.2f} ms for 32'
        )
        say(f'shrunk     {fewer}; {times}, on two threads')
    say(f'this gives {r.gives}; saved in {folder}/model.pt, all figures in {folder}/result.json')


def say(text):
    """Print without disturbing a progress bar, and at once."""
    if distributed.rank() == 0:
        tqdm.write(text)
        sys.stdout.flush()
