"""The networks of the pruning papers, built by name: `archs.build('resnet20', num_classes=100)`.

Every network is a plain nn.Module from images (N, in_channels, H, W) to logits (N, num_classes). All but
lenet300_100 end in a global average pool and so take any image from 8x8 up (VGG from 32x32 up).
"""

import re

from torch import nn

from .densenet import densenet40_24_bc
from .lenet import lenet300_100
from .mobilenet import mobilenet_v1
from .resnet import cifar_resnet
from .torchvision_resnet import torchvision_resnet
from .vgg import vgg_bn
from .wide_resnet import wrn

CIFAR_RESNETS = ['resnet20', 'resnet32', 'resnet44', 'resnet56', 'resnet110']
VGGS = ['vgg16', 'vgg19']
TORCHVISION = ['resnet18', 'resnet50']


def names():
    """The names `build` knows, with two examples of the open family wrn<depth>_<k>."""
    return [
        *CIFAR_RESNETS,
        'mobilenet_v1',
        'densenet',
        'wrn16_8',
        'wrn28_10',
        *VGGS,
        'lenet300_100',
        *TORCHVISION,
    ]


def build(name, num_classes, width=None, in_channels=3, image_size=32, dropout=0.0, bn_momentum=None):
    """Build a freshly initialised network.

    width: channels of the first stage, CIFAR ResNets only (default 32; He et al. use 16).
    image_size: fixes the input of lenet300_100 and is checked for VGG; the others do not depend on it.
    dropout: WRN only. bn_momentum: set on every BatchNorm2d; None keeps PyTorch's 0.1.
    """
    is_wrn = re.fullmatch(r'wrn([0-9]+)_([0-9]+)', name)
    if name not in names() and not is_wrn:
        raise ValueError(f'unknown network {name!r}: choose one of {", ".join(names())}, or any wrn<depth>_<k>')
    if width is not None and name not in CIFAR_RESNETS:
        raise ValueError(f'{name} has no width option, only {", ".join(CIFAR_RESNETS)} have')
    if dropout != 0 and not is_wrn:
        raise ValueError(f'{name} has no dropout option, only wrn<depth>_<k> has')
    width = 32 if width is None else width
    if min(num_classes, width, in_channels, image_size) < 1:
        raise ValueError('num_classes, width, in_channels and image_size must be at least 1')

    if name in CIFAR_RESNETS:
        net = cifar_resnet(int(name.removeprefix('resnet')), num_classes, width, in_channels)
    elif name == 'mobilenet_v1':
        net = mobilenet_v1(num_classes, in_channels)
    elif name == 'densenet':
        net = densenet40_24_bc(num_classes, in_channels)
    elif is_wrn:
        net = wrn(int(is_wrn[1]), int(is_wrn[2]), num_classes, in_channels, dropout)
    elif name in VGGS:
        net = vgg_bn(int(name.removeprefix('vgg')), num_classes, in_channels, image_size)
    elif name == 'lenet300_100':
        net = lenet300_100(num_classes, in_channels, image_size)
    else:
        net = torchvision_resnet(name, num_classes, in_channels)

    if bn_momentum is not None:
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = bn_momentum
    return net


def from_args(args, num_classes, in_channels, image_size):
    """The network that a run's arguments ask for. args: has model, width, dropout and bn_momentum; the rest is the data's."""
    return build(args.model, num_classes, args.width, in_channels, image_size, args.dropout, args.bn_momentum)
