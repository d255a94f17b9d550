"""The networks of the pruning papers, built by name: `archs.build('resnet20', num_classes=100)`; and everybody else's.

Every network is a plain nn.Module from images (N, in_channels, H, W) to logits (N, num_classes). All but
lenet300_100 end in a global average pool and so take any image from 8x8 up (VGG from 32x32 up). Networks of torchvision, timm
and files are built by elsewhere.py.
"""

import difflib
import re

import torch
from torch import nn

from .densenet import densenet40_24_bc
from .elsewhere import absolute, build_elsewhere, files_of, is_elsewhere, is_file, pretrained_state, torchvision_network
from .lenet import lenet300_100
from .mobilenet import mobilenet_v1
from .resnet import cifar_resnet
from .vgg import vgg_bn
from .wide_resnet import wrn

CIFAR_RESNETS = ['resnet20', 'resnet32', 'resnet44', 'resnet56', 'resnet110']
VGGS = ['vgg16', 'vgg19']
TORCHVISION = ['resnet18', 'resnet50']


__all__ = ['absolute', 'build', 'files_of', 'from_args', 'is_elsewhere', 'is_file', 'names', 'pretrained_weights', 'size_of']


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

    width: channels of the first stage of CIFAR ResNets (default 32; He et al. use 16), wide ResNets (default 16k)
    and VGGs (default 64); the other stages follow.
    image_size: fixes the input of lenet300_100 and is checked for VGG; the others do not depend on it.
    dropout: WRN only. bn_momentum: set on every BatchNorm2d; None keeps PyTorch's 0.1.
    """
    is_wrn = re.fullmatch(r'wrn([0-9]+)_([0-9]+)(_nobias)?', name)
    if name not in names() and not is_wrn:
        near = difflib.get_close_matches(name, names(), 3)
        hint = f' (did you mean {", ".join(near)}?)' if near else ''
        raise ValueError(
            f'unknown network {name!r}{hint}: choose one of {", ".join(names())}, or any wrn<depth>_<k>[_nobias], '
            'torchvision/NAME, timm/NAME or FILE.py:FUNCTION'
        )
    if width is not None and name not in [*CIFAR_RESNETS, *VGGS] and not is_wrn:
        raise ValueError(f'{name} has no width option, only {", ".join([*CIFAR_RESNETS, *VGGS])} and wrn<depth>_<k> have')
    if dropout != 0 and not is_wrn:
        raise ValueError(f'{name} has no dropout option, only wrn<depth>_<k> has')
    if min(num_classes, in_channels, image_size, 1 if width is None else width) < 1:
        raise ValueError('num_classes, width, in_channels and image_size must be at least 1')

    if name in CIFAR_RESNETS:
        net = cifar_resnet(int(name.removeprefix('resnet')), num_classes, width or 32, in_channels)
    elif name == 'mobilenet_v1':
        net = mobilenet_v1(num_classes, in_channels)
    elif name == 'densenet':
        net = densenet40_24_bc(num_classes, in_channels)
    elif is_wrn:
        biased = is_wrn[3] is None
        net = wrn(int(is_wrn[1]), int(is_wrn[2]), num_classes, in_channels, dropout, biased, width)
    elif name in VGGS:
        net = vgg_bn(int(name.removeprefix('vgg')), num_classes, in_channels, image_size, width or 64)
    elif name == 'lenet300_100':
        net = lenet300_100(num_classes, in_channels, image_size)
    else:
        net = torchvision_network(name, num_classes, in_channels, image_size)

    set_bn_momentum(net, bn_momentum)
    return net


def set_bn_momentum(net, momentum):
    """Set it on every BatchNorm2d; None leaves what there is."""
    for module in net.modules():
        if momentum is not None and isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum


def from_args(args, num_classes, in_channels, image_size, sources=None):
    """The network that a run's arguments ask for. args: has model, width, dropout and bn_momentum; the rest is the data's.

    With small_dense ('parameters' or 'macs') it is the narrower one that small_width() finds for ptarget.
    sources: a folder with copies of the files of FILE.py:FUNCTION, as a run folder has them, to be used instead of FILE.py.
    """
    if is_elsewhere(args.model):
        return from_elsewhere(args, num_classes, in_channels, image_size, sources)
    settings = {'in_channels': in_channels, 'image_size': image_size}
    width = args.width
    if measure := vars(args).get('small_dense'):
        width = small_width(args.model, args.ptarget, measure, num_classes, width, **settings)
    return build(args.model, num_classes, width, dropout=args.dropout, bn_momentum=args.bn_momentum, **settings)


def from_elsewhere(args, num_classes, in_channels, image_size, sources):
    """The network of torchvision/NAME, timm/NAME or FILE.py:FUNCTION. Raises ValueError for options that only archs has."""
    for option in ('width', 'dropout', 'small_dense'):
        if vars(args).get(option):
            flag = '--' + option.replace('_', '-')
            raise ValueError(f'{args.model} has no {flag}: only networks of archs/ have')
    pretrained = bool(vars(args).get('pretrained'))
    net = build_elsewhere(args.model, num_classes, in_channels, image_size, pretrained, sources)
    set_bn_momentum(net, args.bn_momentum)
    return net


def pretrained_weights(name, in_channels, image_size):
    """The published weights of a network, and what belongs to them; see pretrained_state()."""
    return pretrained_state(f'torchvision/{name}' if name in TORCHVISION else name, in_channels, image_size)


def small_width(name, sparsity, measure, num_classes, width=None, **settings):
    """The width of the small dense control: the largest for which the network has no more than the given one has left.

    Left, with a share `sparsity` of zeros in all convolutions and linear layers, are
    measure 'parameters': those that are not zero, biases and norms included
    measure 'macs':       multiply-accumulates with non-zero weights, when every layer has that share of zeros
    Raises ValueError for networks without a width, and where even a width of 1 has more.
    """
    parameters, prunable, macs = size_of(name, num_classes, width, **settings)
    limit = parameters - round(sparsity * prunable) if measure == 'parameters' else (1 - sparsity) * macs
    for smaller in range(1, 10**4):
        parameters, _, macs = size_of(name, num_classes, smaller, **settings)
        if (parameters if measure == 'parameters' else macs) > limit:
            break
    if smaller == 1:
        raise ValueError(f'no width of {name} has as few {measure} as a share of {sparsity:g} zeros leaves')
    return smaller - 1


def size_of(name, num_classes, width=None, **settings):
    """(parameters, weights of convolutions and linear layers, multiply-accumulates for an image) of a network of archs."""
    with torch.device('meta'):
        net = build(name, num_classes, width, **settings).eval()
        image = torch.zeros(1, settings['in_channels'], settings['image_size'], settings['image_size'])
    layers = [module for module in net.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    uses = {}
    for layer in layers:
        layer.register_forward_hook(lambda layer, inputs, output: uses.update({layer: output[0].numel() // output.shape[1]}))
    net(image)
    prunable = sum(layer.weight.numel() for layer in layers)
    macs = sum(layer.weight.numel() * uses[layer] for layer in layers)
    return sum(parameter.numel() for parameter in net.parameters()), prunable, macs
