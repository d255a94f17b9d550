"""The types of flags, for args.py and for the methods; and which flags say where a run runs, not what it computes."""

import argparse

# These may differ when a run is continued or looked up.
# These say where and on what a run runs, not what it computes: they may differ when a run is continued or looked up.
PLACE = ['command', 'out', 'resume', 'config', 'row', 'sname', 'chain']
PLACE += ['data_dir', 'no_download', 'workers', 'device', 'gpu', 'no_cuda', 'cuda_graphs']


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'must be 1 or more, got {text}')
    return value


def count(text):
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f'must be 0 or more, got {text}')
    return value


def nonnegative(text):
    value = float(text)
    if not 0 <= value < float('inf'):
        raise argparse.ArgumentTypeError(f'must be 0 or more and finite, got {text}')
    return value


def share(text):
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f'must lie from 0 to 1, got {text}')
    return value


def fraction(text):
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f'is a fraction and must lie between 0 and 1, got {text}')
    return value


def differences(old, new):
    """The arguments, as lines `--name old -> new`, in which two runs (dicts) compute something different."""
    names = sorted((old.keys() | new.keys()) - set(PLACE))
    return [
        f'--{name.replace("_", "-")} {old.get(name)} -> {new.get(name)}' for name in names if old.get(name) != new.get(name)
    ]
