"""Accuracy at equal milliseconds: which rows are measured how, and what the page says of hand-written figures."""

import pytest
import torch
from torch import nn

from harness import engine_bench, milliseconds

ENTRY = {'args': {'method': 'feather'}, 'zeros': 5}
KINDS = {
    'dense': ('dense', ENTRY | {'zeros': 0}),
    'small-dense-98': ('small', ENTRY | {'zeros': 0}),
    'feather-98': ('zeros', ENTRY),
    'l1_filter-30': ('filters', ENTRY | {'small_macs': 3}),
    'dsp-50': ('packed', {'args': {'method': 'dsp'}, 'zeros': 5, 'small_macs': 3}),
}


@pytest.mark.parametrize('row', KINDS)
def test_kinds_of_rows(row):
    kind, entry = KINDS[row]
    assert milliseconds.kind_of(row, entry) == kind and kind in milliseconds.KINDS


def found(kind, accuracy, one, many):
    return {'kind': kind, 'accuracy': accuracy, 'milliseconds': {'1': one, '32': many}}


ROWS = {
    'dense': found('dense', 90.0, {'PyTorch': 1.0, 'OpenVINO': 0.4}, {'PyTorch': 9.0, 'OpenVINO': 6.0}),
    'feather-90': found('zeros', 89.0, {'PyTorch': 1.0, 'sparse engine': 0.1}, {'PyTorch': 9.0, 'sparse engine': 2.0}),
    'l1_filter-30': found('filters', 88.0, {'PyTorch': 0.9, 'OpenVINO': 0.3}, {'PyTorch': 7.0, 'OpenVINO': 1.5}),
}


def test_the_frontier_and_its_sentence_by_hand():
    assert milliseconds.fastest(ROWS['dense'], 1) == (0.4, 'OpenVINO')
    assert milliseconds.frontier(ROWS, 1) == [(0.1, 89.0, 'feather-90'), (0.4, 90.0, 'dense')]
    assert milliseconds.frontier(ROWS, 32) == [(1.5, 88.0, 'l1_filter-30'), (2.0, 89.0, 'feather-90'), (6.0, 90.0, 'dense')]
    assert 'before: feather-90 (0.100 ms, 89.0 %), dense (0.400 ms, 90.0 %).' in milliseconds.sentence(ROWS, 1)


def test_the_page_shows_what_was_not_run():
    measured = {'rows': ROWS, 'device': 'a CPU', 'torch': '2'}
    text = milliseconds.page(['dense', 'feather-90', 'l1_filter-30', 'rigl-98'], measured)
    lines = [[cell.strip() for cell in line.strip('| ').split('|')] for line in text.splitlines() if line.startswith('| ')]
    assert [line[0] for line in lines[2:]] == ['dense', 'feather-90', 'l1_filter-30', 'rigl-98']
    zeros = 'single zeros, sparse engine'
    assert lines[3] == ['feather-90', zeros, '89.00', '0.100', 'sparse engine', '1.000', '2.000', 'sparse engine', '9.000']
    assert lines[5][:2] == ['rigl-98', 'not run']


def test_int8_computes_nearly_the_same():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    images = torch.randn(16, 3, 8, 8)
    quantized = engine_bench.in_int8(model, [images])
    with torch.no_grad():
        expected = model(images)
        gap = (quantized(images) - expected).abs().max()
    assert 0 < gap < 0.05 * expected.abs().max()
    assert type(model[0]) is nn.Conv2d and model[0].weight.dtype == torch.float32
    assert not hasattr(model, 'qconfig') and not hasattr(model[0], 'qconfig')  # the network itself is as it was


def test_of_two_readings_the_faster_one_counts():
    before = {'kind': 'zeros', 'accuracy': 80.0, 'milliseconds': {'1': {'a': 2.0, 'b': 3.0}, '32': {'a': 9.0}}}
    now = {'kind': 'zeros', 'accuracy': 80.0, 'milliseconds': {'1': {'a': 2.5, 'c': 1.0}, '32': {'a': 8.0}}}
    kept = milliseconds.faster(now, before)
    assert kept['milliseconds'] == {'1': {'a': 2.0, 'b': 3.0, 'c': 1.0}, '32': {'a': 8.0}}
    assert milliseconds.faster(now, None) == now
    assert milliseconds.faster(now, before | {'accuracy': 79.0}) == now  # another network
