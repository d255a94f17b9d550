"""Networks that are not of archs/: torchvision's, timm's, and those of a user's file; and weights to start from."""

import json
import shutil
import sys

import pytest
import torch
from helpers import run_main, same_state
from torch import nn

import archs
import main as program
from archs import elsewhere
from args import parse
from deploy.files import read_published
from harness import published, weights
from harness.rebuild import rebuild_run
from methods import load_but_classifier

NET = """
from torch import nn

from args import width
from parts.conv import block


def net(num_classes, in_channels=3):
    return nn.Sequential(block(in_channels, width), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))


def fixed():
    return net(10, 1)


def number():
    return 3


def wrong():
    return net(7, 1)


def fails():
    raise KeyError('a secret')
"""
BLOCK = (
    'from torch import nn\n\n\ndef block(a, b):\n    return nn.Sequential(nn.Conv2d(a, b, 3), nn.BatchNorm2d(b), nn.ReLU())\n'
)
ONE = ['--method=dense', '--epochs=1']


@pytest.fixture
def project(tmp_path):
    """A user's folder with modules that are called as ours are."""
    folder = tmp_path / 'project'
    (folder / 'parts').mkdir(parents=True)
    (folder / 'net.py').write_text(NET)
    (folder / 'args.py').write_text('width = 6\n')
    (folder / 'parts' / 'conv.py').write_text(BLOCK)
    (folder / 'unused.py').write_text('raise RuntimeError\n')
    return folder


def refusal(*words):
    with pytest.raises(SystemExit) as stop:
        program.main([*words, '--dataset=digits', '--no-cuda', '--out=nowhere'])
    assert isinstance(stop.value.code, str) and '\n' not in stop.value.code
    return stop.value.code


def run_of(out, project, *words):
    """main.py on the network of the project; without --width, which it does not have."""
    words = ['--dataset=digits', '--no-cuda', '--limit-train=64', '--batch-size=32', f'--out={out}', *ONE, *words]
    program.main([*words, f'--model={project}/net.py:net'])
    return json.loads((out / 'result.json').read_text()), torch.load(out / 'model.pt', weights_only=True)


def test_a_users_network_and_a_run_folder_that_is_enough_on_its_own(project, tmp_path, capsys):
    ours, path = sys.modules['args'], list(sys.path)
    result, state = run_of(tmp_path / 'run', project)
    assert sys.modules['args'] is ours and sys.path == path
    assert state['0.0.weight'].shape == (6, 1, 3, 3) and result['num_classes'] == 10
    assert result['args']['model'] == f'{project.resolve()}/net.py:net' and result['args']['sname'] == 'dense_net-net'
    copies = tmp_path / 'run' / 'network'
    assert sorted(str(p.relative_to(copies)) for p in copies.rglob('*.py')) == ['args.py', 'net.py', 'parts/conv.py']
    assert not list(project.rglob('__pycache__'))
    published.publish(tmp_path / 'run', tmp_path / 'p.pt')
    shutil.rmtree(project)
    model, _ = rebuild_run(tmp_path / 'run')
    assert same_state(model.state_dict(), state)
    program.main([f'--shrink={tmp_path}/run'])
    assert (tmp_path / 'run' / 'small.json').is_file()
    (tmp_path / 'run' / 'result.json').unlink()
    program.main([f'--resume={tmp_path}/run'])
    assert same_state(torch.load(tmp_path / 'run' / 'model.pt', weights_only=True), state)
    with pytest.raises(SystemExit, match='read them, and add --trust'):
        program.main([f'--evaluate={tmp_path}/p.pt'])
    program.main([f'--evaluate={tmp_path}/p.pt', '--trust'])
    assert f'counted {result["accuracy"]}' in capsys.readouterr().out
    shutil.rmtree(tmp_path / 'p.network')
    with pytest.raises(SystemExit, match='is not there'):
        program.main([f'--evaluate={tmp_path}/p.pt', '--trust'])


def test_a_file_that_changed_within_a_run_is_refused(project, tmp_path):
    run_of(tmp_path / 'run', project)
    (tmp_path / 'run' / 'result.json').unlink()
    (project / 'args.py').write_text('width = 7\n')
    with pytest.raises(SystemExit, match='args.py is not what it was'):
        run_of(tmp_path / 'run', project)
    program.main([f'--resume={tmp_path}/run'])
    assert (tmp_path / 'run' / 'result.json').is_file()


def test_two_projects_with_modules_of_one_name(project, tmp_path):
    other = tmp_path / 'other'
    shutil.copytree(project, other)
    (other / 'args.py').write_text('width = 9\n')
    widths = [
        elsewhere.build_elsewhere(f'{folder}/net.py:net', 10, 1, 8)[0][0].out_channels for folder in (project, other, project)
    ]
    assert widths == [6, 9, 6]


def test_a_file_of_a_package_may_import_relatively(tmp_path):
    package = tmp_path / 'pack'
    package.mkdir()
    (package / '__init__.py').write_text('from .net import net\n')
    (package / 'conv.py').write_text(BLOCK)
    (package / 'net.py').write_text(NET.replace('from args import width', 'width = 4').replace('parts.conv', '.conv'))
    name = f'{package}/net.py:net'
    assert elsewhere.build_elsewhere(name, 10, 1, 8)[0][0].out_channels == 4
    assert sorted(archs.files_of(name)) == ['pack/__init__.py', 'pack/conv.py', 'pack/net.py']


@pytest.mark.parametrize(
    'function, message',
    [
        ('', 'needs the name of a function behind it, FILE.py:FUNCTION; it has net, fixed'),
        (':nett', "has no function 'nett'; did you mean net"),
        (':number', 'returns a int, where an nn.Module is due'),
        (':wrong', r'gives outputs of shape \(2, 7\) for 2 images, where logits of shape \(2, 10\) are due'),
        (':fails', "cannot be used: KeyError: 'a secret'"),
    ],
)
def test_functions_that_will_not_do(function, message, project):
    with pytest.raises(ValueError, match=message):
        archs.from_args(parse(['--dataset=digits', f'--model={project}/net.py{function}']), 10, 1, 8)
    assert isinstance(elsewhere.build_elsewhere(f'{project}/net.py:fixed', 10, 1, 8), nn.Module)


def test_other_refusals(project):
    assert 'there is no file' in refusal('--model=absent.py:net')
    (project / 'net.py').write_text('def net(:\n')
    assert 'no Python file that can be read: SyntaxError' in refusal(f'--model={project}/net.py:net')
    assert 'has no --width' in refusal(f'--model={project}/net.py:net', '--width=4')
    assert '--pretrained is for torchvision/NAME' in refusal('--model=resnet20', '--pretrained')


def test_torchvision_networks_by_name():
    pytest.importorskip('torchvision')
    args = parse(['--dataset=digits', '--model=torchvision/squeezenet1_1', '--bn-momentum=0.2'])
    assert args.sname == 'feather_torchvision-squeezenet1_1'
    net = archs.from_args(args, 10, 1, 32)
    assert type(net).__name__ == 'SqueezeNet' and net(torch.zeros(2, 1, 32, 32)).shape == (2, 10) and net.training
    for name, near in (('torchvision/resnet19', 'torchvision/resnet18'), ('torchvision/squeeznet1_1', 'squeezenet1_1')):
        with pytest.raises(ValueError, match=f'did you mean .*{near}'):
            elsewhere.build_elsewhere(name, 10, 3, 32)
    with pytest.raises(ValueError, match='torchvision/alexnet does not take images of 3x8x8'):
        elsewhere.build_elsewhere('torchvision/alexnet', 10, 3, 8)


def test_networks_with_auxiliary_outputs_give_logits_in_training(monkeypatch):
    models = pytest.importorskip('torchvision').models
    for pretrained in (False, True):
        options = elsewhere.torchvision_options(models, 'googlenet', 64, pretrained)
        assert options['aux_logits'] is False and options['transform_input'] is pretrained


def test_timm_networks_by_name():
    pytest.importorskip('timm')
    net = elsewhere.build_elsewhere('timm/test_resnet', 10, 1, 32)
    assert net(torch.zeros(2, 1, 32, 32)).shape == (2, 10)
    assert elsewhere.build_elsewhere('timm/test_vit', 3, 3, 48)(torch.zeros(2, 3, 48, 48)).shape == (2, 3)
    with pytest.raises(ValueError, match='did you mean .*timm/resnet18'):
        elsewhere.build_elsewhere('timm/resnet19', 10, 3, 32)


@pytest.mark.parametrize('name, way', [('timm/resnet18', 'pip install timm'), ('torchvision/resnet18', 'needs torchvision')])
def test_libraries_that_are_not_there(name, way, monkeypatch):
    monkeypatch.setitem(sys.modules, name.partition('/')[0], None)
    with pytest.raises(RuntimeError, match=way):
        elsewhere.build_elsewhere(name, 10, 3, 32)


# --------------------------------------------------------------------------------------------------------------- weights


def classifier(classes, width=4):
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(width, classes))


def test_weights_for_other_classes_leave_the_classifier_fresh():
    theirs, ours = classifier(7), classifier(3)
    fresh = ours[3].weight.clone()
    assert load_but_classifier(ours, theirs.state_dict()) == {'3': (7, 3)}
    assert torch.equal(ours[0].weight, theirs[0].weight) and torch.equal(ours[3].weight, fresh)
    assert load_but_classifier(classifier(7), theirs.state_dict()) == {}
    missing = {name: tensor for name, tensor in theirs.state_dict().items() if name != '1.running_mean'}
    for state in (classifier(7, 5).state_dict(), missing, missing | {'more': torch.zeros(1)}):
        with pytest.raises(RuntimeError):
            load_but_classifier(ours, state)


def test_weights_in_files_of_any_wrapping(tmp_path):
    state = classifier(3).state_dict()
    wrapped = {'epoch': 3, 'state_dict': {f'module.{name}': tensor for name, tensor in state.items()}}
    torch.save(wrapped, tmp_path / 'a.pth')
    torch.save(state, tmp_path / 'b.pth', _use_new_zipfile_serialization=False)
    for name in ('a.pth', 'b.pth'):
        assert same_state(weights.weights_of(str(tmp_path / name)), state)
    save_file = pytest.importorskip('safetensors.torch').save_file
    save_file(state, tmp_path / 'c.safetensors')
    read = weights.weights_of(str(tmp_path / 'c.safetensors'))
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())
    damaged = bytearray((tmp_path / 'a.pth').read_bytes())
    damaged[damaged.index(state['0.weight'].numpy().tobytes())] ^= 0xFF
    (tmp_path / 'h.pth').write_bytes(damaged)
    torch.save([1, 2], tmp_path / 'd.pth')
    (tmp_path / 'e.pth').write_bytes(b'nothing')
    torch.save(classifier(3), tmp_path / 'f.pth')  # a module: code
    for name, message in (
        ('d.pth', 'no state dict'),
        ('e.pth', 'read safely'),
        ('f.pth', 'read safely'),
        ('g.pth', 'there is no'),
        ('h.pth', 'damaged'),
    ):
        with pytest.raises(weights.RunError, match=message):
            weights.weights_of(str(tmp_path / name))


def test_a_failed_download_says_where_it_looked_and_how_to_go_on(monkeypatch, tmp_path):
    models = pytest.importorskip('torchvision').models
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', no_network)
    said = refusal('--model=torchvision/mobilenet_v3_small', '--pretrained', '--dataset=digits')
    assert 'are for images of 3 channels, not 1' in said
    with pytest.raises(
        RuntimeError,
        match='looked in https://.*resnet18.* and .*checkpoints.*no network.*put it there, or give it with --from FILE',
    ) as stop:
        archs.pretrained_weights('torchvision/resnet18', 3, 32)
    assert '\n' not in str(stop.value)
    with pytest.raises(ValueError, match='give --image-size 224'):
        archs.pretrained_weights('torchvision/vit_b_32', 3, 32)
    assert models.get_model_weights('resnet18').DEFAULT.url in str(stop.value)


def test_a_file_that_is_there_is_used_and_another_number_of_classes_leaves_the_classifier_fresh(monkeypatch, tmp_path):
    models = pytest.importorskip('torchvision').models
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', no_network)
    folder = tmp_path / 'hub' / 'checkpoints'
    folder.mkdir(parents=True)
    theirs = models.squeezenet1_1().state_dict()
    torch.save(theirs, folder / models.get_model_weights('squeezenet1_1').DEFAULT.url.rpartition('/')[2])
    state, called, mean, std = archs.pretrained_weights('torchvision/squeezenet1_1', 3, 32)
    assert same_state(state, theirs) and called == 'IMAGENET1K_V1' and (mean[0], std[2]) == (0.485, 0.225)
    net = elsewhere.build_elsewhere('torchvision/squeezenet1_1', 10, 3, 32, pretrained=True)
    assert load_but_classifier(net, state) == {'classifier.1': (1000, 10)}
    assert torch.equal(net.features[0].weight, theirs['features.0.weight'])


def no_network(*args, **options):
    raise OSError('no network')


def test_a_failed_download_of_timm(monkeypatch):
    timm = pytest.importorskip('timm')
    make = timm.create_model

    def create(name, pretrained=False, **options):
        return no_network() if pretrained else make(name, **options)

    monkeypatch.setattr(timm, 'create_model', create)
    with pytest.raises(RuntimeError, match='looked in timm/test_resnet.*no network.*model.safetensors.*--from FILE'):
        archs.pretrained_weights('timm/test_resnet', 3, 32)


def test_pretrained_weights_skip_dense_training_unless_the_classifier_is_fresh(project, tmp_path, monkeypatch, trained, capsys):
    """What main.py makes of published weights, which stand in here for a download."""
    state = elsewhere.build_elsewhere(f'{project}/net.py:net', 7, 1, 8).state_dict()
    same = elsewhere.build_elsewhere(f'{project}/net.py:net', 10, 1, 8).state_dict()
    words = ['--method=l1_filter', '--finetune-epochs=1', '--ptarget=0.5', '--pretrained']
    for name, published_state, stages in (('other', state, ['pretrain', 'finetune']), ('same', same, ['finetune'])):
        given = (published_state, 'V1', (0.3059,), (0.5,))
        monkeypatch.setattr(archs, 'pretrained_weights', lambda *args, given=given: given)
        trained.clear()
        result, _ = run_of(tmp_path / name, project, *words)
        assert trained == stages and result['fresh'] == (['3'] if name == 'other' else [])
    said = capsys.readouterr().out
    assert '3 stays fresh: the weights of' in said and 'are for 7 classes, the data has 10' in said
    assert '--mean 0.3059 --std 0.5' in said
    assert result['started_with'].endswith('V1')


def test_from_takes_a_file_of_weights(tmp_path, trained):
    net = archs.build('resnet20', 5, width=4, in_channels=1)
    torch.save({'state_dict': net.state_dict()}, tmp_path / 'w.pth')
    result, _ = run_main(tmp_path / 'run', '--method=level', '--epochs=1', '--finetune-epochs=1', f'--from={tmp_path}/w.pth')
    assert trained == ['pretrain', 'finetune'] and result['fresh'] == ['fc']


def test_pretrained_and_from_together(capsys):
    with pytest.raises(SystemExit):
        parse(['--pretrained', '--from=x', '--model=torchvision/resnet18'])
    assert 'leave one out' in capsys.readouterr().err


def test_a_published_network_of_archs_needs_no_trust(tmp_path):
    run_main(tmp_path / 'run', *ONE)
    about = read_published(published.publish(tmp_path / 'run', tmp_path / 'p.pt'))[1]
    assert published.code_of(tmp_path / 'p.pt', about, False) is None and not (tmp_path / 'p.network').exists()
