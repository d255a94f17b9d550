"""python main.py --shrink RUN: a smaller network of what a finished run has pruned."""

from pathlib import Path

from deploy import formats
from deploy.latency import gains
from deploy.network_file import save
from deploy.reporting import report as deploy_report
from deploy.shrinking import shrink
from pruners.processes import say

from .rebuild import rebuild_run


def shrink_run(folder, round_to=1, pt2=False, onnx=False, torchscript=False, threads=2):
    """Shrink the network of a finished run (python main.py --shrink RUN): small.pt and small.json in its folder.

    Also writes small.pt2, small.onnx and small.ts when asked. Compares outputs before anything is written, prints what was
    gained and returns gains(). Raises ValueError for a folder that holds no finished run, or no network that main.py builds.
    """
    folder = Path(folder)
    model, example = rebuild_run(folder)
    small = shrink(model, example, round_to)
    result = gains(model, small, example, threads)
    info = {'run': folder.name, 'round_to': round_to, **result}
    paths = list(save(small, folder / 'small', example, **info))
    for wanted, suffix, write in (
        (pt2, 'pt2', formats.write_pt2),
        (onnx, 'onnx', formats.write_onnx),
        (torchscript, 'ts', formats.write_torchscript),
    ):
        if wanted:
            paths.append(folder / f'small.{suffix}')
            write(small, example, paths[-1])
    report(result, say)
    held = deploy_report(model, example, round_to)
    for filters in held:
        say(str(filters))
    if result['small_parameters'] == result['dense_parameters'] and not held:
        say('nothing could be removed: no filter and no channel of this network is zero as a whole')
    say(f'saved in {", ".join(map(str, paths))}')
    return result


def report(result, say=print):
    """Print gains()."""
    for key, unit in (('parameters', 'parameters'), ('macs', 'MACs for one image')):
        small = result[f'small_{key}']
        dense = result[f'dense_{key}']
        say(f'{dense:>15,} -> {small:>15,} {unit}, {100 * (1 - small / dense):.2f} % fewer')
    for key in [key for key in result if key.startswith('small_ms_')]:
        small = result[key]
        dense = result[key.replace('small', 'dense')]
        say(f'{dense:>12.2f} ms -> {small:>12.2f} ms for a batch of {key.rpartition("_")[2]}, {dense / small:.2f}x as fast')
    say(f'measured on {result["latency_on"]}')
