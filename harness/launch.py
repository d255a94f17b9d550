"""Run the rows of tables, one after another:

    ./launch CONFIG... [--list] [--record] [--publish] [--row ID] [--seed N] [--runs DIR]
                       [--parallel N] [flags of main.py]

CONFIG is a YAML file, its name without .yaml, or a folder of them. Each row and seed runs main.py into
runs/<table>/<row>-s<seed>. A finished run with the same arguments is skipped, an interrupted one continued, and a row that
fails does not stop the others. Flags of main.py go to every row and win over the table's.

--list     print the rows, their state and expected time; run nothing
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

ROOT = Path(__file__).resolve().parents[1]


def main():
    if hasattr(signal, 'SIGPIPE'):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `./launch ... --list | head` ends quietly
    words = sys.argv[1:]
    first_flag = next((i for i, word in enumerate(words) if word.startswith('-')), len(words))
    names, flags = words[:first_flag], words[first_flag:]
    parser = arguments.Parser(prog='launch', add_help=False, allow_abbrev=False)
    parser.add_argument('--list', action='store_true')
    parser.add_argument('--record', action='store_true')
    parser.add_argument('--publish', action='store_true')
    parser.add_argument('--row')
    parser.add_argument('--seed', type=count)
    parser.add_argument('--runs', type=Path, default=Path('runs'))
    parser.add_argument('--parallel', type=positive, default=1)
    if not names:
        parser.exit(0 if flags in (['-h'], ['--help']) else 2, __doc__)
    options, flags = parser.parse_known_args(flags)
    try:
        jobs = [(path, expand(path, options, flags)) for name in names for path in find(name)]
    except ValueError as error:
        parser.error(str(error))
    if not any(rows for _, rows in jobs):
        parser.exit(1, f'launch: nothing matched {" ".join(words)}\n')
    try:
        for path, rows in jobs:
            if options.record or options.publish:
                check_recordable(path, rows)
            if options.list:
                list_rows(path, rows)
            else:
                run_rows(path, rows, options)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, 'launch: interrupted; the same command goes on\n')
    unfinished = [str(run.out) for _, rows in jobs for run in rows if state_of(run.out, run.args) != 'finished']
    if unfinished and not options.list:
        parser.exit(1, f'launch: {len(unfinished)} of {sum(len(rows) for _, rows in jobs)} failed: {", ".join(unfinished)}\n')


def check_recordable(path, rows):
    """Raise ValueError where --record would write down something else than the table says."""
    if not Path(path).resolve().is_relative_to(tables.CONFIGS):
        raise ValueError(f'--record and --publish are for tables below configs/, not {path}')
    for run in rows:
        plain = [*run.words[:2], *run.words[-2:]]  # without the user's flags
        if changed := differences(vars(arguments.parse(plain)), run.args):
            raise ValueError(f'--record is for the rows as the table has them, not with {", ".join(changed)}: change the table')


def find(name):
    """The YAML files that a word of the command line means."""
    for path in (Path(name), Path(f'{name}.yaml'), ROOT / 'configs' / name, ROOT / 'configs' / f'{name}.yaml'):
        if path.is_file():
            return [path]
        if path.is_dir():
            return sorted(path.rglob('*.yaml'))
    raise ValueError(f'there is no config {name!r}: give a YAML file, its name without .yaml, or a folder of them')


class Run(NamedTuple):
    """A row and a seed: its folder, the words for main.py, and what these mean."""

    row: dict
    seed: int
    out: Path
    words: list
    args: dict


def expand(path, options, flags):
    """The runs of a table that --row and --seed ask for. One that main.py would refuse ends the program, with its sentence."""
    table, rows = arguments.load_table(path), []
    for row in table['rows']:
        for seed in row['seeds'] if options.seed is None else [options.seed]:
            if options.row in (None, row['id']):
                out = options.runs / tables.name_of(path) / f'{row["id"]}-s{seed}'
                words = [f'--config={path}', f'--row={row["id"]}', *flags, f'--seed={seed}', f'--out={out}']
                rows.append(Run(row, seed, out, words, vars(arguments.parse(words))))
    return rows


def state_of(out, wanted):
    """What the run folder holds of a run with the arguments `wanted`."""
    have, result = read_json(out / 'args.json'), read_json(out / 'result.json')
    if have is None:
        return 'not run'
    if differences(have, wanted):
        return 'other arguments'
    if result is None:
        return 'interrupted' if (out / 'checkpoint.pt').exists() else 'not run'
    return 'finished' if result.get('status') == 'finished' else f'failed: {result.get("reason")}'


def list_rows(path, rows):
    print(f'{path}: {len(rows)} runs')
    width = max(len(row['id']) for row, *_ in rows) if rows else 0
    for row, seed, out, _, args in rows:
        minutes = f'{row["minutes"]:g} min' if 'minutes' in row else 'time not known'
        print(f'  {row["id"]:<{width}}  seed {seed}  {minutes:>14}  {state_of(out, args)}')


def run_rows(path, rows, options):
    table = tables.name_of(path)
    states, turns = [state_of(run.out, run.args) for run in rows], turns_of(rows)
    for now in sorted(set(turns)):
        with ThreadPoolExecutor(options.parallel) as pool:
            futures = []
            for number, (run, state, turn) in enumerate(zip(rows, states, turns, strict=True), 1):
                if turn == now:
                    title = f'[{number}/{len(rows)}] {table} {run.row["id"]}, seed {run.seed}'
                    futures.append(pool.submit(run_row, title, state, run.out, run.words, options.parallel))
            try:
                for future in futures:
                    future.result()
            except BaseException:  # Ctrl-C has reached the runs too
                pool.shutdown(cancel_futures=True)
                raise
    states = [state_of(run.out, run.args) for run in rows]
    ended = [run for run, state in zip(rows, states, strict=True) if state.startswith(('finished', 'failed'))]
    results = tables.of_folders([(run.row['id'], run.seed, run.out) for run in ended])  # not those of other arguments
    for run, state in zip(rows, states, strict=True) if options.publish else ():
        if state == 'finished':
            published.publish(run.out)
    if options.record or options.publish:
        tables.keep(table, results)
    print('\n' + tables.render(path, results), flush=True)


def turns_of(rows):
    """For each row how many of those above it have to come first, one after the other.

    A row waits for the one whose weights it starts from, and for those that share its --chain of rounds.
    """
    turns, seen = [], []
    for _, seed, out, _, args in rows:
        source, chain = (str(args.get(name) or '').replace('{seed}', str(seed)) for name in ('from', 'chain'))
        source = Path(source.removesuffix('/model.pt')).name
        before = [turn for turn, (name, rounds) in zip(turns, seen, strict=True) if name == source or rounds == chain != '']
        turns.append(max(before, default=-1) + 1)
        seen.append((out.name, chain))
    return turns


def run_row(title, state, out, words, parallel):
    """One run in a process of its own; side by side with others it has its share of the cores, and prints to a file."""
    print(f'{title}: {state}', flush=True)
    if state == 'finished':
        return
    processes = os.environ.get('NPROC')
    several = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}'] if processes else []
    command = [sys.executable, *several, ROOT / 'main.py', *words]
    if parallel == 1:
        subprocess.run(command, check=False)
        return
    out.mkdir(parents=True, exist_ok=True)
    threads = {'OMP_NUM_THREADS': str(max((os.cpu_count() or 1) // parallel, 1))}
    with open(out / 'output.txt', 'a') as file:
        ended = subprocess.run(command, check=False, stdout=file, stderr=subprocess.STDOUT, env=threads | os.environ)
    print(f'{title}: {"ended" if ended.returncode == 0 else f"failed, see {out}/output.txt"}', flush=True)


if __name__ == '__main__':
    main()
