"""torch.hub's entry: the published networks, each in one line, from a clone of this repository in DIR.

    net = torch.hub.load(DIR, 'resnet20_cifar10', source='local', method='feather', sparsity=98)
    net = torch.hub.load(DIR, 'resnet20_cifar10', source='local', method='st3', sparsity=98, fast=True)

results/weights/README.md lists what there is. A network comes in eval mode, with exact zeros. It takes images [B, C, H, W] with
pixels in [0, 1], minus net.published['args']['mean'], divided by net.published['args']['std']; net.published also holds the
accuracy and all arguments of its training. fast=True: the sparse engine computes with the non-zero weights alone (see
deploy.sparse_compile).
"""

import argparse
import pathlib

import torch

import archs
import deploy
from deploy import files

dependencies = ['torch']

WEIGHTS = pathlib.Path(__file__).resolve().parent / 'results' / 'weights'


def resnet20_cifar10(method='feather', sparsity=98, seed=0, table='cifar10_10ep', fast=False):
    """ResNet-20 of width 16 on CIFAR-10, 10 classes.

    method: 'dense', or as in the rows of the table: 'feather', 'st3-sigma', ... sparsity: percent of the weights that are zero
    (of filter methods: of filters or FLOPs); dense has none. Raises ValueError, naming what is published, where this is not.
    """
    row = 'dense' if method == 'dense' else f'{method}-{sparsity}'
    return _load(table, row, seed, 10, (3, 32, 32), fast)


def lenet300_100_mnist(rounds=10, seed=0, table='nni/lottery_ticket', fast=False):
    """LeNet-300-100 on MNIST, 10 classes: the lottery ticket's network after a number of rounds. Raises ValueError."""
    return _load(table, f'round-{rounds}', seed, 10, (1, 28, 28), fast)


def _load(table, row, seed, classes, image, fast):
    path = WEIGHTS / table / f'{row}-s{seed}.pt'
    if not path.is_file():
        there = ', '.join(sorted(file.stem for file in path.parent.glob('*.pt'))) or 'nothing'
        raise ValueError(f'{table} has no published network {row} of seed {seed}: there is {there}')
    state, about = files.read_published(path)
    channels, size, _ = image
    net = archs.from_args(argparse.Namespace(**about['args']), classes, channels, size)
    net.load_state_dict(state)
    net.eval()
    if fast:
        net = deploy.sparse_compile(net, torch.zeros(1, *image))
    net.published = about
    return net
