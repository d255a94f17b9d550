"""Files that survive a kill, and tensors that are read without running code.

A file is written beside its place and then put there in one step. Published weights are folded and read here too: a torch.save
of five entries, read with weights_only=True, so that nothing in it can run:
about    JSON: result and arguments of the run, table and row, and name, shape and kind of each tensor
dense    float32: the tensors that are mostly not zero, one after the other
values   float32: the non-zero values of the others ('sparse')
gaps     uint8, deflated: how many zeros stand before each of those values, as bytes of 255 and one below
counts   int64: batch norm's counters
The state dict that is read back is equal to the bit, but that a zero has lost its sign.
"""

import json
import math
import os
import zipfile
import zlib

import torch
import torch.distributed as dist

LARGEST = 2**28  # parameters: what a file may unfold to, so that a small file cannot fill the memory


class FileError(Exception):
    """One sentence for the user: why a file cannot be read or written."""


def write_atomically(path, write):
    """Call write(file) on a temporary file beside `path`, then put it in place of `path` in one step; only rank 0 does."""
    if dist.is_initialized() and dist.get_rank():
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
        raise FileError(f'cannot write {path} ({reason}); what stood there before is as it was') from None


def write_tensors(state, path):
    """torch.save, atomically."""
    write_atomically(path, lambda file: torch.save(state, file))


def read_tensors(path, device='cpu'):
    """Read what write_tensors() wrote: tensors and plain types only, never code. Raises FileError for a damaged file."""
    try:
        with zipfile.ZipFile(path) as parts:  # torch.load does not look at the checksums
            if damaged := parts.testzip():
                raise ValueError(f'the checksum of {damaged} is wrong')
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch reports damage as RuntimeError, EOFError, UnpicklingError, KeyError, ...
        reason = str(error).strip().split('\n')[0][:100]
        raise FileError(f'{path} is damaged ({reason}): delete it to start over, or take another --out') from None


def write_json(value, path):
    text = json.dumps(value, indent=1) + '\n'
    write_atomically(path, lambda file: file.write(text.encode()))


def read_json(path):
    """The object in a JSON file, or None when there is none or it is cut short."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def encode(positions):
    """Sorted positions (int64, 1-d) -> uint8: each gap g as g // 255 bytes of 255, and one byte g % 255."""
    gaps = torch.diff(positions, prepend=torch.tensor([-1])) - 1
    ends = torch.cumsum(gaps // 255 + 1, 0) - 1
    code = torch.full((int(ends[-1]) + 1 if len(ends) else 0,), 255, dtype=torch.uint8)
    code[ends] = (gaps % 255).to(torch.uint8)
    return code


def decode(code):
    """The inverse of encode()."""
    steps = code.long()
    steps[code != 255] += 1
    return torch.cumsum(steps, 0)[code != 255] - 1


def pack_sparse(state, about):
    """State dict and JSON-able dict -> what the file holds."""
    layout = []
    parts = {'sparse': [], 'dense': [], 'counts': []}
    for name, tensor in state.items():
        if tensor.dtype not in (torch.float32, torch.int64):
            raise ValueError(f'{name} is {tensor.dtype}; only float32 weights and int64 counters can be published')
        sparse = tensor.is_floating_point() and tensor.numel() > 4 and torch.count_nonzero(tensor) < 0.8 * tensor.numel()
        kind = 'sparse' if sparse else 'dense' if tensor.is_floating_point() else 'counts'
        layout.append([name, list(tensor.shape), kind])
        parts[kind].append(tensor.detach().cpu().reshape(-1))
    flat = {kind: torch.cat(tensors) if tensors else torch.empty(0) for kind, tensors in parts.items()}
    positions = flat['sparse'].nonzero().reshape(-1)
    packed = zlib.compress(encode(positions).numpy().tobytes(), 9)
    return {
        'about': json.dumps(about | {'tensors': layout}),
        'dense': flat['dense'],
        'values': flat['sparse'][positions],
        'gaps': torch.frombuffer(bytearray(packed), dtype=torch.uint8),
        'counts': flat['counts'].long(),
    }


def unpack_sparse(content):
    """What the file holds -> (state dict, about). Raises ValueError when the parts do not fit together."""
    about = json.loads(content['about'])
    sizes = {'sparse': 0, 'dense': 0, 'counts': 0}
    for _, shape, kind in about['tensors']:
        if not all(type(side) is int and side >= 0 for side in shape):
            raise ValueError(f'a shape is {shape}')
        sizes[kind] += math.prod(shape)
    if sum(sizes.values()) > LARGEST:
        raise ValueError(f'its tensors would have {sum(sizes.values()):,} entries')
    survivors = len(content['values'])
    limit = survivors + sizes['sparse'] // 255 + 1
    code = zlib.decompressobj().decompress(content['gaps'].numpy().tobytes(), limit)
    positions = decode(torch.frombuffer(bytearray(code), dtype=torch.uint8)) if code else torch.empty(0, dtype=torch.int64)
    if len(positions) != survivors or (survivors and positions[-1] >= sizes['sparse']):
        raise ValueError('positions and values differ in number')
    flat = {'sparse': torch.zeros(sizes['sparse']), 'dense': content['dense'], 'counts': content['counts']}
    flat['sparse'][positions] = content['values']
    if any(len(flat[kind]) != size for kind, size in sizes.items()):
        raise ValueError('shapes and values differ in number')
    state = {}
    start = dict.fromkeys(sizes, 0)
    for name, shape, kind in about.pop('tensors'):
        part = flat[kind][start[kind] : start[kind] + math.prod(shape)]
        state[name] = part.reshape(shape).clone()
        start[kind] = start[kind] + math.prod(shape)
    return state, about


def read_published(path):
    """A published file -> (state dict, about). Raises FileError for anything else."""
    try:
        return unpack_sparse(read_tensors(path))
    except FileError:
        raise
    except Exception as error:  # wrong content shows as one of many exceptions
        reason = ' '.join(str(error).split())[:100]
        raise FileError(f'{path} is no published weight file ({reason}); --publish RUN makes one') from None
