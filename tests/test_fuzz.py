"""Random input from hypothesis: arguments, tables, weight files, data files. All is taken or refused in a sentence.

HYPOTHESIS_PROFILE=long ./launch tests tests/test_fuzz.py      twenty times as many examples
"""

import hashlib
import io
import json
import math
import os

import pytest
import torch
import yaml
from helpers import TINY, run_main
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from make_data import cifar10, mnist
from torch import nn

import args as arguments
import methods
from deploy import files, network_file
from deploy.files import FileError
from harness import data, launch, published
from methods._algorithms import ALGORITHMS, algorithm
from pruners import selection
from pruners.compressor import StatisticsPruner

COMMON = dict(deadline=None, suppress_health_check=list(HealthCheck))
settings.register_profile('short', max_examples=60, **COMMON)
settings.register_profile('long', max_examples=1200, **COMMON)
settings.load_profile(os.environ.get('HYPOTHESIS_PROFILE', 'short'))

FLAGS = sorted(
    {flag for action in arguments.common_parser()._actions for flag in action.option_strings} | {'--frequency', '--p'}
)
VALUES = st.one_of(
    st.sampled_from(
        ['', '0', '1', '-1', '0.5', '1e-4', 'nan', 'inf', '-inf', '1e400', '99999999999999999999', 'x', '--', 'None']
    ),
    st.sampled_from(
        [*methods.names(), 'resnet20', 'wrn16_8', 'wrn0_0', 'wrn9999_1', 'digits', 'cifar10', 'cpu', 'cuda:7', 'zeros']
    ),
    st.integers().map(str),
    st.floats().map(str),
    st.text(st.characters(exclude_categories=['Cs']), max_size=8),
)
WORDS = st.one_of(st.sampled_from(FLAGS), VALUES, st.tuples(st.sampled_from(FLAGS), VALUES).map('='.join))


@given(st.lists(WORDS, max_size=8))
def test_arguments(words):
    assume(not {'-h', '--help'} & set(words) and not any(word.startswith('--resume') for word in words))
    try:
        args = arguments.parse(words)
    except SystemExit as stop:
        assert stop.code == 2
    else:
        assert args.epochs >= 1 and 0 < args.ptarget < 1 and args.method in methods.names()
        with_refusal(lambda: methods.load(args.method)(args))


def with_refusal(action, errors=ValueError):
    """Run it; it may only fail with a sentence."""
    try:
        return action()
    except errors as error:
        assert str(error).strip() and 'Traceback' not in str(error)


LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6), st.dates())
TREES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)
ROWS = st.dictionaries(st.sampled_from(['id', 'method', 'epochs', 'ptarget', 'paper', 'minutes', 'seeds', 'lr', 'mean']), TREES)
TABLES = st.fixed_dictionaries(
    {'rows': st.lists(ROWS, max_size=3) | TREES}, optional={'defaults': ROWS | TREES, 'seeds': TREES}
)


@given(
    st.one_of(
        TREES.map(lambda tree: yaml.safe_dump(tree)), TABLES.map(yaml.safe_dump), st.text(max_size=40), st.binary(max_size=40)
    )
)
def test_tables(tmp_path_factory, text):
    path = tmp_path_factory.mktemp('t') / 'table.yaml'
    path.write_bytes(text if isinstance(text, bytes) else text.encode('utf-8', 'surrogatepass'))
    table = with_refusal(lambda: arguments.load_table(path))
    for row in table['rows'] if table else ():
        try:
            launch.state_of(path.parent / 'run', vars(arguments.parse([f'--config={path}', f'--row={row["id"]}'])))
        except SystemExit as stop:
            assert stop.code == 2


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    out = tmp_path_factory.mktemp('run')
    run_main(out / 'r', '--epochs=1', '--ptarget=0.9')
    return published.publish(out / 'r', out / 'w.pt').read_bytes()


EDITS = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from(['flip', 'cut', 'insert', 'repeat']), st.binary(min_size=1, max_size=9))
)


def edited(content, edits):
    for place, kind, some in edits:
        at = int(place * len(content))
        if kind == 'flip':
            content = content[:at] + bytes([some[0]]) + content[at + 1 :]
        elif kind == 'cut':
            content = content[:at]
        elif kind == 'insert':
            content = content[:at] + some + content[at:]
        else:
            content = content[:at] + content[max(at - 40, 0) :]
    return content


@given(edits=EDITS)
def test_damaged_weight_files(tmp_path_factory, weights, edits):
    path = tmp_path_factory.mktemp('w') / 'w.pt'
    path.write_bytes(edited(weights, edits))
    found = with_refusal(lambda: files.read_published(path), FileError)
    if found is not None:  # the damage was where nothing is stored, or there was none
        whole = torch.load(io.BytesIO(weights), weights_only=True)
        state, about = files.unpack_sparse(whole)
        assert all(torch.equal(found[0][name], tensor) for name, tensor in state.items()) and found[1] == about


@given(
    about=TREES, parts=st.dictionaries(st.sampled_from(['gaps', 'values', 'dense', 'counts']), st.lists(st.integers(0, 255)))
)
def test_weight_files_of_strange_content(tmp_path_factory, weights, about, parts):
    path = tmp_path_factory.mktemp('w') / 'w.pt'
    content = torch.load(io.BytesIO(weights), weights_only=True)
    if isinstance(about, dict):
        about = json.loads(content['about']) | about
    content['about'] = json.dumps(about, default=str)
    content |= {name: torch.tensor(values, dtype=content[name].dtype) for name, values in parts.items()}
    torch.save(content, path)
    found = with_refusal(lambda: files.read_published(path), FileError)
    if found is not None:
        with_refusal(lambda: published.rebuild(*found), FileError)


@pytest.fixture(scope='module')
def datasets(tmp_path_factory):
    root = tmp_path_factory.mktemp('data')
    cifar10(root, train=20, test=10)
    mnist(root, train=20, test=10)
    return root


@given(edits=EDITS, name=st.sampled_from(['mnist', 'cifar10']), sums=st.booleans())
def test_damaged_data_files(datasets, edits, name, sums):
    folder = datasets / data.FOLDERS[name]
    path = sorted(file for file in folder.iterdir() if file.name != 'MD5SUMS' and 'meta' not in file.name)[0]
    whole, listed = path.read_bytes(), (folder / 'MD5SUMS').read_text()
    changed = edited(whole, edits)
    try:
        path.write_bytes(changed)
        if sums:  # somebody who vouches for the damage
            old, new = (hashlib.md5(content).hexdigest() for content in (whole, changed))
            (folder / 'MD5SUMS').write_text(listed.replace(old, new))
        words = [*TINY, f'--dataset={name}', f'--data-dir={datasets}', '--no-download', '--limit-train=8', '--batch-size=4']
        loaded = with_refusal(lambda: data.load(arguments.parse(words), torch.device('cpu')), data.DataError)
        if loaded is not None and not sums:
            assert changed == whole
    finally:
        path.write_bytes(whole)
        (folder / 'MD5SUMS').write_text(listed)


LAYER = st.fixed_dictionaries({}, optional={key: TREES for key in ('name', 'class', 'config', 'type', 'arguments')})
DESCRIPTIONS = st.fixed_dictionaries(
    {'format': st.just(network_file.FORMAT)},
    optional={
        'layers': st.lists(LAYER, max_size=2) | TREES,
        'tensors': TREES,
        'operations': st.lists(LAYER) | TREES,
        'info': TREES,
    },
)


@given(TREES | DESCRIPTIONS, st.dictionaries(st.text(max_size=5), st.just(torch.zeros(2)), max_size=2))
def test_descriptions_of_networks(description, tensors):
    with_refusal(lambda: network_file.rebuild(description, tensors))


KEYS = ['sparsity', 'op_types', 'op_names', 'exclude', 'initial_sparsity', 'final_sparsity', 'start_epoch', 'end_epoch']
KEYS += ['frequency', 'prune_iterations', 'sparsty']
SHARES = st.sampled_from([0.0, 0.3, 0.5, 0.999, 1.0, -1, math.nan, math.inf, True, '0.5', None])
NAMES = st.lists(
    st.sampled_from(['0', '1', '2', '3', '4', '5', '', '9', 'Conv2d', 'Linear', 'BatchNorm2d', 'default', 'ReLU', 3])
)
ENTRIES = st.dictionaries(st.sampled_from(KEYS), SHARES | NAMES | st.integers(-2, 9) | st.just('Conv2d'), max_size=5)
LIKELY = st.fixed_dictionaries(
    {'sparsity': st.sampled_from([0.0, 0.3, 0.5, 0.999])},
    optional={'op_types': st.lists(st.sampled_from(['Conv2d', 'Linear', 'default'])), 'op_names': NAMES},
)
LEAVES_OUT = st.fixed_dictionaries({'exclude': st.just(True)}, optional={'op_types': NAMES, 'op_names': NAMES})


@given(st.lists(ENTRIES | LIKELY | LEAVES_OUT, max_size=4) | st.none() | ENTRIES, st.sampled_from(sorted(ALGORITHMS)))
def test_config_lists(config_list, name):
    """Taken, and then each layer has as many zeros as it was asked for, or refused in a sentence."""
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 5)]
    model = nn.Sequential(*layers)
    try:
        pruner = algorithm(name)(model, config_list)
    except ValueError as error:
        assert str(error) and '\n' not in str(error)
        return
    assert set(pruner.layers) <= {'0', '1', '3', '5'}
    assert all(0 <= entry['sparsity'] < 1 for entry in pruner.entries.values())
    if not isinstance(pruner, StatisticsPruner):
        pruner.compress()
        for layer, entry in pruner.entries.items() if name != 'slim' else ():
            scores = model[int(layer)].weight.flatten() if name == 'level' else model[int(layer)].weight.flatten(1).norm(dim=1)
            wanted = min(selection.num_pruned(len(scores), entry['sparsity']), len(scores) - 1)
            assert int((scores == 0).sum()) == wanted
