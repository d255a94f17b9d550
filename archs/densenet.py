"""DenseNet40-24-BC for CIFAR: Huang et al., "Densely Connected Convolutional Networks", CVPR 2017.

Depth 40, growth 24, bottlenecks (B) and compression 0.5 (C). No deviation from the architecture; the dropout
that the paper uses on unaugmented data is left out.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from .init import kaiming_normal

GROWTH = 24
LAYERS = 6  # per block: 3 blocks of 6 two-conv layers, stem, 2 transitions and classifier make depth 40


class DenseLayer(nn.Module):
    """Adds GROWTH channels, computed from all channels so far through a 1x1 bottleneck."""

    def __init__(self, in_channels):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, 4 * GROWTH, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * GROWTH)
        self.conv2 = nn.Conv2d(4 * GROWTH, GROWTH, 3, padding=1, bias=False)

    def forward(self, x):
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        return torch.cat([x, out], dim=1)


def dense_block(in_channels):
    return nn.Sequential(*[DenseLayer(in_channels + i * GROWTH) for i in range(LAYERS)])


def transition(in_channels):
    return nn.Sequential(
        nn.BatchNorm2d(in_channels),
        nn.ReLU(),
        nn.Conv2d(in_channels, in_channels // 2, 1, bias=False),
        nn.AvgPool2d(2),
    )


def densenet40_24_bc(num_classes, in_channels=3):
    added = LAYERS * GROWTH
    c1 = 2 * GROWTH
    c2 = (c1 + added) // 2
    c3 = (c2 + added) // 2
    net = OrderedDict(
        conv1=nn.Conv2d(in_channels, c1, 3, padding=1, bias=False),
        block1=dense_block(c1),
        transition1=transition(c1 + added),
        block2=dense_block(c2),
        transition2=transition(c2 + added),
        block3=dense_block(c3),
        bn=nn.BatchNorm2d(c3 + added),
        relu=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        fc=nn.Linear(c3 + added, num_classes),
    )
    return kaiming_normal(nn.Sequential(net))
