"""Random networks in the sparse engine, beside PyTorch. RANDOM_NETWORKS=1000 in the environment tries so many, not a few."""

import copy
import os
import random

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_equal, compiled, sparse
from torch import nn

NETWORKS = int(os.environ.get('RANDOM_NETWORKS', 8))
ACTIVATIONS = [F.relu, F.relu6, F.silu, F.hardswish, F.gelu, torch.tanh, lambda x: F.leaky_relu(x, 0.2), lambda x: x]


class Random(nn.Module):
    """Up to six layers after one another, some with a branch that is added or concatenated; operations drawn from a seed."""

    def __init__(self, seed):
        super().__init__()
        self.draw = random.Random(seed)
        self.layers = nn.ModuleList()
        self.plan = []
        self.channels = self.draw.choice([1, 3, 4])
        channels = self.channels
        for _ in range(self.draw.randint(1, 6)):
            kind = self.draw.choice(['conv', 'conv', 'residual', 'cat', 'pool', 'up'])
            out = channels if kind == 'residual' else self.draw.choice([2, 6, 17])
            layer, channels = self.layer(kind, channels, out)
            self.layers.append(layer)
            self.plan.append((kind, self.draw.choice(ACTIVATIONS)))
        self.head = nn.Linear(channels, 5) if self.draw.random() < 0.7 else None

    def layer(self, kind, channels, out):
        """(a layer, the channels that it leaves)."""
        if kind == 'pool':
            return self.draw.choice([nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2), nn.MaxPool2d(2)]), channels
        if kind == 'up':
            return nn.ConvTranspose2d(channels, out, self.draw.choice([2, 3]), 2, self.draw.choice([0, 1])), out
        kernel = self.draw.choice([1, 3, 3, 5])
        dilation = self.draw.choice([1, 1, 2])
        same = dilation * (kernel - 1) // 2
        stride = 1 if kind != 'conv' else self.draw.choice([1, 1, 2, 3])
        padding = same if kind != 'conv' else self.draw.choice([same, same, 0, 1])
        groups = self.draw.choice([1, 1, channels]) if out % channels == 0 else 1
        conv = nn.Conv2d(channels, out, kernel, stride, padding, dilation, groups, bias=self.draw.random() < 0.5)
        layer = nn.Sequential(conv, nn.BatchNorm2d(out)) if self.draw.random() < 0.5 else conv
        return layer, channels + out if kind == 'cat' else out

    def forward(self, x):
        for layer, (kind, activation) in zip(self.layers, self.plan, strict=True):
            if kind == 'residual':
                x = activation(layer(x) + x)
            elif kind == 'cat':
                x = torch.cat([activation(layer(x)), x], 1)
            else:
                x = activation(layer(x))
        return x if self.head is None else self.head(x.mean((2, 3)))


@pytest.mark.parametrize('seed', range(NETWORKS))
def test_random_networks(seed):
    draw = random.Random(seed + 1000)
    torch.manual_seed(seed)
    model = sparse(Random(seed), draw.choice([0.0, 0.5, 0.9, 0.99]), seed)
    size = draw.randint(16, 40), draw.randint(16, 40)
    images = torch.randn(draw.choice([1, 1, 2, 5, 33]), model.channels, *size)
    try:
        copy.deepcopy(model).double()(images.double())
    except RuntimeError:  # as it does for an image without pixels
        pytest.skip('the layers leave no image')
    network = compiled(model, images, threads=draw.randint(1, 4))
    assert_equal(network, model, images)
    assert_equal(network, model, torch.randn(3, *images.shape[1:]))


TORCHVISION = ['resnet18', 'mobilenet_v2', 'squeezenet1_1', 'shufflenet_v2_x0_5', 'efficientnet_b0']
TORCHVISION += ['mobilenet_v3_small', 'mnasnet0_5', 'densenet121', 'regnet_x_400mf', 'googlenet']


@pytest.mark.parametrize('name', TORCHVISION if NETWORKS > 100 else TORCHVISION[2:4])
def test_networks_of_torchvision(name):
    models = pytest.importorskip('torchvision.models')
    torch.manual_seed(0)
    options = {'init_weights': False, 'aux_logits': False} if name == 'googlenet' else {}
    model = sparse(getattr(models, name)(num_classes=10, **options), 0.9)
    network = compiled(model, torch.randn(1, 3, 64, 64))
    assert_equal(network, model, torch.randn(1, 3, 64, 64))
    assert_equal(network, model, torch.randn(2, 3, 64, 64))
