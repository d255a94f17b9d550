"""The network of a finished run, as main.py built it."""

from argparse import Namespace

import archs

from . import data


def network_of(args, result):
    """(the network with fresh weights, the shape [C, H, W] of an image) of a run.

    args: the run's arguments, a dict. result: of its result.json or published file, which names the numbers of classes and
    channels and the image size; runs of before these were written down have those of their dataset.
    """
    facts = data.DATASETS[args['dataset']]
    classes, channels, size = (result.get(name, facts[name]) for name in ('num_classes', 'in_channels', 'image_size'))
    return archs.from_args(Namespace(**args), classes, channels, size), (channels, size, size)
