"""Pictures of recorded tables, beside their pages: results/<table>.png and .svg, results/<table>-layers.png and .svg.

    python -m harness.plot [TABLE...]        default: every table with enough runs for a picture

<table>         accuracy against sparsity and against MACs: mean and sample standard deviation over seeds, a line a method,
                hollow marks for the figures the papers give, a dashed line for the dense network; on the axis of sparsity the
                methods stand a little beside one another, or their marks would cover each other
<table>-filters the same for methods that prune whole filters, with the MACs that are left once these are removed
<table>-learning  accuracy over epochs, from the logs of results/logs
<table>-layers  share of zeros in each layer, counted in the published weights, at the highest sparsity that most methods have
Colours are those of Okabe and Ito, and every series has a mark of its own, so that a picture can be read in print and by the
colour-blind.
"""

import json
import re
import statistics
import sys

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator  # noqa: E402

import args as arguments  # noqa: E402
from deploy.files import read_published  # noqa: E402
from sparse_utils import count_zeros  # noqa: E402

from . import published  # noqa: E402
from . import table as tables  # noqa: E402

COLOURS = ['#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000', '#8C6D31', '#7F7F7F']
MARKS = ['o', 's', '^', 'D', 'v', 'P', 'X', '<', '>', 'p', 'h', '*']
TICKS = [0, 50, 80, 90, 95, 98, 99, 99.5, 99.9]
STYLE = {
    'font.size': 9,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.grid': True,
    'grid.alpha': 0.3,
    'svg.hashsalt': 'results',  # the same runs give the same file
    'svg.fonttype': 'none',
}


def series_of(row):
    """The method a row belongs to: its id without the numbers it ends with, feather-98 -> feather, sr_ste-2-4 -> sr_ste."""
    return re.sub(r'(-[0-9.]+)+$', '', row)


def points(table, results, filters):
    """{series: [(sparsity %, MMACs, mean accuracy, deviation, published accuracy or None)]} of the rows with finished runs.

    filters: only those that prune whole filters, or only the others; the dense rows in both. A smaller network has the sparsity
    of the largest one that lacks as many weights.
    """
    series = {}
    largest = max((run['weights'] for run in results.values() if run['status'] == 'finished'), default=0)
    macs = 'small_macs' if filters else 'macs_nonzero'
    for row in table['rows']:
        runs = [result for (name, _), result in results.items() if name == row['id'] and result['status'] == 'finished']
        if runs and (runs[0]['zeros'] == 0 or filters == ('small_macs' in runs[0])):
            accuracies = [run['accuracy'] for run in runs]
            figures = row.get('paper')
            figures = figures.get('accuracy') if isinstance(figures, dict) else figures
            series.setdefault(series_of(row['id']), []).append(
                (
                    100 * statistics.fmean(1 - (run['weights'] - run['zeros']) / largest for run in runs),
                    statistics.fmean(run.get(macs, run['macs_dense']) for run in runs) / 1e6,
                    statistics.fmean(accuracies),
                    statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
                    figures,
                )
            )
    return series


def draw_curves(table, results, filters=False):
    """Accuracy against sparsity and MACs -> figure, or None where lines would say nothing: fewer than four points on lines."""
    series = points(table, results, filters)
    dense = [point for name, found in series.items() for point in found if point[0] == 0]
    series = {name: sorted(point for point in found if point[0] > 0) for name, found in series.items()}
    series = {name: found for name, found in series.items() if found}
    if sum(len(found) for found in series.values() if len(found) > 1) < 4:
        return None
    width = 9 if len(series) < 16 else 10
    figure, (left, right) = plt.subplots(1, 2, figsize=(width, 4), sharey=True, layout='constrained')
    for number, (name, found) in enumerate(series.items()):
        look = {'color': COLOURS[number % len(COLOURS)], 'marker': MARKS[number % len(MARKS)], 'markersize': 5}
        aside = 1.025 ** (number - (len(series) - 1) / 2)
        for axes, x in ((left, [(100 - point[0]) * aside for point in found]), (right, [point[1] for point in found])):
            y = [point[2] for point in found]
            spread = [point[3] for point in found]
            axes.errorbar(x, y, spread, label=name, capsize=2, linewidth=1.2, elinewidth=0.8, **look)
            given = [(a, point[4]) for a, point in zip(x, found, strict=True) if isinstance(point[4], int | float)]
            if given:
                axes.plot(*zip(*given, strict=True), linestyle='', fillstyle='none', **look)
    for axes in (left, right):
        axes.set_xscale('log')
        for number, point in enumerate(dense):
            axes.axhline(point[2], color='black', linestyle='--', linewidth=1, label=None if number else 'dense')
    clip_to(left, [point[2] for found in series.values() for point in found], series)
    left.invert_xaxis()
    left.xaxis.set_major_locator(FixedLocator([100 - tick for tick in TICKS]))
    left.xaxis.set_major_formatter(FuncFormatter(lambda kept, _: f'{100 - kept:g}'))
    left.xaxis.set_minor_locator(NullLocator())
    left.set_xlabel('zeros among prunable weights, %')
    right.invert_xaxis()
    right.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
    right.xaxis.set_minor_locator(NullLocator())
    right.set_xlabel('million MACs, one image, ' + ('filters removed' if filters else 'with non-zero weights'))
    left.set_ylabel('test accuracy, %')
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside right upper', frameon=False, ncols=1 if len(labels) < 16 else 2)
    figure.suptitle(table['title'], fontsize=10)
    return figure


def clip_to(axes, accuracies, series):
    """Leave points far below the others off the axis, and say in it what they are, or the others could not be told apart."""
    floor = statistics.median(accuracies) - 12
    if min(accuracies) < floor - 8:
        axes.set_ylim(floor, min(axes.get_ylim()[1], 100.5))
        below = [(name, *point[:3]) for name, found in series.items() for point in found if point[2] < floor]
        text = '\n'.join(f'{name} at {zeros:.0f} % zeros: {accuracy:.1f} %' for name, zeros, _, accuracy in below)
        axes.text(0.03, 0.03, 'below this axis:\n' + text, transform=axes.transAxes, fontsize=8)


def learning(name, row, seeds):
    """[(epochs done, accuracy)], from the log of a row's first seed that has one; of training in rounds the last round."""
    path = next((path for seed in seeds if (path := tables.log_of(name, row, seed)).exists()), None)
    if path is None:
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    if lines[-1]['stage'].startswith('round'):
        lines = [line for line in lines if line['stage'] == lines[-1]['stage']]
    return [(done, line['accuracy']) for done, line in enumerate(lines, 1)]


def draw_learning(table, name):
    """Accuracy over epochs -> figure, or None of fewer than two logs. Of many rows those of one sparsity, and dense."""
    found = {row['id']: learning(name, row['id'], row['seeds']) for row in table['rows']}
    found = {row: line for row, line in found.items() if len(line) > 1}
    if len(found) > len(MARKS):
        ending = common_ending(found)
        found = {row: line for row, line in found.items() if row.endswith(ending) or row == 'dense'}
    if len(found) < 2:
        return None
    figure, axes = plt.subplots(figsize=(8, 4.5), layout='constrained')
    for number, (row, line) in enumerate(found.items()):
        style = '-' if number < len(COLOURS) else '--'
        axes.plot(*zip(*line, strict=True), style, label=row, color=COLOURS[number % len(COLOURS)], linewidth=1.2)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel('epochs')
    axes.set_ylabel('test accuracy, %')
    axes.set_title(table['title'], fontsize=10)
    figure.legend(loc='outside right upper', frameon=False)
    return figure


def common_ending(rows):
    """The number with which most ids of rows end, the largest of several; '' where none ends with one."""
    endings = [match[0] for row in rows if (match := re.search(r'-[0-9.]+$', row))]
    return max(endings, key=lambda text: (endings.count(text), float(text[1:])), default='')


def layer_shares(name):
    """{row: {layer: share of zeros}} from the published weights of a table, first seed of each row."""
    shares = {}
    for path in sorted((published.WEIGHTS / name).glob('*.pt')):
        state, about = read_published(path)
        if about['row'] not in shares and about['zeros']:
            model, args = published.rebuild(state, about)
            shares[about['row']] = {layer: zeros / n for layer, (zeros, n) in count_zeros(model, args.pthres).items()}
    return shares


def draw_layers(table, name):
    """Zeros in each layer as bars, a panel for each method -> figure, or None when nothing of the table is published."""
    shares = layer_shares(name)
    shares = {row['id']: shares[row['id']] for row in table['rows'] if row['id'] in shares}
    ending = common_ending(shares)
    if not ending:
        return None
    chosen = {row: found for row, found in shares.items() if row.endswith(ending)}
    figure, panels = plt.subplots(
        len(chosen), 1, figsize=(9, 0.9 + 0.95 * len(chosen)), sharex=True, sharey=True, squeeze=False, layout='constrained'
    )
    for number, (axes, (row, found)) in enumerate(zip(panels[:, 0], chosen.items(), strict=True)):
        axes.bar(range(len(found)), [100 * share for share in found.values()], color=COLOURS[number % len(COLOURS)])
        axes.set_title(row, loc='left', fontsize=9, pad=2)
        axes.set_ylim(0, 100)
        axes.set_yticks([0, 50, 100])
        axes.grid(axis='x', visible=False)
    last = panels[-1, 0]
    last.set_xticks(range(len(found)), list(found), rotation=90, fontsize=7)
    figure.supylabel('zeros in the layer, %', fontsize=9)
    figure.suptitle(f'{table["title"]}: where the zeros are', fontsize=10)
    return figure


def save(figure, path):
    """Write PNG and SVG. Returns their paths; none for None."""
    if figure is None:
        return []
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_suffix('.svg'), metadata={'Date': None})
    figure.savefig(path.with_suffix('.png'), dpi=150, metadata={'Software': None})
    plt.close(figure)
    return [path.with_suffix('.png'), path.with_suffix('.svg')]


def main(names):
    recorded = tables.recorded()
    if unknown := [name for name in names if name not in recorded]:
        sys.exit(f'no runs recorded of {", ".join(unknown)}; there are {", ".join(recorded)}')
    plt.rcParams.update(STYLE)
    for name in names or recorded:
        table = arguments.load_table(tables.CONFIGS / f'{name}.yaml')
        written = save(draw_curves(table, recorded[name]), tables.RESULTS / f'{name}.svg')
        written += save(draw_curves(table, recorded[name], filters=True), tables.RESULTS / f'{name}-filters.svg')
        written += save(draw_learning(table, name), tables.RESULTS / f'{name}-learning.svg')
        written += save(draw_layers(table, name), tables.RESULTS / f'{name}-layers.svg')
        print(*[path.relative_to(tables.ROOT) for path in written] or [f'{name}: nothing to draw'], sep='\n')


if __name__ == '__main__':
    main(sys.argv[1:])
