"""What the READMEs say in words about recorded runs is what the runs say."""

import json
import re
import statistics

import pytest
from helpers import ROOT

from deploy.files import read_json
from harness import milliseconds, pairs, table


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


def below_dense(runs, row):
    """Points that a row of the ten epochs lies below dense, both with seed 0."""
    return runs['cifar10_10ep']['dense', 0]['accuracy'] - runs['cifar10_10ep'][row, 0]['accuracy']


def deviations(runs):
    """[(standard deviation of the seeds' accuracy, row)] of the rows of the ten epochs that have several, rising."""
    seeds = {}
    for (row, _), run in runs['cifar10_10ep'].items():
        seeds.setdefault(row, []).append(run['accuracy'])
    return sorted((round(statistics.stdev(values), 2), row) for row, values in seeds.items() if len(values) > 1)


def logged(table, row, epoch, seed=0):
    """The line of an epoch, 1, 2, ..., in a recorded log."""
    return json.loads((ROOT / f'results/logs/{table}/{row}-s{seed}.jsonl').read_text().splitlines()[epoch - 1])


def finished(runs, row):
    """(epochs, accuracy) of a row of ST-3's table on CIFAR-10, where two rows and no others are recorded."""
    assert runs['st3/cifar10'].keys() == {('dense', 0), ('st3-98', 0)}
    run = runs['st3/cifar10'][row, 0]
    return run['epochs'], run['accuracy']


def epochs_at_speed(row, speed):
    """How many epochs of a row of ST-3's table on CIFAR-10 saw at least `speed` images a second: those on a GPU."""
    return sum(logged('st3/cifar10', row, epoch)['images_per_second'] >= speed for epoch in range(1, 161))


def macs_nonzero(runs, row):
    """Of a row of the ten epochs, its seeds' mean."""
    return statistics.fmean(run['macs_nonzero'] for (name, _), run in runs['cifar10_10ep'].items() if name == row)


def beyond_chance(runs, row, control='dense', table='digits'):
    """The mean difference of two rows where its 95 % interval leaves out zero, else 0."""
    middle, half, _ = pairs.difference(runs[table], row, control)
    return round(middle, 1) if abs(middle) > half else 0


def unlike_dense(runs, share):
    """{row: difference to dense} of the digits' rows at a share that lie beyond chance."""
    rows = {row for row, _ in runs['digits'] if row.endswith(f'-{share}')}
    return {row: beyond_chance(runs, row) for row in rows if beyond_chance(runs, row)}


def as_printed(runs, *rows):
    """Accuracies of rows of the ten epochs, as the page says them."""
    return [round(ten_epochs(runs, row), 2) for row in rows]


CLAIMS = {
    '(level, agp) loses 1.7 points. No method that prunes while it trains can be told from dense': lambda runs: (
        unlike_dense(runs, 90) == {'level-90': -1.7, 'agp-90': -1.7}
    ),
    'At 98 % agp loses 42 points and AC/DC 0.6': lambda runs: unlike_dense(runs, 98) == {'agp-98': -42.1, 'ac_dc-98': -0.6},
    'small dense networks, static and RigL cannot be told from one another': lambda runs: (
        not (
            beyond_chance(runs, 'small-dense-98', 'static-98')
            or beyond_chance(runs, 'rigl-98', 'static-98')
            or beyond_chance(runs, 'rigl-98', 'small-dense-98')
        )
    ),
    'At 99 % ProbMask loses 7.6 points and ST-3-sigma 5.7; Feather is 4.6 above the latter, GMP 5.1': lambda runs: (
        unlike_dense(runs, 99) == {'st3-sigma-99': -5.7, 'probmask-99': -7.6}
        and beyond_chance(runs, 'feather-99', 'st3-sigma-99') == 4.6
        and beyond_chance(runs, 'gmp-99', 'st3-sigma-99') == 5.1
    ),
    'At 80 % of the filters group_norm loses 4.6 points; FPGM is 1.6 above L2': lambda runs: (
        unlike_dense(runs, 80) == {'group_norm-80': -4.6} and beyond_chance(runs, 'fpgm-80', 'l2_filter-80') == 1.6
    ),
    'at 98 % zeros Feather leads, before ST-3 and gradual magnitude pruning': lambda runs: (
        ten_epochs(runs, 'feather-98') > ten_epochs(runs, 'st3-98') > ten_epochs(runs, 'gmp-98')
    ),
    'at 90 % Feather and ST-3 are equal': lambda runs: abs(ten_epochs(runs, 'feather-90') - ten_epochs(runs, 'st3-90')) < 0.5,
    'half of the filters buys 1.3x to 1.9x': lambda runs: all(
        1.25 < ratio < 1.95 for batch in (1, 32) for ratio in speedups(runs, batch)
    ),
    '2.1 points above ST-3 and ST-3-sigma, 3.2 above Spartan and 4.2 above GMP, each beyond chance': lambda runs: (
        [beyond_chance(runs, 'feather-98', row, 'cifar10_10ep') for row in ('st3-98', 'st3-sigma-98', 'spartan-98', 'gmp-98')]
        == [2.1, 2.1, 3.2, 4.2]
    ),
    'ST-3, ST-3-sigma and Spartan cannot be told from one another': lambda runs: (
        not (
            beyond_chance(runs, 'st3-98', 'st3-sigma-98', 'cifar10_10ep')
            or beyond_chance(runs, 'st3-98', 'spartan-98', 'cifar10_10ep')
            or beyond_chance(runs, 'st3-sigma-98', 'spartan-98', 'cifar10_10ep')
        )
    ),
    'GraNet (73.62 %) comes after them, five points above RigL (68.66 %); AC/DC (66.94 %) cannot be told': lambda runs: (
        as_printed(runs, 'granet-98', 'rigl-98', 'ac_dc-98') == [73.62, 68.66, 66.94]
        and round(beyond_chance(runs, 'granet-98', 'rigl-98', 'cifar10_10ep')) == 5
        and not beyond_chance(runs, 'ac_dc-98', 'rigl-98', 'cifar10_10ep')
    ),
    'lies a standard deviation of 0.14 (feather-98) to 1.41 points (small-dense-98)': lambda runs: (
        deviations(runs)[0] == (0.14, 'feather-98') and deviations(runs)[-1] == (1.41, 'small-dense-98')
    ),
    'that never move (static, 67.11 %) and SET (66.67 %)': lambda runs: (
        as_printed(runs, 'static-98', 'set-98') == [67.11, 66.67]
    ),
    'GraSP (66.98 %), SNIP (65.49 %) and SynFlow (64.60 %)': lambda runs: (
        as_printed(runs, 'grasp-98', 'snip-98', 'synflow-98') == [66.98, 65.49, 64.60]
    ),
    'A narrow dense network with as few weights reaches 58.92 %': lambda runs: as_printed(runs, 'small-dense-98') == [58.92],
    'SR-STE keeps 84.76 % with 2 of 4 weights and 79.05 % with 1 of 16': lambda runs: (
        as_printed(runs, 'sr_ste-2-4', 'sr_ste-1-16') == [84.76, 79.05]
    ),
    'DPF ends at 38.51 %': lambda runs: as_printed(runs, 'dpf-98') == [38.51],
    'ends near 51 %': lambda runs: round(ten_epochs(runs, 'level-98')) == 51,
    'about a point and a half below dense, and GMP two points lower': lambda runs: (
        1 < below_dense(runs, 'feather-90') < 2 and 1.5 < below_dense(runs, 'gmp-90') - below_dense(runs, 'feather-90') < 2.5
    ),
    "with two thirds of ST-3's MACs": lambda runs: (
        macs_nonzero(runs, 'st3-sigma-98') / macs_nonzero(runs, 'st3-98') == pytest.approx(2 / 3, abs=0.03)
    ),
    'two rows are there, with all of their 160 epochs: dense 91.40 %': lambda runs: finished(runs, 'dense') == (160, 91.4),
    '98 % zeros 81.47 %': lambda runs: finished(runs, 'st3-98') == (160, 81.47),
    '(epochs 1 to 81 on an NVIDIA H200, the others on a CPU)': lambda runs: epochs_at_speed('dense', 2000) == 81,
    '(1 to 43 on the H200)': lambda runs: epochs_at_speed('st3-98', 2000) == 43,
    'STR stops at 90 % zeros (79.8 % accuracy)': lambda runs: (
        round(100 * logged('cifar10_10ep', 'str-98', 9)['sparsity']) == 90
        and round(logged('cifar10_10ep', 'str-98', 9)['accuracy'], 1) == 79.8
    ),
    'in all layers but the first: 93.6 % zeros': lambda runs: (
        round(100 * runs['cifar10_10ep']['sr_ste-1-16', 0]['sparsity'], 1) == 93.6
    ),
    'and stops at 92.5 %': lambda runs: round(100 * runs['cifar10_10ep']['asl-98', 0]['sparsity'], 1) == 92.5,
    'times as heavy it stops at 95.3 %': lambda runs: (
        round(100 * runs['cifar10_10ep']['asl-lv100-98', 0]['sparsity'], 1) == 95.3
    ),
    'end three points lower after five epochs': lambda runs: all(
        2.5 < below_dense(runs, row) < 3.6 for row in ('l1_filter-30', 'fpgm-30')
    ),
    'At equal MACs a narrow dense network, trained for ten epochs, lies above both filter criteria': lambda runs: all(
        runs['cifar10_10ep']['small-dense-50', 0]['macs_dense'] < runs['cifar10_10ep'][row, 0]['small_macs']
        and ten_epochs(runs, 'small-dense-50') > ten_epochs(runs, row)
        for row in ('l1_filter-30', 'fpgm-30')
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


def test_what_the_readme_says_of_equal_milliseconds():
    rows = read_json(milliseconds.MEASURED)['rows']
    text = (ROOT / 'README.md').read_text()

    def said(row):
        time, _ = milliseconds.fastest(rows[row], 1)
        return f'{float(f"{time:.2g}"):g} ms', f'{rows[row]["accuracy"]:.1f} %'

    for row in ('dense', 'feather-90', 'feather-98', 'small-dense-75'):
        assert all(part in text for part in said(row)), (row, said(row))
    for row in ('l1_filter-30', 'fpgm-30'):  # slower and less accurate than a narrow network
        narrow = rows['small-dense-50']
        assert milliseconds.fastest(rows[row], 1)[0] > milliseconds.fastest(narrow, 1)[0]
        assert rows[row]['accuracy'] < narrow['accuracy']
    dense, int8 = rows['dense'], rows['dense-int8']
    assert 1.8 < milliseconds.fastest(dense, 32)[0] / milliseconds.fastest(int8, 32)[0] < 2.2
    assert abs(dense['accuracy'] - int8['accuracy']) < 0.1


def test_what_the_readme_says_of_the_share_of_the_peak():
    page = (ROOT / 'results' / 'bench' / 'sparse.md').read_text()
    shares = {'3x3': [], '1x1': []}
    for pixels, kernel, share in re.findall(r'(\d+)x\d+, (3x3|1x1): .*90% ([0-9.]+)', page):
        if int(pixels) >= 8:
            shares[kernel].append(float(share))
    assert '3x3 layers come to about 0.4 to 0.5 of it, 1x1 layers to about 0.35' in text()
    assert len(shares['3x3']) >= 4 and all(round(share, 1) in (0.4, 0.5) for share in shares['3x3'])
    assert len(shares['1x1']) >= 4 and all(share == pytest.approx(0.35, abs=0.035) for share in shares['1x1'])


def test_what_the_pages_say_of_packed_networks():
    page = (ROOT / 'results' / 'bench' / 'pack.md').read_text()
    cases = re.findall(r'(?ms)^(resnet\d+), .*?^  packed .*? ([0-9.]+)x as fast', page)
    assert len(cases) == 16 and all(float(ratio) >= 1 for _, ratio in cases)
    large = [float(ratio) for name, ratio in cases if name == 'resnet18']
    assert f'of ResNet-18 at 224x224 packing gives {min(large):.1f}x to {max(large):.1f}x' in text()


def headings(page):
    """The anchors of a page's headings."""
    words = re.findall(r'(?m)^#+ (.*)$', page)
    return {re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-') for heading in words}


def test_links_lead_somewhere():
    """Each relative link and picture of a page is a file, each anchor a heading."""
    pages = [*ROOT.glob('*.md'), *(ROOT / 'results').rglob('*.md'), *(ROOT / 'tests').rglob('*.md')]
    assert len(pages) > 30
    wrong = []
    for path in pages:
        text = re.sub(r'(?s)```.*?```|`[^`\n]*`', '', path.read_text())
        for target in re.findall(r'\]\(([^)\s]+)\)', text):
            if re.match(r'https?://', target):
                continue
            name, _, anchor = target.partition('#')
            there = path.parent / name if name else path
            if not there.exists() or (anchor and anchor not in headings(there.read_text())):
                wrong.append(f'{path.relative_to(ROOT)}: {target}')
    assert not wrong
