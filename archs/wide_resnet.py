"""Wide ResNets WRN-depth-k: Zagoruyko & Komodakis, "Wide Residual Networks", BMVC 2016.

Deviations, both as in the net the ASL authors train: all convs have biases (the 1x1 shortcut convs too), and
the shortcut conv sees the raw block input, where in Zagoruyko's code it sees that input after BatchNorm and
ReLU.
"""

from collections import OrderedDict

import torch.nn.functional as F
from torch import nn

from .init import kaiming_normal


class PreActBlock(nn.Module):
    def __init__(self, in_channels, channels, stride, dropout):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.shortcut = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride)

    def forward(self, x):
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(self.dropout(F.relu(self.bn2(out))))  # dropout after the ReLU: section 2.4
        return out + self.shortcut(x)


def stage(in_channels, channels, blocks, stride, dropout):
    first = PreActBlock(in_channels, channels, stride, dropout)
    return nn.Sequential(first, *[PreActBlock(channels, channels, 1, dropout) for _ in range(blocks - 1)])


def wrn(depth, k, num_classes, in_channels=3, dropout=0.0):
    """depth = 6n + 4: three stages of n two-conv blocks, plus stem and shortcut convs; k times He's width."""
    n = (depth - 4) // 6
    if n < 1 or depth != 6 * n + 4:
        raise ValueError(f'wrn{depth}_{k}: the depth must be 6n + 4 with n of at least 1 (10, 16, 22, 28, ...)')
    if k < 1:
        raise ValueError(f'wrn{depth}_{k}: the widening factor must be at least 1')
    net = OrderedDict(
        conv1=nn.Conv2d(in_channels, 16, 3, padding=1),
        stage1=stage(16, 16 * k, n, 1, dropout),
        stage2=stage(16 * k, 32 * k, n, 2, dropout),
        stage3=stage(32 * k, 64 * k, n, 2, dropout),
        bn=nn.BatchNorm2d(64 * k),
        relu=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        fc=nn.Linear(64 * k, num_classes),
    )
    return kaiming_normal(nn.Sequential(net))
