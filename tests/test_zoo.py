"""The comparison of shrink() with Torch-Pruning: on one tiny network, with its limits, and what its page says."""

import contextlib
import json
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from harness import zoo


def tiny(name):
    torch.manual_seed(0)
    first = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU()
    net = nn.Sequential(*first, nn.Conv2d(6, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    return net.eval(), torch.randn(2, 2, 8, 8)


def test_both_remove_the_same_dead_channels(monkeypatch):
    pytest.importorskip('torch_pruning')
    monkeypatch.setattr(zoo, 'build', tiny)
    row = zoo.compare_network('tiny')
    # Torch-Pruning keeps int(0.7 n): 4 of 6 channels, 5 of 8. Of 593 parameters 4 * 18 + 4, 8, 5 * 36 + 5 and 3 * 5 + 3 stay
    assert row['parameters'] == 593 and row['theirs'] == row['ours'] == 593 - (76 + 8 + 185 + 18)
    assert row['difference'] < 1e-5 and row['their difference'] < 1e-5 and row['reason'] == ''
    assert row['l1 ours'] > 0 and row['l1 difference'] < 1e-5


def test_where_torch_pruning_fails_the_row_says_so(monkeypatch):
    monkeypatch.setattr(zoo, 'build', tiny)
    monkeypatch.setitem(sys.modules, 'torch_pruning', None)
    row = zoo.compare_network('tiny')
    assert row['theirs'] is None and 'torch_pruning' in row['reason'] and row['ours'] > 0 and row['difference'] < 1e-5


def test_where_we_fail_the_row_says_so(monkeypatch):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(2, 4, 3), nn.Linear(4, 3)

        def forward(self, x):
            x = self.conv(x).mean((2, 3))
            return self.fc(x if x.sum() > 0 else -x)

    monkeypatch.setattr(zoo, 'build', lambda name: (Branching().eval(), torch.randn(2, 2, 8, 8)))
    row = zoo.compare_network('branching')
    assert row['ours'] == 0 and 'ValueError' in row['refused'] and 'ValueError' in row['l1 refused']


def test_a_part_that_takes_too_long_is_stopped():
    with pytest.raises(zoo.OutOfTime, match=r'more than 0\.05 s'), zoo.time_limit(0.05):
        time.sleep(5)
    with pytest.raises(zoo.OutOfTime), zoo.time_limit(0.05):
        with contextlib.suppress(Exception):
            time.sleep(5)
        time.sleep(5)  # again, after it was swallowed
    with zoo.time_limit(0.05):
        pass
    time.sleep(0.1)  # nothing is left behind


def test_a_process_that_dies_gives_a_row(monkeypatch):
    def ended(words, **options):
        return subprocess.CompletedProcess(words, -9, stdout='', stderr='line\nKilled')

    monkeypatch.setattr(subprocess, 'run', ended)
    assert zoo.compare_apart('a')['refused'] == 'the process ended with status -9: Killed'

    def late(words, **options):
        raise subprocess.TimeoutExpired(words, options['timeout'])

    monkeypatch.setattr(subprocess, 'run', late)
    assert zoo.compare_apart('a', seconds=10)['refused'] == 'the process did not end within 100 s'


def test_where_torch_pruning_fills_the_memory_we_go_on_alone(monkeypatch):
    asked = []

    def answer(name, seconds, gigabytes, without=''):
        asked.append(without)
        return rows()['even'] | {'theirs': None, 'reason': without or 'MemoryError'}

    monkeypatch.setattr(zoo, 'row_of_process', answer)
    assert zoo.compare_apart('a')['ours'] == 500 and asked == ['', 'MemoryError']
    monkeypatch.setattr(zoo, 'row_of_process', lambda name, *more: rows()['even' if len(more) == 3 else 'dead'])
    assert zoo.compare_apart('a')['ours'] == 500


ROW = {'parameters': 1000, 'reason': '', 'seconds': 1.0, 'difference': 1e-7, 'their seconds': 2.0, 'l1 ours': 250}


def rows():
    return {
        'even': ROW | {'network': 'even', 'ours': 500, 'theirs': 500, 'their difference': 1e-7},
        'less': ROW | {'network': 'less', 'ours': 300, 'theirs': 500, 'their difference': 0.2},
        'dead': {'network': 'dead', 'parameters': None, 'theirs': None, 'reason': '', 'ours': 0, 'refused': 'it ended'},
    }


def test_a_run_goes_on_behind_the_rows_that_are_there(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(zoo, 'compare_apart', lambda name, *limits: asked.append(name) or rows()[name])
    said = []
    zoo.zoo(['even'], said.append, tmp_path / 'rows.jsonl')
    found = zoo.zoo(list(rows()), said.append, tmp_path / 'rows.jsonl')
    assert asked == ['even', 'less', 'dead'] and len(said) == 3
    assert [row['network'] for row in found] == ['even', 'less', 'dead']
    assert [json.loads(line)['network'] for line in (tmp_path / 'rows.jsonl').read_text().splitlines()] == asked


def test_the_page_shows_what_failed_and_why(monkeypatch):
    for module in ('timm', 'torchvision', 'torch_pruning'):
        pytest.importorskip(module)
    lines = zoo.page(list(rows().values()))
    text = '\n'.join(lines)
    even, less, dead = (next(line for line in lines if line.startswith(name)) for name in rows())
    assert even.split()[:5] == ['even', '1,000', '500', '500', '1.0000'] and even.endswith('25.00 %')
    assert '0.6000' in less and 'refused' in dead and 'fails' in dead
    assert 'dead: ours: it ended' in text and '3 networks; 1 of 2 that both can do' in text
    assert 'less: ours removes less: what Torch-Pruning cuts changes what the network computes, by 2.0e-01' in text
