"""How much shrink() removes from other people's networks, beside Torch-Pruning: the same dead channels for both.

    python bench.py zoo --record           # all of NETWORKS, an hour or more; results/bench/zoo.md
    python -m harness.zoo resnet50 timm/resnet50

A network of random weights and batch norms that look trained; Torch-Pruning chooses 30 % of the channels of each group of
layers (MagnitudeImportance). Those channels are set to zero in a copy, with bias and batch norm, and the copy is shrunk;
Torch-Pruning cuts its own. Parameters that each removes, seconds, and the largest difference of our outputs from the masked
network's. Where Torch-Pruning fails, 30 % are chosen by their L1 norm in our dependency groups. Then another copy is pruned as
the README shows it: L1FilterPruner at 30 % with decide_together(), and shrunk.

Each network has a process of its own, with a limit of time and memory for each of the three parts. Rows are added to a file as
they come, and a run that is started again goes on behind those that are there.
"""

import contextlib
import copy
import json
import resource
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from deploy.live import norms_behind
from deploy.outputs import compare
from deploy.shrinking import dependency_groups, shrink
from deploy.ties import read_channels
from methods.l1_filter import L1FilterPruner

from .result import commit

RATIO = 0.3
SIZE = 64
SECONDS = 300  # limits of each part of a network's row
GIGABYTES = 8
ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / 'runs' / 'zoo.jsonl'
TORCHVISION = (
    'resnet18 resnet50 resnext50_32x4d wide_resnet50_2 vgg16_bn vgg11 alexnet squeezenet1_1 densenet121 densenet169 googlenet'
    ' inception_v3 mobilenet_v2 mobilenet_v3_small mobilenet_v3_large mnasnet0_5 mnasnet1_0'
    ' shufflenet_v2_x0_5 shufflenet_v2_x1_0'
    ' efficientnet_b0 efficientnet_b1 efficientnet_v2_s regnet_y_400mf regnet_x_400mf convnext_tiny vit_b_32 swin_t swin_v2_t'
    ' maxvit_t resnet34'
).split()
TIMM = (
    'resnet50 resnet50d resnet26t resnetv2_50 resnext50_32x4d res2net50_26w_4s skresnet18 seresnet50 ecaresnet26t densenet121'
    ' cspresnet50 cspdarknet53 darknet53 vovnet39a dla34 hrnet_w18_small repvgg_a0 mobilenetv2_100 mobilenetv3_small_100'
    ' efficientnet_b0 efficientnet_lite0 mixnet_s ghostnet_100 regnety_004 nfnet_l0 convnext_atto'
    ' edgenext_xx_small vit_tiny_patch16_224'
    ' mobileone_s0 rexnet_100'
).split()
NETWORKS = [*TORCHVISION, *(f'timm/{name}' for name in TIMM)]
SIZES = {'inception_v3': 96, 'maxvit_t': 224, 'alexnet': 96, 'timm/vit_tiny_patch16_224': 224}


def build(name):
    """(network in eval mode, example) by its name; `timm/NAME` is timm's."""
    size = SIZES.get(name, SIZE)
    torch.manual_seed(0)
    if name.startswith('timm/'):
        import timm

        net = timm.create_model(name.removeprefix('timm/'))
    else:
        from torchvision import models

        options = {'init_weights': False} if name in ('googlenet', 'inception_v3') else {}
        net = models.get_model(name, **options, **({'image_size': size} if name.startswith('vit') else {}))
    generator = torch.Generator().manual_seed(1)
    for norm in [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]:
        norm.running_mean.copy_(torch.randn(norm.num_features, generator=generator) / 10)
        norm.running_var.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
        if norm.affine:
            norm.weight.data.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
            norm.bias.data.copy_(torch.randn(norm.num_features, generator=generator) / 10)
    return net.eval(), torch.randn(2, 3, size, size, generator=generator)


def parameters(net):
    return sum(parameter.numel() for parameter in net.parameters())


def torch_pruning_cuts(net, example, masked):
    """Let Torch-Pruning cut `net` in place, and set the channels that it chooses to zero in `masked`."""
    import torch_pruning

    names = {module: name for name, module in net.named_modules()}
    last = [module for module in net.modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1]
    heads = [module for module in net.modules() if isinstance(module, nn.Linear) and module.out_features == 1000]
    pruner = torch_pruning.pruner.MetaPruner(
        net, example[:1], torch_pruning.importance.MagnitudeImportance(p=1), pruning_ratio=RATIO, ignored_layers=[last, *heads]
    )
    functions = torch_pruning.function
    rows = (functions.prune_conv_out_channels, functions.prune_linear_out_channels, functions.prune_depthwise_conv_out_channels)
    for group in pruner.step(interactive=True):
        for dependency, places in group:
            target = dependency.target.module
            how = dependency.handler
            if target not in names or how not in (*rows, functions.prune_batchnorm_out_channels):
                continue
            layer = masked.get_submodule(names[target])
            for tensor in (layer.weight, layer.bias):
                if tensor is not None:
                    with torch.no_grad():
                        tensor[[place for place in places if place < len(tensor)]] = 0
        group.prune()


def own_choice(net, example):
    """Where Torch-Pruning fails: the 30 % of filters with the smallest L1 norm of each group of layers, set to zero."""
    groups = dependency_groups(net, example, depthwise=True)
    layers = {name: module for name, module in net.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    grouped = {name for group in groups for name in group}
    norms = norms_behind(read_channels(net, example))
    for group in [*groups, *([name] for name in list(layers)[:-1] if name not in grouped)]:
        own = [layers[name] for name in group if name in layers]
        if not own or own[0].weight.shape[0] == 1000:
            continue
        score = sum(layer.weight.detach().abs().flatten(1).mean(1) for layer in own)
        dead = score.argsort()[: int(RATIO * len(score))]
        for name in group:
            for module in [layers.get(name), net.get_submodule(norms[name]) if name in norms else None]:
                for tensor in [] if module is None else [module.weight, module.bias]:
                    if tensor is not None:
                        tensor.data[dead] = 0


class OutOfTime(Exception):
    """A part of a row has taken longer than it may."""


@contextlib.contextmanager
def time_limit(seconds):
    """Raise OutOfTime in the block when it takes longer. For the main thread alone."""

    def stop(*_):
        raise OutOfTime(f'more than {seconds:g} s')

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)  # and again each second: somebody's `except` may swallow the first
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def sentence(error):
    """What failed, on one line."""
    return f'{type(error).__name__}: {" ".join(f"{error}".split())[:160]}'.rstrip(': ')


def compare_network(name, seconds=SECONDS, without=''):
    """{what the page of results shows of one network}; 'theirs' is None, and 'reason' says why, where Torch-Pruning fails.

    Where we fail, 'refused' says why. seconds: the limit of each part. without: why Torch-Pruning is left out, if it is.
    """
    net, example = build(name)
    masked = copy.deepcopy(net)
    row = {'network': name, 'parameters': parameters(net), 'theirs': None, 'reason': without}
    try:
        with time_limit(seconds):
            row |= {} if without else their_part(net, example, masked)
    except Exception as error:
        row['reason'] = sentence(error)
        masked = copy.deepcopy(net)
    try:
        with time_limit(seconds):
            if row['theirs'] is None:
                own_choice(masked, example)
            row |= our_part(masked, example)
    except Exception as error:
        row |= {'ours': 0, 'refused': sentence(error)}
    try:
        with time_limit(seconds):
            row |= readme_part(net, example)
    except Exception as error:
        row['l1 refused'] = sentence(error)
    return row


def their_part(net, example, masked):
    """Torch-Pruning on a copy of the network; what it chooses becomes zero in `masked`."""
    theirs = copy.deepcopy(net)
    start = time.perf_counter()
    torch_pruning_cuts(theirs, example, masked)
    seconds = time.perf_counter() - start
    return {
        'their difference': compare(masked, theirs, example),
        'theirs': parameters(net) - parameters(theirs),
        'their seconds': seconds,
    }


def our_part(masked, example):
    """shrink() on the network with the dead channels."""
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        small = shrink(masked, example)
    seconds = time.perf_counter() - start
    named = [str(warning.message) for warning in said if 'names sizes' in str(warning.message)]
    return {
        'ours': parameters(masked) - parameters(small),
        'seconds': seconds,
        'difference': compare(masked, small, example),
        'said': named,
    }


def readme_part(net, example):
    """L1FilterPruner at 30 % with decide_together(), and shrink(), on a copy: what the README shows."""
    pruned = copy.deepcopy(net)
    pruner = L1FilterPruner(pruned, [{'sparsity': RATIO, 'op_types': ['Conv2d']}])
    pruner.decide_together(dependency_groups(pruned, example, depthwise=True))
    pruner.compress()
    pruner.unhook()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        small = shrink(pruned, example)
    return {'l1 ours': parameters(net) - parameters(small), 'l1 difference': compare(pruned, small, example)}


def compare_apart(name, seconds=SECONDS, gigabytes=GIGABYTES):
    """compare_network() in a process of its own, which may take so much memory.

    Where that process dies, or Torch-Pruning has filled the memory, another one does our parts without it.
    """
    row = row_of_process(name, seconds, gigabytes)
    reason = row['reason']
    if 'refused' in row and row['parameters'] is None:
        reason = f'its process or ours: {row["refused"]}'
    elif 'Memory' not in reason and 'allocate' not in reason:
        return row
    again = row_of_process(name, seconds, gigabytes, reason)
    return row if again['parameters'] is None else again


def row_of_process(name, seconds, gigabytes, without=''):
    """The row that a new process gives; one that dies gives a row that says so. without: see compare_network()."""
    words = [sys.executable, '-m', 'harness.zoo', '--one', name, str(seconds), str(gigabytes), without]
    start = {'network': name, 'parameters': None, 'theirs': None, 'reason': without, 'ours': 0}
    try:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=4 * seconds + 60)
    except subprocess.TimeoutExpired:
        return start | {'refused': f'the process did not end within {4 * seconds + 60:g} s'}
    last = (done.stdout.strip().splitlines() or [''])[-1]
    try:
        return json.loads(last)
    except ValueError:
        said = (done.stderr.strip().splitlines() or ['no word'])[-1][:160]
        return start | {'refused': f'the process ended with status {done.returncode}: {said}'}


def rows_of(path):
    """{network: row} of a file of rows; the last one of a network counts."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row['network']: row for row in rows}


def zoo(names=None, say=print, path=None, seconds=SECONDS, gigabytes=GIGABYTES):
    """The rows of the networks, a line each while it goes -> [rows].

    path: a file to which each row is added when it is there; networks that have a row in it are not run again. None: no file.
    """
    names = names or NETWORKS
    done = {} if path is None else rows_of(path)
    for name in names:
        if name in done:
            continue
        done[name] = compare_apart(name, seconds, gigabytes) | {'commit': commit()}
        say(line_of(done[name]))
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open('a') as file:
                file.write(json.dumps(done[name]) + '\n')
    return [done[name] for name in names]


def line_of(row):
    """A row in a line, for who waits."""
    gap = row.get('refused') or f'outputs differ by {row["difference"]:.1e}, {row["seconds"]:.1f} s'
    theirs = f'fails ({row["reason"]})' if row['theirs'] is None else f'{row["theirs"]:,}'
    return f'{row["network"]}: {row["ours"]:,} of {row["parameters"] or 0:,} removed, {gap}; Torch-Pruning {theirs}'


def page(rows):
    """The rows as the lines of a page: a table, what failed, and what is to be read with it."""
    title = f'{"network":<30} {"parameters":>12} {"ours":>12} {"theirs":>12} {"ratio":>7} {"s":>6} {"their s":>7}'
    title += f' {"differs by":>10} {"theirs by":>10} {"L1 30 %":>8}'
    import timm
    import torchvision

    versions = f'torchvision {torchvision.__version__}, timm {timm.__version__}, Torch-Pruning {version("torch-pruning")}'
    explained = (
        "parameters that each removes of the same dead channels; seconds; how far outputs are from the masked network's, "
    )
    explained += f'of the largest; and what L1FilterPruner at {RATIO:.0%} and shrink() remove'
    lines = [versions, *textwrap.wrap(explained, 126), '', title]
    notes = []
    for row in rows:
        name = row['network']
        theirs = row['theirs']
        refused = row.get('refused')
        cells = [f'{name:<30} {row["parameters"] or 0:>12,} {"refused" if refused else format(row["ours"], ","):>12}']
        cells.append(f'{"fails" if theirs is None else format(theirs, ","):>12}')
        cells.append(f'{row["ours"] / theirs:>7.4f}' if theirs and not refused else f'{"":>7}')
        cells.append(figure(row, 'seconds', '6.1f'))
        cells.append(figure(row, 'their seconds', '7.1f'))
        cells.append(figure(row, 'difference', '10.1e'))
        cells.append(figure(row, 'their difference', '10.1e'))
        share = f'{100 * row["l1 ours"] / row["parameters"]:.2f} %' if 'l1 ours' in row else ''
        cells.append(f'{share:>8}')
        lines.append(' '.join(cells).rstrip())
        if refused:
            notes.append(f'{name}: ours: {refused}')
        if row['reason']:
            notes.append(f'{name}: Torch-Pruning: {row["reason"]}')
        if row.get('l1 refused') and row['l1 refused'] != refused:
            notes.append(f'{name}: L1: {row["l1 refused"]}')
        if said := row.get('said'):
            more = f' and so do {len(said) - 1} others' if len(said) > 1 else ''
            notes.append(f'{name}: ours: {said[0]}{more}')
        if theirs and not refused and row['ours'] < 0.999 * theirs:
            notes.append(f'{name}: ours removes less: {why_less(row)}')
    compared = [row for row in rows if row['theirs'] and not row.get('refused')]
    equal = sum(row['ours'] >= 0.999 * row['theirs'] for row in compared)
    lines += [
        '',
        f'{len(rows)} networks; {equal} of {len(compared)} that both can do: at least 0.999 of what Torch-Pruning removes',
    ]
    lines += ['', *notes] if notes else []
    return [*lines, '', f'commits {", ".join(sorted({str(row.get("commit")) for row in rows}))}']


def why_less(row):
    """Why we remove less than Torch-Pruning, as far as the row tells."""
    gap = row['their difference']
    if gap > 1e-3:
        return f'what Torch-Pruning cuts changes what the network computes, by {gap:.1e} of the largest output'
    return 'to be looked at'


def figure(row, key, form):
    """A number of a row in its column, or as many blanks."""
    width = int(form.split('.')[0])
    return format(row[key], form) if key in row else ' ' * width


def one(name, seconds, gigabytes, without):
    """What the process of compare_apart() does: a row as the last line that it prints."""
    limit = int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    torch.set_num_threads(1)
    print(json.dumps(compare_network(name, seconds, without)))


if __name__ == '__main__':
    if sys.argv[1:2] == ['--one']:
        one(sys.argv[2], float(sys.argv[3]), float(sys.argv[4]), sys.argv[5])
    else:
        print('\n'.join(page(zoo(sys.argv[1:]))))
