"""What torch.export reads of a network: everyday operations, shapes of inputs and outputs, wrapped models, refusals."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deploy import even_parts, outputs, report
from deploy.shrinking import shrink

DEAD = [1, 2, 5, 6]


class Between(nn.Module):
    """conv (8 filters, of which half are dead) -> an operation -> conv."""

    def __init__(self, operation, width=8, size=None):
        super().__init__()
        self.first, self.operation = nn.Conv2d(3, 8, 3, padding=1), operation
        self.last = nn.Conv2d(width, 4, 1)

    def forward(self, x):
        return self.last(self.operation(self.first(x)))


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def half_dead(net, dead=DEAD):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn_like(parameter) / 2)
        net.first.weight[dead] = net.first.bias[dead] = 0
    return net.eval()


def assert_same(model, small, x):
    with torch.no_grad(), outputs.eval_mode(model), outputs.eval_mode(small):
        for one, other in zip(outputs.run(model, x), outputs.run(small, x), strict=True):
            assert one.abs().max() > 1e-3
            torch.testing.assert_close(other, one, rtol=0, atol=1e-5 * float(one.abs().max()))


class Gate(nn.Module):
    def __init__(self, gate=torch.sigmoid):
        super().__init__()
        self.down, self.up, self.gate = nn.Conv2d(8, 3, 1), nn.Conv2d(3, 8, 1), gate

    def forward(self, x):
        return x * self.gate(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


class Scale(nn.Module):
    """Parameters used by hand, in several shapes."""

    def __init__(self, *shape):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(*shape))

    def forward(self, x):
        return x * self.scale


class Frozen(nn.Module):
    """Batch norm by hand, from buffers, as torchvision's FrozenBatchNorm2d."""

    def __init__(self):
        super().__init__()
        for name in ('weight', 'bias', 'mean'):
            self.register_buffer(name, torch.randn(8))
        self.register_buffer('var', torch.rand(8) + 0.5)

    def forward(self, x):
        scale = (self.weight * (self.var + 1e-5).rsqrt()).reshape(1, -1, 1, 1)
        return x * scale + (self.bias - self.mean * scale.flatten()).reshape(1, -1, 1, 1)


class NormAct(nn.BatchNorm2d):
    def forward(self, x):
        return F.relu(super().forward(x))


class SamePadding(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


class ChannelsLast(nn.Module):
    """The MLP of ConvNeXt: channels in the last dimension, a linear layer on four."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x):
        return self.down(F.gelu(self.up(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)


def in_place(function):
    def change(x):
        x = x.clone()
        function(x)
        return x

    return change


def skip(x, p):
    return x + x * p


# Each alone between two convolutions; half of the filters in front must go. {name: (operation, width behind it)}
EVERYDAY = {
    'nn.ReLU': nn.ReLU(),
    'F.relu': F.relu,
    'x.relu': lambda x: x.relu(),
    'x.relu_': lambda x: x.clone().relu_(),
    'nn.ReLU in place': nn.ReLU(inplace=True),
    'F.leaky_relu': lambda x: F.leaky_relu(x, 0.2),
    'F.silu': F.silu,
    'nn.GELU': nn.GELU(),
    'nn.Hardswish': nn.Hardswish(),
    'torch.tanh': torch.tanh,
    'sigmoid - 0.5': lambda x: torch.sigmoid(x) - 0.5,
    'nn.PReLU(8)': nn.PReLU(8),
    'nn.PReLU()': nn.PReLU(),
    'x.clamp': lambda x: x.clamp(-1, 1),
    'x.abs': lambda x: x.abs(),
    'x ** 2': lambda x: x**2,
    'sqrt': lambda x: (x.square() + 1e-4).sqrt() - 1e-2,
    'F.dropout': lambda x: F.dropout(x, 0.5, False),
    'nn.Dropout2d': nn.Dropout2d(0.3),
    'nn.Identity': nn.Identity(),
    '0.5 * x': lambda x: 0.5 * x,
    'x * 0.5': lambda x: x * 0.5,
    'x / 2': lambda x: x / 2,
    '-x': lambda x: -x,
    'x *= 2': in_place(lambda x: x.mul_(2)),
    'x - x.mean': lambda x: x - x.mean((2, 3), keepdim=True),
    'sum([x, x])': lambda x: sum([x, x]),
    'torch.add alpha': lambda x: torch.add(x, x, alpha=0.5),
    'torch.where': lambda x: torch.where(x > 0, x, 0.1 * x),
    'x * mask': lambda x: x * (x > 0),
    'x.float': lambda x: x.float(),
    'x.to': lambda x: x.to(torch.float32),
    'x.contiguous': lambda x: x.contiguous(),
    'x.detach': lambda x: x.detach(),
    'torch.cat': lambda x: torch.cat([x, -x], 1),
    'torch.stack': lambda x: torch.stack([x, F.relu(x)], 1).sum(1),
    'torch.stack flat': lambda x: torch.stack([x, F.relu(x)], 1).flatten(1, 2),
    'chunk': lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    'split': lambda x: torch.cat(x.split(x.shape[1] // 2, 1)[::-1], 1),
    'slices': lambda x: torch.cat([x[:, x.shape[1] // 2 :], x[:, : x.shape[1] // 2]], 1),
    'x[:, :, ::2]': lambda x: x[:, :, ::2, ::2],
    'flip': lambda x: x.flip(1),
    'roll': lambda x: x.roll(1, 2),
    'F.pad': lambda x: F.pad(x, (1, 1, 1, 1)),
    'F.pad reflect': lambda x: F.pad(x, (1, 1, 1, 1), mode='reflect'),
    'permute there and back': lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    'transpose': lambda x: x.transpose(2, 3),
    'view there and back': lambda x: x.view(x.size(0), x.size(1), -1).view(x.shape),
    'flatten, unflatten': lambda x: x.flatten(2).unflatten(2, (8, 8)),
    'unsqueeze, squeeze': lambda x: x.unsqueeze(2).squeeze(2),
    'expand_as': lambda x: x.mean((2, 3), keepdim=True).expand_as(x) + x,
    'F.max_pool2d': lambda x: F.max_pool2d(x, 2),
    'nn.AvgPool2d': nn.AvgPool2d(3, 1, 1),
    'F.adaptive_avg_pool2d': lambda x: F.adaptive_avg_pool2d(x, 2),
    'F.interpolate': lambda x: F.interpolate(x, scale_factor=2),
    'F.interpolate to a size': lambda x: F.interpolate(x, size=(5, 5), mode='bilinear'),
    'nn.Upsample': nn.Upsample(scale_factor=2, mode='bilinear'),
    'x.mean(keepdim)': lambda x: x.mean((2, 3), keepdim=True),
    'x.amax': lambda x: x.amax((2, 3), keepdim=True),
    'x.sum': lambda x: x.sum(3, keepdim=True) * 0.1,
    'nn.BatchNorm2d': nn.BatchNorm2d(8),
    'subclass of BatchNorm2d': NormAct(8),
    'nn.InstanceNorm2d': nn.InstanceNorm2d(8, affine=True),
    'frozen batch norm': Frozen(),
    'subclass of Conv2d': SamePadding(8, 8, 3),
    'nn.Conv2d depthwise': nn.Conv2d(8, 8, 3, groups=8),
    'nn.ConvTranspose2d': nn.ConvTranspose2d(8, 8, 2, 2),
    'layer scale': Scale(8, 1, 1),
    'parameter of four dimensions': Scale(1, 8, 1, 1),
    'squeeze-excite': Gate(),
    'squeeze-excite hard': Gate(F.hardsigmoid),
    'linear on four dimensions': ChannelsLast(),
    'channel shuffle': lambda x: x.view(x.size(0), 2, x.size(1) // 2, *x.shape[2:]).transpose(1, 2).flatten(1, 2),
    'nn.ChannelShuffle': nn.ChannelShuffle(2),
    'softmax over positions': lambda x: x.flatten(2).softmax(2).view_as(x),
    'F.normalize of positions': lambda x: F.normalize(x, dim=2),
}
WIDTH = {'torch.cat': 16, 'torch.stack flat': 16}


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def between(operation, width=8):
    return Between(copy.deepcopy(operation) if isinstance(operation, nn.Module) else Call(operation), width)


@pytest.mark.parametrize('name', EVERYDAY)
def test_everyday_operations_let_half_of_the_filters_go(name):
    dead = [1, 2, 5, 6]  # two of each half, the same places in each: what a chunk and a shuffle allow
    net = half_dead(between(EVERYDAY[name], WIDTH.get(name, 8)), dead)
    x = images(2, 3, 8, 8)
    small = shrink(net, x)
    assert small.first.out_channels == 4
    assert_same(net, small, x)


# --------------------------------------------------------------------------------------------- inputs, outputs, wrappers


class Many(nn.Module):
    """Two inputs, one of them optional and by name; outputs nested in a dict, with None among them."""

    def __init__(self):
        super().__init__()
        self.first, self.other, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(2, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x, other=None, scale=1.0):
        y = F.relu(self.first(x)) * scale
        if other is not None:
            y = y + 0 * self.other(other)
        return {'out': (self.last(y), [y.mean((1, 2, 3))]), 'nothing': None}


@pytest.mark.parametrize('example', ['a tuple', 'a dict', 'a tensor'])
def test_examples_of_several_inputs_and_nested_outputs(example):
    net = half_dead(Many())
    net.last.weight.data[0] = 0
    x, other = images(2, 3, 8, 8), images(2, 2, 8, 8)
    example = {'a tuple': (x, other), 'a dict': {'x': x, 'other': other, 'scale': 0.5}, 'a tensor': x}[example]
    small = shrink(net, example)
    assert_same(net, small, example)
    net.forward = None  # the small network has a forward of its own
    assert small.last.out_channels == 4


class Segmenter(nn.Module):
    """A head that runs in training only, as the auxiliary classifiers of GoogLeNet and DeepLab do."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
        self.aux = nn.Sequential(nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1))

    def forward(self, x):
        y = F.relu(self.norm(self.first(x)))
        out = {'out': self.last(y)}
        if self.training:
            out['aux'] = self.aux(y)
        return out


def test_a_head_that_runs_in_training_only_is_cut_with_the_rest_and_trains():
    torch.manual_seed(0)
    net, x = Segmenter(), images(1, 3, 8, 8)
    with torch.no_grad():
        for tensor in (net.first.weight, net.first.bias, net.norm.weight, net.norm.bias):
            tensor[[0, 3, 4]] = 0
    small = shrink(net, x)
    assert_same(net.eval(), small, x)
    assert small.first.out_channels == small.aux[0].in_channels == 5
    found, expected = small.train()(images(2, 3, 8, 8)), net.train()(images(2, 3, 8, 8))
    torch.testing.assert_close(found['aux'], expected['aux'])
    (found['aux'].sum() + found['out'].sum()).backward()
    assert all(parameter.grad is not None for parameter in small.parameters())


@pytest.mark.parametrize('wrap', [nn.DataParallel, torch.compile])
def test_wrapped_networks_are_unwrapped_and_said_so(wrap):
    net = half_dead(between(nn.ReLU()))
    with pytest.warns(UserWarning, match='is taken off'):
        small = shrink(wrap(net), images(1, 3, 8, 8))
    assert type(small) is Between and small.first.out_channels == 4


class Hard(nn.Module):
    """Sizes written down in the code."""

    def __init__(self):
        super().__init__()
        self.free, self.first, self.last = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 1), nn.Linear(8 * 16, 4)

    def forward(self, x):
        x = F.relu(self.first(F.relu(self.free(x))))
        return self.last(x.view(-1, 8 * 16))


def test_what_feeds_a_size_in_the_code_stays_and_the_rest_goes():
    net = half_dead(Hard())
    with torch.no_grad():
        net.free.weight[:3] = net.free.bias[:3] = 0
    x = images(2, 3, 4, 4)
    with pytest.warns(UserWarning, match=r'view \(test_graph.py, line \d+\) names sizes in its code'):
        small = shrink(net, x)
    assert (small.free.out_channels, small.first.out_channels) == (3, 8)
    assert_same(net, small, x)
    (held,) = report(net, x)
    assert held.layer == 'first' and held.filters == DEAD and held.held_by.startswith('view (test_graph.py, line ')
    assert '4 dead filters stay' in str(held) and 'sizes from the tensor' in str(held)


# ------------------------------------------------------------------------------------------------------------ what stays

HELD = {
    'layer_norm': (nn.LayerNorm([8, 8, 8]), 'layer_norm in operation .*reads them all'),
    'group_norm': (nn.GroupNorm(2, 8), 'group_norm in operation .*reads them all'),
    'softmax': (nn.Softmax(1), 'softmax in operation .*needs the dimension as it is'),
    'cumsum': (lambda x: x.cumsum(1), 'cumsum in operation .*needs the dimension as it is'),
    'one channel': (lambda x: x + x[:, 3:4], 'slice in operation .*needs the dimension as it is'),
    'einsum': (lambda x: torch.einsum('bchw,dc->bdhw', x, torch.ones(8, 8)), 'einsum|matmul|bmm'),
    'sort': (lambda x: x.sort(1)[0], 'sort in operation .*needs the dimension as it is'),
    'uneven parts': (lambda x: torch.cat(x.split([3, 5], 1), 1), 'split.* in operation .*needs the dimension as it is'),
    'norm over channels': (lambda x: F.normalize(x, dim=1), 'norm in operation .*needs the dimension as it is'),
}


@pytest.mark.parametrize('name', HELD)
def test_report_names_the_operation_that_holds_dead_filters(name):
    operation, held_by = HELD[name]
    net, x = half_dead(between(operation)), images(2, 3, 8, 8)
    small = shrink(net, x)
    assert_same(net, small, x)
    if small.first.out_channels == 8:
        (held,) = report(net, x)
        assert held.layer == 'first' and held.filters == DEAD
        assert re.search(held_by, held.held_by), held
    else:
        assert not report(net, x)


def test_report_names_the_layers_that_are_not_dead_and_groups_that_are_uneven():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.other, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            return self.last(self.first(x) + self.other(x))

    (held,) = report(half_dead(Sum()), images(1, 3, 8, 8))
    assert held.layer == 'first' and 'other puts out the same channels' in str(held) and 'dependency_groups' in held.remedy
    grouped = half_dead(between(nn.Conv2d(8, 8, 1, groups=2)), [0, 1])
    (held,) = report(grouped, images(1, 3, 8, 8))
    assert held.filters == [0, 1] and 'operation has 2 groups' in str(held)
    assert report(half_dead(between(nn.ReLU())), images(1, 3, 8, 8)) == []


def test_filters_in_front_of_groups_and_halves_come_in_equal_parts():
    net = nn.Sequential(nn.Conv2d(3, 12, 1), nn.BatchNorm2d(12), nn.Conv2d(12, 6, 1, groups=3), nn.Conv2d(6, 4, 1))
    assert even_parts(net, images(1, 3, 8, 8)) == {'0': 3, '2': 3}
    assert even_parts(between(EVERYDAY['chunk']), images(1, 3, 8, 8)) == {'first': 2}
    dead = torch.tensor([0, 5, 9])  # one of each four
    with torch.no_grad():
        for tensor in (net[0].weight, net[0].bias, net[1].weight, net[1].bias):
            tensor[dead] = 0
    small = shrink(net.eval(), images(1, 3, 8, 8))
    assert (small[0].out_channels, small[2].in_channels, small[2].groups) == (9, 9, 3)


# --------------------------------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_read_is_refused_in_a_sentence(capsys):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.conv(x) if x.sum() > 0 else x

    with pytest.raises(ValueError, match='cannot trace Branching.*torch.where'):
        shrink(Branching(), images(1, 3, 8, 8))
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1)))
    with pytest.raises(ValueError, match='layer 0 is parametrized'):
        shrink(normed, images(1, 3, 8, 8))
    printed = capsys.readouterr()
    assert not printed.out and not printed.err


def grouped_network(kind):
    from torchvision import models

    if kind == 'resnext':
        return models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=5, groups=8, width_per_group=4)
    sizes = {'depths': [1, 1], 'widths': [16, 32], 'group_widths': [4, 8]}
    settings = models.regnet.BlockParams(**sizes, bottleneck_multipliers=[1.0, 1.0], strides=[2, 2])
    return models.RegNet(settings, num_classes=5, stem_width=8)


@pytest.mark.parametrize('kind', ['resnext', 'regnet'])
def test_half_of_the_filters_of_grouped_convolutions_really_go(kind):
    """Chosen evenly in each group; chosen freely, the fullest group decides for all."""
    from deploy import decided_together, shrink
    from methods import L1FilterPruner

    width = {}
    for evenly in (True, False):
        torch.manual_seed(0)
        model, x = grouped_network(kind).eval(), images(1, 3, 32, 32)
        groups, parts = decided_together(model, x)
        assert sum(model.get_submodule(name).groups > 1 for name in parts) >= 2
        pruner = L1FilterPruner(model, [{'sparsity': 0.5, 'op_types': ['Conv2d']}])
        pruner.decide_together(groups, parts if evenly else {})
        pruner.compress()
        small = shrink(model, x)
        widths = [sum(net.get_submodule(name).out_channels for name in parts) for net in (small, model)]
        width[evenly] = widths[0] / widths[1]
    assert width[True] < 0.51 and width[False] > width[True] + 0.05


def test_parts_of_a_layer_rank_alike():
    from pruners.selection import even_scores, keep_by_layer

    scores = {'a': torch.tensor([1.0, 2.0, 7.0, 5.0]), 'b': torch.tensor([1.0, 2.0])}
    even = even_scores(scores, {'a': 2})
    assert even['a'].tolist() == [3.0, 4.5, 4.5, 3.0] and torch.equal(even['b'], scores['b'])
    assert keep_by_layer(even, {'a': 0.5, 'b': 0.5})['a'].tolist() == [False, True, True, False]
