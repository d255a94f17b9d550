"""What torch.export reads of a network: everyday operations, shapes of inputs and outputs, wrapped models, refusals."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deploy import outputs
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
