"""--sparse-compile RUN, and what tables show of it."""

import json

import pytest
from helpers import run_main

import bench
import main as program
from harness import engine_bench, launch, sparse_run
from harness import table as tables

MILLISECONDS = {'PyTorch': 4.0, 'ONNX Runtime': 2.0, engine_bench.OURS: 0.5}


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A run with zeros: (its folder, result.json)."""
    folder = tmp_path_factory.mktemp('sparse') / 'run'
    return folder, run_main(folder, '--method=feather', '--ptarget=0.9')[0]


@pytest.fixture(autouse=True)
def measured(monkeypatch):
    """The workers that sparse_run asks for; none is started."""
    asked = []

    def measure(name, batch, threads, chosen=None, failed=None):
        asked.append((name, batch, threads))
        if failed is not None and 'OpenVINO' not in failed:
            failed.append('OpenVINO')
        return {engine: batch * ms for engine, ms in MILLISECONDS.items()}

    monkeypatch.setattr(engine_bench, 'measure', measure)
    return asked


def test_a_run_is_timed(run, measured, capsys):
    folder, result = run
    program.main([f'--sparse-compile={folder}', '--threads=1'])
    said = capsys.readouterr().out
    found = json.loads((folder / 'sparse.json').read_text())
    assert measured == [(str(folder), 1, 1), (str(folder), 32, 1)]
    assert found['accuracy_dense'] == result['accuracy'] and abs(found['accuracy'] - result['accuracy']) < 1
    assert (found['zeros'], found['weights']) == (result['zeros'], result['weights'])
    assert (found['sparse_ms_1'], found['pytorch_ms_1'], found['sparse_ms_32'], found['pytorch_ms_32']) == (0.5, 4, 16, 128)
    assert sum(layer['zeros'] for layer in found['layers']) == result['zeros']
    assert 'one image  0.500 ms, 4.00x as fast as ONNX Runtime' in said and 'OpenVINO' in said.splitlines()[-2]


def test_tables_show_the_milliseconds(run):
    folder, _ = run
    program.main([f'--sparse-compile={folder}', '--threads=1'])
    results = tables.results_in([('feather', 0, folder)])
    assert results['feather', 0]['sparse_ms_32'] == 16 and 'engines' not in results['feather', 0]
    columns = tables.columns_of({'rows': [{'id': 'feather'}], 'times': True, 'summary': 'mean'}, results, {})
    assert columns['ms sparse engine (PyTorch), 1 image']({'id': 'feather'}, {0: results['feather', 0]}) == '0.50 (4.00)'


def test_the_launcher_times_what_has_single_zeros(run, tmp_path, monkeypatch):
    folder, result = run
    for name, changes in {'zeros': {}, 'dense': {'zeros': 0}, 'filters': {'small_macs': 1}, 'packed': {'saved': 'x'}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / 'result.json').write_text(json.dumps(result | changes))
    runs = [launch.Run({}, 0, tmp_path / name, [], {'data_dir': 'd'}) for name in ('zeros', 'dense', 'filters', 'packed')]
    started = []
    monkeypatch.setattr(launch.subprocess, 'run', lambda command, check: started.append(command[2:]))
    launch.time_zeros(runs)
    assert started == [['--sparse-compile', tmp_path / 'zeros', '--data-dir=d', '--no-download']]


def test_recorded_rows_are_timed_from_published_files(run, measured, tmp_path, monkeypatch):
    _, result = run
    lines = [{'table': 'digits', 'row': row, 'seed': 0} | result for row in ('published', 'not published')]
    (tmp_path / 'runs.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    (tmp_path / 'digits').mkdir()
    (tmp_path / 'digits' / 'published-s0.pt').touch()
    written = {}
    monkeypatch.setattr(tables, 'RUNS', tmp_path / 'runs.jsonl')
    monkeypatch.setattr(tables, 'write', written.update)
    monkeypatch.setattr(sparse_run.published, 'WEIGHTS', tmp_path)
    assert sparse_run.measure_recorded(['digits'], 2) == 1 and list(written) == ['digits.md']
    assert measured == [(str(tmp_path / 'digits' / 'published-s0.pt'), batch, 2) for batch in (1, 32)]
    recorded = tables.recorded()['digits']
    assert recorded['published', 0]['sparse_ms_1'] == 0.5 and 'sparse_ms_1' not in recorded['not published', 0]


def test_the_page_keeps_other_numbers_of_threads(tmp_path):
    page = tmp_path / 'sparse.md'
    for lines in (['CPU, 2 threads', 'old'], ['CPU, 1 threads', 'one'], ['CPU, 2 threads', 'new']):
        bench.record(page, 'sparse', lines)
    assert page.read_text().endswith('\n\n```\nCPU, 1 threads\none\n```\n\n```\nCPU, 2 threads\nnew\n```\n')
    bench.record(page, 'step', ['CPU, 1 threads', 'x'])
    assert page.read_text() == '# Speed: step\n\nMade by `python bench.py step --record`.\n\n```\nCPU, 1 threads\nx\n```\n'


def test_requests_that_cannot_be_met(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        program.main([f'--sparse-compile={tmp_path}'])
    assert f'{tmp_path} is not the folder of a finished run' in str(ended.value.code)
    with pytest.raises(SystemExit):
        program.main([f'--sparse-compile={tmp_path}', '--lr=1'])
    assert 'unrecognized arguments: --lr=1' in capsys.readouterr().err
