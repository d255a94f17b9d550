"""Networks: published sizes, input shapes, gradients, tracing and the errors of archs.build."""

import sys

import pytest
import torch
from torch import nn

import archs
from sparse_utils import count_macs

ANY_SIZE = ['resnet20', 'mobilenet_v1', 'densenet', 'wrn16_2', 'resnet18', 'resnet50']  # from 8x8 up
CONV_NETS = [*ANY_SIZE, 'vgg16']
ALL_NETS = [*CONV_NETS, 'lenet300_100']


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    """On inputs this small threads gain nothing, and on a busy machine they wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def require_torchvision(name):
    """Skip where torchvision is missing (ImportError) or does not match torch (RuntimeError)."""
    if name not in ('resnet18', 'resnet50'):
        return
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:
        pytest.skip(f'torchvision cannot be imported: {error}')


def build(name, num_classes=7, **options):
    require_torchvision(name)
    torch.manual_seed(0)
    if name == 'resnet20':
        options.setdefault('width', 8)
    return archs.build(name, num_classes, **options)


@pytest.mark.parametrize(
    'name, num_classes, options, total, prunable',
    [
        ('resnet20', 100, {}, 1_096_196, 1_092_960),
        ('resnet20', 10, {'width': 16}, 272_474, 270_896),
        ('resnet56', 10, {'width': 16}, 855_770, 851_504),
        ('mobilenet_v1', 100, {}, 3_315_428, 3_287_488),
        ('densenet', 100, {}, 714_196, 703_920),
        ('wrn16_8', 100, {}, 11_012_036, 11_000_240),
        ('wrn22_2', 10, {}, 1_081_226, 1_076_912),
        ('wrn22_2_nobias', 10, {}, 1_079_642, 1_076_912),
        ('vgg16', 10, {}, 14_724_042, 14_715_584),
        ('vgg19', 10, {}, 20_035_018, 20_024_000),
        ('lenet300_100', 10, {'in_channels': 1, 'image_size': 28}, 266_610, 266_200),
        ('resnet18', 1000, {}, 11_689_512, 11_678_912),
        ('resnet50', 1000, {}, 25_557_032, 25_502_912),
    ],
)
def test_parameter_counts(name, num_classes, options, total, prunable):
    require_torchvision(name)
    with torch.device('meta'):
        net = archs.build(name, num_classes, **options)
    weights = [m.weight for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert sum(p.numel() for p in net.parameters()) == total
    assert sum(w.numel() for w in weights) == prunable


@pytest.mark.parametrize('name, convs', [('resnet32', 31), ('resnet44', 43), ('resnet110', 109)])
def test_resnet_depth(name, convs):
    with torch.device('meta'):
        net = archs.build(name, 10, width=16)
    assert sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in net.modules()) == convs


@pytest.mark.parametrize('name', CONV_NETS)
@torch.no_grad()
def test_any_image_size(name):
    net = build(name).eval()
    for size in (32, 40) if name == 'vgg16' else (8, 32, 40):
        assert net(torch.randn(1, 3, size, size)).shape == (1, 7)
    # a net that flattens with view(-1, C) would return more than two rows here
    assert net(torch.randn(2, 3, 64, 64)).shape == (2, 7)


@pytest.mark.parametrize('name', ALL_NETS)
@torch.no_grad()
def test_one_channel(name):
    net = build(name, in_channels=1).eval()
    assert net(torch.randn(2, 1, 32, 32)).shape == (2, 7)


def test_replaced_torchvision_stem_keeps_its_settings():
    old, new = build('resnet18').conv1, build('resnet18', in_channels=5).conv1
    assert new.weight.shape == (64, 5, 7, 7)
    for setting in ('stride', 'padding', 'dilation', 'groups', 'bias'):
        assert getattr(new, setting) == getattr(old, setting)
    assert new.weight.std().item() == pytest.approx(old.weight.std().item(), rel=0.05)


@pytest.mark.parametrize('name', ALL_NETS)
def test_backward_reaches_every_parameter(name):
    net = build(name)
    net(torch.randn(2, 3, 32, 32)).square().sum().backward()
    for parameter_name, p in net.named_parameters():
        assert p.grad is not None, parameter_name
        assert p.grad.isfinite().all(), parameter_name
        # biases are not compared with zero: in front of a BatchNorm their gradient is zero up to rounding
        assert p.ndim == 1 or p.grad.any(), parameter_name


@pytest.mark.parametrize('name', ALL_NETS)
@torch.no_grad()
def test_eval_output_does_not_depend_on_the_batch(name):
    net = build(name).double()
    x = torch.randn(3, 3, 32, 32, dtype=torch.double)
    net(x)  # moves the BatchNorm statistics off their initial values
    net.eval()
    torch.testing.assert_close(net(x)[1:2], net(x[1:2]))


@pytest.mark.parametrize('name', ALL_NETS)
@torch.no_grad()
def test_fx_trace(name):
    net = build(name).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(torch.fx.symbolic_trace(net)(x), net(x))


@pytest.mark.parametrize('name', ['resnet20', 'wrn10_1', 'lenet300_100'])
@torch.no_grad()
def test_export(name):
    net = build(name).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), net(x))


@torch.no_grad()
def test_dropout_is_on_in_training_only():
    net = build('wrn10_1', dropout=0.5)
    x = torch.randn(2, 3, 8, 8)
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))
    plain = build('wrn10_1').eval()
    plain.load_state_dict(net.state_dict())
    assert torch.equal(net(x), plain(x))


def test_wrn_shortcut_sees_the_raw_input():
    block = build('wrn10_1').stage2[0].eval()
    nn.init.zeros_(block.conv2.weight)
    nn.init.zeros_(block.conv2.bias)
    x = -torch.rand(1, 16, 8, 8)  # a ReLU in front of the shortcut would wipe this out
    assert torch.equal(block(x), block.shortcut(x))


def test_bn_momentum():
    momenta = {m.momentum for m in build('densenet', bn_momentum=0.01).modules() if isinstance(m, nn.BatchNorm2d)}
    assert momenta == {0.01}
    momenta = {m.momentum for m in build('densenet').modules() if isinstance(m, nn.BatchNorm2d)}
    assert momenta == {0.1}


@pytest.mark.parametrize('name', archs.names())
def test_every_listed_name_builds(name):
    require_torchvision(name)
    with torch.device('meta'):
        assert isinstance(archs.build(name, 10), nn.Module)


@pytest.mark.parametrize('name', ['resnet21', 'wrn16', 'wrn16_8x', ''])
def test_unknown_name_lists_the_names(name):
    with pytest.raises(ValueError, match='unknown network .*') as caught:
        archs.build(name, 10)
    for known in [*archs.names(), 'wrn<depth>_<k>']:
        assert known in str(caught.value)


@pytest.mark.parametrize(
    'name, options, message',
    [
        ('wrn17_8', {}, 'depth must be 6n'),
        ('wrn4_8', {}, 'depth must be 6n'),
        ('wrn16_0', {}, 'widening factor'),
        ('densenet', {'width': 16}, 'no width option'),
        ('wrn16_8', {'width': 0}, 'at least 1'),
        ('resnet18', {'width': 16}, 'no width option'),
        ('resnet20', {'width': 0}, 'at least 1'),
        ('resnet20', {'dropout': 0.3}, 'no dropout option'),
        ('resnet20', {'in_channels': 0}, 'at least 1'),
        ('vgg16', {'image_size': 28}, 'at least 32x32'),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        archs.build(name, 10, **options)


def test_lenet_takes_one_image_size():
    net = build('lenet300_100', in_channels=1, image_size=28)
    assert net(torch.randn(2, 1, 28, 28)).shape == (2, 7)
    with pytest.raises(ValueError, match='takes images of 784 values, not 3x32x32'):
        net(torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize('error', ['ImportError', 'RuntimeError'])
def test_broken_torchvision(error, tmp_path, monkeypatch):
    (tmp_path / 'torchvision.py').write_text(f"raise {error}('does not fit this torch')")
    for module in [m for m in sys.modules if m.split('.')[0] == 'torchvision']:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match='resnet18 needs torchvision.*does not fit this torch'):
        archs.build('resnet18', 10)


# ------------------------------------------------------------------------------------------- small dense controls


def test_widths():
    one, two = archs.build('wrn22_2_nobias', 10), archs.build('wrn22_2_nobias', 10, width=22)
    assert [one.conv1.out_channels, one.stage1[0].conv1.out_channels, one.fc.in_features] == [16, 32, 128]
    assert [two.conv1.out_channels, two.stage1[0].conv1.out_channels, two.fc.in_features] == [11, 22, 88]
    channels = [module.out_channels for module in archs.build('vgg16', 10, width=20).modules() if isinstance(module, nn.Conv2d)]
    assert channels == [20] * 2 + [40] * 2 + [80] * 3 + [160] * 6


def test_small_networks_by_hand():
    # ResNet-20, width 16, 10 classes: 272,474 parameters, 270,896 of them weights. Half of these as zeros leave 137,026
    settings = {'in_channels': 3, 'image_size': 32}
    assert [archs.size_of('resnet20', 10, width, **settings)[0] for width in (11, 12)] == [129_359, 153_766]
    assert archs.small_width('resnet20', 0.5, 'parameters', 10, 16, **settings) == 11
    # WRN-22-2 at 80 %: the stem and the three stages of the control have 7, 14, 28 and 56 channels
    assert archs.small_width('wrn22_2_nobias', 0.8, 'parameters', 10, **settings) == 14


@pytest.mark.parametrize('name, width', [('resnet20', 6), ('wrn10_1', None), ('vgg16', 8)])
@pytest.mark.parametrize('measure', ['parameters', 'macs'])
def test_small_networks_are_the_nearest_that_are_not_above(name, width, measure):
    settings = {'in_channels': 3, 'image_size': 32}
    parameters, prunable, macs = archs.size_of(name, 10, width, **settings)
    for sparsity in (0.3, 0.9):
        found = archs.small_width(name, sparsity, measure, 10, width, **settings)
        sizes = [archs.size_of(name, 10, width, **settings) for width in (found, found + 1)]
        here, above = (size[0] if measure == 'parameters' else size[2] for size in sizes)
        left = parameters - sparsity * prunable if measure == 'parameters' else (1 - sparsity) * macs
        assert here <= left + 0.5 < above + 0.5


def test_macs_are_those_of_count_macs():
    net = archs.build('wrn10_1', 10)
    counted = sum(dense for dense, _ in count_macs(net, torch.zeros(1, 3, 32, 32)).values())
    assert archs.size_of('wrn10_1', 10, in_channels=3, image_size=32)[2] == counted


def test_small_networks_that_cannot_be():
    with pytest.raises(ValueError, match='no width of resnet20 has as few parameters'):
        archs.small_width('resnet20', 0.9999, 'parameters', 10, 8, in_channels=3, image_size=32)
    with pytest.raises(ValueError, match='densenet has no width option'):
        archs.small_width('densenet', 0.5, 'macs', 10, in_channels=3, image_size=32)
