"""CIFAR ResNets: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2.

Deviations from the paper: where the shape changes the shortcut is a 1x1 conv with BatchNorm (He's option B)
instead of the parameter-free option A, and the width is free. Width 32 is the twice-wide net that GraSP (Wang
et al., ICLR 2020) and Feather (Glentis Georgoulakis et al., BMVC 2023) prune; width 16 is He's, as in DSP
(Park et al., AAAI 2023).
"""

from collections import OrderedDict

import torch.nn.functional as F
from torch import nn

from .init import kaiming_normal


class BasicBlock(nn.Module):
    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


def stage(in_channels, channels, blocks, stride):
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *[BasicBlock(channels, channels, 1) for _ in range(blocks - 1)])


def cifar_resnet(depth, num_classes, width, in_channels=3):
    """depth = 6n + 2: stem, three stages of n two-conv blocks, classifier."""
    n = (depth - 2) // 6
    net = OrderedDict(
        conv1=nn.Conv2d(in_channels, width, 3, padding=1, bias=False),
        bn1=nn.BatchNorm2d(width),
        relu=nn.ReLU(),
        stage1=stage(width, width, n, stride=1),
        stage2=stage(width, 2 * width, n, stride=2),
        stage3=stage(2 * width, 4 * width, n, stride=2),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        fc=nn.Linear(4 * width, num_classes),
    )
    return kaiming_normal(nn.Sequential(net))
