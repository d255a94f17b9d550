"""Weights to start from: of a finished run, of a file, or the published ones of torchvision and timm."""

import zipfile
from pathlib import Path

import torch

import archs
from deploy.files import read_tensors
from pruners.processes import say

from .run_folder import RunError, compare_images

WRAPPINGS = ('state_dict', 'model', 'model_state_dict', 'net', 'model_state')  # entries under which checkpoints keep weights


def start_weights(args, data):
    """(state dict, what it is called) that --from or --pretrained asks for, or None.

    data: of harness.data.load(). Raises RunError, ValueError or RuntimeError with one sentence.
    """
    if run := vars(args).get('from'):
        run = run.replace('{seed}', str(args.seed))
        state = weights_of(run)
        compare_images(run, args)
        return state, run
    if vars(args).get('pretrained'):
        state, called, mean, std = archs.pretrained_weights(args.model, data.in_channels, data.image_size)
        if not vars(args).get('per_image') and (list(mean), list(std)) != (list(args.mean), list(args.std)):
            flags = f'--mean {" ".join(map(str, mean))} --std {" ".join(map(str, std))}'
            say(f'these weights were trained on images of another normalisation: {flags}')
        return state, f'{args.model}, {called}'
    return None


def weights_of(run):
    """The state dict of a finished run, named by its folder, or of any file of weights. Raises RunError where there is none."""
    path = Path(run) / 'model.pt' if Path(run).is_dir() else Path(run)
    if not path.is_file():
        raise RunError(f'--from {run}: there is no {path}; name the folder of a finished run, or a file of weights')
    return read_tensors(path) if Path(run).is_dir() else read_weights(path)


def read_weights(path):
    """The state dict in a file of torch.save or safetensors, without running code from it. Raises RunError.

    It may lie under one of WRAPPINGS, and its names may begin with `module.`, as DistributedDataParallel makes them.
    """
    try:
        if path.suffix == '.safetensors':
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            check_sums(path)
            content = torch.load(path, map_location='cpu', weights_only=True)
    except ImportError:
        raise RunError(f'--from {path} needs safetensors: pip install safetensors') from None
    except Exception as error:  # damage shows as one of many exceptions
        raise RunError(
            f'--from {path} is no file of weights that can be read safely ({error_line(error)}); a file of state_dict() is'
        ) from None
    for key in WRAPPINGS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(torch.is_tensor(value) for value in content.values()):
        raise RunError(f'--from {path} holds no state dict, that is tensors by their names')
    if all(name.startswith('module.') for name in content):
        content = {name.removeprefix('module.'): tensor for name, tensor in content.items()}
    return content


def check_sums(path):
    """Raises ValueError where a file of torch.save is damaged, at which torch.load does not look; older files have no sums."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as parts:
            if damaged := parts.testzip():
                raise ValueError(f'it is damaged: the checksum of {damaged} is wrong')


def error_line(error):
    lines = f'{error}'.strip().splitlines() or ['no reason given']
    return lines[0][:120]
