"""Published weight files: small, exact, harmless, and found out when they are not what they say."""

import json
import pickle
import zlib

import pytest
import torch
from helpers import TINY, run_main, same_state

import main as program
from deploy import files
from deploy.files import FileError
from harness import published


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A finished run: folder, result, state."""
    out = tmp_path_factory.mktemp('run') / 'r'
    return out, *run_main(out, '--method=feather', '--ptarget=0.98', '--width=8')


@pytest.fixture
def file(run, tmp_path):
    return published.publish(run[0], tmp_path / 'table' / 'row-s0.pt')


def change(path, **parts):
    """Rewrite entries of a published file; `about` is a dict of changed keys."""
    content = torch.load(path, weights_only=True)
    if 'about' in parts:
        parts['about'] = json.dumps(json.loads(content['about']) | parts['about'])
    torch.save(content | parts, path)


def test_gaps_by_hand():
    # zeros before each value: 0, 254, 0, 255, 0, 600 = 2 * 255 + 90
    positions = torch.tensor([0, 255, 256, 512, 513, 1114])
    code = [0, 254, 0, 255, 0, 0, 255, 255, 90]
    assert files.encode(positions).tolist() == code
    assert files.decode(torch.tensor(code, dtype=torch.uint8)).tolist() == positions.tolist()
    assert files.encode(torch.empty(0, dtype=torch.int64)).tolist() == []


def test_the_state_comes_back_to_the_bit():
    state = {
        'sparse': torch.zeros(7, 300).index_put_((torch.tensor([0, 6]), torch.tensor([3, 299])), torch.tensor([1e-30, -2.5])),
        'empty': torch.zeros(40, 50),
        'dense': torch.randn(3, 4),
        'count': torch.tensor(17),
        'bool-like': torch.zeros(3),
    }
    back, about = files.unpack_sparse(files.pack_sparse(state, {'row': 'x'}))
    assert same_state(back, state) and about == {'row': 'x'}


def test_a_type_that_cannot_be_kept_exactly_is_refused():
    with pytest.raises(ValueError, match='a is torch.float64'):
        files.pack_sparse({'a': torch.zeros(3, dtype=torch.float64)}, {})


def test_a_run_is_published_and_checked(run, file, capsys):
    folder, result, state = run
    back, about = files.read_published(file)
    assert same_state(back, state) and about['zeros'] == result['zeros'] and 'out' not in about['args']
    assert file.stat().st_size < (folder / 'model.pt').stat().st_size / 3
    program.main([f'--evaluate={file}', '--no-cuda'])
    out = capsys.readouterr().out
    assert f'zeros      file {result["zeros"]}, counted {result["zeros"]}' in out
    assert f'accuracy   file {result["accuracy"]}, counted {result["accuracy"]}' in out and 'DIFFERENT' not in out


def test_a_false_claim_is_found(file, capsys):
    change(file, about={'accuracy': 99.9})
    with pytest.raises(SystemExit) as stop:
        program.main([f'--evaluate={file}', '--no-cuda'])
    assert stop.value.code == 1 and 'DIFFERENT' in capsys.readouterr().out


@pytest.mark.parametrize('fault', ['a value set to zero', 'accuracy', 'no line in runs.jsonl', 'truncated'])
def test_verify_finds_a_wrong_file(fault, file, monkeypatch, capsys, tmp_path):
    change(file, about={'table': 'table', 'row': 'row', 'seed': 0})
    about = files.read_published(file)[1]
    monkeypatch.setattr(published.tables, 'recorded', lambda: {'table': {('row', 0): about}})
    assert published.verify([f'--weights={tmp_path}', f'--data-dir={tmp_path}']) == 0
    assert f'{about["zeros"]:,} zeros, {about["accuracy"]:.2f} % as it says' in capsys.readouterr().out
    if fault == 'a value set to zero':
        values = torch.load(file, weights_only=True)['values']
        values[5] = 0
        change(file, values=values)
    elif fault == 'accuracy':
        change(file, about={'accuracy': about['accuracy'] + 0.5})
    elif fault == 'truncated':
        file.write_bytes(file.read_bytes()[:5000])
    else:
        monkeypatch.setattr(published.tables, 'recorded', dict)
    assert published.verify([f'--weights={tmp_path}']) == 1
    assert 'WRONG' in capsys.readouterr().out


def test_verify_of_nothing_fails(tmp_path):
    assert published.verify([f'--weights={tmp_path}']) == 1


class Payload:
    def __reduce__(self):
        return print, ('code ran',)


def hostile(kind, path):
    if kind == 'pickle':
        path.write_bytes(pickle.dumps(Payload()))
    elif kind == 'pickled entry':
        torch.save({'about': Payload()}, path)
    elif kind == 'zip bomb':
        bomb = torch.frombuffer(bytearray(zlib.compress(bytes(10**8), 9)), dtype=torch.uint8)
        change(path, gaps=bomb)
    elif kind == 'huge shape':
        change(path, about={'tensors': [['a', [2**40], 'sparse']]})
    elif kind == 'negative shape':
        change(path, about={'tensors': [['a', [-4, -5], 'sparse']]})
    elif kind == 'kind':
        change(path, about={'tensors': [['a', [1], 'pickle']]})
    elif kind == 'missing entry':
        torch.save({'about': '{}'}, path)
    elif kind == 'text':
        path.write_text('weights')


@pytest.mark.parametrize(
    'kind', ['pickle', 'pickled entry', 'zip bomb', 'huge shape', 'negative shape', 'kind', 'missing entry', 'text']
)
def test_a_hostile_file_gets_one_sentence(kind, file, capsys):
    hostile(kind, file)
    with pytest.raises(FileError, match='is no published weight file|is damaged'):
        files.read_published(file)
    assert 'code ran' not in capsys.readouterr().out


@pytest.mark.parametrize(
    'args, message',
    [
        ({'model': 'resnet56'}, 'cannot be rebuilt'),
        ({'model': '../x'}, 'unknown network'),
        ({'dataset': 'moons'}, 'cannot be rebuilt'),
    ],
)
def test_a_network_that_is_not_the_one_described(args, message, file):
    state, about = files.read_published(file)
    with pytest.raises(FileError, match=message):
        published.rebuild(state, about | {'args': about['args'] | args})


def test_bad_requests_get_one_sentence(tmp_path, file, capsys):
    for words, message in [
        ([f'--publish={tmp_path}/none'], 'no finished run there'),
        ([f'--evaluate={tmp_path}/none.pt'], 'no such file'),
        ([f'--evaluate={file}', '--dataset=cifar10'], 'was trained on digits'),
    ]:
        with pytest.raises(SystemExit) as stop:
            program.main([*words, '--no-cuda'])
        assert message in str(stop.value) and '\n' not in str(stop.value)
    with pytest.raises(SystemExit):
        program.main(['--publish=x', *TINY])
    assert 'unrecognized arguments' in capsys.readouterr().err


def test_packed_and_shrunk_networks_are_evaluated(tmp_path, capsys):
    out = tmp_path / 'r'
    words = ['--method=dsp', '--prune=0.5', '--group-epochs=1', '--finetune-epochs=1', '--cycles=1', '--val-size=0', '--pack']
    result, _ = run_main(out, *words, '--torchscript')
    program.main([f'--shrink={out}', '--pt2'])
    capsys.readouterr()
    for name, words in [
        ('packed.pt', []),
        ('packed.json', []),
        ('small.pt', []),
        ('packed.pt2', ['--trust']),
        ('packed.ts', ['--trust']),
    ]:
        program.main([f'--evaluate={out}/{name}', '--no-cuda', *words])
        assert f'accuracy   {result["accuracy"]:.2f} %' in capsys.readouterr().out
    for name in ('packed.pt2', 'packed.ts'):
        with pytest.raises(SystemExit, match='can carry code'):
            program.main([f'--evaluate={out}/{name}', '--no-cuda'])
    (out / 'packed.ts').rename(tmp_path / 'alone.ts')
    with pytest.raises(SystemExit, match='name the data with --dataset'):
        program.main([f'--evaluate={tmp_path}/alone.ts', '--no-cuda', '--trust'])
    program.main([f'--evaluate={tmp_path}/alone.ts', '--no-cuda', '--trust', '--dataset=digits'])
    assert f'accuracy   {result["accuracy"]:.2f} %' in capsys.readouterr().out


def test_every_published_file_of_the_repository_has_its_zeros():
    if published.WEIGHTS.is_dir():
        assert published.verify([]) == 0
