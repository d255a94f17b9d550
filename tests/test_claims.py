"""What the READMEs say in words about recorded runs is what the runs say."""

import re
import statistics

import pytest
from helpers import ROOT

from harness import table


@pytest.fixture(scope='module')
def runs():
    return table.recorded()


def accuracy(runs, name, row):
    return statistics.fmean(result['accuracy'] for (own, _), result in runs[name].items() if own == row)


def speedups(runs, batch):
    """Of the rows of the pruners' table with half of the filters of every layer: dense over shrunk milliseconds."""
    half = [result for result in runs['pruners'].values() if result.get('small_parameters') == 68786]
    assert len(half) >= 8
    return [result[f'dense_ms_{batch}'] / result[f'small_ms_{batch}'] for result in half]


def ten_epochs(runs, row):
    return accuracy(runs, 'cifar10_10ep', row)


def digits(runs, share):
    """{method: mean accuracy} of the digits' rows at a share."""
    rows = {row for row, _ in runs['digits'] if row.endswith(f'-{share}')}
    return {row.removesuffix(f'-{share}'): accuracy(runs, 'digits', row) for row in rows}


def beaten(accuracies, control):
    """The methods that are no better than the control."""
    return {name for name, own in accuracies.items() if name != control and own <= accuracies[control]}


CLAIMS = {
    'At 98 % all methods with single zeros beat a dense network with as few weights (small-dense), but four': lambda runs: (
        beaten(digits(runs, 98), 'small-dense') == {'str', 'dpf', 'level', 'agp'}
    ),
    'at 98 % random masks are as good as RigL': lambda runs: abs(digits(runs, 98)['static'] - digits(runs, 98)['rigl']) < 0.5,
    'FPGM, Taylor, L1 and L2 beat random filters; group_norm, slim, apoz and mean_activation do not': lambda runs: (
        beaten(digits(runs, 80), 'random_filter') == {'group_norm', 'slim', 'apoz', 'mean_activation'}
    ),
    'At 90 % zeros the methods that prune while they train lie within three points': lambda runs: (
        max(digits(runs, 90).values()) - min(digits(runs, 90).values()) < 3
    ),
    'DPF holds 90 % and falls while its masks tighten to 98 %': lambda runs: (
        digits(runs, 90)['dpf'] > 98 and digits(runs, 98)['dpf'] < 80
    ),
    'at 98 % zeros Feather leads, before ST-3 and gradual magnitude pruning': lambda runs: (
        ten_epochs(runs, 'feather-98') > ten_epochs(runs, 'st3-98') > ten_epochs(runs, 'gmp-98')
    ),
    'at 90 % Feather and ST-3 are equal': lambda runs: abs(ten_epochs(runs, 'feather-90') - ten_epochs(runs, 'st3-90')) < 0.5,
    'half of the filters buys 1.3x to 1.9x': lambda runs: all(
        1.25 < ratio < 1.95 for batch in (1, 32) for ratio in speedups(runs, batch)
    ),
    'At 98 % zeros Feather is first, two points above ST-3, four above GMP': lambda runs: (
        round(ten_epochs(runs, 'feather-98') - ten_epochs(runs, 'st3-98')) == 2
        and round(ten_epochs(runs, 'feather-98') - ten_epochs(runs, 'gmp-98')) == 4
    ),
    'ends near 51 %': lambda runs: round(ten_epochs(runs, 'level-98')) == 51,
    'about a point and a half below dense, and GMP two points lower': lambda runs: (
        1 < ten_epochs(runs, 'dense') - ten_epochs(runs, 'feather-90') < 2
        and 1.5 < ten_epochs(runs, 'feather-90') - ten_epochs(runs, 'gmp-90') < 2.5
    ),
    "with three fifths of ST-3's MACs": lambda runs: (
        runs['cifar10_10ep']['st3-sigma-98', 0]['macs_nonzero'] / runs['cifar10_10ep']['st3-98', 0]['macs_nonzero']
        == pytest.approx(0.6, abs=0.03)
    ),
    'and stops at 92.5 %': lambda runs: round(100 * runs['cifar10_10ep']['asl-98', 0]['sparsity'], 1) == 92.5,
    'times as heavy it stops at 95.3 %': lambda runs: (
        round(100 * runs['cifar10_10ep']['asl-lv100-98', 0]['sparsity'], 1) == 95.3
    ),
    'end three points lower after five epochs': lambda runs: all(
        2.5 < ten_epochs(runs, 'dense') - ten_epochs(runs, row) < 3.6 for row in ('l1_filter-30', 'fpgm-30')
    ),
    'In accuracy ADMM is first': lambda runs: (
        max(
            (result for result in runs['pruners'].values() if result.get('small_parameters') == 68786),
            key=lambda result: result['accuracy'],
        )['row']
        == 'admm'
    ),
}


def text():
    pages = [(ROOT / name).read_text() for name in ('README.md', 'results/README.md')]
    return re.sub(r'\s+', ' ', ' '.join(pages))


@pytest.mark.parametrize('claim', CLAIMS)
def test_what_the_pages_say_is_what_was_recorded(claim, runs):
    assert claim in text()
    assert CLAIMS[claim](runs)
