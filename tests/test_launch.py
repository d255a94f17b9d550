"""The launcher, the tables, and the README's promises about them."""

import ast
import functools
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, same_state, start_main

import args as arguments
from harness import launch, pairs, plot
from harness import table as tables

TINY_TABLE = """
title: A tiny table
defaults: {dataset: digits, model: resnet20, width: 4, limit-train: 64, batch-size: 32, epochs: 1, no-cuda: true, wd: 5e-4}
seeds: [0, 1]
rows:
  - {id: dense, method: dense, paper: 99.5, minutes: 0.1}
  - {id: sparse, method: feather, ptarget: 0.9, paper: {accuracy: 98.0, mflops: 3}}
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / 'tiny.yaml'
    path.write_text(TINY_TABLE)
    return path


def forked(command, check, stdout=None, stderr=None, env=None):
    """subprocess.run for the launcher: main.py starts in a tenth of a second, as torch is imported there already."""
    python, script, *words = command
    assert (python, script) == (sys.executable, ROOT / 'main.py') and not check
    with tempfile.NamedTemporaryFile('r') as file:
        process = start_main(words, output=stdout.name if stdout else file.name, environment=env)
        process.join()
        print(file.read())
    return subprocess.CompletedProcess(command, process.exitcode)


def run_launcher(monkeypatch, *words, start=forked):
    """launch.main() in this process; the runs it starts are processes of their own -> exit status."""
    monkeypatch.setattr(sys, 'argv', ['launch', *map(str, words)])
    monkeypatch.setattr(launch, 'subprocess', SimpleNamespace(run=start, STDOUT=subprocess.STDOUT))
    try:
        launch.main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return 0


def test_a_table_from_start_to_end(config, tmp_path, monkeypatch, capfd):
    runs = tmp_path / 'runs'
    assert run_launcher(monkeypatch, config, '--list', f'--runs={runs}') == 0
    listed = capfd.readouterr().out
    assert listed.count('not run') == 4 and '0.1 min' in listed and 'time not known' in listed and not runs.exists()

    only = ['--row=dense', '--seed=0', f'--runs={runs}']
    assert run_launcher(monkeypatch, config, *only, start=subprocess.run) == 0  # as users start it
    assert 'train 1/1' in capfd.readouterr().out
    assert run_launcher(monkeypatch, config, f'--runs={runs}') == 0
    printed = capfd.readouterr().out
    assert re.search(r'tiny dense, seed 0: finished\n.*tiny dense, seed 1: not run', printed)
    results = {path.parent.name: json.loads(path.read_text()) for path in runs.rglob('result.json')}
    assert sorted(results) == ['dense-s0', 'dense-s1', 'sparse-s0', 'sparse-s1']
    assert results['sparse-s1']['args']['seed'] == 1 and results['sparse-s1']['args']['ptarget'] == 0.9
    one, two = results['sparse-s0']['accuracy'], results['sparse-s1']['accuracy']
    row = next(line for line in printed.splitlines() if line.startswith('| sparse'))
    mean, spread = (one + two) / 2, abs(one - two) / 2**0.5
    assert (
        f'| {mean:.2f} ± {spread:.2f}' in row
        and 'accuracy 98.0, mflops 3' in row
        and f'{results["sparse-s0"]["zeros"]:,}' in row
    )

    before = {path: path.stat().st_mtime_ns for path in runs.rglob('model.pt')}
    assert run_launcher(monkeypatch, config, f'--runs={runs}') == 0  # everything is there: nothing is trained again
    assert before == {path: path.stat().st_mtime_ns for path in runs.rglob('model.pt')}
    assert run_launcher(monkeypatch, config, '--list', f'--runs={runs}', '--epochs=2') == 0
    assert capfd.readouterr().out.count('other arguments') == 4


def test_a_failing_row_does_not_stop_the_others(config, tmp_path, monkeypatch, capfd):
    bad = '{id: diverges, method: dense, lr: 1e30, clip: 0}'
    config.write_text(TINY_TABLE.replace('[0, 1]', '[0]').replace('rows:\n', f'rows:\n  - {bad}\n'))
    assert run_launcher(monkeypatch, config, f'--runs={tmp_path}/runs') == 1
    out, err = capfd.readouterr()
    assert 'diverges-s0' in err and '1 of 3 failed' in err
    assert re.search(r'\| diverges +\| .*\| failed', out)
    assert len(list((tmp_path / 'runs').rglob('model.pt'))) == 2


@pytest.mark.parametrize(
    'text, message',
    [
        (None, 'there is no config'),
        ('rows: [', 'no valid YAML'),
        ('rows: []', 'needs `rows`'),
        ('[1, 2]', 'needs `rows`'),
        ('{rows: [{method: dense}]}', 'needs an `id`'),
        ('{rows: [{id: ../x}]}', 'can be a file name'),
        ('{rows: [{id: a}, {id: a}]}', 'two rows have the id'),
        ('{row: [{id: a}], rows: [{id: a}]}', "unknown key 'row'"),
        ('{seeds: [x], rows: [{id: a}]}', 'whole numbers'),
        ('{rows: [{id: a, seeds: [-1]}]}', 'whole numbers'),
        ('{rows: [{id: a, bach-size: 3}]}', "unknown key 'bach-size' (did you mean batch-size?)"),
        ('{rows: [{id: a, epochs: 0}]}', '--epochs: must be 1 or more'),
        ('{rows: [{id: a, method: fether}]}', 'did you mean feather'),
        ('{rows: [{id: a, out: x}]}', "unknown key 'out'"),
    ],
)
def test_a_faulty_config_gets_one_sentence_and_runs_nothing(text, message, tmp_path, monkeypatch, capfd):
    path = tmp_path / 'bad.yaml'
    if text is not None:
        path.write_text(text)
    assert run_launcher(monkeypatch, path, f'--runs={tmp_path}/runs') == 2
    err = capfd.readouterr().err
    assert message in err and len(err.strip().splitlines()) == 1 and not (tmp_path / 'runs').exists()


def test_runs_side_by_side_are_the_runs_one_after_another(config, tmp_path, monkeypatch, capfd):
    for folder, words in (('one', []), ('two', ['--parallel=2'])):
        assert run_launcher(monkeypatch, config, '--row=sparse', f'--runs={tmp_path}/{folder}', *words) == 0
    out = capfd.readouterr().out
    assert out.count(': ended') == 2 and 'zeros' in (tmp_path / 'two/tiny/sparse-s0/output.txt').read_text()
    for seed in (0, 1):
        one, two = ((tmp_path / folder / f'tiny/sparse-s{seed}/model.pt') for folder in ('one', 'two'))
        assert same_state(torch.load(one, weights_only=True), torch.load(two, weights_only=True))


def test_side_by_side_a_row_waits_for_the_one_it_starts_from():
    def turns(*rows):
        runs = [(f'{name}-s{seed}', seed, [f'--{flag}' for flag in flags]) for name, *flags in rows for seed in (0, 1)]
        return launch.turns_of(
            [launch.Run({}, seed, Path('runs/t', out), [], vars(arguments.parse(words))) for out, seed, words in runs]
        )

    chained = ('method=lrr', 'chain=runs/t/c-{seed}')
    rows = [('a',), ('b', 'from=runs/t/a-s{seed}'), ('c', 'from=runs/t/b-s{seed}/model.pt'), ('d',), ('e', 'from=elsewhere')]
    assert turns(*rows, ('f', 'from=runs/t/f-s{seed}')) == [0, 0, 1, 1, 2, 2, 0, 0, 0, 0, 0, 0]  # main.py will refuse f
    assert turns(('a', *chained), ('b',), ('c', *chained), ('d', *chained)) == [0, 0, 0, 0, 1, 1, 2, 2]  # seed by seed


def test_what_is_recorded_is_what_the_table_says(config, tmp_path, monkeypatch, capfd):
    assert run_launcher(monkeypatch, config, '--record', f'--runs={tmp_path}/runs') == 2
    assert 'below configs/' in capfd.readouterr().err
    assert run_launcher(monkeypatch, 'quickstart', '--record', '--lr=3', f'--runs={tmp_path}/runs') == 2
    assert '--lr 0.1 -> 3.0' in capfd.readouterr().err and not (tmp_path / 'runs').exists()
    folder = tmp_path / 'runs/tiny/dense-s0'
    folder.mkdir(parents=True)
    args = vars(arguments.parse([f'--config={config}', '--row=dense', f'--out={folder}']))
    (folder / 'args.json').write_text(json.dumps(args | {'lr': 3.0}))
    (folder / 'result.json').write_text(json.dumps({'status': 'finished', 'accuracy': 12.34, 'args': args}))
    assert run_launcher(monkeypatch, config, '--row=dense', '--seed=0', f'--runs={tmp_path}/runs') == 1
    out, err = capfd.readouterr()
    assert 'other arguments' in out and '12.34' not in out and '1 of 1 failed' in err


def test_ctrl_c_ends_the_launcher_and_starts_no_further_row(config, tmp_path, monkeypatch, capfd):
    started = []

    def run_row(title, *rest):
        started.append(title)
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, 'run_row', run_row)
    assert run_launcher(monkeypatch, config, f'--runs={tmp_path}/runs') == 130
    assert len(started) < 4 and 'interrupted' in capfd.readouterr().err


def test_a_row_may_have_seeds_of_its_own(config, monkeypatch, capfd):
    config.write_text(TINY_TABLE.replace('id: dense,', 'id: dense, seeds: [3, 4, 5],'))
    assert run_launcher(monkeypatch, config, '--list') == 0
    listed = [line.split()[:3] for line in capfd.readouterr().out.splitlines()[1:]]
    assert [(row, int(seed)) for row, _, seed in listed] == [
        ('dense', 3),
        ('dense', 4),
        ('dense', 5),
        ('sparse', 0),
        ('sparse', 1),
    ]


def test_nothing_matched(config, monkeypatch, capfd):
    assert run_launcher(monkeypatch, config, '--row=nosuch') == 1
    assert 'nothing matched' in capfd.readouterr().err


def test_the_users_flag_wins_over_the_table(config):
    args = arguments.parse([f'--config={config}', '--row=sparse', '--ptarget=0.5'])
    assert (args.ptarget, args.epochs, args.wd, args.no_cuda, args.seed) == (0.5, 1, 5e-4, True, 0)
    assert arguments.parse([f'--config={config}', '--row=dense']).method == 'dense'


def test_a_config_without_row_names_its_rows(config, capfd):
    with pytest.raises(SystemExit):
        arguments.parse([f'--config={config}'])
    assert 'choose one with --row: dense, sparse' in capfd.readouterr().err


def test_names_with_and_without_yaml_and_folders():
    assert launch.find('configs/quickstart') == launch.find('configs/quickstart.yaml') == [Path('configs/quickstart.yaml')]
    assert launch.find('quickstart')[0].name == 'quickstart.yaml'
    assert [path.name for path in launch.find('configs/feather')] == ['cifar100.yaml', 'imagenet.yaml']
    assert tables.name_of('configs/feather/cifar100.yaml') == 'feather/cifar100'


@pytest.mark.parametrize('path', sorted((ROOT / 'configs').rglob('*.yaml')), ids=lambda path: path.stem)
def test_every_row_of_every_config_parses_and_begins_dense(path, monkeypatch):
    monkeypatch.setattr(
        arguments, 'load_table', functools.cache(arguments.load_table)
    )  # a table is read once, not for each row
    table = arguments.load_table(path)
    for row in table['rows']:
        arguments.parse([f'--config={path}', f'--row={row["id"]}'])
    first = table['defaults'] | table['rows'][0]
    assert first['method'] == 'dense' or first['method'] == 'lottery_ticket' and first['last-round'] == 0  # its dense round


def test_a_readme_may_repeat_some_rows_of_a_page(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, 'RESULTS', tmp_path)
    block = '```\nCPU\n\nstep\n  dense 1\n  feather 2\n  asl 3\n\nlayers\n  16->16 4\n```'
    (tmp_path / 'step.md').write_text(f'# Speed\n\nMade.\n\n{block}\n')
    (tmp_path / 'table.md').write_text('# T\n\n| row | a |\n| --- | - |\n| dense | 1 |\n| asl | 2 |\n\n- a CPU\n')
    (tmp_path / 'README.md').write_text(
        'x\n<!-- results/step.md only dense|feather -->\nold\n<!-- end -->\n<!-- results/table.md only asl -->\n<!-- end -->\n'
    )
    assert tables.readme(tmp_path / 'README.md') == (
        'x\n<!-- results/step.md only dense|feather -->\nMade.\n\n```\nCPU\n\nstep\n  dense 1\n  feather 2\n\n```\n'
        '<!-- end -->\n<!-- results/table.md only asl -->\n| row | a |\n| --- | - |\n| asl | 2 |\n\n- a CPU\n<!-- end -->\n'
    )


def test_recorded_tables_are_what_the_runs_say(tmp_path, monkeypatch):
    """The committed pages; then a page made from one recorded run, and that a touched digit is noticed."""
    monkeypatch.setattr(sys, 'argv', ['table.py', '--check'])
    tables.main()  # says nothing
    monkeypatch.setattr(tables, 'RESULTS', tmp_path)
    monkeypatch.setattr(tables, 'RUNS', tmp_path / 'runs.jsonl')
    monkeypatch.setattr(tables, 'table_names', lambda: ['quickstart'])
    monkeypatch.setattr(tables, 'READMES', [tmp_path / 'README.md'])
    (tmp_path / 'README.md').write_text('before\n<!-- results/quickstart.md -->\nold\n<!-- end -->\nafter\n')
    keys = {'weights': 200, 'macs_nonzero': 1e6, 'macs_dense': 2e6, 'seconds': 60, 'device': 'x', 'torch': 'y', 'commit': 'z'}
    result = {
        'status': 'finished',
        'accuracy': 98.25,
        'zeros': 150,
        'layers': {},
        'args': {'lr': 0.1, 'out': '/home/me'},
    } | keys
    tables.record('quickstart', {('feather-90', 0): result, ('feather-99', 0): {'status': 'failed', 'reason': 'no'}})
    assert '/home/me' not in (tmp_path / 'runs.jsonl').read_text()
    page = (tmp_path / 'quickstart.md').read_text()
    assert re.search(r'\| feather-90 +\| 98\.25 +\| 0 +\| 150 +\| 200 +\| 75\.000', page) and 'not run' in page
    tables.main()  # says nothing
    readme = (tmp_path / 'README.md').read_text()
    assert readme.startswith('before\n') and readme.endswith('after\n') and '| 98.25' in readme and 'old' not in readme
    (tmp_path / 'README.md').write_text(readme.replace('98.25', '99.25'))
    with pytest.raises(SystemExit) as stop:
        tables.main()
    assert 'README.md' in stop.value.code
    (tmp_path / 'README.md').write_text(readme)
    (tmp_path / 'quickstart.md').write_text(page.replace('98.25', '99.25'))
    with pytest.raises(SystemExit) as stop:
        tables.main()
    assert 'quickstart' in stop.value.code


def test_launch_sh_takes_the_active_python_and_reports_failure(tmp_path):
    environment = {**os.environ, 'PYTHON': sys.executable}
    done = subprocess.run([ROOT / 'launch', 'nosuch'], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and 'there is no config' in done.stderr and 'installing' not in done.stdout


def listed(path):
    """The names of a requirements file, and those that its comments name as optional (`when wanted: a, b`)."""
    text = path.read_text()
    optional = re.findall(r'when wanted: (.*)', text)
    return re.findall(r'^([\w-]+)', text, re.MULTILINE), [name for line in optional for name in re.findall(r'[\w-]+', line)]


def imported():
    """Top-level names that the code imports or asks for with importorskip, inside functions too: {name: a file that does}."""
    found = {}
    folders = [ROOT / name for name in ('archs', 'deploy', 'harness', 'methods', 'pruners', 'tests')]
    for path in [*ROOT.glob('*.py'), *[path for folder in folders for path in sorted(folder.rglob('*.py'))]]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == 'pytest.importorskip':
                names = [node.args[0].value] if isinstance(node.args[0], ast.Constant) else []
            found |= {name.split('.')[0]: str(path.relative_to(ROOT)) for name in names}
    return found


FAKE_PYTHON = """#!/bin/sh
here=$(dirname "$0")
case "$1 $2 $3" in
  "- "*) cat > /dev/null; test -e "$here/packages" ;;
  "-m venv "*) echo venv >> "$LOG"; mkdir -p "$3/bin"; sleep 0.3; cp "$0" "$3/bin/python" ;;
  "-m pip "*) sleep 0.3; echo pip >> "$LOG"; touch "$here/packages" ;;
  *) echo "$@" >> "$LOG" ;;
esac
"""


@pytest.mark.skipif(shutil.which('flock') is None, reason='without flock nothing can wait')
def test_two_launchers_at_once_install_once(tmp_path):
    for name in ('launch', 'requirements.txt'):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / 'tools' / 'python'
    python.parent.mkdir()
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    log = tmp_path / 'log'
    environment = os.environ | {'PYTHON': str(python), 'LOG': str(log)}
    command = [str(tmp_path / 'launch'), 'python', 'hello']
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    lines = log.read_text().splitlines()
    assert lines.count('venv') == lines.count('pip') == 1 and lines.count('hello') == 2


def test_requirements_are_what_the_code_imports():
    """Every import from elsewhere is listed, and every line is imported, or used where it says."""
    modules = {'scikit-learn': 'sklearn', 'pyyaml': 'yaml', 'pytest-xdist': 'xdist', 'torch-pruning': 'torch_pruning'}
    without_import = {'tensorboard': 'main.py', 'pytest-xdist': 'launch.sh', 'ruff': 'tests/test_style.py'}
    required, optional = listed(ROOT / 'requirements.txt')
    for path in ROOT.glob('requirements-*.txt'):  # of single tests
        optional += listed(path)[0]
    own = {path.name.removesuffix('.py') for folder in (ROOT, ROOT / 'tests') for path in folder.iterdir()}
    elsewhere = {name: file for name, file in imported().items() if name not in {*sys.stdlib_module_names, *own}}
    assert elsewhere.pop('PIL').startswith('tests')  # torchvision requires Pillow
    names = {modules.get(name, name) for name in [*required, *optional]}
    assert elsewhere.keys() <= names, {name: file for name, file in elsewhere.items() if name not in names}
    for name in required:
        if name in without_import:
            assert {'pytest-xdist': '-n auto'}.get(name, name) in (ROOT / without_import[name]).read_text()
        else:
            assert modules.get(name, name) in elsewhere, f'{name} is required, and imported nowhere'
        if name not in ('torchvision', 'torch-pruning', 'ruff'):  # may not match a CPU build of torch (two); a program
            importlib.import_module(modules.get(name, name))


def test_logs_of_recorded_runs_are_kept_and_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, 'RESULTS', tmp_path)
    rows = [{'id': 'dense', 'seeds': [0]}, {'id': 'ticket', 'seeds': [0, 1]}, {'id': 'not-run', 'seeds': [0]}]
    logs = {
        ('dense', 0): [('train', 10.0), ('train', 20.0), ('train', 30.0)],
        ('ticket', 1): [('round0', 1.0), ('round0', 2.0), ('round1', 40.0), ('round1', 50.0)],
    }
    runs = []
    for (row, seed), lines in logs.items():
        folder = tmp_path / f'{row}-{seed}'
        folder.mkdir()
        text = ''.join(json.dumps({'stage': stage, 'accuracy': accuracy}) + '\n' for stage, accuracy in lines)
        (folder / 'log.jsonl').write_text(text)
        runs.append((row, seed, folder))
    tables.record_logs('mine/table', runs)
    assert (tmp_path / 'logs/mine/table/ticket-s1.jsonl').read_text() == text
    figure = plot.draw_learning({'title': 'mine', 'rows': rows}, 'mine/table')
    drawn = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
    assert drawn == {'dense': [[1, 10], [2, 20], [3, 30]], 'ticket': [[1, 40], [2, 50]]}  # of the ticket its last round
    assert plot.draw_learning({'title': 'mine', 'rows': rows[1:]}, 'mine/table') is None
    assert plot.common_ending(['a-98', 'b-98', 'c-90', 'dense']) == '-98'


def test_a_flag_goes_to_the_rows_that_have_it(tmp_path, monkeypatch, capsys):
    path = tmp_path / 'two.yaml'
    path.write_text(
        'defaults: {dataset: digits, width: 4, epochs: 1}\nrows:\n  - {id: dense, method: dense}\n  - {id: st3, method: st3}\n'
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['launch', str(path), '--list', '--power', '2', '--lr=0.2'])
    launch.main()
    said = capsys.readouterr().out
    assert 'launch: --power is no flag of the method of dense, which go without it' in said and '--lr' not in said
    options = launch.own_parser().parse_args([])
    dense, st3 = (run.args for run in launch.runs_of(path, options, ['--power', '2', '--lr=0.2', '--wd', '-0']))
    assert (dense['lr'], st3['lr'], st3['power']) == (0.2, 0.2, 2.0) and 'power' not in dense
    monkeypatch.setattr(sys, 'argv', ['launch', str(path), '--list', '--poweer=2'])
    with pytest.raises(SystemExit) as stop:
        launch.main()
    assert stop.value.code == 2 and 'no row has a flag --poweer' in capsys.readouterr().err


def test_the_list_shows_the_published_figures(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['launch', 'configs/dsp/cifar10', '--list', '--row', 'resnet20-g4', '--seed', '0'])
    launch.main()
    assert 'published: accuracy 92.22, flops_pruned 63.57, params_pruned 50.45' in capsys.readouterr().out


def test_columns_of_a_table(tmp_path):
    """Shares pruned beside the paper's, medians where asked, failures, and what no run has."""
    path = tmp_path / 't.yaml'
    path.write_text(
        'summary: median\nrows:\n  - {id: dense}\n  - {id: dsp, paper: {accuracy: 92.5, flops-pruned: 60.0}}\n'
        '  - {id: l1, paper: {flops_pruned: 50.0}}\n  - {id: none, paper: 91}\n'
    )
    run = {
        'status': 'finished',
        'zeros': 1,
        'weights': 4,
        'macs_nonzero': 1e6,
        'macs_dense': 2e6,
        'seconds': 60,
        'gives': 'zeros',
    }
    run |= {'device': 'x', 'torch': 'y', 'commit': 'z'}
    results = {
        ('dsp', seed): run | {'accuracy': accuracy, 'flops_pruned': 0.6125} for seed, accuracy in enumerate([90, 93, 91])
    }
    results[('l1', 0)] = run | {'accuracy': 80.0, 'small_macs': 1e6, 'dense_macs': 4e6, 'small_parameters': 3}
    results[('l1', 1)] = {'status': 'failed', 'reason': 'no'}
    lines = [[cell.strip() for cell in line.split('|')[1:-1]] for line in tables.render(path, results).splitlines()[:6]]
    head, dense, dsp, l1, none = lines[0], *lines[2:]
    row = dict(zip(head, dsp, strict=True))
    assert row['accuracy %'] == '91.00 (90.00 to 93.00)' and row['seeds'] == '0 1 2' and row['paper'] == '92.5'
    assert row['FLOPs pruned % (paper)'] == '61.25 (60.0)' and row['MMACs shrunk'] == '' and row['sparsity %'] == '25.000'
    row = dict(zip(head, l1, strict=True))
    assert (
        row['accuracy %'] == '80.00 (1 failed)'
        and row['FLOPs pruned % (paper)'] == '75.00 (50.0)'
        and row['MMACs shrunk'] == '1.000'
    )
    assert none[:3] == ['none', '91', 'not run'] and dense[2] == 'not run' and 'ms shrunk (dense), 1 image' not in head


def test_launch_works_from_another_folder(tmp_path):
    """Relative paths are those of the folder it is called from, and files of the user there are not taken for ours."""
    (tmp_path / 'args.py').write_text('X = 1\n')
    (tmp_path / 'own.yaml').write_text('rows:\n  - {id: a, method: dense, dataset: digits, width: 4}\n')
    environment = {**os.environ, 'PYTHON': sys.executable}
    words = [ROOT / 'launch', 'own', 'configs/quickstart', '--list']
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and 'own.yaml: 1 runs' in done.stdout and 'quickstart.yaml: 3 runs' in done.stdout, done.stderr


def test_paired_differences_by_hand():
    # differences 1, 2, 3: mean 2, s = 1, t(0.975, 2) = 4.302653, half = 4.302653 / sqrt(3) = 2.484138
    assert pairs.paired_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2.484138), abs=1e-6)
    runs = {('dense', seed): 90.0 for seed in (0, 1, 2)} | {('a', seed): 91.0 + seed for seed in (0, 1, 2)} | {('b', 1): 95.0}
    results = {key: {'status': 'finished', 'accuracy': value} for key, value in runs.items()}
    results['a', 5] = {'status': 'failed'}
    assert pairs.difference(results, 'a', 'dense') == (2.0, pytest.approx(2.484138, abs=1e-6), [0, 1, 2])
    assert pairs.difference(results, 'b', 'dense') is None
    column = tables.minus_dense(results)['minus dense (95 %)']
    assert [column({'id': name}, {}) for name in ('dense', 'a', 'b')] == ['', '+2.00 ± 2.48', '']
    assert not tables.minus_dense({key: result for key, result in results.items() if key[0] != 'a'})
