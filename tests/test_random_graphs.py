"""Random networks with random dead filters and masks: the shrunk and the packed one compute the same in double precision.

RANDOM_GRAPHS=2000 ./launch tests tests/test_random_graphs.py      as many as wanted; 40 in the suite
"""

import copy
import os
import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deploy import outputs, packing, shrink
from deploy.writing import write

NUMBER = int(os.environ.get('RANDOM_GRAPHS', 40))
ACTIVATIONS = (F.relu, F.silu, torch.sigmoid, torch.tanh, F.gelu, F.hardswish, F.softplus, torch.abs, F.elu)


class Net(nn.Module):
    """A random network. Each line of the plan: (what, name of its layer, places of its inputs); the values are feature maps."""

    def __init__(self, seed):
        super().__init__()
        self.dice, self.plan, self.layers = random.Random(seed), [], nn.ModuleDict()
        self.widths = [3]  # of each value, the input first
        torch.manual_seed(seed)
        for _ in range(self.dice.randint(4, 12)):
            getattr(self, self.dice.choice(OPERATIONS))()
        self.convolution(self.dice.choice([2, 4]))
        self.dice = None

    def pick(self):
        """A value, the latest ones more often."""
        return max(self.dice.randrange(len(self.widths)), self.dice.randrange(len(self.widths)))

    def add(self, what, layer, inputs, width):
        name = f'l{len(self.plan)}'
        if layer is not None:
            self.layers[name] = layer
        self.plan.append((what, name, inputs))
        self.widths.append(width)

    def convolution(self, width=None):
        source = self.pick()
        read, width = self.widths[source], width or self.dice.choice([4, 6, 8])
        size = self.dice.choice([1, 3])
        bias, mode = self.dice.random() < 0.6, self.dice.choice(['zeros', 'zeros', 'reflect'])
        groups = self.dice.choice([1, 1, 1, 2]) if read % 2 == width % 2 == 0 else 1
        conv = nn.Conv2d(read, width, size, padding=size // 2, bias=bias, groups=groups, padding_mode=mode)
        self.add('layer', conv, [source], width)

    def depthwise(self):
        source = self.pick()
        width = self.widths[source]
        self.add('layer', nn.Conv2d(width, width, 3, padding=1, groups=width), [source], width)

    def transposed(self):
        source = self.pick()
        self.add('layer', nn.ConvTranspose2d(self.widths[source], 4, 3, padding=1), [source], 4)

    def norm(self):
        source = self.pick()
        width = self.widths[source]
        kind = self.dice.choice([nn.BatchNorm2d, nn.BatchNorm2d, nn.BatchNorm2d, nn.InstanceNorm2d])
        self.add('layer', kind(width, affine=self.dice.random() < 0.8), [source], width)

    def whole_norm(self):
        source = self.pick()
        self.add('layer', nn.GroupNorm(1, self.widths[source]), [source], self.widths[source])

    def prelu(self):
        source = self.pick()
        self.add('layer', nn.PReLU(self.dice.choice([1, self.widths[source]])), [source], self.widths[source])

    def pool(self):
        source = self.pick()
        kind = self.dice.choice([nn.MaxPool2d, nn.AvgPool2d])
        self.add('layer', kind(3, 1, 1), [source], self.widths[source])

    def linear(self):
        source = self.pick()
        self.add('linear', nn.Linear(self.widths[source], 5, bias=self.dice.random() < 0.7), [source], 5)

    def activation(self):
        source = self.pick()
        self.add(f'activation {self.dice.randrange(len(ACTIVATIONS))}', None, [source], self.widths[source])

    def pair(self):
        """Two values of the same width: added, subtracted, multiplied, gated, or the maximum of both."""
        one = self.pick()
        other = self.dice.choice([i for i, width in enumerate(self.widths) if width == self.widths[one]])
        self.add(
            self.dice.choice(['sum', 'difference', 'product', 'gate', 'largest', 'stack']), None, [one, other], self.widths[one]
        )

    def concatenation(self):
        one, other = self.pick(), self.pick()
        if self.widths[one] + self.widths[other] <= 16:
            self.add('cat', None, [one, other], self.widths[one] + self.widths[other])

    def move(self):
        source = self.pick()
        even = self.widths[source] % 2 == 0
        moves = ['flip', 'pad', 'views', 'permute', 'flat', 'repeat'] + ['chunk', 'shuffle', 'swap', 'hard'] * even
        what = self.dice.choice(moves)
        self.add(what, None, [source], self.widths[source] * (2 if what == 'repeat' else 1))

    def forward(self, x):
        values = [x]
        for what, name, inputs in self.plan:
            sources = [values[i] for i in inputs]
            if what == 'layer':
                values.append(self.layers[name](sources[0]))
            elif what == 'linear':
                values.append(self.layers[name](sources[0].permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
            elif what.startswith('activation'):
                values.append(ACTIVATIONS[int(what.split()[1])](sources[0]))
            else:
                values.append(CALLS[what](*sources))
        return values[-1], values[len(values) // 2].mean((1, 2, 3))


OPERATIONS = (
    ['convolution'] * 5 + ['norm'] * 3 + ['activation'] * 3 + ['pair'] * 2 + ['concatenation', 'move', 'move', 'depthwise']
)
OPERATIONS += ['transposed', 'whole_norm', 'prelu', 'pool', 'linear']
CALLS = {
    'sum': lambda a, b: a + b,
    'difference': lambda a, b: a - 0.5 * b,
    'product': lambda a, b: a * b,
    'gate': lambda a, b: a * torch.sigmoid(b.mean((2, 3), keepdim=True)),
    'largest': torch.maximum,
    'stack': lambda a, b: torch.stack([a, b], 1).mean(1),
    'cat': lambda a, b: torch.cat([a, b], 1),
    'flip': lambda a: a.flip(1),
    'pad': lambda a: F.pad(a, (1, 0, 0, 1))[:, :, :-1, 1:],
    'views': lambda a: a.reshape(a.size(0), a.size(1), -1).transpose(1, 2).transpose(1, 2).reshape(a.shape),
    'permute': lambda a: a.permute(2, 3, 0, 1).permute(2, 3, 1, 0).transpose(2, 3),
    'flat': lambda a: a.flatten(1).unflatten(1, (-1, 4, 4)),
    'repeat': lambda a: a.repeat(1, 2, 1, 1),
    'chunk': lambda a: torch.cat(a.chunk(2, 1)[::-1], 1),
    'shuffle': lambda a: a.reshape(a.size(0), 2, a.size(1) // 2, 4, 4).transpose(1, 2).reshape(a.shape),
    'swap': lambda a: torch.cat([a[:, a.size(1) // 2 :], a[:, : a.size(1) // 2]], 1),
    'hard': lambda a: a.reshape(-1, a.size(1) // 2, 2, 4, 4).flatten(1, 2),
}


@torch.no_grad()
def kill(net, seed):
    """Random dead filters: with or without their biases and shifts, and zeros here and there."""
    generator, dice = torch.Generator().manual_seed(seed), random.Random(seed)
    for layer in net.modules():
        weight = getattr(layer, 'weight', None)
        if weight is None:
            continue
        if isinstance(layer, (nn.BatchNorm2d, nn.InstanceNorm2d)):
            weight.copy_(torch.rand(weight.shape, generator=generator) + 0.5)
            layer.bias.copy_(torch.randn(weight.shape, generator=generator))
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.copy_(torch.randn(weight.shape, generator=generator))
            layer.running_var.copy_(torch.rand(weight.shape, generator=generator) + 0.5)
        dead = torch.rand(len(weight), generator=generator) < dice.choice([0.2, 0.5, 0.8])
        if dice.random() < 0.7 and not isinstance(layer, nn.PReLU):
            weight[dead] = 0
            if layer.bias is not None and dice.random() < 0.7 and not isinstance(layer, nn.ConvTranspose2d):
                layer.bias[dead] = 0
        if weight.dim() == 4 and dice.random() < 0.3:
            weight *= (torch.rand(weight.shape[:2], generator=generator) > 0.4)[:, :, None, None]


@pytest.mark.parametrize('block', range(4))
def test_random_networks_compute_the_same_when_shrunk(block):
    for seed in range(block * NUMBER // 4, (block + 1) * NUMBER // 4):
        net = Net(seed).double().eval()
        kill(net, seed)
        before = copy.deepcopy(net.state_dict())
        x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            small = shrink(net, x)
        fresh = torch.randn(3, 3, 4, 4, dtype=torch.float64)
        assert outputs.compare(net, small, fresh) < 1e-9, f'seed {seed}'
        assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items()), f'seed {seed}'


@torch.no_grad()
def mask_kernels(net, seed):
    """Masks as Dynamic Structure Pruning leaves them: filters in groups that read their own channels, some dead."""
    generator, dice = torch.Generator().manual_seed(seed), random.Random(seed)
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d) and dice.random() < 0.8:
            groups, kept = dice.choice([1, 2, 3]), dice.choice([0.4, 0.7])
            group = torch.randint(groups, (layer.out_channels,), generator=generator)
            live = torch.rand(groups, layer.weight.shape[1], generator=generator) < kept
            alive = torch.rand(layer.out_channels, generator=generator) > dice.choice([0.0, 0.3])
            layer.register_buffer('mask', (live[group] & alive[:, None])[:, :, None, None])


@pytest.mark.parametrize('block', range(4))
def test_random_networks_compute_the_same_when_packed(block):
    """Each convolution in a way drawn at random, in a memory layout drawn at random."""
    for seed in range(block * NUMBER // 4, (block + 1) * NUMBER // 4):
        net, dice = Net(seed).double().eval(), random.Random(seed)
        kill(net, seed)
        mask_kernels(net, seed)
        x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            base, network, _ = packing.prepared(net, x)

        def choose(network, node, layout, ways, into_sum, dice=dice):
            return dice.choice(ways)

        packed = write(dice.choice(packing.layouts(network)), choose)
        fresh = torch.randn(3, 3, 4, 4, dtype=torch.float64)
        for expected, found in zip(outputs.run(base, fresh), outputs.run(packed, fresh), strict=True):
            assert (expected - found).abs().max() <= 1e-9 * expected.abs().max().clamp(min=1), f'seed {seed}'
