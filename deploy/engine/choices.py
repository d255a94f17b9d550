"""Which kernel a convolution or a linear layer takes: settings worth a measurement, and the measurement."""

import ctypes

from . import build
from .geometry import keeps_size, reach

REPEATS = 3  # of a step, of which the fastest counts
NEAR = 40 << 10  # bytes of inputs that stay in the nearest cache; FAR: of any number of channels
FAR = 1 << 30
PREPARED = {build.CONV: 'conv', build.LINEAR: 'linear'}
_chosen = {}  # what measuring found before, by geometry and share of non-zero weights


def prepare(work, values, threads, run=None):
    """The step of a work with its weights prepared for the kernel that runs it fastest.

    values: the Values of its output, its input and what is added. run: a function of a step that gives nanoseconds; without it
    nothing is measured and the first candidate is taken. The result's `prepared` has to be given to free().
    """
    step = work.step
    density = float((work.weight != 0).sum()) / work.weight.numel()
    candidates = candidates_of(step, values, density)
    key = key_of(step, density, threads)
    if key in _chosen:
        candidates = [_chosen[key]]
    best = None
    for candidate in candidates:
        trial = build.Step.from_buffer_copy(step)
        for name, value in candidate.items():
            setattr(trial, name, value)
        if step.kind == build.CONV:
            trial.chunks = chunks_of(trial, threads)
        trial.prepared = getattr(build.library(), f'{PREPARED[step.kind]}_prepare')(ctypes.byref(trial))
        nanoseconds = min(run(trial) for _ in range(REPEATS)) if run and len(candidates) > 1 else 0
        if best is None or nanoseconds < best[0]:
            if best is not None:
                free(best[1])
            best = nanoseconds, trial, candidate
        else:
            free(trial)
    if run:
        _chosen[key] = best[2]
    return best[1]


def free(step):
    """Give back what prepare() has prepared."""
    getattr(build.library(), f'{PREPARED[step.kind]}_free')(step.prepared)


def key_of(step, density, threads):
    """What decides which kernel is fastest."""
    names = [name for name in build.INTEGERS if name != 'activation']
    pitches = step.source.pitch, step.target.pitch, step.other.pitch
    return (step.kind, float(f'{density:.1g}'), threads, *pitches, *(getattr(step, name) for name in names))


def candidates_of(step, values, density):
    """Settings worth a measurement, the most likely one first."""
    if step.kind == build.LINEAR:
        kinds = [{'dense': 0}, {'dense': 1}] if density > 0.15 else [{'dense': 0}]
        return kinds[::-1] if density > 0.5 else kinds
    rows = {'dense': 0, 'shifted': 0, 'direct': 0, 'vectors': 14, 'block_bytes': NEAR}
    direct = rows | {'direct': 1}
    pointwise = step.kernel_h == step.kernel_w == 1
    alike = all(value.pitch == values[0].pitch for value in values)
    found = []
    if step.phases or not step.mode and keeps_size(step) and alike and values[1].border >= reach(step):
        found = [direct | {'vectors': vectors} for vectors in (10, 14, 24, 8, 5)]
        found += [direct | {'vectors': vectors, 'block_bytes': FAR} for vectors in (14, 24)]
    if not pointwise and not step.phases:
        found += [rows | {'shifted': 1, 'vectors': vectors} for vectors in (18, 14, 8)]
    if not found or not pointwise and not step.phases:
        found += [rows, rows | {'block_bytes': 2 * NEAR}]
    if density > 0.25:
        dense = [found[0] | {'dense': 1, 'vectors': 6}, found[0] | {'dense': 1, 'vectors': 4}]
        if not step.phases:
            dense.append(rows | {'dense': 1, 'vectors': 6, 'shifted': int(not pointwise)})
        found = dense + found if density > 0.6 else found + dense
    return found


def chunks_of(step, threads):
    """In how many pieces the filters are shared out, so that four tasks come to a thread."""
    if threads == 1:
        return 1
    tiles = step.images * step.groups * -(-step.out_height * step.out_width // (16 * step.vectors))
    return max(1, -(-4 * threads // tiles))
