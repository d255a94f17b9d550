"""The run folder: what a run leaves, written so that a kill at any moment loses at most the epoch it was in.

args.json        the arguments, every default spelled out
log.jsonl        a line an epoch
checkpoint.pt    everything to continue from, replaced atomically after each epoch
stage-*.pt       the end of each finished stage but the last, for methods of several stages
events.*         the log again, for TensorBoard
masks.pt         of dsp: the masks that packing works from
packed.*         of dsp: the packed network, see deploy/network_file.py
network/         of --model FILE.py:FUNCTION: copies of that file and of what it imports from its folder
small.*          of --shrink: the smaller network, see deploy/network_file.py
sparse.json      of --sparse-compile: accuracy and milliseconds of the sparse engine
model.pt         plain state dict of the finished network: original names and order, exact zeros
result.json      what came out, or why the run failed; written last
"""

import contextlib
import json
from datetime import datetime
from pathlib import Path

from deploy import files
from deploy.files import FileError, read_json, write_json
from methods._flags import differences
from pruners import processes

try:
    import fcntl
except ImportError:  # not on Windows: runs there are not protected against a second one in the same folder
    fcntl = None


class RunError(FileError):
    """One sentence for the user: why this run cannot start or go on."""


def compare_images(run, args):
    """Say it where the run that --from names, by folder or file, has seen images normalised in another way than this one."""
    there = read_json((Path(run) if Path(run).is_dir() else Path(run).parent) / 'args.json') or {}
    for name in ('mean', 'std', 'per_image'):
        other = there.get(name) or None
        own = vars(args).get(name) or None
        if there.get('dataset') == args.dataset and list_of(other) != list_of(own):
            flag = name.replace('_', '-')
            processes.say(
                f'the run of --from had --{flag} {shown(other)}, this one has {shown(own)}: '
                'its weights expect images as they were there, so give the same, or train on long enough'
            )


def list_of(value):
    """A tuple becomes a list when it was read from a JSON file."""
    return list(value) if isinstance(value, (list, tuple)) else value


def shown(value):
    """As it would be typed."""
    return ' '.join(f'{number:g}' for number in value) if isinstance(value, (list, tuple)) else str(value)


def open_run(args):
    """Make or reopen the run's folder -> (Path, lock). Raises RunError when it holds another run, or one that is running."""
    args.out = processes.same(str(args.out or f'runs/{datetime.now():%Y-%m-%d_%H-%M-%S}_{args.sname}'))
    folder = Path(args.out)
    if processes.rank():
        processes.wait()  # until rank 0 has the folder; if it fails, torchrun ends this process too
        return folder, contextlib.nullcontext()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / 'lock', 'w')
    except OSError as error:
        raise RunError(f'cannot write the run folder {folder}: {error.strerror}') from None
    try:
        claim(folder, lock, args)
    except FileError:
        lock.close()
        raise
    processes.wait()
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


def sources(folder):
    """The folder with copies of the files of --model FILE.py:FUNCTION in a run folder (or None for none), or None."""
    kept = folder and Path(folder) / 'network'
    return kept if kept and kept.is_dir() else None


def keep_sources(folder, found):
    """Copy the files that the network came from into the run folder, so that it can be built again from there alone.

    found: {path in the folder: Path}, of archs.files_of(). Raises RunError where the run was begun with other files.
    """
    kept = Path(folder) / 'network'
    for name, path in found.items():
        copy = kept / name
        content = path.read_bytes()
        if copy.is_file() and copy.read_bytes() != content:
            raise RunError(
                f'{path} is not what it was when the run in {folder} began; take another --out, or continue that run, with the '
                f'file as it was, with --resume {folder}'
            )
        if not copy.is_file() and processes.rank() == 0:
            copy.parent.mkdir(parents=True, exist_ok=True)
            files.write_atomically(copy, lambda file, content=content: file.write(content))


def finished(folder):
    """The result of a run that ended well, or None."""
    result = read_json(Path(folder) / 'result.json')
    return result if isinstance(result, dict) and result.get('status') == 'finished' else None


def log(folder, line, number):
    """Write `line` as line `number` (from 0) of log.jsonl; what stood from there on was never saved, and is repeated now."""
    path = folder / 'log.jsonl'
    lines = path.read_text(errors='replace').splitlines(keepends=True)[:number] if path.exists() else []
    if len(lines) < number or not all(line.endswith('\n') for line in lines):
        raise RunError(
            f'{path} is damaged: it should have {number} lines; take another --out, or delete the folder to start over'
        )
    files.write_atomically(path, lambda file: file.write((''.join(lines) + json.dumps(line) + '\n').encode()))
