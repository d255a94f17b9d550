"""Tables out of recorded runs; nobody types a number.

    python -m harness.table            rewrite results/<table>.md of every table in configs/, results/tables.md, their list, and
                                       results/weights/README.md, the list of published weights
    python -m harness.table --check    fail if one of them is not what results/runs.jsonl says
    python -m harness.table --compare TABLE ROW ROW     the difference between two rows, with its interval

A row shows the mean and the sample standard deviation over its seeds, or, with `summary: median` in the table, the median and
the range. Where rows have several seeds, as the dense one, a column has the difference to it, paired by seeds, with its 95 %
interval by a paired t test. Accuracy is that of the last epoch on the test set, zeros and MACs are counted on the saved
network, and where whole filters went also on the network without them; milliseconds, with `times: true` in the table, are
those of that network and, in brackets, of the dense one in the same run; where single weights are zero, of the sparse engine
and, in brackets, of PyTorch. They are of the seeds that were timed, on one machine, which the last line of a page counts.
A table that was never run has a page too, with the published figures and "not run".
README.md and results/README.md repeat some of these pages, between the comments <!-- results/NAME.md --> and <!-- end -->;
both commands see to those too.
"""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path

import args as arguments
from deploy import files
from deploy.files import read_json
from methods._flags import PLACE

from . import pairs, weights_page
from .markdown import markdown

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / 'configs'
RESULTS = ROOT / 'results'
RUNS = RESULTS / 'runs.jsonl'
READMES = [ROOT / 'README.md', RESULTS / 'README.md']


def name_of(path):
    """configs/feather/cifar100.yaml -> feather/cifar100; a table from elsewhere goes by its file's name."""
    path = Path(path).resolve().with_suffix('')
    return str(path.relative_to(CONFIGS)) if path.is_relative_to(CONFIGS) else path.name


# ---------------------------------------------------------------------------------------------------------------- results


def results_in(runs):
    """[(row, seed, run folder)] -> {(row, seed): result}, for the runs that have one, failed ones too."""
    results = {}
    for row, seed, folder in runs:
        result = read_json(folder / 'result.json')
        if result is not None:
            timed = read_json(folder / 'sparse.json') or {}  # of --sparse-compile
            results[row, seed] = result | {key: value for key, value in timed.items() if '_ms_' in key or key == 'sparse_on'}
    return results


def recorded():
    """results/runs.jsonl -> {table: {(row, seed): result}}; the last line of a run counts."""
    tables = {}
    lines = RUNS.read_text().splitlines() if RUNS.exists() else []
    for line in lines:
        entry = json.loads(line)
        tables.setdefault(entry['table'], {})[entry['row'], entry['seed']] = entry
    return tables


def record(table, results):
    """Add the finished results of a table to runs.jsonl, without what belongs to one machine, and rewrite its page."""
    tables = recorded()
    for (row, seed), result in results.items():
        if result['status'] == 'finished':
            args = {name: value for name, value in result['args'].items() if name not in PLACE}
            entry = {'table': table, 'row': row, 'seed': seed} | result | {'args': args}
            del entry['layers']
            tables.setdefault(table, {})[row, seed] = entry
    lines = [json.dumps(entry) + '\n' for results in tables.values() for entry in results.values()]
    files.write_atomically(RUNS, lambda file: file.write(''.join(lines).encode()))
    write(pages_of([table], tables))


def record_logs(table, runs):
    """Keep the log of each finished run, [(row, seed, run folder)], as results/logs/<table>/<row>-s<seed>.jsonl."""
    for row, seed, folder in runs:
        text = (folder / 'log.jsonl').read_bytes()
        path = log_of(table, row, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(path, lambda file, text=text: file.write(text))


def pages_of(names, results):
    """{name below results/: text} of the pages of some tables, and of those that hold something of all of them."""
    pages = {f'{name}.md': page(name, results.get(name, {})) for name in names}
    return pages | {'tables.md': index(results), 'weights/README.md': weights_page.page()}


def log_of(table, row, seed):
    """Where the log of a recorded run is kept; runs recorded before logs were kept have none."""
    return RESULTS / 'logs' / table / f'{row}-s{seed}.jsonl'


# ------------------------------------------------------------------------------------------------------------------ pages


def page(table, results):
    """The text of results/<table>.md."""
    title = arguments.load_table(CONFIGS / f'{table}.yaml')['title']
    made = 'Made by' if results else 'Not run yet; that is done by'
    text = f'# {title}\n\n{made} `./launch configs/{table} --record`.\n\n'
    text += render(CONFIGS / f'{table}.yaml', results, published_sizes(table, results))
    for picture in pictures(table):
        text += f'\n![{picture.stem}]({picture.name})\n'
    return text


def pictures(table):
    """The PNG files that harness/plot.py has drawn for a table."""
    folder = (RESULTS / table).parent
    stem = Path(table).name
    return [path for name in ('', '-filters', '-learning', '-layers') if (path := folder / f'{stem}{name}.png').exists()]


def published_sizes(table, results):
    """{row: [kB of the published weight files of its recorded runs]}"""
    sizes = {}
    for row, seed in results:
        path = RESULTS / 'weights' / table / f'{row}-s{seed}.pt'
        if path.exists():
            sizes.setdefault(row, []).append(path.stat().st_size / 1000)
    return sizes


def index(tables):
    """The text of results/tables.md: every table of configs/, and what has been recorded of it."""
    lines = []
    for name in table_names():
        table = arguments.load_table(CONFIGS / f'{name}.yaml')
        wanted = {(row['id'], seed) for row in table['rows'] for seed in row['seeds']}
        done = len(wanted & tables.get(name, {}).keys())
        state = 'not run' if not done else f'complete, {done} runs' if done == len(wanted) else f'{done} of {len(wanted)} runs'
        lines.append([f'[{name}]({name}.md)', table['title'], state])
    return '# Tables\n\nEach is `./launch configs/TABLE`.\n\n' + markdown(['table', 'what it is', 'recorded'], lines)


def table_names():
    return sorted(name_of(path) for path in CONFIGS.rglob('*.yaml'))


def render(path, results, sizes=None):
    """A Markdown table of the rows of a YAML table; rows without a result stay visible.

    results: {(row, seed): result}. sizes: {row: [kB of its published files]}.
    """
    table = arguments.load_table(path)
    rows = [(row, {seed: result for (name, seed), result in results.items() if name == row['id']}) for row in table['rows']]
    columns = columns_of(table, results, sizes or {})
    lines = [[cell(row, runs) for cell in columns.values()] for row, runs in rows]
    origins = []
    for _, runs in rows:
        finished = finished_of(runs)
        origins += [f'{run["device"]}, torch {run["torch"]}, commit {run["commit"]}' for run in finished]
    text = markdown(list(columns), lines)
    notes = [f'- {origin}: {origins.count(origin)} of {len(origins)} runs\n' for origin in sorted(set(origins))]
    timed = [run['sparse_on'] for _, runs in rows for run in finished_of(runs) if 'sparse_on' in run]
    notes += [f'- sparse engine and PyTorch beside it, {where}: {timed.count(where)} runs\n' for where in sorted(set(timed))]
    return text + ('\n' + ''.join(notes) if notes else '')


# ---------------------------------------------------------------------------------------------------------------- columns


def columns_of(table, results, sizes):
    """{head: function of a row and its results {seed: result} -> cell}, those that have something to say in this table."""
    summary = median_and_range if table['summary'] == 'median' else mean_and_deviation
    columns = {'row': lambda row, runs: row['id']}
    if any('paper' in row for row in table['rows']):
        columns['paper'] = lambda row, runs: paper(row)
    columns |= {
        'accuracy %': lambda row, runs: accuracy(runs, summary),
        **minus_dense(results),
        'seeds': lambda row, runs: ' '.join(str(seed) for seed, run in sorted(runs.items()) if run['status'] == 'finished'),
        'zeros': over_runs(lambda run: run['zeros'], '{:,.0f}'),
        'of weights': over_runs(lambda run: run['weights'], '{:,.0f}'),
        'sparsity %': over_runs(lambda run: 100 * run['zeros'] / run['weights'], '{:.3f}'),
        'MMACs non-zero': over_runs(lambda run: run['macs_nonzero'] / 1e6, '{:.3f}'),
        'of dense': over_runs(lambda run: run['macs_dense'] / 1e6, '{:.3f}'),
    }
    for name, head in (('flops_pruned', 'FLOPs pruned % (paper)'), ('params_pruned', 'parameters pruned % (paper)')):
        if any(name in published(row) for row in table['rows']):
            columns[head] = beside_paper(name)
    columns['minutes'] = over_runs(lambda run: run['seconds'] / 60, '{:.1f}')
    if any('small_macs' in result for result in results.values()):
        columns['parameters shrunk'] = shrunk_parameters
        columns['MMACs shrunk'] = over_runs(lambda run: run['small_macs'] / 1e6, '{:.3f}')
        if table['times']:
            columns['ms shrunk (dense), 1 image'] = lambda row, runs: milliseconds(runs, 1)
            columns['32 images'] = lambda row, runs: milliseconds(runs, 32)
    if table['times'] and any('sparse_ms_1' in result for result in results.values()):
        columns['ms sparse engine (PyTorch), 1 image'] = lambda row, runs: milliseconds(runs, 1, 'sparse', 'pytorch')
        columns['sparse engine, 32 images'] = lambda row, runs: milliseconds(runs, 32, 'sparse', 'pytorch')
    if sizes:
        columns['kB published'] = lambda row, runs: f'{mean(sizes[row["id"]]):,.1f}' if row['id'] in sizes else ''
    return columns


def minus_dense(results):
    """The column of the difference to the dense row; none where fewer than two seeds of any row are paired with its own."""
    found = {row: pairs.difference(results, row, 'dense') for row in {row for row, _ in results} - {'dense'}}
    texts = {row: f'{pair[0]:+.2f} ± {pair[1]:.2f}' for row, pair in found.items() if pair}
    return {'minus dense (95 %)': lambda row, runs: texts.get(row['id'], '')} if texts else {}


def finished_of(runs):
    return [run for run in runs.values() if run['status'] == 'finished']


def over_runs(figure, form):
    """A column: the mean of figure(run) over the finished runs of a row, empty where a run does not have it."""

    def cell(row, runs):
        try:
            values = [figure(run) for run in finished_of(runs)]
        except KeyError:
            return ''
        return form.format(mean(values)) if values else ''

    return cell


def accuracy(runs, summary):
    """The accuracy over the finished runs, and how many have failed; or why there is none."""
    finished = finished_of(runs)
    failed = len(runs) - len(finished)
    if not finished:
        return 'failed' if failed else 'not run'
    return summary([run['accuracy'] for run in finished]) + (f' ({failed} failed)' if failed else '')


def mean(values):
    return statistics.fmean(values)


def mean_and_deviation(values):
    return f'{mean(values):.2f}' + (f' ± {statistics.stdev(values):.2f}' if len(values) > 1 else '')


def median_and_range(values):
    return f'{statistics.median(values):.2f}' + (f' ({min(values):.2f} to {max(values):.2f})' if len(values) > 1 else '')


def shrunk_parameters(row, runs):
    """Parameters once the zeros of whole filters are removed; of a dense row all that it has."""
    finished = finished_of(runs)
    if all('small_parameters' in run for run in finished):
        return over_runs(lambda run: run['small_parameters'], '{:,.0f}')(row, runs)
    if finished[0]['gives'] == 'the dense network':
        return over_runs(lambda run: run['parameters'], '{:,.0f}')(row, runs)
    return ''


def has_single_zeros(result):
    """Whether a run has zeros that are not whole filters, so that the sparse engine is what makes them fast."""
    return result['zeros'] > 0 and 'small_macs' not in result and 'saved' not in result


def milliseconds(runs, batch, fast='small', dense='dense'):
    """Of the shrunk network, or in the sparse engine, and, in brackets, of the dense one, for a batch; of the runs timed."""
    timed = [run for run in finished_of(runs) if f'{fast}_ms_{batch}' in run]
    if not timed:
        return ''
    ours, theirs = (mean(run[f'{name}_ms_{batch}'] for run in timed) for name in (fast, dense))
    return f'{ours:.{3 if ours < 0.1 else 2}f} ({theirs:.2f})'


# -------------------------------------------------------------------------------------------------------- published figures


def published(row):
    """The published figures of a row, `paper: 76.03` or `paper: {accuracy: 76.03, mflops: 764}`, as a dict."""
    figures = row.get('paper', {})
    figures = figures if isinstance(figures, dict) else {'accuracy': figures}
    return {name.replace('-', '_'): value for name, value in figures.items()}


def paper(row):
    """The published figures of a row in words, but those that have a column of their own."""
    figures = {name: value for name, value in published(row).items() if name not in ('flops_pruned', 'params_pruned')}
    if list(figures) == ['accuracy']:
        return str(figures['accuracy'])
    return ', '.join(f'{name} {value}' for name, value in figures.items())


def beside_paper(name):
    """A column: percent of FLOPs or parameters that are pruned, ours and in brackets the paper's.

    DSP counts both over the convolutions that it groups, and its result says so; elsewhere both are those of the whole network
    without its dead filters.
    """
    counted, small, dense = {
        'flops_pruned': ('flops_pruned', 'small_macs', 'dense_macs'),
        'params_pruned': ('weights_pruned', 'small_parameters', 'dense_parameters'),
    }[name]

    def share(run):
        return run[counted] if counted in run else 1 - run[small] / run[dense]

    ours = over_runs(lambda run: 100 * share(run), '{:.2f}')

    def cell(row, runs):
        theirs = published(row).get(name)
        text = ours(row, runs)
        return f'{text} ({theirs})'.strip() if theirs is not None else text

    return cell


# ------------------------------------------------------------------------------------------------------------------ files


def readme(path):
    """The text of a README with what it repeats from results/ as it stands there now, without titles and pictures.

    <!-- results/NAME.md --> repeats a page; with `only` and a regular expression, of its rows those in which it is found.
    """

    def included(match):
        _, _, text = (RESULTS / match[1]).read_text().partition('\n\n')
        if match[2]:
            text = '\n\n'.join(chosen_rows(part, match[2]) for part in text.split('\n\n'))
        text = text[text.index('|') if '|' in text else 0 :]
        text = re.sub(r'(?m)^!\[.*?\]\(.*?\)$', '', text)
        if match[1] == 'tables.md':  # whose links begin in results/
            text = re.sub(r'\]\((?=[\w/]+\.md\))', '](results/', text) if path.parent == ROOT else text
        chosen = f' only {match[2]}' if match[2] else ''
        return f'<!-- results/{match[1]}{chosen} -->\n{text.strip()}\n<!-- end -->'

    return re.sub(r'<!-- results/(\S+?)(?: only (.+?))? -->\n.*?<!-- end -->', included, path.read_text(), flags=re.DOTALL)


def chosen_rows(part, pattern):
    """Of a part of a page the rows in which the pattern is found, and its other lines; or else, nothing but fences."""
    lines = part.splitlines()
    kept = [line for line in lines if not is_row(line) or re.search(pattern, line)]
    if any(map(is_row, lines)) and not any(map(is_row, kept)):
        kept = [line for line in kept if line == '```']
    return '\n'.join(kept)


def is_row(line):
    """Whether a line of a page is a row with figures: of a table, but not its head, or indented in a block of text."""
    return line.startswith('  ') or (line.startswith('| ') and not re.match(r'\| (row|-+) ', line))


def write(pages):
    """Write {name below results/: text}, and then the READMEs, which repeat some of them."""
    for name, text in pages.items():
        path = RESULTS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for path in READMES:
        path.write_text(readme(path))


def compare(results, table, row, control):
    """Print the difference between two rows of a table, paired by seeds."""
    found = pairs.difference(results.get(table, {}), row, control)
    if found is None:
        sys.exit(f'{row} and {control} have fewer than two recorded seeds in common in {table}')
    middle, half, seeds = found
    print(f'{row} - {control}: {middle:+.2f} points, 95 % interval {middle - half:+.2f} to {middle + half:+.2f}')
    print(f'paired over the seeds {" ".join(map(str, seeds))} of {table}')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='write nothing; fail where a page is stale')
    parser.add_argument('--compare', nargs=3, metavar=('TABLE', 'ROW', 'ROW'), help='the difference between two rows')
    options = parser.parse_args()
    results = recorded()
    if options.compare:
        compare(results, *options.compare)
        return
    pages = pages_of(table_names(), results)
    if not options.check:
        write(pages)
        return
    stale = [name for name, text in pages.items() if not (RESULTS / name).exists() or (RESULTS / name).read_text() != text]
    stale += [str(path) for path in READMES if path.read_text() != readme(path)]
    if stale:
        sys.exit(f'not what the recorded runs say: {", ".join(stale)}; python -m harness.table rewrites them')


if __name__ == '__main__':
    main()
