"""python main.py --sparse-compile RUN: how fast the zeros of a finished run are, and what the network is worth then.

    python -m harness.sparse_run TABLE...     the same milliseconds for recorded rows, from their published weights

Every engine is timed in a process of its own (harness/engine_bench.py); what is not installed, or fails, is named.
"""

import argparse
import json
from pathlib import Path

import torch

from deploy import sparse_compile
from deploy.files import read_json, write_atomically, write_json
from deploy.latency import threads_of_the_cpu
from pruners.processes import say
from sparse_utils import count_zeros

from . import engine_bench, published
from . import table as tables
from .rebuild import rebuild_run
from .result import accuracy, totals

BATCHES = (1, 32)
PYTORCH = 'PyTorch'  # eager: what filter methods are timed in
ENGINES = {engine_bench.OURS: 'sparse', PYTORCH: 'pytorch'}  # of tables


def compile_run(args, device):
    """`--sparse-compile RUN`: build the sparse engine's network, count its accuracy, time it beside dense engines.

    Writes sparse.json into the run's folder and returns what is in it. Raises ValueError for a folder that holds no finished
    run of a network that main.py builds, and deploy.CompilerError without a C++ compiler.
    """
    folder = Path(args.sparse_compile).resolve()
    model, example = rebuild_run(folder)
    compiled = sparse_compile(model, example, args.threads)
    run = read_json(folder / 'args.json')
    images = published.test_images(args, {'args': run | {'channels_last': False, 'val_size': 0, 'limit_train': None}}, device)
    with threads_of_the_cpu(args.threads):
        result = {'run': folder.name, 'accuracy': accuracy(compiled, images), 'accuracy_dense': accuracy(model, images)}
    zeros, weights = totals(count_zeros(model, run['pthres']))
    result |= {'zeros': zeros, 'weights': weights, 'sparse_on': measured_on(args.threads)}
    failed = []
    engines = {batch: engine_bench.measure(str(folder), batch, args.threads, failed=failed) for batch in BATCHES}
    result |= in_tables(engines)
    result |= {'engines': engines, 'not_measured': sorted({*engine_bench.missing(), *failed}), 'layers': compiled.report()}
    write_json(result, folder / 'sparse.json')
    report(result, run['dataset'], images.num_images)
    say(f'layer by layer in {folder}/sparse.json')
    return result


def report(result, dataset, count):
    """Print what --sparse-compile found."""
    share = f'{result["accuracy"]:.2f} % with the engine, {result["accuracy_dense"]:.2f} % in PyTorch'
    say(f'accuracy   {share}, on the {count:,} test images of {dataset}')
    say(f'zeros      {result["zeros"]:,} of {result["weights"]:,} prunable weights')
    for batch, times in result['engines'].items():
        ours = times[engine_bench.OURS]
        dense = {engine: ms for engine, ms in times.items() if engine != engine_bench.OURS}
        fastest = min(dense, key=dense.get)
        images = 'one image' if batch == 1 else f'{batch} images'
        say(f'{images:<10} {ours:.3f} ms, {dense[fastest] / ours:.2f}x as fast as {fastest}')
        say('           ' + ', '.join(f'{engine} {ms:.3f} ms' for engine, ms in dense.items()))
    pytorch = sum(record['kernel'].startswith('PyTorch') for record in result['layers'])
    say(f'{len(result["layers"]) - pytorch} steps run in the engine, {pytorch} in PyTorch; measured on {result["sparse_on"]}')
    if result['not_measured']:
        say(f'not measured, as not installed or not able to run this network: {", ".join(result["not_measured"])}')


def measured_on(threads):
    return f'{threads} threads of the CPU, torch {torch.__version__}'


def in_tables(engines):
    """{batch: {engine: ms}} -> what a line of results/runs.jsonl holds."""
    return {f'{ENGINES[name]}_ms_{batch}': round(engines[batch][name], 4) for batch in engines for name in ENGINES}


def measure_recorded(names, threads):
    """Add the milliseconds of recorded rows that have zeros and published weights to runs.jsonl; returns how many."""
    recorded = tables.recorded()
    measured = 0
    for name in names:
        for (row, seed), entry in recorded.get(name, {}).items():
            path = published.WEIGHTS / name / f'{row}-s{seed}.pt'
            if entry['status'] != 'finished' or not tables.has_single_zeros(entry) or not path.exists():
                continue
            engines = {batch: engine_bench.measure(str(path), batch, threads, list(ENGINES)) for batch in BATCHES}
            entry |= in_tables(engines) | {'sparse_on': measured_on(threads)}
            say(f'{name} {row}, seed {seed}: {in_tables(engines)}')
            measured += 1
    lines = [json.dumps(entry) + '\n' for results in recorded.values() for entry in results.values()]
    write_atomically(tables.RUNS, lambda file: file.write(''.join(lines).encode()))
    tables.write({f'{name}.md': tables.page(name, recorded.get(name, {})) for name in names})
    return measured


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('tables', nargs='+', metavar='TABLE', help='such as cifar10_10ep')
    parser.add_argument('--threads', type=int, default=2, help='of the CPU (default: %(default)s)')
    options = parser.parse_args()
    if unknown := set(options.tables) - set(tables.table_names()):
        parser.error(f'there is no table {sorted(unknown)[0]!r}')
    say(f'{measure_recorded(options.tables, options.threads)} rows measured')


if __name__ == '__main__':
    main()
