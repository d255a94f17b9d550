"""Run the rows of tables, one after another:

    ./launch CONFIG... [--list] [--record] [--publish] [--row ID] [--seed N] [--runs DIR]
                       [--parallel N] [flags of main.py]

CONFIG is a YAML file, its name without .yaml, or a folder of them. Each row and seed runs main.py into
runs/<table>/<row>-s<seed>. A finished run with the same arguments is skipped, an interrupted one continued, and a row that
fails does not stop the others. Flags of main.py go to every row that has them and win over the table's.

--list     print the rows, their state, the published figures and the expected time; run nothing
--record   add the finished rows to results/runs.jsonl and rewrite results/<table>.md
--publish  the same, and put the weights of those rows into results/weights/<table>/
--row ID   only this row     --seed N   only this seed     --runs DIR   instead of runs/
--parallel N   so many runs side by side, for a GPU that one small network does not fill; each prints to <run folder>/output.txt

With NPROC=8 in the environment each run is started by torchrun as 8 processes, one for each GPU.

The exit status is 0 only if every row asked for is finished.
"""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import args as arguments
from deploy.files import read_json
from methods._flags import count, differences, positive

from . import published
from . import table as tables

ROOT = tables.ROOT


class Run(NamedTuple):
    """A row and a seed: its folder, the words for main.py, and what these mean."""

    row: dict
    seed: int
    out: Path
    words: list
    args: dict


def main():
    if hasattr(signal, 'SIGPIPE'):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `./launch ... --list | head` ends quietly
    words = sys.argv[1:]
    first_flag = next((i for i, word in enumerate(words) if word.startswith('-')), len(words))
    names = words[:first_flag]
    flags = words[first_flag:]
    parser = own_parser()
    if not names:
        parser.exit(0 if flags in (['-h'], ['--help']) else 2, __doc__)
    options, flags = parser.parse_known_args(flags)
    try:
        tables_of_runs = [(path, runs_of(path, options, flags)) for name in names for path in find(name)]
        check_flags(flags, [run for _, runs in tables_of_runs for run in runs])
    except ValueError as error:
        parser.error(str(error))
    if not any(runs for _, runs in tables_of_runs):
        parser.exit(1, f'launch: nothing matched {" ".join(words)}\n')
    try:
        for path, runs in tables_of_runs:
            if options.record or options.publish:
                check_recordable(path, runs)
            if options.list:
                print_list(path, runs)
            else:
                carry_out(path, runs, options)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, 'launch: interrupted; the same command goes on\n')
    every = [run for _, runs in tables_of_runs for run in runs]
    unfinished = [str(run.out) for run in every if state_of(run.out, run.args) != 'finished']
    if unfinished and not options.list:
        parser.exit(1, f'launch: {len(unfinished)} of {len(every)} failed: {", ".join(unfinished)}\n')


def own_parser():
    parser = arguments.Parser(prog='launch', add_help=False, allow_abbrev=False)
    parser.add_argument('--list', action='store_true')
    parser.add_argument('--record', action='store_true')
    parser.add_argument('--publish', action='store_true')
    parser.add_argument('--row')
    parser.add_argument('--seed', type=count)
    parser.add_argument('--runs', type=Path, default=Path('runs'))
    parser.add_argument('--parallel', type=positive, default=1)
    return parser


def find(name):
    """The YAML files that a word of the command line means: from the present folder, or else from this repository's."""
    for path in (Path(name), Path(f'{name}.yaml'), ROOT / name, ROOT / f'{name}.yaml', ROOT / 'configs' / f'{name}.yaml'):
        if path.is_file():
            return [path]
        if path.is_dir():
            return sorted(path.rglob('*.yaml'))
    if (ROOT / 'configs' / name).is_dir():
        return sorted((ROOT / 'configs' / name).rglob('*.yaml'))
    raise ValueError(f'there is no config {name!r}: give a YAML file, its name without .yaml, or a folder of them')


def runs_of(path, options, flags):
    """The runs of a table that --row and --seed ask for. One that main.py would refuse ends the program, with its sentence."""
    table = arguments.load_table(path)
    runs = []
    for row in table['rows']:
        if options.row not in (None, row['id']):
            continue
        for seed in row['seeds'] if options.seed is None else [options.seed]:
            out = options.runs / tables.name_of(path) / f'{row["id"]}-s{seed}'
            words = [f'--config={path}', f'--row={row["id"]}']
            words += [*known_flags(words, flags), f'--seed={seed}', f'--out={out}']
            runs.append(Run(row, seed, out, words, vars(arguments.parse(words))))
    return runs


# ------------------------------------------------------------------------------------------------ flags of the user's own


def with_values(flags):
    """['--lr', '0.1', '--amp'] -> [['--lr', '0.1'], ['--amp']]"""
    groups = []
    for word in flags:
        if word.startswith('-') and not is_number(word):
            groups.append([word])
        elif groups:
            groups[-1].append(word)
        else:
            raise ValueError(f'unexpected {word!r}: flags come after the configs')
    return groups


def is_number(word):
    try:
        float(word)
    except ValueError:
        return False
    return True


def known_flags(words, flags):
    """Of the user's flags those that main.py has for the row that `words` name: not every method has every flag."""
    if not flags:
        return []  # without reading the table once more for each row
    known = arguments.flags_of(words)
    return [word for group in with_values(flags) if group[0].split('=')[0] in known for word in group]


def check_flags(flags, runs):
    """Raise ValueError for a flag that no row has; say once which rows go without one."""
    for name in (group[0].split('=')[0] for group in with_values(flags)):
        without = [run for run in runs if name not in [word.split('=')[0] for word in run.words]]
        if len(without) == len(runs) and runs:
            raise ValueError(f'no row has a flag {name}: see python main.py --method {runs[0].args["method"]} --help')
        if without:
            rows = ', '.join(dict.fromkeys(run.row['id'] for run in without))
            print(f'launch: {name} is no flag of the method of {rows}, which go without it')


def check_recordable(path, runs):
    """Raise ValueError where --record would write down something else than the table says."""
    if not Path(path).resolve().is_relative_to(tables.CONFIGS):
        raise ValueError(f'--record and --publish are for tables below configs/, not {path}')
    for run in runs:
        plain = [*run.words[:2], *run.words[-2:]]  # without the user's flags
        if changed := differences(vars(arguments.parse(plain)), run.args):
            raise ValueError(f'--record is for the rows as the table has them, not with {", ".join(changed)}: change the table')


# ------------------------------------------------------------------------------------------------------------------- runs


def state_of(out, wanted):
    """What the run folder holds of a run with the arguments `wanted`."""
    have = read_json(out / 'args.json')
    result = read_json(out / 'result.json')
    if have is None:
        return 'not run'
    if differences(have, wanted):
        return 'other arguments'
    if result is None:
        return 'interrupted' if (out / 'checkpoint.pt').exists() else 'not run'
    return 'finished' if result.get('status') == 'finished' else f'failed: {result.get("reason")}'


def print_list(path, runs):
    print(f'{path}: {len(runs)} runs')
    if not runs:
        return
    lines = []
    for run in runs:
        minutes = f'{run.row["minutes"]:g} min' if 'minutes' in run.row else 'time not known'
        figures = ', '.join(f'{name} {value}' for name, value in tables.published(run.row).items())
        published_as = f'published: {figures}' if figures else ''
        lines.append([run.row['id'], f'seed {run.seed}', minutes, state_of(run.out, run.args), published_as])
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    for line in lines:
        print('  ' + '  '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def carry_out(path, runs, options):
    """Run what is not finished, row after row or side by side; then print the table, and record it where asked."""
    table = tables.name_of(path)
    states = [state_of(run.out, run.args) for run in runs]
    turns = turns_of(runs)
    for now in sorted(set(turns)):
        with ThreadPoolExecutor(options.parallel) as pool:
            futures = []
            for number, (run, state, turn) in enumerate(zip(runs, states, turns, strict=True), 1):
                if turn == now:
                    title = f'[{number}/{len(runs)}] {table} {run.row["id"]}, seed {run.seed}'
                    futures.append(pool.submit(run_row, title, state, run, options.parallel))
            try:
                for future in futures:
                    future.result()
            except BaseException:  # Ctrl-C has reached the runs too
                pool.shutdown(cancel_futures=True)
                raise
    states = [state_of(run.out, run.args) for run in runs]  # not of folders with other arguments
    ended = [run for run, state in zip(runs, states, strict=True) if state.startswith(('finished', 'failed'))]
    results = tables.results_in([(run.row['id'], run.seed, run.out) for run in ended])
    if options.publish:
        for run, state in zip(runs, states, strict=True):
            if state == 'finished':
                published.publish(run.out)
    if (options.record or options.publish) and arguments.load_table(path)['times']:
        time_zeros([run for run, state in zip(runs, states, strict=True) if state == 'finished'])
        results = tables.results_in([(run.row['id'], run.seed, run.out) for run in ended])
    if options.record or options.publish:
        tables.record_logs(
            table, [(run.row['id'], run.seed, run.out) for run, state in zip(runs, states, strict=True) if state == 'finished']
        )
        tables.record(table, results)
    print('\n' + tables.render(path, results), flush=True)


def time_zeros(runs):
    """`--sparse-compile` for runs whose zeros are not whole filters and that were not timed yet, one after the other."""
    for run in runs:
        if tables.has_single_zeros(read_json(run.out / 'result.json')) and not (run.out / 'sparse.json').exists():
            place = [f'--data-dir={run.args["data_dir"]}', '--no-download']
            subprocess.run([sys.executable, ROOT / 'main.py', '--sparse-compile', run.out, *place], check=False)


def turns_of(runs):
    """For each run how many of those above it have to come first, one after the other.

    A run waits for the one whose weights it starts from, and for those that share its --chain of rounds.
    """
    turns = []
    seen = []
    for run in runs:
        source, chain = (str(run.args.get(name) or '').replace('{seed}', str(run.seed)) for name in ('from', 'chain'))
        source = Path(source.removesuffix('/model.pt')).name
        before = [turn for turn, (name, rounds) in zip(turns, seen, strict=True) if name == source or rounds == chain != '']
        turns.append(max(before, default=-1) + 1)
        seen.append((run.out.name, chain))
    return turns


def run_row(title, state, run, parallel):
    """One run in a process of its own; side by side with others it has its share of the cores, and prints to a file."""
    print(f'{title}: {state}', flush=True)
    if state == 'finished':
        return
    processes = os.environ.get('NPROC')
    several = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}'] if processes else []
    command = [sys.executable, *several, ROOT / 'main.py', *run.words]
    if parallel == 1:
        subprocess.run(command, check=False)
        return
    run.out.mkdir(parents=True, exist_ok=True)
    threads = {'OMP_NUM_THREADS': str(max((os.cpu_count() or 1) // parallel, 1))}
    with open(run.out / 'output.txt', 'a') as file:
        ended = subprocess.run(command, check=False, stdout=file, stderr=subprocess.STDOUT, env=threads | os.environ)
    print(f'{title}: {"ended" if ended.returncode == 0 else f"failed, see {run.out}/output.txt"}', flush=True)


if __name__ == '__main__':
    main()
