"""Smaller networks: by hand on small ones, then every architecture, with outputs equal to those of the masked network."""

import copy
import functools
import inspect
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from helpers import run_main
from torch import nn

import archs
import main as program
from deploy import cutting, formats, latency, network_file, outputs
from deploy.latency import measure_latency
from deploy.shrinking import dependency_groups, rebuild_optimizer, shrink, take
from harness.rebuild import rebuild_run
from harness.shrunk import shrink_run
from pruners.selection import join_groups
from sparse_utils import count_macs


def seeded(*layers):
    torch.manual_seed(0)
    return nn.Sequential(*layers)


def randomized(model, seed=1):
    """Batch norms as after training: no mean, variance, scale or shift is a round number."""
    generator = torch.Generator().manual_seed(seed)
    for norm in [m for m in model.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]:
        norm.running_mean.copy_(torch.randn(norm.num_features, generator=generator) / 3)
        norm.running_var.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
        norm.weight.data.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
        norm.bias.data.copy_(torch.randn(norm.num_features, generator=generator) / 3)
    return model.eval()


@torch.no_grad()
def zero(layer, channels, norm=None):
    """What a filter pruner leaves: filters and their biases zero and, given the norm, also what it emits for them."""
    for tensor in (layer.weight, layer.bias, *([norm.weight, norm.bias] if norm is not None else [])):
        if tensor is not None:
            tensor[channels] = 0


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def assert_same(model, small, x):
    """Equal outputs to 1e-5 of the largest, in eval mode, also for inputs that shrink() has not seen."""
    with torch.no_grad(), outputs.eval_mode(model), outputs.eval_mode(small):
        one, other = model(x), small(x)
    assert one.abs().max() > 1e-3
    torch.testing.assert_close(other, one, rtol=0, atol=1e-5 * float(one.abs().max()))


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


# ------------------------------------------------------------------------------------------------------------ by hand


def test_zero_filters_go_and_all_that_belongs_to_them():
    net = seeded(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1, bias=False))
    net.extend([nn.Flatten(), nn.Linear(5 * 36, 2)])
    zero(net[0], [0, 2], randomized(net)[1])
    zero(net[3], [4])
    net.train()
    before = copy.deepcopy(net.state_dict())
    x = images(2, 3, 6, 6)
    small, kept = shrink(net, x, return_kept=True)
    assert_same(net, small, x)
    assert [tuple(small[i].weight.shape) for i in (0, 1, 3, 5)] == [(2, 3, 3, 3), (2,), (4, 2, 3, 3), (2, 4 * 36)]
    assert torch.equal(small[0].weight, net[0].weight[[1, 3]]) and torch.equal(small[1].running_var, net[1].running_var[[1, 3]])
    assert torch.equal(small[3].weight, net[3].weight[:4][:, [1, 3]]) and torch.equal(small[5].weight, net[5].weight[:, :144])
    assert (small[0].out_channels, small[1].num_features, small[3].in_channels, small[5].in_features) == (2, 2, 2, 144)
    assert small[3].bias is None and small.training and list(small.state_dict()) == list(net.state_dict())
    assert net.training and all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    state = net.state_dict()
    assert set(kept) == {f'{i}.{key}' for i, keys in ((0, 'wb'), (1, 'wbrv'), (3, 'w'), (5, 'w')) for key in names(keys)}
    assert all(torch.equal(take(state[name], part), small.state_dict()[name]) for name, part in kept.items())


def names(keys):
    return [{'w': 'weight', 'b': 'bias', 'r': 'running_mean', 'v': 'running_var'}[key] for key in keys]


def test_a_network_without_zeros_stays_as_it_is():
    net = randomized(archs.build('resnet20', 5, width=4))
    small, kept = shrink(net, images(1, 3, 8, 8), return_kept=True)
    assert kept == {} and small is not net and str(small) == str(net)
    assert all(torch.equal(tensor, small.state_dict()[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize(('padding', 'mode'), [(0, 'zeros'), (1, 'reflect'), ('valid', 'zeros'), ('same', 'circular')])
def test_a_constant_goes_into_the_bias_of_a_convolution_without_zero_padding(padding, mode):
    net = seeded(
        nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=padding, padding_mode=mode, bias=False), nn.Flatten()
    )
    zero(net[0], [0, 1])
    net[0].bias.data[:2] = torch.tensor([2.0, -1.0])  # filter 0 emits 2, filter 1 after ReLU nothing
    small = shrink(net, images(2, 3, 6, 6))
    assert tuple(small[2].weight.shape) == (2, 1, 3, 3)
    torch.testing.assert_close(small[2].bias, 2 * net[2].weight[:, 0].sum((1, 2)))
    assert_same(net, small, images(2, 3, 6, 6))


def test_a_constant_goes_into_the_bias_of_a_linear_layer_through_flattening():
    net = randomized(seeded(nn.Conv2d(3, 2, 3, padding=1), nn.BatchNorm2d(2), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(18, 4)))
    zero(net[0], [0])
    constant = net[1].bias[0] - net[1].weight[0] * net[1].running_mean[0] / (net[1].running_var[0] + 1e-5).sqrt()
    small = shrink(net, images(2, 3, 6, 6))
    assert small[4].in_features == 9 and torch.equal(small[4].weight, net[4].weight[:, 9:])
    torch.testing.assert_close(small[4].bias, net[4].bias + constant * net[4].weight[:, :9].sum(1))
    assert_same(net, small, images(2, 3, 6, 6))


def test_before_zero_padding_one_constant_stands_for_the_others():
    net = seeded(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 3, padding=1))
    zero(net[0], [0, 1, 2])
    net[0].bias.data[:3] = torch.tensor([1.0, -4.0, 0.0])
    small = shrink(net, images(2, 3, 6, 6))
    assert torch.equal(small[0].bias, net[0].bias[[1, 3]])  # the constants 1 and -4 differ at the border from inside
    torch.testing.assert_close(small[1].weight[:, 0], net[1].weight[:, 1] - net[1].weight[:, 0] / 4)
    assert torch.equal(small[1].bias, net[1].bias)
    assert_same(net, small, images(2, 3, 6, 6))


@pytest.mark.parametrize(
    ('pool', 'kept'), [(nn.AvgPool2d(3, 1), 1), (nn.AvgPool2d(3, 1, padding=1), 2), (nn.MaxPool2d(3, 1, 1), 1)]
)
def test_pooling_keeps_a_constant_except_over_padding_with_zeros(pool, kept):
    net = seeded(nn.Conv2d(3, 2, 1), pool, nn.Flatten(), nn.LazyLinear(2))
    x = images(2, 3, 5, 5)
    net(x)
    zero(net[0], [0])
    net[0].bias.data[0] = 1
    small = shrink(net, x)
    assert small[0].out_channels == kept
    assert_same(net, small, x)


POINTWISE = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid),
    *(nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softplus),
)
SPATIAL = (
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.Upsample, nn.ReflectionPad2d, nn.ReplicationPad2d),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.ZeroPad2d),
)


@pytest.mark.parametrize('layer', [*POINTWISE, *SPATIAL])
def test_every_layer_that_lets_channels_pass_makes_of_a_constant_what_was_foreseen(layer):
    arguments = {'Adaptive': (3,), 'MaxPool': (2,), 'AvgPool': (2,), 'Upsample': (6,), 'Pad2d': (1,)}
    layer = layer(*next((value for key, value in arguments.items() if key in layer.__name__), ()))
    dims = next((d for d in (1, 3) if f'{d}d' in type(layer).__name__), 2)
    conv, norm = {1: (nn.Conv1d, nn.BatchNorm1d), 2: (nn.Conv2d, nn.BatchNorm2d), 3: (nn.Conv3d, nn.BatchNorm3d)}[dims]
    net = randomized(seeded(conv(3, 5, 1), norm(5), layer, conv(5, 4, 1), nn.Flatten()))
    zero(net[0], [0, 1, 3])
    x = images(2, 3, *[5] * dims)
    small = shrink(net, x)
    padding = isinstance(layer, nn.ZeroPad2d)  # the constants differ from the border, but may be one channel's only
    assert small[0].out_channels == (5 if padding else 2)
    assert_same(net, small, x)


def test_filters_that_nobody_reads_go_and_what_only_they_read():
    net = seeded(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(4)))
    net[3].weight.data[:, 1] = 0
    net[2].weight.data[:1, 3] = net[2].weight.data[2:, 3] = 0  # filter 3 of layer 1 is read by filter 1 of layer 2 alone
    net[1].weight.data[:3, :2] = 0
    small = shrink(net, images(2, 4, 6, 6))
    assert [(conv.in_channels, conv.out_channels) for conv in small] == [(4, 2), (2, 3), (3, 3), (3, 4)]
    assert_same(net, small, images(2, 4, 6, 6))


def test_a_dead_layer_keeps_one_filter_and_the_network_stays_exact():
    net = randomized(
        seeded(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.Flatten(), nn.Linear(32, 3))
    )
    zero(net[0], slice(None))
    small = shrink(net, images(2, 3, 6, 6))
    assert (
        small[0].out_channels == small[1].num_features == small[3].in_channels == small[3].groups == small[3].out_channels == 1
    )
    assert_same(net, small, images(2, 3, 6, 6))
    assert shrink(net, images(2, 3, 6, 6), round_to=4)[0].out_channels == 4


class Block(nn.Module):
    """Two summands of a residual stream, and a reader; `merge` says how the summands meet."""

    def __init__(self, merge=torch.add):
        super().__init__()
        self.one, self.two, self.three = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 3)
        self.merge = merge

    def forward(self, x):
        return self.three(self.merge(self.one(x), self.two(x)))


def test_a_residual_stream_loses_what_is_zero_in_all_summands():
    torch.manual_seed(0)
    net = Block()
    zero(net.one, [0, 1, 2])
    zero(net.two, [1, 2, 5])
    small = shrink(net, images(2, 3, 6, 6))
    assert small.one.out_channels == small.two.out_channels == small.three.in_channels == 4
    assert torch.equal(small.two.weight, net.two.weight[[0, 3, 4, 5]])
    assert_same(net, small, images(2, 3, 6, 6))
    assert dependency_groups(net, images(1, 3, 6, 6)) == [['one', 'two']]


def test_a_gated_stream_loses_what_is_zero_in_any_factor():
    torch.manual_seed(0)
    net = Block(lambda one, two: one * two.mean((2, 3), keepdim=True).relu())
    zero(net.one, [0, 1, 2])
    zero(net.two, [1, 2, 5])
    small = shrink(net, images(2, 3, 6, 6))
    assert small.one.out_channels == small.two.out_channels == small.three.in_channels == 2
    assert_same(net, small, images(2, 3, 6, 6))


class Concatenated(nn.Module):
    """(a | b) + c is read by d: c's filters belong to those of a or b; and one part is used twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 5, 1)
        self.d, self.e = nn.Conv2d(5, 4, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        return self.d(torch.cat([a, b], 1) + self.c(x)) + self.e(torch.cat((b, a, b), dim=-3))


def test_concatenation_counts_channel_by_channel():
    torch.manual_seed(0)
    net = Concatenated()
    zero(net.a, [0])
    zero(net.b, [0, 2])
    zero(net.c, [0, 1, 4])  # so channel 0 of a and channel 2 of b are dead, and channel 0 of b lives on in c
    x = images(2, 3, 6, 6)
    small = shrink(net, x)
    layers = (small.a, small.b, small.c, small.d, small.e)
    assert [(conv.in_channels, conv.out_channels) for conv in layers] == [(3, 1), (3, 2), (3, 3), (3, 4), (5, 4)]
    assert torch.equal(small.e.weight, net.e.weight[:, [0, 1, 4, 5, 6]])
    assert_same(net, small, x)
    assert dependency_groups(net, x) == [['d', 'e']]  # c shares its filters with two layers, each a part of them


def test_depthwise_convolutions_follow_also_with_a_multiplier():
    net = seeded(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3, groups=4, padding=1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 3, 1))
    zero(net[0], [1])  # its own bias of zero goes through, that of its depthwise filters stays: they are constants
    zero(net[2], [0, 1])
    small = shrink(net, images(2, 3, 9, 9))
    shapes = [(conv.in_channels, conv.out_channels, conv.groups) for conv in small]
    assert shapes == [(3, 2, 1), (2, 4, 2), (4, 4, 4), (4, 3, 1)]
    assert torch.equal(small[1].weight, net[1].weight[4:]) and torch.equal(small[3].weight, net[3].weight[:, 4:])
    assert_same(net, small, images(2, 3, 9, 9))


def test_a_convolution_of_one_input_channel_is_no_depthwise_one():
    net = seeded(nn.Conv2d(1, 6, 3), nn.Conv2d(6, 1, 1), nn.Conv2d(1, 4, 3), nn.Conv2d(4, 1, 1), nn.Conv2d(1, 1, 1))
    zero(net[0], [0, 3])
    zero(net[2], [1])
    small = shrink(net, images(2, 1, 8, 8))
    shapes = [(conv.in_channels, conv.out_channels, conv.groups) for conv in small]
    assert shapes == [(1, 4, 1), (4, 1, 1), (1, 3, 1), (3, 1, 1), (1, 1, 1)]
    assert_same(net, small, images(2, 1, 8, 8))


def test_grouped_convolutions_keep_equal_groups():
    net = seeded(nn.Conv2d(3, 9, 3), nn.Conv2d(9, 6, 3, groups=3), nn.Conv2d(6, 2, 1))
    zero(net[0], [0, 1, 3])  # the groups lose 2, 1 and 0 of 3 inputs: all keep 3
    small = shrink(net, images(2, 3, 7, 7))
    assert (small[0].out_channels, small[1].groups) == (9, 3)
    zero(net[0], [0, 1, 3, 5, 8])  # 2, 2 and 1 of 3: all keep 2, the first and second with a dead one
    zero(net[1], [0, 2, 5])  # 1 of 2 filters in each
    small = shrink(net, images(2, 3, 7, 7))
    assert [(c.in_channels, c.out_channels, c.groups) for c in small] == [(3, 6, 1), (6, 3, 3), (3, 2, 1)]
    assert torch.equal(small[0].weight, net[0].weight[[0, 2, 3, 4, 6, 7]])
    assert torch.equal(small[1].weight[0], net[1].weight[1][[0, 2]]) and torch.equal(small[1].weight[2], net[1].weight[4][:2])
    assert_same(net, small, images(2, 3, 7, 7))
    zero(net[1], [2, 3])  # a group whose filters are all dead goes, and its inputs with it
    small, kept = shrink(net, images(2, 3, 7, 7), return_kept=True)
    assert [(c.in_channels, c.out_channels, c.groups) for c in small] == [(3, 4, 1), (4, 2, 2), (2, 2, 1)]
    assert torch.equal(take(net[1].weight, kept['1.weight']), small[1].weight)
    assert_same(net, small, images(2, 3, 7, 7))


def test_transposed_convolutions_and_one_and_three_dimensions():
    net = seeded(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 6, 3, stride=2), nn.Conv2d(6, 2, 1), nn.ReLU())
    zero(net[0], [1, 2])
    net[0].bias.data[[1, 2]] = torch.tensor([1.0, 2.0])  # constants, but not at the border of what is transposed
    net[1].weight.data[:, 3] = net[1].bias.data[3] = 0
    small = shrink(net, images(2, 3, 7, 7))
    assert tuple(small[1].weight.shape) == (3, 5, 3, 3) and small[2].in_channels == 5
    assert_same(net, small, images(2, 3, 7, 7))
    for conv, norm, shape in ((nn.Conv1d, nn.BatchNorm1d, (2, 3, 9)), (nn.Conv3d, nn.BatchNorm3d, (2, 3, 5, 5, 5))):
        net = seeded(conv(3, 5, 3, padding=1), norm(5), nn.ReLU(), conv(5, 2, 3)).eval()
        zero(net[0], [0, 4], net[1])
        small = shrink(net, images(*shape))
        assert small[0].out_channels == 3
        assert_same(net, small, images(*shape))


def test_norms_of_scale_zero_are_dead_whatever_their_filters_are():
    net = randomized(seeded(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 3, padding=1)))
    net[1].weight.data[:4] = 0
    net[1].bias.data[:4] = torch.tensor([0.0, -1.0, 0.5, 1.0])  # emits 0, 0, and two constants of which one has to stay
    small = shrink(net, images(2, 3, 8, 8))
    assert torch.equal(small[1].bias, net[1].bias[3:])
    assert_same(net, small, images(2, 3, 8, 8))


class Fixed(nn.Module):
    """Shapes as numbers, a slice of channels, a layer used twice, a group norm: operations that need their channels."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.conv, self.norm = kind, nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.twice, self.last = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 1)
        self.weight = nn.Parameter(torch.randn(4, 4, 1, 1))

    def forward(self, x):
        x = self.conv(x)
        if self.kind == 'view':
            x = x.view(-1, 4, 36).view(x.size(0), 4, 6, 6)
        elif self.kind == 'slice':
            x = torch.cat([x[:, 2:], x[:, :2]], 1)
        elif self.kind == 'twice':
            x = self.twice(self.twice(x))
        elif self.kind == 'norm':
            x = self.norm(x)
        elif self.kind == 'softmax':
            x = x.softmax(1)
        else:
            x = x * self.weight[:, 0]
        return self.last(x)


@pytest.mark.parametrize('kind', ['view', 'slice', 'twice', 'norm', 'softmax'])
@pytest.mark.filterwarnings('ignore:.*names sizes')
def test_an_operation_that_needs_its_channels_keeps_them(kind):
    torch.manual_seed(0)
    net = Fixed(kind)
    zero(net.conv, [0, 1])
    small = shrink(net, images(2, 3, 6, 6))
    assert small.conv.out_channels == 4
    assert_same(net, small, images(2, 3, 6, 6))


def test_a_bare_parameter_is_cut_with_the_channels_that_it_scales():
    torch.manual_seed(0)
    net = Fixed('weight')
    zero(net.conv, [0, 1])
    small, kept = shrink(net, images(2, 3, 6, 6), return_kept=True)
    assert small.conv.out_channels == small.last.in_channels == 2
    assert torch.equal(small.weight, net.weight[2:]) and torch.equal(take(net.weight, kept['weight']), small.weight)
    assert_same(net, small, images(2, 3, 6, 6))


def test_tied_weights_keep_their_channels():
    net = seeded(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 1))
    net[2].weight = net[0].weight
    zero(net[0], [1])
    zero(net[2], [1])
    small = shrink(net, images(1, 4, 8, 8))
    assert small[0].out_channels == small[2].in_channels == 4
    assert_same(net, small, images(1, 4, 8, 8))


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x = before = self.one(x)
        x += 1  # and so `before` too
        return self.two(x) + self.three(before)


class Branching(nn.Conv2d):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


def test_an_operation_in_place_is_seen_under_all_names():
    net, x = InPlace(), images(1, 3, 6, 6)
    assert_same(net, shrink(net, x), x)
    zero(net.one, [0])
    small = shrink(net, x)
    assert small.one.out_channels == small.two.in_channels == small.three.in_channels == 3
    assert_same(net, small, x)


def test_what_cannot_be_done_is_refused_with_a_reason():
    net, x = InPlace(), images(1, 3, 6, 6)
    with pytest.raises(ValueError, match='round_to must be 1'):
        shrink(net, x, round_to=0)
    nn.utils.parametrize.register_parametrization(net.two, 'weight', nn.Identity())
    with pytest.raises(ValueError, match='layer two is parametrized'):
        shrink(net, x)
    with pytest.raises(ValueError, match='cannot trace Sequential'):
        shrink(nn.Sequential(Branching(3, 4, 3)), x)


def test_outputs_are_compared_before_a_network_is_given_out(monkeypatch):
    net = seeded(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1))
    zero(net[0], [0])
    net[0].bias.data[0] = 1
    monkeypatch.setattr(cutting, '_absorb', lambda network, decision, reader: {})
    with pytest.raises(ValueError, match='would differ by .* of the largest output'):
        shrink(net, torch.zeros(1, 3, 6, 6))


def test_half_precision_is_no_reason_to_refuse():
    net = randomized(archs.build('resnet20', 5, width=8))
    zero(net.stage1[0].conv1, [0, 1, 2])
    small = shrink(net.to(torch.bfloat16), images(2, 3, 8, 8).to(torch.bfloat16))
    assert small.stage1[0].conv1.weight.shape[0] == 6 and small.stage1[0].conv1.weight.dtype == torch.bfloat16


# --------------------------------------------------------------------------------------------------- every architecture


ARCHS = ['resnet20', 'mobilenet_v1', 'densenet', 'wrn16_2', 'vgg16', 'lenet300_100']
TORCHVISION = ['resnet18', 'resnet50', 'mobilenet_v2', 'densenet121', 'vgg16_bn']


def network(name):
    torch.manual_seed(0)
    if name in ARCHS:
        return archs.build(name, 10), images(2, 3, 32, 32)
    models = pytest.importorskip('torchvision.models')
    if name != 'vgg16_bn':
        return getattr(models, name)(), images(2, 3, 32, 32)
    with torch.device('meta'):
        net = models.vgg16_bn(init_weights=False)
    net.avgpool, net.classifier[0] = nn.AdaptiveAvgPool2d(2), nn.Linear(512 * 4, 4096)  # of 7x7: a fifth of the weights
    net.features, net.classifier = net.features.to_empty(device='cpu'), net.classifier.to_empty(device='cpu')
    for layer in net.modules():
        if hasattr(layer, 'reset_parameters'):
            layer.reset_parameters()
    return net, images(2, 3, 32, 32)


def filters(model):
    """{name: layer} of convolutions, or of linear layers but the last where there is no convolution."""
    convs = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
    return convs or dict([pair for pair in model.named_modules() if isinstance(pair[1], nn.Linear)][:-1])


def norms_after(model):
    """{layer name: the batch norm that follows it}."""
    modules, found = dict(model.named_modules()), {}
    for node in network_file.trace(model).nodes:
        if node.op == 'call_module' and isinstance(modules[node.target], nn.BatchNorm2d):
            found[str(node.args[0].target)] = modules[node.target]
    return found


def masked(model, groups, with_norms=True):
    """Zero a random 30 to 60 % of the filters of each layer, alike within each group -> {layer name: bool mask}."""
    generator, masks, norms = torch.Generator().manual_seed(5), {}, norms_after(model)
    layers = filters(model)
    scores = join_groups({name: torch.rand(len(layer.weight), generator=generator) for name, layer in layers.items()}, groups)
    for name, layer in layers.items():
        share = 0.3 + 0.3 * float(scores[name].double().sum() % 1)  # the same for layers of the same scores
        masks[name] = scores[name] > scores[name].quantile(share)
        zero(layer, ~masks[name], norms.get(name) if with_norms else None)
    return masks


def check(model, small, x):
    assert_same(model, small, images(3, *x.shape[1:]))
    macs = [sum(dense for dense, _ in count_macs(net, x).values()) for net in (model, small)]
    assert macs[1] < 0.85 * macs[0] and parameters(small) < 0.85 * parameters(model)
    small.train()(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())
    return parameters(small)


@pytest.mark.parametrize('name', [*ARCHS, *TORCHVISION])
def test_groups_that_agree_lose_every_zero_filter(name):
    model, x = network(name)
    masks = masked(randomized(model), dependency_groups(model, x, depthwise=True))
    small = shrink(model, x)
    spare = 2 if name == 'wrn16_2' else 0  # norms before the convolutions make constants of dead channels; see below
    for layer, mask in masks.items():
        assert int(mask.sum()) <= len(small.get_submodule(layer).weight) <= int(mask.sum()) + spare, layer
    check(model, small, x)


@pytest.mark.parametrize('name', [*ARCHS, *TORCHVISION[:-1]])
def test_groups_that_disagree_keep_the_union(name):
    model, x = network(name)
    groups = dependency_groups(model, x)
    masks = masked(randomized(model), [])
    small = shrink(model, x)
    spare = 2 if name == 'wrn16_2' else 0
    for group in groups:
        union = torch.stack([masks[layer] for layer in group]).any(0)
        for layer in group:
            assert int(union.sum()) <= len(small.get_submodule(layer).weight) <= int(union.sum()) + spare, layer
    if groups:  # in a stage of many blocks the union is nearly everything
        assert_same(model, small, x)
    else:
        check(model, small, x)


@pytest.mark.parametrize('name', [name for name in [*ARCHS, *TORCHVISION[:-1]] if name != 'lenet300_100'])
def test_shifts_that_dead_filters_still_emit_are_kept(name):
    model, x = network(name)
    masks = masked(randomized(model), dependency_groups(model, x, depthwise=True), with_norms=False)
    small = shrink(model, x)
    for layer, mask in masks.items():  # at most a constant for each layer that pads
        assert len(small.get_submodule(layer).weight) <= int(mask.sum()) + 3, layer
    check(model, small, x)


@pytest.mark.parametrize('name', ['resnet20', 'mobilenet_v1', 'densenet', 'mobilenet_v2'])
def test_counts_are_rounded_up_to_multiples(name):
    model, x = network(name)
    masks = masked(randomized(model), dependency_groups(model, x, depthwise=True))
    small = shrink(model, x, round_to=8)
    for layer, mask in masks.items():
        width = len(small.get_submodule(layer).weight)
        assert width == min(-(-int(mask.sum()) // 8) * 8, len(mask)), layer
    check(model, small, x)


@pytest.mark.parametrize('name', ['resnet18', 'mobilenet_v2', 'vgg16', 'densenet'])
def test_torch_pruning_leaves_as_many_parameters(name):
    pruning = pytest.importorskip('torch_pruning')
    model, x = network(name)
    groups = dependency_groups(model, x, depthwise=True)
    masks = masked(randomized(model), groups)
    small = shrink(model, x)
    graph = pruning.DependencyGraph().build_dependency(model, x)
    done = set()
    for layer, mask in masks.items():
        if layer not in done:
            done |= {name for group in groups if layer in group for name in group}
            dead = (~mask).nonzero().view(-1).tolist()
            graph.get_pruning_group(model.get_submodule(layer), pruning.prune_conv_out_channels, dead).prune()
    weights = [sum(p.numel() for p in net.parameters() if p.dim() > 1) for net in (model, small)]
    assert weights[0] == weights[1]  # not all parameters: constants of dead channels may have made biases


def test_a_small_network_is_saved_and_loaded(tmp_path):
    model, x = network('densenet')
    masked(randomized(model), [])
    small = shrink(model, x)
    network_file.save(small, tmp_path / 'small', x)
    assert_same(model, network_file.load(tmp_path / 'small'), x)


# -------------------------------------------------------------------------------------------------------- dependency groups


def test_the_groups_that_nni_expects():
    models = pytest.importorskip('torchvision.models')
    x = images(1, 3, 32, 32)
    resnet, mobilenet = models.resnet18(), models.mobilenet_v2()
    assert dependency_groups(resnet, x) == [
        ['conv1', 'layer1.0.conv2', 'layer1.1.conv2'],
        *[[f'layer{i}.0.conv2', f'layer{i}.0.downsample.0', f'layer{i}.1.conv2'] for i in (2, 3, 4)],
    ]
    stages = [(2, 3), (4, 5, 6), (7, 8, 9, 10), (11, 12, 13), (14, 15, 16)]
    assert dependency_groups(mobilenet, x) == [[f'features.{i}.conv.2' for i in stage] for stage in stages]
    both = dependency_groups(mobilenet, x, depthwise=True)
    assert ['features.3.conv.0.0', 'features.3.conv.1.0'] in both and ['features.0.0', 'features.1.conv.0.0'] in both
    assert dependency_groups(models.squeezenet1_1(), x) == [] == dependency_groups(network('vgg16_bn')[0], x)


def test_the_groups_of_our_networks():
    x = images(1, 3, 32, 32)
    groups = dependency_groups(archs.build('resnet20', 10, width=4), x)
    assert groups[0] == ['conv1', 'stage1.0.conv2', 'stage1.1.conv2', 'stage1.2.conv2']
    assert groups[1] == ['stage2.0.conv2', 'stage2.0.shortcut.0', 'stage2.1.conv2', 'stage2.2.conv2'] and len(groups) == 3
    for name in ('vgg16', 'densenet', 'lenet300_100', 'mobilenet_v1'):
        assert dependency_groups(archs.build(name, 10), x) == []


def test_scores_are_averaged_and_masks_united_within_a_group():
    scores = {'a': torch.tensor([1.0, 5.0, 2.0]), 'b': torch.tensor([4.0, 0.0, 3.0]), 'c': torch.tensor([7.0])}
    agreed = join_groups(scores, [['a', 'b'], ['c', 'not pruned']])
    assert agreed['a'].tolist() == agreed['b'].tolist() == [2.5, 2.5, 2.5] and agreed['c'].tolist() == [7.0]
    assert scores['a'].tolist() == [1.0, 5.0, 2.0] and agreed['a'] is not agreed['b']
    masks = {'a': torch.tensor([True, False, False]), 'b': torch.tensor([False, False, True])}
    assert join_groups(masks, [['b', 'a']])['a'].tolist() == [True, False, True] and list(join_groups(masks, [['b', 'a']])) == [
        'a',
        'b',
    ]
    with pytest.raises(ValueError, match='a, c must have the same number'):
        join_groups(scores, [['a', 'c']])


# ------------------------------------------------------------------------------------------------------ training on, time


OPTIMIZERS = {
    'sgd': lambda groups: torch.optim.SGD(groups, 0.1, momentum=0.9, nesterov=True),
    'adam': lambda groups: torch.optim.Adam(groups, 0.01, amsgrad=True),
    'adamw': lambda groups: torch.optim.AdamW(groups, 0.01),
}


def step(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(8, 3, 8, 8, generator=generator), torch.randint(0, 5, (8,), generator=generator)
    optimizer.zero_grad()
    F.cross_entropy(model.train()(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_training_goes_on_as_if_nothing_had_been_removed(optimizer):
    torch.manual_seed(0)
    model = randomized(archs.build('resnet20', 5, width=8)).double()
    masked(model, dependency_groups(model, images(1, 3, 8, 8).double()))
    model.requires_grad_()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    groups = [{'params': decayed, 'weight_decay': 1e-3}, {'params': plain, 'weight_decay': 0.0, 'lr': 0.02}]
    old = OPTIMIZERS[optimizer](groups)
    torch.set_default_dtype(torch.float64)
    try:
        for seed in range(2):
            step(model, old, seed)
        small, kept = shrink(model, images(1, 3, 8, 8), return_kept=True)
        new = rebuild_optimizer(old, model, small, kept)
        assert type(new) is type(old) and [len(g['params']) for g in new.param_groups] == [len(g['params']) for g in groups]
        live = {id(parameter) for group in new.param_groups for parameter in group['params']}
        assert live == {id(parameter) for parameter in small.parameters()} and len(new.state) == len(live)
        for seed in range(2, 5):
            step(model, old, seed)
            step(small, new, seed)
    finally:
        torch.set_default_dtype(torch.float32)
    assert parameters(small) < 0.7 * parameters(model)
    own = dict(small.named_parameters())
    for name, parameter in model.named_parameters():
        expected = take(parameter, kept[name]) if name in kept else parameter
        torch.testing.assert_close(own[name], expected, rtol=1e-6, atol=1e-9, msg=name)


def test_a_new_bias_is_trained_and_what_was_frozen_stays_so():
    net = seeded(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1, bias=False), nn.Flatten(), nn.Linear(32, 2))
    zero(net[0], [0])
    net[0].bias.data[0] = 1
    net[4].requires_grad_(False)
    optimizer = torch.optim.SGD(
        [{'params': [net[0].weight, net[2].weight], 'weight_decay': 0.1}, {'params': [net[0].bias]}], lr=0.5, momentum=0.9
    )
    small, kept = shrink(net, images(2, 3, 6, 6), return_kept=True)
    new = rebuild_optimizer(optimizer, net, small, kept)
    assert [[id(p) for p in group['params']] for group in new.param_groups] == [
        [id(small[0].weight), id(small[2].weight)],
        [id(small[0].bias), id(small[2].bias)],
    ]
    assert new.param_groups[0]['weight_decay'] == 0.1 and not small[4].weight.requires_grad and small[2].bias.requires_grad
    before = small[2].bias.detach().clone()
    small(images(2, 3, 6, 6)).square().sum().backward()
    new.step()
    assert (
        not torch.equal(small[2].bias, before) and len(optimizer.state) == 0 and len(optimizer.param_groups[1]['params']) == 1
    )
    with pytest.raises(ValueError, match='not in the old model'):
        rebuild_optimizer(new, net, small, kept)


ALL_OPTIMIZERS = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
}
OTHER_FORMS = {
    'SGD': [{'momentum': 0.9, 'nesterov': True}, {'momentum': 0.9, 'fused': True}],
    'Adam': [{'amsgrad': True}, {'fused': True}, {'foreach': True}],
    'AdamW': [{'amsgrad': True}, {'fused': True}],
    'RMSprop': [{'centered': True, 'momentum': 0.5}],
    'Adagrad': [{'fused': True}],
}


def three_layers():
    """A network in which a plain, a grouped and a transposed convolution lose filters, and a sparse table of words."""
    net = seeded(
        *(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3, groups=2), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3), nn.Flatten()),
        *(nn.Linear(4 * 36, 5), nn.Unflatten(1, (5, 1))),
    )
    zero_filters(net)
    return net


def zero_filters(net):
    zero(net[0], [1, 3])
    zero(net[2], [0, 5])
    net[4].weight.data[:, 2] = 0
    net[4].bias.data[2] = 0


@pytest.mark.parametrize('name', sorted(set(ALL_OPTIMIZERS) - {'SparseAdam', 'Adafactor', 'LBFGS'}))
def test_every_optimizer_of_torch_goes_on_as_if_nothing_had_been_cut(name):
    """A step before the cut and two after it: the smaller network trains to the same weights as the whole one."""
    for form in [{}, *OTHER_FORMS.get(name, [])]:
        net = three_layers()
        trained = [parameter for parameter in net.parameters() if name != 'Muon' or parameter.dim() == 2]
        old = ALL_OPTIMIZERS[name](trained, lr=0.01, **form)
        train_a_step(net, old)
        zero_filters(net)
        small, kept = shrink(net, images(2, 3, 8, 8), return_kept=True)
        assert parameters(small) < parameters(net)
        new = rebuild_optimizer(old, net, small, kept)
        assert {key for key in vars(old) if key.startswith('_step')} <= vars(new).keys()  # fused ones are known to scalers
        for seed in (1, 2):
            train_a_step(net, old, seed)
            train_a_step(small, new, seed)
            zero_filters(net)
        own = dict(small.named_parameters())
        for key, parameter in net.named_parameters():
            expected = take(parameter, kept[key]) if key in kept else parameter
            if key != '6.weight' or name != 'Muon':  # orthogonalised as a whole, so that it depends on what was cut
                torch.testing.assert_close(own[key], expected, rtol=1e-4, atol=1e-5, msg=f'{key} under {form}')


def train_a_step(net, optimizer, seed=0):
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    net.train()(x).square().mean().backward()
    optimizer.step()


def test_a_sparse_optimizer_keeps_its_table():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.f, self.g = nn.Embedding(7, 3, sparse=True), nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, words):
            return self.g(F.relu(self.f(self.table(words))))

    torch.manual_seed(0)
    net, words = Words(), torch.tensor([1, 2, 5])
    zero(net.f, [2])
    old = torch.optim.SparseAdam(net.table.parameters(), lr=0.01)
    net(words).sum().backward()
    old.step()
    small, kept = shrink(net, words, return_kept=True)
    new = rebuild_optimizer(old, net, small, kept)
    for network, optimizer in ((net, old), (small, new)):
        network.zero_grad()
        network(words).sum().backward()
        optimizer.step()
    torch.testing.assert_close(small.table.weight, net.table.weight)


class Around(torch.optim.SGD):
    """An optimizer that steps with another one."""

    def __init__(self, params):
        params = list(params)
        super().__init__(params, 0.1)
        self.inner = torch.optim.SGD(params, 0.1)


@pytest.mark.parametrize(
    ('make', 'sentence'),
    [
        (
            torch.optim.Adafactor,
            r'Adafactor keeps row_var of 0.weight in the shape \(6, 3, 3, 1\), which cannot be cut like the',
        ),
        (torch.optim.LBFGS, 'LBFGS keeps tensors that cannot be cut: make a new one for the smaller network'),
        (Around, "this Around steps with another optimizer, 'inner': rebuild that one"),
    ],
)
def test_optimizers_that_cannot_be_cut_are_refused_and_left_alone(make, sentence):
    net = three_layers()
    old = make(net.parameters())
    net(images(2, 3, 8, 8)).sum().backward()
    old.step(lambda: net(images(2, 3, 8, 8)).sum()) if make is torch.optim.LBFGS else old.step()
    zero_filters(net)
    small, kept = shrink(net, images(2, 3, 8, 8), return_kept=True)
    before = copy.deepcopy(old.state_dict())
    with pytest.raises(ValueError, match=sentence):
        rebuild_optimizer(old, net, small, kept)
    assert str(old.state_dict()) == str(before)


def test_an_optimizer_that_knows_names_learns_that_of_a_new_bias():
    net = seeded(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1, bias=False), nn.Flatten(), nn.Linear(32, 2))
    zero(net[0], [0])
    net[0].bias.data[0] = 1
    old = torch.optim.SGD(net.named_parameters(), 0.1)
    small, kept = shrink(net, images(2, 3, 6, 6), return_kept=True)
    new = rebuild_optimizer(old, net, small, kept)
    assert new.param_groups[0]['param_names'][-1] == '2.bias' and new.param_groups[0]['params'][-1] is small[2].bias
    assert len(old.param_groups[0]['param_names']) == len(old.param_groups[0]['params']) == 5
    new.load_state_dict(new.state_dict())


class Recorder(nn.Linear):
    def forward(self, x):
        self.calls.append((self.name, len(x), self.training, torch.is_grad_enabled(), torch.get_num_threads()))
        return super().forward(x)


def test_latency_is_measured_in_turns_and_leaves_everything_as_it_was(monkeypatch):
    monkeypatch.setattr(latency, 'WARM_UP', 3)
    monkeypatch.setattr(latency, 'FEWEST', 5)
    calls = []
    small, dense = Recorder(4, 4).train(), Recorder(4, 4).eval()
    for name, net in (('small', small), ('dense', dense)):
        net.name, net.calls = name, calls
    result = measure_latency(small, torch.randn(3, 4), batches=(1, 32), threads=2, dense=dense, seconds=0.0)
    assert list(result) == ['ms_1', 'dense_ms_1', 'ms_32', 'dense_ms_32'] and all(value > 0 for value in result.values())
    assert calls == [call for batch in (1, 32) for _ in range(8) for call in turn(batch)]
    assert small.training and not dense.training and torch.get_num_threads() == 1
    assert list(measure_latency(small, torch.randn(1, 4), batches=(2,), seconds=0)) == ['ms_2']


def turn(batch):
    return [(name, batch, False, False, 2) for name in ('small', 'dense')]


# ------------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A finished run whose network then lost filters, as if a filter method had pruned it."""
    folder = tmp_path_factory.mktemp('run') / 'run'
    run_main(folder, '--method=dense', '--epochs=1', '--width=8')
    model, example = rebuild_run(folder)
    masked(model, dependency_groups(model, example))
    torch.save(model.state_dict(), folder / 'model.pt')
    return folder, model


def test_a_run_is_shrunk_and_its_files_hold_the_same_network(run, capsys, monkeypatch):
    folder, model = run
    monkeypatch.setattr(latency, 'measure_latency', functools.partial(measure_latency, seconds=0))
    result = shrink_run(folder, pt2=True, torchscript=True, threads=1)
    x = images(3, 1, 8, 8)
    small = network_file.load(folder / 'small')
    assert_same(model, small, x)
    for name in ('small.pt2', 'small.ts'):
        assert_same_program(model, formats.read(folder / name, trust=True), x)
    assert result['dense_parameters'] == parameters(model) > parameters(small) == result['small_parameters']
    assert result['small_macs'] < result['dense_macs'] and result['small_ms_32'] > 0 and small.info['run'] == 'run'
    printed = capsys.readouterr().out
    assert f'{parameters(small):,} parameters' in printed and 'batch of 32' in printed and 'small.json' in printed
    assert json.loads(json.dumps(result)) == result and not (folder / 'small.onnx').exists()


def assert_same_program(model, program, x):
    with torch.no_grad():
        torch.testing.assert_close(program(x), model.eval()(x), rtol=0, atol=1e-4)


def test_the_command_line(run, tmp_path, monkeypatch, capsys):
    folder, model = run
    monkeypatch.setattr(latency, 'measure_latency', functools.partial(measure_latency, seconds=0))
    program.main([f'--shrink={folder}', '--round-to', '4', '--threads=1'])
    small = network_file.load(folder / 'small')
    plain = shrink(model, images(1, 1, 8, 8))
    odd = [[layer for layer in filters(net).values() if len(layer.weight) % 4] for net in (small, plain)]
    assert not odd[0] and odd[1] and small.info['round_to'] == 4
    assert_same(model, small, images(3, 1, 8, 8))
    capsys.readouterr()
    for words, status, message in (
        ([f'--shrink={tmp_path}'], f'main.py: error: {tmp_path} is not the folder of a finished run', None),
        ([f'--shrink={folder}', '--round-to=0'], 2, '--round-to: must be 1 or more'),
        (['--shrink', str(folder), '--lr=1'], 2, 'unrecognized arguments: --lr=1'),
    ):
        with pytest.raises(SystemExit) as ended:
            program.main(words)
        assert ended.value.code == status or str(ended.value.code).startswith(str(status))
        assert message is None or message in capsys.readouterr().err


def test_folders_that_cannot_be_shrunk(run, tmp_path):
    with pytest.raises(ValueError, match='not the folder of a finished run'):
        shrink_run(tmp_path)
    (tmp_path / 'args.json').write_bytes((run[0] / 'args.json').read_bytes())
    torch.save({'other': torch.zeros(1)}, tmp_path / 'model.pt')
    with pytest.raises(ValueError, match='is no resnet20'):
        shrink_run(tmp_path)
    assert sorted(path.name for path in Path(tmp_path).iterdir()) == ['args.json', 'model.pt']


def hooks_of(model):
    return [hook for module in model.modules() for hook in (*module._forward_pre_hooks, *module._state_dict_pre_hooks)]


@pytest.mark.parametrize('trained', [False, True])
def test_a_network_that_a_pruner_still_holds(trained):
    from methods import L1FilterPruner

    torch.manual_seed(0)
    model = archs.build('resnet20', 10, 4, in_channels=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    pruner = L1FilterPruner(model, [{'sparsity': 0.5, 'op_types': ['Conv2d']}], optimizer)
    example = torch.randn(2, 1, 8, 8)
    pruner.decide_together(dependency_groups(model, example))
    pruner.compress()
    if trained:
        model(example).sum().backward()
        optimizer.step()
    small = shrink(model.eval(), example)
    assert any(hooks_of(model)) and not any(hooks_of(small))
    small.state_dict()  # nothing there has the old shapes
    assert sum(p.numel() for p in small.parameters()) < 0.5 * sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(small(example), model(example), rtol=1e-4, atol=1e-5)


class Statements(nn.Module):
    """Operations in place whose result nobody takes: y is read as they left it."""

    def __init__(self):
        super().__init__()
        self.stem, self.c1, self.c2, self.c3 = (nn.Conv2d(i, 6, 3, padding=1) for i in (3, 6, 6, 6))
        self.norm, self.relu, self.f = nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Linear(6, 4)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = self.c1(x)
        y.add_(self.c2(x))
        F.relu_(y)
        z = self.norm(self.c3(y))
        self.relu(z)
        return self.f((z + y).mean((2, 3)))


def test_statements_in_place_are_seen():
    from deploy.packing import pack
    from pruners.group_pruning import PruneWrapper

    model, x = randomized(Statements()).eval(), images(2, 3, 8, 8)
    expected = model(x)
    PruneWrapper(model, 2, -1, example_input=x).initialize(0.0)
    torch.testing.assert_close(model(x), expected)  # c2 is read, by way of y
    for conv in (model.c1, model.c2):
        conv.weight.data[:2] = conv.bias.data[:2] = 0
    expected = model(x)
    for small in (shrink(model, x), pack(model, x, 'whole')):
        torch.testing.assert_close(small(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('last', [nn.Sigmoid(), nn.Softplus()])
def test_unknown_constants_behind_padded_pooling(last):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.AvgPool2d(3, 1, padding=1), last, nn.Flatten(), nn.Linear(256, 2))
    model[0].weight.data[:2] = model[0].bias.data[:2] = 0
    x = images(2, 3, 8, 8)
    torch.testing.assert_close(shrink(model, x)(x), model(x))


def test_inputs_that_noise_cannot_stand_for():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.conv, self.f = nn.Embedding(11, 5), nn.Conv1d(5, 6, 3), nn.Linear(6, 2)

        def forward(self, x):
            return self.f(F.relu(self.conv(self.words(x).transpose(1, 2))).mean(2))

    class Logs(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.f = nn.Conv2d(3, 6, 3), nn.Linear(6, 2)

        def forward(self, x):
            return self.f(F.relu(self.conv(torch.log(x))).mean((2, 3)))

    for model, x in ((Words(), torch.randint(0, 11, (2, 9))), (Logs(), images(2, 3, 8, 8).abs() + 0.1)):
        model.conv.weight.data[:2] = model.conv.bias.data[:2] = 0
        small = shrink(model, x)
        torch.testing.assert_close(small(x), model(x))
        assert len(small.conv.weight) == 4


def test_a_weight_that_is_computed_is_refused_by_name_of_the_remedy():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    torch.nn.utils.prune.ln_structured(model[0], 'weight', 0.5, 1, 0)
    model(images(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r'prune\.remove'):
        shrink(model, images(1, 3, 8, 8))


def test_a_bias_that_shrinking_makes_is_trained_only_where_its_layer_is():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 5, 3, bias=False), nn.Flatten(), nn.Linear(80, 2))
    model[0].weight.data[:2] = model[0].bias.data[:2] = 0  # what goes leaves a constant of 0.5 to the second convolution
    x = images(1, 3, 8, 8)
    small, kept = shrink(model, x, return_kept=True)
    assert small[2].bias is not None
    for trained in ([model[4].weight], [model[4].weight, model[0].bias]):
        new = rebuild_optimizer(torch.optim.SGD(trained, 0.1), model, small, kept)
        assert len(new.param_groups[0]['params']) == len(trained)
