"""Wide ResNets WRN-depth-k: Zagoruyko & Komodakis, "Wide Residual Networks", BMVC 2016.

Deviations, both as in the net the ASL authors train: all convs have biases (the 1x1 shortcut convs too), and
the shortcut conv sees the raw block input, where in Zagoruyko's code it sees that input after BatchNorm and
ReLU. Without biases (`wrn22_2_nobias`) WRN-22-2 has 1,079,642 parameters at 10 classes, as in RigL's paper.
"""

from collections import OrderedDict

import torch.nn.functional as F
from torch import nn

from .init import kaiming_normal


class PreActBlock(nn.Module):
    def __init__(self, in_channels, channels, stride, dropout, bias):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=bias)
        self.bn2 = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
        self.shortcut = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=bias)

    def forward(self, x):
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(self.dropout(F.relu(self.bn2(out))))  # dropout after the ReLU: section 2.4
        return out + self.shortcut(x)


def stage(in_channels, channels, blocks, stride, dropout, bias):
    first = PreActBlock(in_channels, channels, stride, dropout, bias)
    return nn.Sequential(first, *[PreActBlock(channels, channels, 1, dropout, bias) for _ in range(blocks - 1)])


def wrn(depth, k, num_classes, in_channels=3, dropout=0.0, bias=True, width=None):
    """depth = 6n + 4: three stages of n two-conv blocks, plus stem and shortcut convs; k times He's width.

    bias: of the convs. width: channels of the first stage (default: 16k); the stem has 1/k of them, rounded.
    """
    n = (depth - 4) // 6
    if n < 1 or depth != 6 * n + 4:
        raise ValueError(f'wrn{depth}_{k}: the depth must be 6n + 4 with n of at least 1 (10, 16, 22, 28, ...)')
    if k < 1:
        raise ValueError(f'wrn{depth}_{k}: the widening factor must be at least 1')
    width = 16 * k if width is None else width
    stem = max(round(width / k), 1)
    net = OrderedDict(
        conv1=nn.Conv2d(in_channels, stem, 3, padding=1, bias=bias),
        stage1=stage(stem, width, n, 1, dropout, bias),
        stage2=stage(width, 2 * width, n, 2, dropout, bias),
        stage3=stage(2 * width, 4 * width, n, 2, dropout, bias),
        bn=nn.BatchNorm2d(4 * width),
        relu=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        fc=nn.Linear(4 * width, num_classes),
    )
    return kaiming_normal(nn.Sequential(net))
