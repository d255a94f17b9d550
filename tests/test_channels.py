"""The channel graph: hand-made masks on small networks, with what must remain of them spelled out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import archs
from deploy.live import convolutions, dead_norms, live_masks, norms_behind
from deploy.ties import read_channels


class Residual(nn.Module):
    """stem -> (conv1 -> conv2) + stem -> last; all of 3 channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.stem_bn = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.last = nn.Conv2d(3, 2, 1)

    def forward(self, x):
        x = F.relu(self.stem_bn(self.stem(x)))
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)
        return self.last(x).mean([2, 3])


def chain(*convs):
    return nn.Sequential(*[layer for conv in convs for layer in (conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU())])


def graph_of(model, channels=2, size=6):
    return read_channels(model.eval(), torch.randn(2, channels, size, size))


def bits(*rows):
    return torch.tensor([[character == '1' for character in row] for row in rows])


def assert_masks(found, expected):
    assert {name: mask.int().tolist() for name, mask in found.items()} == {n: m.int().tolist() for n, m in expected.items()}


def test_filters_that_nobody_reads_and_inputs_that_nobody_feeds_go():
    graph = graph_of(chain(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, 3), nn.Conv2d(3, 2, 1)))
    masks = {
        '0': bits('10', '01', '00'),  # filter 2 has no kernel
        '3': bits('101', '011', '001'),  # so filter 2, which reads that channel alone, is dead too
        '6': bits('101', '001'),  # nobody reads filter 1 of '3'; filter 1 here has only dead input
    }
    expected = {'0': bits('10', '00', '00'), '3': bits('100', '000', '000'), '6': bits('100', '000')}
    assert_masks(live_masks(graph, masks), expected)


def test_the_cascade_runs_through_the_whole_network_in_both_directions():
    graph = graph_of(chain(*[nn.Conv2d(2, 2, 3, padding=1) for _ in range(6)]))
    names = list(convolutions(graph))
    keep = bits('10', '01')  # two chains that do not touch
    cut = {name: keep for name in names} | {names[2]: bits('10', '00')}
    left = {name: bits('10', '00') for name in names}
    assert_masks(live_masks(graph, cut), left | {names[0]: bits('10', '00'), names[5]: bits('10', '00')})


def test_what_is_alive_stays_and_a_second_pass_finds_nothing():
    torch.manual_seed(0)
    for name in ['resnet20', 'densenet', 'mobilenet_v1', 'wrn10_1']:
        graph = read_channels(archs.build(name, 10), torch.zeros(1, 3, 16, 16))
        full = {name: torch.ones(out, inputs, dtype=torch.bool) for name, (out, inputs, _) in convolutions(graph).items()}
        assert_masks(live_masks(graph, full), full)
        once = live_masks(graph, {name: torch.rand(mask.shape) > 0.9 for name, mask in full.items()})
        assert_masks(live_masks(graph, once), once)


def test_the_second_pass_of_a_residual_network_agrees_with_autograd():
    """A kernel is alive exactly where the output's gradient reaches it, for positive weights and inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(Residual(), nn.Flatten())
    graph = graph_of(model)
    for p in model.parameters():
        p.data.abs_()
    convs = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
    for layer in convs.values():
        nn.init.zeros_(layer.bias)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.zeros_(layer.bias)
    for _ in range(20):
        masks = {name: torch.rand(layer.weight.shape[:2]) > 0.5 for name, layer in convs.items()}
        weights = {f'{n}.weight': (convs[n].weight.detach() * m[:, :, None, None]).requires_grad_() for n, m in masks.items()}
        out = torch.func.functional_call(model, weights, (torch.rand(2, 2, 6, 6) + 1,))
        gradients = torch.autograd.grad(out.sum(), list(weights.values()), allow_unused=True, materialize_grads=True)
        reached = {n: g.abs().sum((2, 3)).gt(0) & masks[n] for n, g in zip(masks, gradients, strict=True)}
        assert_masks(live_masks(graph, masks), reached)


def test_a_sum_is_dead_only_if_all_its_summands_are():
    graph = graph_of(Residual())
    masks = {'stem': bits('11', '11', '00'), 'conv2': bits('111', '000', '000'), 'last': bits('011', '001')}
    found = live_masks(graph, masks)
    # channel 1 lives by the shortcut alone, channel 2 by nothing; channel 0 is not read by `last`, so conv2 and conv1 are dead
    assert_masks(found, {'stem': bits('00', '11', '00'), 'conv2': bits('000', '000', '000'), 'last': bits('010', '000')})
    dead = dead_norms(graph, masks)
    assert dead['stem_bn'].tolist() == [True, False, True]
    assert dead['bn1'].tolist() == [True, True, True]
    assert dead['bn2'].tolist() == [True, True, True]


def test_a_dead_block_leaves_its_shortcut_alone():
    graph = graph_of(Residual())
    found = live_masks(
        graph, {'conv1': bits('000', '000', '000'), 'conv2': bits('111', '111', '111'), 'last': bits('111', '111')}
    )
    assert not found['conv1'].any() and not found['conv2'].any()
    assert found['last'].all()


def test_a_linear_layer_reads_everything_and_the_output_is_read():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(3 * 16, 2), nn.LogSoftmax(1))
    masks = {'0': bits('10', '00', '11')}
    assert_masks(live_masks(graph_of(model), masks), masks)
    assert_masks(live_masks(graph_of(model[:1]), masks), masks)


def test_concatenation_lines_channels_up():
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 1)
            self.bn, self.c = nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1)

        def forward(self, x):
            x = self.a(x)
            return self.c(F.relu(self.bn(torch.cat([x, self.b(x)], dim=1))))

    graph = graph_of(Dense())
    masks = {'a': bits('11', '11'), 'b': bits('10', '00'), 'c': bits('0011')}
    # channel 3 is the unfed filter 1 of b; of a, only channel 0 is read, by b
    assert_masks(live_masks(graph, masks), {'a': bits('11', '00'), 'b': bits('10', '00'), 'c': bits('0010')})
    assert dead_norms(graph, masks)['bn'].tolist() == [True, True, False, True]


def test_grouped_and_depthwise_convolutions_read_their_own_group():
    graph = graph_of(chain(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 1, 1)))
    masks = {'0': bits('11', '00', '11', '11'), '6': bits('11', '01', '10', '01'), '9': bits('1011')}
    expected = {
        '0': bits('11', '00', '11', '11'),
        '6': bits('10', '00', '10', '01'),  # filter 1 read channel 1 alone
        '9': bits('1011'),
    }
    assert_masks(live_masks(graph, masks), expected)
    dead = dead_norms(graph, masks)
    assert dead['4'].tolist() == [
        False,
        True,
        False,
        False,
    ]  # the depthwise filter between has no mask, and dies with its input


def test_parameter_free_shortcuts_pad_and_take_every_second_pixel():
    class OptionA(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv, self.last = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 4, 3, 2, 1), nn.Conv2d(4, 1, 1)

        def forward(self, x):
            x = self.stem(x)
            return self.last(self.conv(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1)))

    graph = graph_of(OptionA())
    # channels 0 and 3 of the sum have only the convolution, 1 and 2 also channels 0 and 1 of the stem
    masks = {'stem': bits('11', '11'), 'conv': bits('00', '00', '00', '00'), 'last': bits('1101')}
    assert_masks(live_masks(graph, masks), masks | {'stem': bits('11', '00'), 'last': bits('0100')})


def test_flattening_by_any_spelling_is_seen():
    for flatten in (lambda x: x.view(x.size(0), -1), lambda x: torch.flatten(x, 1), lambda x: x.reshape(-1, 48)):

        class Net(nn.Module):
            def __init__(self, flatten=flatten):
                super().__init__()
                self.conv, self.fc, self.flatten = nn.Conv2d(2, 3, 3), nn.Linear(48, 2), flatten

            def forward(self, x):
                return self.fc(self.flatten(self.conv(x)))

        conv, fc = graph_of(Net()).steps
        assert fc.inputs.tolist() == conv.out.repeat_interleave(16).tolist()


def test_a_gate_and_unknown_operations_keep_alive():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.gate, self.norm, self.last = (
                nn.Conv2d(2, 2, 1),
                nn.Conv2d(2, 2, 1),
                nn.GroupNorm(1, 2),
                nn.Conv2d(2, 1, 1),
            )

        def forward(self, x):
            x = self.a(x)
            return self.last(self.norm(x) * torch.sigmoid(self.gate(x)))

    graph = graph_of(Gate())
    masks = {'a': bits('11', '00'), 'gate': bits('10', '00'), 'last': bits('01')}
    # a dead gate is sigmoid(0), and group norm mixes all channels: channel 1 of the product is alive
    expected = {'a': bits('11', '00'), 'gate': bits('00', '00'), 'last': bits('01')}
    assert_masks(live_masks(graph, masks), expected)


def test_a_softmax_over_channels_reads_all_of_them():
    class Weighed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.last = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 2, 1)

        def forward(self, x):
            return self.last(torch.softmax(self.a(x), 1))

    masks = {'a': bits('11', '10', '01'), 'last': bits('100', '000')}  # one channel is read; its share depends on the others
    assert_masks(live_masks(graph_of(Weighed()), masks), masks)


def test_one_tensor_given_twice_is_two_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 3, 1)

        def forward(self, x, y):
            return self.a(x) + self.b(y)

    x = torch.randn(2, 2, 6, 6)
    first, second = read_channels(Two(), (x, x)).steps[:2]
    assert first.node.args[0] is not second.node.args[0]


def test_batch_norms_are_named_by_the_convolution_they_follow():
    graph = graph_of(Residual())
    assert norms_behind(graph) == {'stem': 'stem_bn', 'conv1': 'bn1', 'conv2': 'bn2'}


def test_masks_keep_their_shape_and_the_model_its_state():
    model = archs.build('resnet20', 10, width=4).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graph = read_channels(model, torch.randn(2, 3, 16, 16))
    assert model.training and model.bn1.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    mask = torch.ones(4, 4, 1, 1, dtype=torch.bool)
    assert live_masks(graph, {'stage1.0.conv1': mask})['stage1.0.conv1'].shape == (4, 4, 1, 1)


def test_clear_errors():
    graph = graph_of(Residual())
    with pytest.raises(ValueError, match="'nowhere', which is no convolution"):
        live_masks(graph, {'nowhere': bits('1')})
    with pytest.raises(ValueError, match=r'mask of conv1 has shape \[2, 2\], its kernels are \[3, 3\]'):
        live_masks(graph, {'conv1': bits('11', '11')})

    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match='cannot trace Branching'):
        graph_of(Branching())
    with pytest.raises(ValueError, match='cannot trace Residual.*channels'):
        read_channels(Residual(), torch.zeros(1, 7, 6, 6))


class Counted(TorchDispatchMode):
    """Counts the tensor operations that are carried out within it."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += 1
        return function(*args, **(kwargs or {}))


def test_the_work_of_a_sweep_grows_with_the_depth_and_no_faster():
    """Searches sweep hundreds of times: one pass in each direction, a few operations a convolution however deep the network."""
    share = {}
    for name, number in (('resnet20', 21), ('resnet56', 57)):
        graph = read_channels(archs.build(name, 10, width=4), torch.zeros(1, 3, 32, 32))
        masks = {conv: torch.rand(sizes[:2]) > 0.5 for conv, sizes in convolutions(graph).items()}
        assert len(masks) == number
        live_masks(graph, masks)  # what does not depend on the masks is found once
        with Counted() as counted:
            live_masks(graph, masks)
        share[name] = counted.operations / number
    assert share['resnet56'] == pytest.approx(share['resnet20'], rel=0.05) and share['resnet56'] < 60
