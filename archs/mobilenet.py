"""MobileNet v1 for CIFAR: Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile
Vision Applications", arXiv 1704.04861, 2017.

Deviations from the paper: the stem has stride 1 (32x32 images). The pointwise convs have biases although
BatchNorm follows, as in the code of the Feather authors (BMVC 2023): dropping them would change the published
parameter count.
"""

from collections import OrderedDict

from torch import nn

# (output channels, stride) of the depthwise separable blocks
BLOCKS = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]


def separable(in_channels, channels, stride):
    return nn.Sequential(
        nn.Conv2d(in_channels, in_channels, 3, stride, padding=1, groups=in_channels, bias=False),
        nn.BatchNorm2d(in_channels),
        nn.ReLU(),
        nn.Conv2d(in_channels, channels, 1),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )


def mobilenet_v1(num_classes, in_channels=3):
    blocks = []
    channels = 32
    for out_channels, stride in BLOCKS:
        blocks.append(separable(channels, out_channels, stride))
        channels = out_channels
    net = OrderedDict(
        conv1=nn.Conv2d(in_channels, 32, 3, padding=1, bias=False),
        bn1=nn.BatchNorm2d(32),
        relu=nn.ReLU(),
        blocks=nn.Sequential(*blocks),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        fc=nn.Linear(channels, num_classes),
    )
    return nn.Sequential(net)  # the paper names no initialisation: PyTorch's default
