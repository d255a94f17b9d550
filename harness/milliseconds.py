"""Accuracy at equal milliseconds: what each kind of pruning buys on CIFAR-10, ResNet-20, in the engine that runs it fastest.

    python -m harness.milliseconds --data-dir DIR [--threads 2] [--row ROW...]

Takes the published networks of results/cifar10_10ep.md, seed 0: single zeros run in the sparse engine, whole filters are
removed by shrink(), the network of Dynamic Structure Pruning is packed; these, the dense network and narrow ones trained as
they are run in every engine that is installed, the dense one in PyTorch's int8 as well. All are timed on one machine, each
engine in a process of its own, one image and 32. Writes results/bench/milliseconds.json, .md and .png; --row measures some rows
again, or new ones. Of two readings of a network in an engine the faster one counts, as what disturbs a machine only slows it.
"""

import argparse
from argparse import Namespace

import torch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

import args as arguments
from deploy import pack, shrink
from deploy.files import read_json, read_published, write_json

from . import engine_bench, published
from . import plot as plots
from . import table as tables
from .markdown import markdown
from .result import accuracy, hardware
from .sparse_run import BATCHES

TABLE = 'cifar10_10ep'
MEASURED = tables.RESULTS / 'bench' / 'milliseconds.json'
CALIBRATION = 4  # batches of training images from which int8 takes the ranges of activations
KINDS = {
    'dense': 'dense',
    'int8': 'dense in int8',
    'small': 'narrow dense',
    'zeros': 'single zeros, sparse engine',
    'filters': 'filters removed',
    'packed': 'packed groups',
}


def kind_of(row, entry):
    """Which of KINDS a row is."""
    if row.startswith('small-dense'):
        return 'small'
    if entry['args']['method'] == 'dsp':
        return 'packed'
    if 'small_macs' in entry:
        return 'filters'
    return 'zeros' if tables.has_single_zeros(entry) else 'dense'


def prepared(row, kind):
    """(network as it is run, example image) of a published row."""
    model, example = engine_bench.network(str(published.WEIGHTS / TABLE / f'{row}-s0.pt'))
    if kind == 'filters':
        model = shrink(model, example)
    if kind == 'packed':
        model = pack(model, example)
    return model, example


def row_names():
    return [row['id'] for row in arguments.load_table(tables.CONFIGS / f'{TABLE}.yaml')['rows']]


def rows_to_measure(entries):
    """{row: its entry} of the recorded rows with published weights, seed 0, in the order of the table."""
    there = {name: entries[name, 0] for name in row_names() if (name, 0) in entries}
    return {name: entry for name, entry in there.items() if (published.WEIGHTS / TABLE / f'{name}-s0.pt').exists()}


def measure(row, entry, threads):
    """{'kind', 'accuracy', 'milliseconds': {batch, as in a file: {engine: ms}}} of a row."""
    kind = kind_of(row, entry)
    chosen = ['PyTorch', engine_bench.OURS] if kind == 'zeros' else engine_bench.engines()
    return {'kind': kind, 'accuracy': entry['accuracy'], 'milliseconds': times_of(prepared(row, kind), threads, chosen, [])}


def times_of(network, threads, chosen, failed=None):
    """{batch, as in a file: {engine: ms}} of a network in the chosen engines. failed: as for engine_bench.measure()."""
    return {f'{batch}': engine_bench.measure(network, batch, threads, chosen, failed=failed) for batch in BATCHES}


def faster(found, before):
    """A measured row with the faster readings of two; before: None, or the same network as it was measured earlier."""
    if before is None or before['accuracy'] != found['accuracy']:
        return found
    earlier = before['milliseconds']
    times = {batch: engine_bench.faster(now, earlier[batch]) for batch, now in found['milliseconds'].items()}
    return found | {'milliseconds': times}


def measure_int8(options):
    """The same of the dense row in int8: PyTorch's kernels, calibrated on training images, counted on the test images."""
    path = published.WEIGHTS / TABLE / 'dense-s0.pt'
    model, _ = engine_bench.network(str(path))
    _, about = read_published(path)
    settings = Namespace(data_dir=options.data_dir, no_download=True, workers=0)
    loaded = published.load_data(settings, about, torch.device('cpu'))
    batches = [images for (images, _), _ in zip(loaded.train, range(CALIBRATION), strict=False)]
    quantized = engine_bench.in_int8(model, batches)
    times = times_of((model, batches[0][:1]), options.threads, [engine_bench.INT8])
    return {'kind': 'int8', 'accuracy': accuracy(quantized, loaded.test), 'milliseconds': times}


# ------------------------------------------------------------------------------------------------------- page and picture


def fastest(found, batch):
    """(milliseconds, engine) of a measured row."""
    times = found['milliseconds'][str(batch)]
    engine = min(times, key=times.get)
    return times[engine], engine


def frontier(rows, batch):
    """[(milliseconds, accuracy, row)], fastest first: the rows that no other one beats in time and accuracy both."""
    points = sorted((fastest(found, batch)[0], -found['accuracy'], row) for row, found in rows.items())
    kept = []
    for milliseconds, negative, row in points:
        if not kept or -negative > kept[-1][1]:
            kept.append((milliseconds, -negative, row))
    return kept


def sentence(rows, batch):
    """What the frontier says, in words."""
    parts = [f'{row} ({ms:.3f} ms, {accuracy:.1f} %)' for ms, accuracy, row in frontier(rows, batch)]
    images = 'One image' if batch == 1 else f'{batch} images'
    return f'{images}, fastest first, each more accurate than all before: {", ".join(parts)}.'


def cells_of(found):
    """The cells of a measured row of the page, after its name."""
    cells = [KINDS[found['kind']], f'{found["accuracy"]:.2f}']
    for batch in BATCHES:
        milliseconds, engine = fastest(found, batch)
        pytorch = found['milliseconds'][str(batch)].get('PyTorch')
        cells += [f'{milliseconds:.3f}', engine, f'{pytorch:.3f}' if pytorch else '']
    return cells


def page(names, measured):
    """The text of results/bench/milliseconds.md. names: all rows of the table, so that those without a figure are seen."""
    rows = measured['rows']
    head = ['row', 'what runs', 'accuracy %']
    for batch in BATCHES:
        images = '1 image' if batch == 1 else f'{batch} images'
        head += [f'ms, {images}', 'fastest in', f'PyTorch, {images}']
    lines = [[name, *cells_of(rows[name])] for name in sorted(rows, key=lambda name: -rows[name]['accuracy'])]
    lines += [[name, 'not run', *[''] * (len(head) - 2)] for name in names if name not in rows]
    text = '# Accuracy at equal milliseconds: CIFAR-10 in 10 epochs, ResNet-20 width 16\n\n'
    text += 'Made by `python -m harness.milliseconds`.\n\n' + markdown(head, lines)
    where = f'{measured["device"]}, torch {measured["torch"]}'
    text += f'\n- milliseconds on {where}, each network in the engine that runs it fastest\n'
    text += '- of rows that were read more than once the faster reading\n'
    text += ''.join(f'- {sentence(rows, batch)}\n' for batch in BATCHES)
    return text + '\n![accuracy over milliseconds](../milliseconds.png)\n'


def draw(rows):
    """Accuracy over milliseconds, one image and 32; a line joins the rows that no other one beats in both."""
    plots.plt.rcParams.update(plots.STYLE)
    figure, panels = plots.plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout='constrained')
    floor = max(found['accuracy'] for found in rows.values()) - 15
    for axes, batch in zip(panels, BATCHES, strict=True):
        for number, (kind, label) in enumerate(KINDS.items()):
            own = {row: found for row, found in rows.items() if found['kind'] == kind and found['accuracy'] > floor}
            if not own:
                continue
            x = [fastest(found, batch)[0] for found in own.values()]
            y = [found['accuracy'] for found in own.values()]
            axes.plot(x, y, plots.MARKS[number], color=plots.COLOURS[number], label=label, markersize=5)
            for row, milliseconds in zip(own, x, strict=True):
                place = {'xytext': (4, -9), 'textcoords': 'offset points', 'fontsize': 6.5}
                axes.annotate(row, (milliseconds, own[row]['accuracy']), **place)
        best = [point for point in frontier(rows, batch) if point[1] > floor]
        axes.plot([point[0] for point in best], [point[1] for point in best], color='black', linewidth=0.8, alpha=0.5)
        axes.set_xscale('log')
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel('milliseconds for ' + ('one image' if batch == 1 else f'{batch} images'))
    panels[0].set_ylabel('test accuracy, %')
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=3, frameon=False)
    figure.suptitle('Accuracy at equal milliseconds: ResNet-20 width 16, CIFAR-10, 10 epochs', fontsize=10)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', metavar='DIR', help='with CIFAR-10, for the accuracy in int8; without it, no such row')
    parser.add_argument('--threads', type=int, default=2, help='of the CPU (default: %(default)s)')
    parser.add_argument('--row', nargs='+', default=[], metavar='ROW', help='only these rows (default: all that are recorded)')
    parser.add_argument('--draw', action='store_true', help='measure nothing: page and picture from what was measured')
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    measured = read_json(MEASURED) or {'rows': {}}
    if not options.draw:
        entries = tables.recorded().get(TABLE, {})
        for row, entry in rows_to_measure(entries).items():
            if not options.row or row in options.row:
                measured['rows'][row] = faster(measure(row, entry, options.threads), measured['rows'].get(row))
                write_json(measured, MEASURED)
                print(row, measured['rows'][row], flush=True)
        if options.data_dir and (not options.row or 'dense-int8' in options.row):
            measured['rows']['dense-int8'] = faster(measure_int8(options), measured['rows'].get('dense-int8'))
        measured |= {'device': hardware(torch.device('cpu')), 'torch': torch.__version__}
        write_json(measured, MEASURED)
    MEASURED.with_suffix('.md').write_text(page(row_names(), measured))
    plots.save(draw(measured['rows']), tables.RESULTS / 'milliseconds.svg')
    print(*[sentence(measured['rows'], batch) for batch in BATCHES], sep='\n')


if __name__ == '__main__':
    main()
