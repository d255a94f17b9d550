"""Tables out of recorded runs; nobody types a number.

    python -m harness.table            rewrite results/<table>.md of every table in configs/ with runs in results/runs.jsonl
    python -m harness.table --check    fail if one of them is not what the runs say

A row shows the mean and the sample standard deviation over its seeds. Accuracy is that of the last epoch on the test set,
zeros and MACs are counted on the saved network, and where whole filters went also on the network without them; milliseconds,
with `times: true` in the table, are those of that network on two threads, and of the dense one in the same run. README.md and
results/README.md repeat some of these pages, between the comments <!-- results/NAME.md --> and <!-- end -->; both commands
see to those too.
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

SHRUNK = ['parameters shrunk', 'MMACs shrunk']
TIMES = ['ms shrunk (dense), 1 image', '32 images']
ROOT = Path(__file__).resolve().parents[1]
RESULTS, CONFIGS = ROOT / 'results', ROOT / 'configs'
RUNS = RESULTS / 'runs.jsonl'
READMES = [ROOT / 'README.md', RESULTS / 'README.md']


def name_of(path):
    """configs/feather/cifar100.yaml -> feather/cifar100; a table from elsewhere goes by its file's name."""
    path = Path(path).resolve().with_suffix('')
    return str(path.relative_to(CONFIGS)) if path.is_relative_to(CONFIGS) else path.name


def of_folders(runs):
    """[(row, seed, run folder)] -> {(row, seed): result}, for the runs that have one, failed ones too."""
    results = {(row, seed): read_json(folder / 'result.json') for row, seed, folder in runs}
    return {key: result for key, result in results.items() if result is not None}


def recorded():
    """results/runs.jsonl -> {table: {(row, seed): result}}; the last line of a run counts."""
    tables = {}
    for line in RUNS.read_text().splitlines() if RUNS.exists() else []:
        entry = json.loads(line)
        tables.setdefault(entry['table'], {})[entry['row'], entry['seed']] = entry
    return tables


def keep(table, results):
    """Add the finished results of a table to runs.jsonl, without what belongs to one machine, and rewrite its page."""
    tables = recorded()
    for (row, seed), result in results.items():
        if result['status'] == 'finished':
            args = {name: value for name, value in result['args'].items() if name not in PLACE}
            entry = {'table': table, 'row': row, 'seed': seed} | result | {'args': args}
            tables.setdefault(table, {})[row, seed] = {key: value for key, value in entry.items() if key != 'layers'}
    lines = [json.dumps(entry) + '\n' for results in tables.values() for entry in results.values()]
    files.write_atomically(RUNS, lambda file: file.write(''.join(lines).encode()))
    write(table, tables.get(table, {}))
    write_readmes()


def page(table, results):
    """The text of results/<table>.md."""
    path = CONFIGS / f'{table}.yaml'
    return f'# {arguments.load_table(path)["title"]}\n\nMade by `./launch configs/{table} --record`.\n\n{render(path, results)}'


def write(table, results):
    path = RESULTS / f'{table}.md'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(table, results))


def render(path, results):
    """A Markdown table of the rows of a YAML table; rows without a result stay visible."""
    table = arguments.load_table(path)
    head = ['row', 'paper', 'accuracy %', 'seeds', 'zeros', 'of weights', 'sparsity %', 'MMACs non-zero', 'of dense', 'minutes']
    shrinks = any('small_macs' in result for result in results.values())
    head += [*SHRUNK, *(TIMES if table['times'] else [])] if shrinks else []
    files = {run: RESULTS / 'weights' / name_of(path) / '{}-s{}.pt'.format(*run) for run in results}
    files = {run: file.stat().st_size / 1000 for run, file in files.items() if file.exists()}
    head += ['kB published'] if files else []
    lines, origins = [], []
    for row in table['rows']:
        mine = {seed: result for (name, seed), result in results.items() if name == row['id']}
        runs = [result for result in mine.values() if result['status'] == 'finished']
        failures = [result['reason'] for result in mine.values() if result['status'] != 'finished']
        cells = figures(runs) if runs else ['failed' if failures else 'not run']
        cells[0] += f' ({len(failures)} failed)' if runs and failures else ''
        cells.insert(1, ' '.join(str(seed) for seed, result in sorted(mine.items()) if result['status'] == 'finished'))
        cells += shrunk(runs)[: len(SHRUNK) + 2 * table['times']] if runs and shrinks else []
        cells = [row['id'], paper(row), *cells, *[''] * len(head)][: len(head)]
        if sizes := [size for (name, _), size in files.items() if name == row['id']]:
            cells[-1] = f'{mean(sizes):,.1f}'
        lines.append(cells)
        origins += [f'{run["device"]}, torch {run["torch"]}, commit {run["commit"]}' for run in runs]
    if not any(published for _, published, *_ in lines):
        head, *lines = [[first, *rest] for first, _, *rest in [head, *lines]]  # a table of our own
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    rule = ['-' * width for width in widths]
    aligned = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in [head, rule, *lines]]
    notes = [f'{origin}: {origins.count(origin)} of {len(origins)} runs' for origin in sorted(set(origins))]
    return (
        '\n'.join('| ' + ' | '.join(line) + ' |' for line in aligned) + '\n\n' + '\n'.join(f'- {note}' for note in notes) + '\n'
    )


def figures(runs):
    """The cells of a row from its finished runs."""
    accuracies = [run['accuracy'] for run in runs]
    spread = f' ± {statistics.stdev(accuracies):.2f}' if len(runs) > 1 else ''
    zeros, weights, nonzero, dense = (
        mean(run[key] for run in runs) for key in ('zeros', 'weights', 'macs_nonzero', 'macs_dense')
    )
    return [
        f'{mean(accuracies):.2f}{spread}',
        f'{zeros:,.0f}',
        f'{weights:,.0f}',
        f'{100 * zeros / weights:.3f}',
        f'{nonzero / 1e6:.3f}',
        f'{dense / 1e6:.3f}',
        f'{mean(run["seconds"] for run in runs) / 60:.1f}',
    ]


def shrunk(runs):
    """What is left once the zeros of whole filters are removed: parameters, million MACs, milliseconds with dense in brackets."""
    if not all('small_macs' in run for run in runs):
        return [f'{mean(run["parameters"] for run in runs):,.0f}', ''] if runs[0]['gives'] == 'the dense network' else ['', '']
    cells = [f'{mean(run["small_parameters"] for run in runs):,.0f}', f'{mean(run["small_macs"] for run in runs) / 1e6:.3f}']
    for batch in (1, 32):
        small, dense = (mean(run[f'{which}_ms_{batch}'] for run in runs) for which in ('small', 'dense'))
        cells.append(f'{small:.2f} ({dense:.2f})')
    return cells


def mean(values):
    return statistics.fmean(values)


def paper(row):
    """The published figures of a row: `paper: 76.03` or `paper: {accuracy: 76.03, mflops: 764}`."""
    published = row.get('paper', '')
    return ', '.join(f'{key} {value}' for key, value in published.items()) if isinstance(published, dict) else str(published)


def readme(path):
    """The text of a README with what it repeats from results/ as it stands there now, without the titles."""

    def included(match):
        _, _, text = (RESULTS / match[1]).read_text().partition('\n\n')
        return f'<!-- results/{match[1]} -->\n{text[text.index("|") if "|" in text else 0 :].strip()}\n<!-- end -->'

    return re.sub(r'<!-- results/(\S+) -->\n.*?<!-- end -->', included, path.read_text(), flags=re.DOTALL)


def write_readmes():
    for path in READMES:
        path.write_text(readme(path))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='write nothing; fail where a page is stale')
    check = parser.parse_args().check
    tables = {name: results for name, results in recorded().items() if (CONFIGS / f'{name}.yaml').exists()}
    pages = {RESULTS / f'{name}.md': page(name, results) for name, results in tables.items()}
    if check:
        stale = [path.name for path, text in pages.items() if not path.exists() or path.read_text() != text]
        stale += [str(path) for path in READMES if path.read_text() != readme(path)]
        sys.exit(f'not what the recorded runs say: {", ".join(stale)}; python -m harness.table rewrites them' if stale else 0)
    for name, results in tables.items():
        write(name, results)
    write_readmes()


if __name__ == '__main__':
    main()
