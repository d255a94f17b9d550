"""The network of a finished run, as main.py built it."""

from argparse import Namespace
from pathlib import Path

import torch

import archs
from deploy.files import read_json, read_tensors

from . import data
from .run_folder import sources


def network_of(args, result, sources=None):
    """(the network with fresh weights, the shape [C, H, W] of an image) of a run.

    args: the run's arguments, a dict. result: of its result.json or published file, which names the numbers of classes and
    channels and the image size; runs of before these were written down have those of their dataset. sources: a folder with
    copies of the files of --model FILE.py:FUNCTION, see archs.from_args().
    """
    facts = data.DATASETS[args['dataset']]
    classes, channels, size = (result.get(name) or facts[name] for name in ('num_classes', 'in_channels', 'image_size'))
    return archs.from_args(Namespace(**args), classes, channels, size, sources), (channels, size, size)


def rebuild_run(folder):
    """(model in eval mode on the CPU, one example of random pixels) of a run folder, as main.py builds it.

    Of a network of FILE.py:FUNCTION the copies in the folder are run.
    """
    folder = Path(folder)
    args = read_json(folder / 'args.json')
    if not isinstance(args, dict) or not (folder / 'model.pt').is_file():
        raise ValueError(f'{folder} is not the folder of a finished run: it needs args.json and model.pt')
    model, shape = network_of(args, read_json(folder / 'result.json') or {}, sources(folder))
    try:
        model.load_state_dict(read_tensors(folder / 'model.pt'))
    except RuntimeError as error:
        reason = ' '.join(str(error).split())[:200]
        raise ValueError(f'{folder}/model.pt is no {args["model"]}, so it has another shape already: {reason}') from None
    return model.eval(), torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
