"""Files of small networks: read in another process without the code that built them, and hostile ones that run nothing."""

import importlib.util
import json
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import archs
from deploy import formats, network_file

ROOT = Path(__file__).parent.parent


class Odd(nn.Module):
    """Widths no architecture has, a residual, a concatenation, functions, methods, a shared layer, a weight of its own."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding='same', bias=False)
        self.bn = nn.BatchNorm2d(5, momentum=None, eps=1e-3)
        self.act = nn.LeakyReLU(0.2)
        self.branches = nn.ModuleDict(
            {'a-1': nn.Conv2d(5, 5, 1), 'b': nn.Conv2d(5, 2, (1, 3), padding=(0, 1), padding_mode='reflect')}
        )
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(7, 7, 1, groups=7), nn.Hardsigmoid())
        self.scale = nn.Parameter(torch.randn(7, 1, 1))
        self.register_buffer('index', torch.tensor([6, 0, 3, 3]))
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = self.act(self.bn(self.conv(x)))
        x = torch.cat([self.act(x + self.branches['a-1'](x)), self.branches['b'](x)], dim=1)
        x *= self.gate(x)
        x = F.max_pool2d(x * self.scale, 2)[:, :, 1:, ::2]
        x = F.adaptive_avg_pool2d(x[:, self.index], 1).view(x.shape[0], -1)
        return self.fc(x).softmax(dim=1)


def randomized(model):
    """Statistics of batch norm as after training, so that modes and wrong orders show in the outputs."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
    return model


@pytest.fixture
def odd():
    torch.manual_seed(0)
    return randomized(Odd()).train()


IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def test_save_and_load_restore_every_tensor_and_the_outputs(odd, tmp_path):
    before = {name: tensor.clone() for name, tensor in odd.state_dict().items()}
    files = network_file.save(odd, tmp_path / 'small', IMAGES, accuracy=91.5, made_by={'method': 'l1'})
    assert files == (tmp_path / 'small.pt', tmp_path / 'small.json') and len(list(tmp_path.iterdir())) == 2
    assert odd.training and all(torch.equal(tensor, before[name]) for name, tensor in odd.state_dict().items())
    for path in ('small', 'small.pt', 'small.json'):
        network = network_file.load(tmp_path / path)
        assert not network.training and network.info == {'accuracy': 91.5, 'made_by': {'method': 'l1'}}
        assert torch.equal(network(IMAGES), odd.eval()(IMAGES)) and torch.equal(network(IMAGES[:1]), odd(IMAGES[:1]))
    state = network.state_dict()
    assert state.keys() == before.keys() and all(torch.equal(state[name], before[name]) for name in state)
    trained = {name for name, _ in odd.named_parameters()}
    assert {name for name, p in network.named_parameters() if p.requires_grad} == trained
    assert network.bn.momentum is None and network.bn.eps == 1e-3


def test_a_loaded_network_can_be_trained_like_the_original(odd, tmp_path):
    network_file.save(odd, tmp_path / 'small', IMAGES)
    for network in (odd.train(), network_file.load(tmp_path / 'small').train()):
        network(IMAGES).square().sum().backward()
    gradients = [{name: p.grad for name, p in net.named_parameters()} for net in (odd, network)]
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
    assert torch.equal(odd.bn.running_mean, network.bn.running_mean)


NETS = ['resnet20', 'mobilenet_v1', 'densenet', 'wrn10_1', 'vgg16', 'lenet300_100']


def test_every_network_of_archs_in_a_new_process_that_has_only_deploy(odd, tmp_path):
    torch.manual_seed(0)
    nets = {name: randomized(archs.build(name, 4)).eval() for name in NETS} | {'odd': odd.eval()}
    images = torch.randn(2, 3, 32, 32)
    for name, net in nets.items():
        network_file.save(net, tmp_path / name, images)
        torch.save((images, net(images).detach()), tmp_path / f'{name}.expected')
    formats.write_pt2(nets['resnet20'], images, tmp_path / 'program.pt2')
    torch.save((images, nets['resnet20'](images).detach()), tmp_path / 'program.expected')
    shutil.copytree(ROOT / 'deploy', tmp_path / 'deploy')
    shutil.copy(ROOT / 'sparse_utils.py', tmp_path)
    program = """
import pathlib, sys, torch
from deploy import load, read
torch.set_num_threads(1)
for path in sorted(pathlib.Path().glob('*.expected')):
    images, expected = torch.load(path, weights_only=True)
    file = path.with_suffix('.pt2')
    network = read(file, trust=True) if file.exists() else load(path.stem)
    torch.testing.assert_close(network(images), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    print(path.stem, end=' ')
print('archs' in sys.modules)
"""
    done = subprocess.run([sys.executable, '-c', program], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == sorted([*nets, 'program']) + ['False'], done.stderr


# ----------------------------------------------------------------------------------------------- files that are not right


@pytest.fixture
def saved(tmp_path):
    """(path, description) of a small network; `spoil` what is in the description, then load."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    network_file.save(net, tmp_path / 'small', IMAGES)
    return tmp_path / 'small', json.loads((tmp_path / 'small.json').read_text())


ATTACK = "__import__('pathlib').Path('ran').touch()"


def refused(saved, spoil, message):
    """load() ends in a ValueError of one line that names the file, and what a hostile file asks for has not been run."""
    path, description = saved
    spoil(description)
    path.with_suffix('.json').write_text(json.dumps(description))
    with pytest.raises(ValueError, match=message) as caught:
        network_file.load(path)(IMAGES)
    assert '\n' not in str(caught.value) and 'small.json' in str(caught.value) and not Path('ran').exists()


def operation(description, target):
    return next(row for row in description['operations'] if row['target'] == target)


def insert(row):
    """An operation between the input and the first layer."""

    def spoil(description):
        description['operations'].insert(1, {'name': 'evil', 'args': [{'node': 'input_1'}], 'kwargs': {}} | row)

    return spoil


def rename_layer(name):
    def spoil(description):
        description['layers'][0]['name'] = name
        operation(description, '0')['target'] = name

    return spoil


HOSTILE = {
    'a function of the system': (insert({'op': 'call_function', 'target': 'os.system'}), 'unknown function'),
    'a built-in function': (insert({'op': 'call_function', 'target': 'builtins.eval', 'args': [ATTACK]}), 'unknown function'),
    'a function of torch that reads files': (insert({'op': 'call_function', 'target': 'torch.load'}), 'unknown function'),
    'a function that is no text': (insert({'op': 'call_function', 'target': ['operator.add']}), 'damaged'),
    'an attribute': (insert({'op': 'call_function', 'target': 'getattr', 'args': [{'node': 'input_1'}, '__class__']}), 'shape'),
    'an attribute of a text': (insert({'op': 'call_function', 'target': 'getattr', 'args': ['x', 'shape']}), 'shape'),
    'a private method': (insert({'op': 'call_method', 'target': '__reduce__'}), 'method'),
    'a method that is an expression': (insert({'op': 'call_method', 'target': f'relu().{ATTACK}'}), 'method'),
    'a method of a text': (insert({'op': 'call_method', 'target': 'add', 'args': ['x']}), 'result of an operation'),
    'a method of the name of a function': (insert({'op': 'call_method', 'target': 'apply_'}), 'method'),
    'a weight that is an attribute': (insert({'op': 'get_attr', 'target': '__class__', 'args': []}), 'not described'),
    'a layer that is an attribute': (insert({'op': 'call_module', 'target': 'forward'}), 'not described'),
    'a layer that is a weight': (insert({'op': 'get_attr', 'target': '0', 'args': []}), 'not described'),
    'another kind of operation': (insert({'op': 'root', 'target': 'x'}), 'unknown kind'),
    'a keyword that is code': (
        lambda d: operation(d, '2').update(kwargs={f'x={ATTACK}, y': 1}),
        'names of arguments',
    ),
    'a keyword that is Python': (lambda d: operation(d, '2').update(kwargs={'lambda': 1}), 'names of arguments'),
    'a layer named by code': (rename_layer(f'0"), {ATTACK}, getattr(self, "0'), 'no name of a layer'),
    'a layer named by a line break': (rename_layer('0\n'), 'no name of a layer'),
    'a layer with a private name': (rename_layer('__class__'), 'no name of a layer'),
    'a layer over a method': (rename_layer('forward'), 'damaged'),
    'a tensor over a method': (
        lambda d: d['tensors'].append({'name': 'state_dict', 'trained': False, 'shape': [1], 'dtype': 'torch.bool'}),
        'damaged',
    ),
    'a class that is no layer': (lambda d: d['layers'][2].update({'class': 'Module'}), 'unknown layer'),
    'a container': (lambda d: d['layers'][2].update({'class': 'Sequential'}), 'unknown layer'),
    'a dotted class': (lambda d: d['layers'][2].update({'class': 'modules.os.system'}), 'unknown layer'),
    'an argument layers do not have': (lambda d: d['layers'][2]['arguments'].update(device='cuda'), 'not described by'),
    'an input that is code': (
        lambda d: d['operations'][0].update(target=f'x={ATTACK}', name=f'x={ATTACK}'),
        'refers to one',
    ),
}


@pytest.mark.parametrize('case', HOSTILE)
def test_hostile_descriptions_run_nothing(case, saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(saved, *HOSTILE[case])


def test_the_names_of_operations_never_reach_the_generated_code(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, description = saved
    text = json.dumps(description).replace('"input_1"', json.dumps(f'x={ATTACK}')).replace('"_0"', json.dumps(f'1;{ATTACK}'))
    path.with_suffix('.json').write_text(text)
    network = network_file.load(path)  # the names only say which operation is meant, so these are odd but harmless
    assert network(IMAGES).shape == (3, 2) and 'import' not in network.code and not Path('ran').exists()


FAULTY = {
    'of another format': (lambda d: d.update(format='2'), 'format'),
    'without layers': (lambda d: d.pop('layers'), 'damaged'),
    'of layers that are no list': (lambda d: d.update(layers=3), 'damaged'),
    'with an argument of the wrong type': (lambda d: d['layers'][0]['arguments'].update(in_channels='three'), 'damaged'),
    'with an operation that comes later': (lambda d: operation(d, '0').update(args=[{'node': '_5'}]), 'refers to one'),
    'with an argument of another kind': (lambda d: operation(d, '2').update(kwargs={'inplace': {'code': '1'}}), 'no argument'),
    'with two operations of a name': (lambda d: operation(d, '1').update(name='_0'), 'two operations'),
    'with two inputs': (lambda d: d['operations'].insert(0, {**d['operations'][0], 'name': 'other'}), 'one input'),
    'without an output': (lambda d: d['operations'].pop(), 'one output'),
    'of nothing': (lambda d: d.update(operations=[]), 'one input'),
    'with another width': (lambda d: d['layers'][0]['arguments'].update(out_channels=5), 'shape'),
    'with a layer more': (
        lambda d: d['layers'].append({'name': 'y', 'class': 'PReLU', 'arguments': {}}),
        "no tensor 'y.weight'",
    ),
    'with a bias less': (lambda d: d['layers'][5]['arguments'].update(bias=False), "'5.bias' that no layer has"),
}


@pytest.mark.parametrize('case', FAULTY)
def test_faulty_descriptions_give_one_sentence(case, saved):
    refused(saved, *FAULTY[case])


def test_damaged_and_missing_files_give_one_sentence(saved, tmp_path):
    path, description = saved
    weights = path.with_suffix('.pt').read_bytes()

    class Attack:
        def __reduce__(self):
            return exec, (f"open('{tmp_path}/ran', 'w')",)

    for content, message in ((weights[:200], 'damaged'), (pickle.dumps(Attack(), protocol=2), 'damaged'), (b'', 'damaged')):
        path.with_suffix('.pt').write_bytes(content)
        with pytest.raises(ValueError, match=message):
            network_file.load(path)
    assert not (tmp_path / 'ran').exists()
    torch.save([torch.zeros(1)], path.with_suffix('.pt'))
    with pytest.raises(ValueError, match='dict of tensors'):
        network_file.load(path)
    torch.save({'0.weight': torch.zeros(4, 3, 3, 3, dtype=torch.long)}, path.with_suffix('.pt'))
    with pytest.raises(ValueError, match='int64|no tensor'):
        network_file.load(path)
    path.with_suffix('.pt').unlink()
    with pytest.raises(ValueError, match='cannot read the weights'):
        network_file.load(path)
    for text in ('{"format"', '[' * 100_000, 'null', '"text"'):
        path.with_suffix('.json').write_text(text)
        path.with_suffix('.pt').write_bytes(weights)
        with pytest.raises(ValueError, match='no valid JSON|no description'):
            network_file.load(path)
    with pytest.raises(ValueError, match='cannot read the description'):
        network_file.load(tmp_path / 'other')


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ('function', 'message'),
    [
        (lambda x: F.dropout(x, 0.5), 'dropout'),
        (lambda x: x.type(torch.float64), 'type'),
        (lambda x: x if x.sum() > 0 else -x, 'cannot trace'),
        (lambda x: x + torch.ones(3, 3, 8, 8)[0, 0, 0, 0].item() * x.new_ones(1), 'new_ones'),
    ],
)
def test_what_cannot_be_described_is_named_and_nothing_is_written(function, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        network_file.save(Calls(function), tmp_path / 'small', IMAGES)
    assert not list(tmp_path.iterdir())


def test_several_outputs_are_saved_and_loaded(tmp_path):
    network_file.save(Calls(lambda x: (x, x + 1)), tmp_path / 'small', IMAGES)
    one, two = network_file.load(tmp_path / 'small')(IMAGES)
    assert torch.equal(two, one + 1)


def test_a_parametrized_layer_and_an_unfit_info_are_named(odd, tmp_path):
    with pytest.raises(ValueError, match='JSON'):
        network_file.save(odd, tmp_path / 'small', IMAGES, weights=torch.ones(1))
    nn.utils.parametrize.register_parametrization(odd.branches['b'], 'weight', nn.Identity())
    with pytest.raises(ValueError, match='branches.b is parametrized'):
        network_file.save(odd, tmp_path / 'small', IMAGES)
    assert not list(tmp_path.iterdir())


def test_a_subclass_of_a_layer_is_not_taken_for_the_layer(tmp_path):
    class Doubled(nn.ReLU):
        def forward(self, x):
            return 2 * super().forward(x)

    net = nn.Sequential(Doubled())
    network_file.save(net, tmp_path / 'small', IMAGES)
    assert torch.equal(network_file.load(tmp_path / 'small')(IMAGES), 2 * IMAGES.relu())


# ------------------------------------------------------------------------------------------------ files for other programs


def test_pt2_and_torchscript_take_any_batch_and_are_read_only_with_trust(odd, tmp_path):
    expected = odd.eval()(IMAGES)
    odd.train()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        formats.write_pt2(odd, IMAGES[:1], tmp_path / 'a.pt2')
        formats.write_torchscript(odd, IMAGES[:1], tmp_path / 'a.ts')
        assert odd.training
        shutil.copy(tmp_path / 'a.ts', tmp_path / 'b.pt')  # whatever its name
        for name, kind in (('a.pt2', '.pt2'), ('a.ts', 'TorchScript'), ('b.pt', 'TorchScript')):
            with pytest.raises(ValueError, match=f'{kind} file, which can carry code'):
                formats.read(tmp_path / name)
            torch.testing.assert_close(formats.read(tmp_path / name, trust=True)(IMAGES), expected, rtol=0, atol=1e-6)


def test_read_knows_the_kinds_of_files(odd, tmp_path):
    network_file.save(odd, tmp_path / 'small', IMAGES)
    for name in ('small.pt', 'small.json', 'small'):
        assert torch.equal(formats.read(tmp_path / name)(IMAGES), odd.eval()(IMAGES))
    (tmp_path / 'small.json').unlink()
    with pytest.raises(ValueError, match='without the description small.json'):
        formats.read(tmp_path / 'small.pt')
    (tmp_path / 'x.onnx').write_bytes(b'\x08')
    (tmp_path / 'x.pt').write_bytes(b'\x80\x04')
    (tmp_path / 'x.pt2').write_bytes((tmp_path / 'small.pt').read_bytes())
    for name, trust, message in (
        ('x.onnx', False, 'onnxruntime'),
        ('x.pt', True, 'unknown'),
        ('gone.pt2', True, 'no file'),
        ('x.pt2', True, 'cannot be read as a .pt2'),
    ):
        with pytest.raises(ValueError, match=message):
            formats.read(tmp_path / name, trust=trust)


def test_onnx_takes_any_batch(odd, tmp_path):
    pytest.importorskip('onnxscript')
    runtime = pytest.importorskip('onnxruntime')
    net = nn.Sequential(odd.conv, odd.bn, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)).train()
    formats.write_onnx(net, IMAGES[:1], tmp_path / 'a.onnx')
    assert [path.name for path in tmp_path.iterdir()] == ['a.onnx'] and net.training
    session = runtime.InferenceSession(tmp_path / 'a.onnx')
    for images in (IMAGES, IMAGES[:1]):
        outputs = torch.from_numpy(session.run(['output'], {'input': images.numpy()})[0])
        torch.testing.assert_close(outputs, net.eval()(images), rtol=0, atol=1e-5)


def test_onnx_names_the_packages_that_are_missing(odd, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == 'onnxscript' else object())
    with pytest.raises(ValueError, match='pip install onnxscript$'):
        formats.write_onnx(odd, IMAGES, tmp_path / 'a.onnx')
