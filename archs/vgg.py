"""VGG-16 and VGG-19 for CIFAR: Simonyan & Zisserman, "Very Deep Convolutional Networks for Large-Scale Image
Recognition", ICLR 2015.

Deviations from the paper, as usual in pruning papers on CIFAR: BatchNorm after every conv (so the convs have
no bias), and one Linear(512, classes) on globally averaged features instead of three fully connected layers.
At 10 classes VGG-16 has 14,724,042 and VGG-19 20,035,018 parameters.
"""

from collections import OrderedDict

from torch import nn

from .init import kaiming_normal

# convs before each of the five max-pools
CONVS = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
CHANNELS = (1, 2, 4, 8, 8)  # in units of the first, which are 64


def vgg_bn(depth, num_classes, in_channels=3, image_size=32, width=64):
    if image_size < 32:
        raise ValueError(f'vgg{depth} halves the image five times and needs at least 32x32 pixels, not {image_size}')
    layers = []
    previous = in_channels
    for convs, units in zip(CONVS[depth], CHANNELS, strict=True):
        channels = units * width
        for _ in range(convs):
            conv = nn.Conv2d(previous, channels, 3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(channels), nn.ReLU()]
            previous = channels
        layers.append(nn.MaxPool2d(2))
    net = OrderedDict(
        features=nn.Sequential(*layers),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        fc=nn.Linear(previous, num_classes),
    )
    return kaiming_normal(nn.Sequential(net))
