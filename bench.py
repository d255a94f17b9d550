"""Speed, always as ratios of things measured in one run, interleaved, medians of many repeats.

    python bench.py                          everything below
    python bench.py threshold                the exact threshold search against one full sort (what the authors' code does)
    python bench.py step                     a training step of the methods that change it against the dense one
    python bench.py amp                      --amp, --channels-last and both against the plain step
    python bench.py criteria                 the masks of NNI's pruners for torchvision's ResNet-50, from construction to zeros
    python bench.py pack                     networks packed by Dynamic Structure Pruning's masks against the dense ones
    python bench.py sparse                   networks with zeros in the sparse engine against dense engines
    python bench.py memory                   peak memory of a training step of ResNet-50 against the dense step's
    python bench.py zoo                      what shrink() removes from 60 networks beside Torch-Pruning: an hour, only if named
    ... --threads 2 --device cpu --repeats 60 --methods feather st3 --record

On a CPU use a quiet machine and as many threads as it has cores; a second program on the same cores spoils every figure.
"""

import argparse
import contextlib
import gc
import io
import itertools
import json
import statistics
import tempfile
import textwrap
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import archs
import methods
from args import parse
from deploy import fold, pack
from harness import engine_bench, zoo
from harness.result import hardware
from harness.side_by_side import blocks_in_turn
from harness.training import keep_freed_memory, make_optimizer, one_step
from methods._algorithms import ALGORITHMS, algorithm
from pruners.compressor import StatisticsPruner
from pruners.group_pruning import PruneWrapper
from sparse_utils import global_threshold


def interleaved(functions, repeats, device, calls=1):
    """{name: function} -> {name: median seconds of a call}: calls of each in turn, so that a disturbance hits all alike."""
    times = {name: [] for name in functions}
    for repeat in range(repeats + 3):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(calls):
                function()
            if device.type == 'cuda':
                torch.cuda.synchronize(device)
            if repeat >= 3:  # the first ones warm up
                times[name].append((time.perf_counter() - start) / calls)
    return {name: statistics.median(values) for name, values in times.items()}


LINES = []  # what was said, for --record


def say(text):
    print(text, flush=True)
    LINES.append(text)


def show(title, times, baseline, speedup=False):
    """A line for each thing: milliseconds, and the ratio to the baseline."""
    say(f'\n{title}')
    for name, seconds in times.items():
        ratio = times[baseline] / seconds if speedup else seconds / times[baseline]
        say(f'  {name:<34} {1000 * seconds:9.2f} ms   {ratio:7.2f}x{" as fast" if speedup else " the time"}')


def bench_threshold(device, repeats, names):
    keep_freed_memory()  # as main.py does
    for n in (1_092_960, 25_000_000):
        torch.manual_seed(0)
        weights = [part.clone() for part in torch.randn(n, device=device).split(n // 5 + 1)]
        for ratio in (0.5, 0.9, 0.99):
            ordered = torch.cat(weights).abs().sort().values
            position = (n - 1) * ratio
            k = int(position)
            exact = ordered[k] + (ordered[k + 1] - ordered[k]) * (position - k)
            previous = exact * 1.0005  # about what a training step moves it by
            for guess in (None, previous):
                torch.testing.assert_close(global_threshold(weights, ratio, guess), exact, rtol=1e-6, atol=0)
            functions = {
                'full sort': lambda w=weights: torch.cat(w).abs().sort(),
                'global_threshold, first call': lambda w=weights, r=ratio: global_threshold(w, r),
                'global_threshold, in training': lambda w=weights, r=ratio, p=previous: global_threshold(w, r, p),
            }
            times = interleaved(functions, max(repeats // (4 if n < 2e6 else 12), 3), device, calls=4 if n < 2e6 else 1)
            show(f'threshold search, {n:,} weights, ratio {ratio}', times, 'full sort', speedup=True)


SMALL = ('--model=resnet20', '--width=32')
LARGE = ('--model=resnet50',)
STEPS = 40  # of the schedule


def trainer(device, size, batch, words=(), method='dense', target=0.9, network=SMALL):
    """A function that makes one training step of a network with 100 classes, where the method's schedule has ended."""
    keep_freed_memory()
    common = ['--dataset=cifar100', '--epochs=2', '--clip=3', '--lr-schedule=constant', *network]
    args = parse([f'--method={method}', f'--ptarget={target}', *common, *words])
    torch.manual_seed(0)
    model = archs.build(args.model, 100, args.width, image_size=size).to(device)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    model.to(memory_format=layout)
    method = methods.load(args.method)(args)
    with contextlib.redirect_stdout(io.StringIO()):  # a method says what it computes with
        method.prepare(model, STEPS, args)
    images = torch.randn(batch, 3, size, size, device=device).to(memory_format=layout)
    labels = torch.randint(0, 100, (batch,), device=device)
    fit = Namespace(
        args=args,
        batches=STEPS // args.epochs,
        model=model,
        forward=model,
        optimizer=make_optimizer(args, method.param_groups(model, args)),
        criterion=torch.nn.CrossEntropyLoss(),
        autocast=torch.autocast(device.type, torch.bfloat16) if args.amp else contextlib.nullcontext(),
        example=images[:1],
        replayed=None,
    )
    method.attach(fit)
    steps = itertools.count()

    def step():
        one_step(method, fit, min(next(steps), STEPS - 1), (images, labels))  # the last step of the schedule, again and again

    for _ in range(25):  # the target is reached after 20
        step()
    return step


def bench_step(device, repeats, names):
    """Each method in a process of its own beside the dense step in another, blocks of steps in turn.

    Four methods at a time: so many processes fit into memory.
    """
    for size, calls, targets in ((8, 20, (0.9, 0.98)), (32, 4, (0.98,))):
        say(f'\ntraining step, ResNet-20 width 32, batch 64, {size}x{size} images')
        for start in range(0, len(names), 4):
            makers = {'dense': (trainer, (device, size, 64))}
            for name in names[start : start + 4]:
                for target in targets:
                    makers[f'{name}, {target:.0%}'] = trainer, (device, size, 64, (), name, target)
                if name in ('feather', 'st3'):
                    makers[f'{name} --no-kernels, 98%'] = trainer, (device, size, 64, ['--no-kernels'], name, 0.98)
            seconds = blocks_in_turn(makers, max(repeats // 4, 5), calls, torch.get_num_threads())
            for name, blocks in seconds.items():
                ratios = [own / dense for own, dense in zip(blocks, seconds['dense'], strict=True)]
                say(f'  {name:<34} {1000 * statistics.median(blocks):9.2f} ms   {statistics.median(ratios):7.2f}x the time')


def bench_amp(device, repeats, names):
    knobs = {'float32': [], '--channels-last': ['--channels-last'], '--amp': ['--amp'], 'both': ['--amp', '--channels-last']}
    for method in ('dense', 'feather'):
        functions = {name: trainer(device, 32, 128, words, method) for name, words in knobs.items()}
        times = interleaved(functions, max(repeats // 6, 5), device)
        show(f'{method} step, ResNet-20 width 32, batch 128, 32x32 images', times, 'float32', speedup=True)


def bench_criteria(device, repeats, names):
    """From scores to zeros; what apoz, mean_activation and taylorfo have to see (one batch of two images here) is not timed."""
    torch.manual_seed(0)
    model = archs.build('resnet50', 1000, image_size=224).to(device)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    functions = {}
    for name in ALGORITHMS:
        kinds = algorithm(name).TYPES or ('default',)
        pruner = algorithm(name)(model, [{'sparsity': 0.5, 'op_types': list(kinds)}])
        if isinstance(pruner, StatisticsPruner):
            pruner.watch()
            model.train()(torch.randn(2, 3, 224, 224, device=device)).square().mean().backward()
            model.zero_grad()

        def masks(pruner=pruner):
            pruner.set_masks(None)  # all anew
            pruner.update_mask()

        functions[name] = masks
    times = interleaved(functions, max(repeats // 12, 3), device)
    model.load_state_dict(state)
    show('masks of half of ResNet-50, 25.6 million parameters', times, 'l1')


def group_pruned(name, groups, round_to, image):
    """An untrained network after group channel pruning of 62 % of the FLOPs of its block convolutions, as DSP's paper prunes.

    Random groups, and channels whose sizes are spread about as in the published checkpoints: dropping nothing but the channels
    that no group reads leaves about half of the FLOPs, as it does there. Returns (model, what the pruner reported).
    """
    torch.manual_seed(0)
    model = archs.build(name, 10, 16) if image.shape[-1] == 32 else archs.build(name, 1000)
    said = []
    pruner = PruneWrapper(model.eval(), groups, 2, example_input=image, round_to=round_to, say=said.append)
    for conv in pruner.convs.values():
        conv.group.data = torch.randn_like(conv.group)
        own = conv.group.argmax(0)
        channels = 0.7 * torch.randn(conv.in_channels) + 0.5 * torch.randn(groups, conv.in_channels)[own]
        conv.weight.data *= (channels + 0.3 * torch.randn(conv.out_channels, 1)).exp()[:, :, None, None]
    pruner.initialize(0.62)
    return model, said[-1].split(' of these')[0]


def bench_pack(device, repeats, names):
    cases = [(name, 32, batch, 1) for name in ('resnet20', 'resnet56') for batch in (1, 128)]
    cases += [('resnet18', 224, batch, round_to) for round_to in (1, 16) for batch in (1, 16)]
    for name, size, batch, round_to in cases:
        for groups in (2, 4):
            model, said = group_pruned(name, groups, round_to, torch.zeros(1, 3, size, size))
            model.to(device)
            images = torch.randn(batch, 3, size, size, device=device)
            networks = {'dense': fold(model, images, tune=False)}
            networks |= {'dense, in its fastest layout': fold(model, images), 'packed': pack(model, images)}
            with torch.no_grad():
                functions = {kind: partial(network, images) for kind, network in networks.items()}
                times = interleaved(functions, repeats if batch == 1 else max(repeats // 4, 5), device)
            rounding = f', round_to={round_to}' if round_to > 1 else ''
            show(f'{name}, {size}x{size}, batch {batch}, g = {groups}{rounding}: {said}', times, 'dense', speedup=True)
            sizes = [sum(p.numel() for p in network.parameters()) for network in networks.values()]
            say(f'  parameters: {sizes[-1]:,} of {sizes[0]:,}')
            lines = networks['packed'].meta['layers']
            say(textwrap.fill('; '.join(lines), 126, initial_indent='  ', subsequent_indent='  '))


def peak_memory(function, device):
    """The most bytes that tensors made within function() hold at a time, as PyTorch's allocator counts them."""
    gc.collect()
    if device.type == 'cuda':
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device) - held
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f'{folder}/trace.json')
        events = json.loads(Path(folder, 'trace.json').read_text())['traceEvents']
    changes = [(event['ts'], event['args']['Bytes']) for event in events if event['name'] == '[memory]']
    return max(itertools.accumulate(size for _, size in sorted(changes)))


def bench_memory(device, repeats, names):
    peaks = {name: peak_memory(partial(trainer, device, 64, 8, (), name, 0.99, LARGE), device) for name in ('dense', *names)}
    say('\npeak memory of 25 training steps, ResNet-50, batch 8, 64x64 images, 99 %')
    for name, peak in peaks.items():
        say(f'  {name:<34} {peak / 2**20:9.1f} MiB  {peak / peaks["dense"]:7.2f}x the memory')


def bench_sparse(device, repeats, names):
    engine_bench.bench_sparse(device, repeats, names, say=say)
    if torch.get_num_threads() == 1:
        engine_bench.bench_layers(say=say)


def bench_zoo(device, repeats, names):
    rows = zoo.zoo(say=print, path=zoo.ROWS)
    say('')
    for line in zoo.page(rows):
        say(line)


def training_methods():
    """The methods that train in one stage, and those of whose stages one is more than dense training: they change the step."""
    single = [name for name in methods.names() if methods.load(name).run is methods.Method.run]
    return [name for name in (*single, 'snip', 'grasp', 'synflow', 'group_norm', 'lrr', 'probmask') if name != 'dense']


BENCHES = {'threshold': bench_threshold, 'step': bench_step, 'amp': bench_amp, 'criteria': bench_criteria}
BENCHES |= {'pack': bench_pack, 'memory': bench_memory, 'sparse': bench_sparse, 'zoo': bench_zoo}


def record(page, name, lines):
    """Write what was printed; the page of the sparse engine keeps what it has of other numbers of threads."""
    kept = page.read_text().split('```\n')[1::2] if name == 'sparse' and page.exists() else []
    blocks = [block for block in kept if block.splitlines()[0] != lines[0]] + ['\n'.join(lines) + '\n']
    made = f'Made by `python bench.py {name} --record`' + (', with `--threads 1` and `--threads 2`' if name == 'sparse' else '')
    page.parent.mkdir(exist_ok=True)
    subject = 'What shrink() removes' if name == 'zoo' else 'Speed'
    page.write_text(f'# {subject}: {name}\n\n{made}.\n\n' + '\n'.join(f'```\n{block}```\n' for block in sorted(blocks)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('which', nargs='*', help=', '.join(BENCHES))
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument('--device', type=torch.device, default=torch.device('cpu'))
    parser.add_argument('--repeats', type=int, default=60)
    parser.add_argument('--record', action='store_true', help='write what is printed to results/bench/<which>.md')
    parser.add_argument('--methods', nargs='+', choices=methods.names(), default=training_methods(), help='for step and memory')
    options = parser.parse_args()
    if unknown := set(options.which) - set(BENCHES):
        parser.error(f'there is no bench {sorted(unknown)[0]!r}; there are {", ".join(BENCHES)}')
    torch.set_num_threads(options.threads)
    for name in options.which or [name for name in BENCHES if name != 'zoo']:
        LINES.clear()
        say(f'{hardware(options.device)}, torch {torch.__version__}')
        BENCHES[name](options.device, options.repeats, options.methods)
        if options.record:
            record(Path(__file__).parent / 'results' / 'bench' / f'{name}.md', name, LINES)


if __name__ == '__main__':
    main()
