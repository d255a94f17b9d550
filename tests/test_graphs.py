"""--cuda-graphs. What a CPU can show is that a run is the same where passes are replayed; a graph itself needs a GPU."""

import pytest
import torch
from helpers import TINY, read_run, run_main, same_state

import main as program
from harness import graphs

WORDS = ['--limit-train=80', '--ptarget=0.9', '--val-size=40']  # two whole batches an epoch and one of 16 images
METHODS = ['dense', 'feather', 'st3', 'gmp', 'rigl', 'ac_dc', 'spartan']


@pytest.mark.parametrize('method', ['feather', 'rigl'])
def test_a_run_is_the_same_where_passes_are_replayed(tmp_path, monkeypatch, method):
    calls = []

    def recorded(function, inputs, state=()):
        def replay(*now):
            calls.append(getattr(function, '__name__', 'evaluation'))
            assert [tensor.shape for tensor in now] == [tensor.shape for tensor in inputs]
            return function(*now)

        return replay

    words = [*WORDS, f'--method={method}']
    plain = run_main(tmp_path / 'plain', *words)
    monkeypatch.setattr(graphs, 'recorded', recorded)
    monkeypatch.setattr(graphs, 'check', lambda *_: None)
    replayed = run_main(tmp_path / 'replayed', *words, '--cuda-graphs')
    assert same_state(plain[1], replayed[1]) and plain[0]['zeros'] == replayed[0]['zeros']
    assert calls.count('passes') == 2 * 3 and calls.count('evaluation') == (2 + 2) * 3  # without the measuring at the end
    assert run_main(tmp_path / 'replayed', *words)[0] == replayed[0]  # the flag is no other run


@pytest.mark.parametrize(
    'words, reason',
    [
        ([], 'a GPU, not cpu'),
        (['--method=probmask'], 'a GPU, not cpu'),
    ],
)
def test_what_cannot_be_replayed_is_refused(tmp_path, words, reason):
    with pytest.raises(SystemExit, match=f'--cuda-graphs needs {reason}'):
        program.main([*TINY, f'--out={tmp_path}/run', '--cuda-graphs', *words])
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    'words, reason',
    [
        (['--method=probmask'], 'a method whose steps are all alike, which probmask is not'),
        (['--backbone=asl'], 'a method whose steps are all alike, which feather is not'),
        (['--accumulate=2'], 'whole batches'),
        (['--compile'], 'leave --compile out'),
    ],
)
def test_reasons_on_a_gpu(words, reason):
    args = program.parse([*TINY, '--cuda-graphs', *words])
    method = program.methods.load(args.method)(args)
    with pytest.raises(ValueError, match=reason):
        graphs.check(args, torch.device('cuda'), method)


@pytest.mark.gpu
@pytest.mark.parametrize('method', METHODS)
def test_a_graph_computes_what_the_passes_do(tmp_path, monkeypatch, method):
    monkeypatch.setattr(program, 'pick_device', lambda args: torch.device('cuda'))  # without a choice of kernels by their time
    monkeypatch.setattr(torch.backends.cudnn, 'deterministic', True)
    words = [word for word in TINY if word != '--no-cuda'] + [*WORDS, f'--method={method}', '--amp', '--channels-last']
    program.main([*words, f'--out={tmp_path}/plain'])
    program.main([*words, f'--out={tmp_path}/replayed', '--cuda-graphs'])
    plain = read_run(tmp_path / 'plain')
    replayed = read_run(tmp_path / 'replayed')
    assert plain[0]['zeros'] == replayed[0]['zeros']
    assert same_state(plain[1], replayed[1])
