"""What is done with a finished run: its weights are published in a small file, and anybody can check what the file says.

python main.py --publish RUN                       results/weights/<table>/<row>-s<seed>.pt, or RUN/published.pt outside a table
python main.py --evaluate FILE --data-dir DIR      count zeros and accuracy again; also the accuracy of packed networks
./launch verify [--data-dir DIR]                   the same for every file below results/weights

What such a file holds stands in deploy/files.py.
"""

import json
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import torch

import archs
import args as arguments
from deploy import formats
from deploy.files import FileError, pack_sparse, read_json, read_published, read_tensors, write_tensors
from methods._flags import PLACE
from pruners.processes import say
from sparse_utils import count_zeros

from . import data
from . import table as tables
from .rebuild import network_of
from .result import accuracy, totals
from .run_folder import RunError, finished, sources

WEIGHTS = Path(__file__).resolve().parents[1] / 'results' / 'weights'


def publish(run, path=None):
    """Write the published file of a finished run folder and return its path. Raises RunError for a run that has none."""
    folder = Path(run)
    result = finished(folder)
    if result is None:
        raise RunError(f'--publish {run}: no finished run there')
    args = result['args']
    row = {}
    if path is None and args.get('config') and args.get('row'):
        table = tables.name_of(args['config'])
        row = {'table': table, 'row': args['row'], 'seed': args['seed']}
        path = WEIGHTS / table / f'{args["row"]}-s{args["seed"]}.pt'
    path = Path(path or folder / 'published.pt')
    about = row | {key: value for key, value in result.items() if key != 'layers'}
    about['args'] = {name: value for name, value in args.items() if name not in PLACE}
    content = pack_sparse(read_tensors(folder / 'model.pt'), about)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(content, path)
    if copies := sources(folder):
        shutil.copytree(copies, network_beside(path), dirs_exist_ok=True)
        say(f'{network_beside(path)}: the Python files that the network is built from, which belong to it')
    say(f'{path}: {path.stat().st_size:,} bytes, {result["zeros"]:,} of {result["weights"]:,} weights are zero')
    return path


def network_beside(path):
    """The folder with the Python files of a published file whose network is of FILE.py:FUNCTION."""
    return path.with_suffix('.network')


def code_of(path, about, trust):
    """That folder, or None where the network is built by name. Raises RunError for code that is not trusted, or not there."""
    if not archs.is_file(about['args']['model']):
        return None
    folder = network_beside(path)
    if not folder.is_dir():
        raise RunError(f'{path} has the weights of {about["args"]["model"]}, and {folder} with its Python files is not there')
    if not trust:
        raise RunError(
            f'the network of {path} is built by the Python files in {folder}: read them, and add --trust to run them'
        )
    return folder


def rebuild(state, about, copies=None):
    """The network a published file describes, with its weights. Raises RunError when they do not fit together.

    copies: the folder of code_of().
    """
    try:
        args = Namespace(**about['args'])
        model, _ = network_of(about['args'], about, copies)
        model.load_state_dict(state)
        if args.channels_last:  # the same kernels as in the run, so that the accuracy is the same to the last image
            model.to(memory_format=torch.channels_last)
    except (KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        reason = ' '.join(str(error).split())[:150]
        raise RunError(f'the network cannot be rebuilt: {type(error).__name__}: {reason}') from None
    return model.eval(), args


def check(path, loader=None, device=None, trust=False):
    """Count a published file again -> (about, {claim: (what the file says, what is counted)}).

    loader: images to count the accuracy on, or None; one may be made with test_images(). trust: whether to run the Python
    files beside it, where its network is built by those.
    """
    state, about = read_published(path)
    model, args = rebuild(state, about, code_of(path, about, trust))
    zeros, weights = totals(count_zeros(model, args.pthres))
    counted = {'zeros': zeros, 'weights': weights}
    if loader is not None:
        counted['accuracy'] = accuracy(model.to(device), loader)
    return about, {claim: (about.get(claim), value) for claim, value in counted.items()}


def test_images(args, about, device):
    """The test set that a published file was evaluated on, with the run's normalisation."""
    return load_data(args, about, device).test


def load_data(args, about, device):
    """The data set that a published file was trained on, as harness.data.load() gives it."""
    settings = Namespace(**about['args'])
    settings.data_dir = args.data_dir
    settings.no_download = args.no_download
    settings.workers = args.workers
    return data.load(settings, device)


def evaluate(args, device):
    """`--evaluate FILE`: print what a published file says and what is counted; of another network, its accuracy.

    Returns whether the file is what it says. FILE is a published file, a network of deploy.save() (its .pt or .json), or a .pt2
    or TorchScript file with --trust. Raises RunError or ValueError for anything else.
    """
    path = Path(args.evaluate)
    if not path.is_file():
        raise RunError(f'--evaluate {path}: no such file')
    if not formats.file_kind(path).startswith('weights only'):
        return evaluate_network(path, args, device)
    _, about = read_published(path)
    dataset = about['args']['dataset']
    if args.dataset not in (None, dataset):
        raise RunError(f'{path} was trained on {dataset}, not on {args.dataset}')
    code_of(path, about, args.trust)
    about, claims = check(path, test_images(args, about, device), device, args.trust)
    made = f'{about["args"]["method"]} on {about["args"]["model"]}, {dataset}, seed {about["args"]["seed"]}'
    say(f'{made}; trained on {about["device"]}, torch {about["torch"]}, commit {about["commit"]}')
    for claim, (said, counted) in claims.items():
        say(f'{claim:<10} file {said}, counted {counted}' + ('' if said == counted else '   DIFFERENT'))
    return all(said == counted for said, counted in claims.values())


def evaluate_network(path, args, device):
    """A packed or shrunk network, on the data and normalisation of the run it lies in, or of --dataset, --mean and --std."""
    network = formats.read(path, args.trust).to(device)
    run = read_json(path.parent / 'args.json')
    if run is None and args.dataset is None:
        raise RunError(f'{path} lies in no run folder: name the data with --dataset')
    if run is None or args.dataset not in (None, run['dataset']):
        run = vars(arguments.parse([f'--dataset={args.dataset}', '--method=dense']))
    run |= {
        name: value
        for name, value in (('mean', args.mean), ('std', args.std), ('image_size', args.image_size))
        if value is not None
    }
    images = test_images(args, {'args': run | {'channels_last': False, 'val_size': 0, 'limit_train': None}}, device)
    share = accuracy(network, images)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    say(f'accuracy   {share:.2f} % on the {images.num_images:,} test images of {run["dataset"]}')
    say(f'parameters {parameters:,}')
    return True


def verify(argv=None):
    """`./launch verify`: check every file below results/weights -> the exit status. argv: default, the command line's."""
    parser = arguments.Parser(prog='launch verify', description='Check every published weight file.', allow_abbrev=False)
    parser.add_argument('--data-dir', help='also count the accuracies, on the datasets in this folder')
    parser.add_argument('--weights', type=Path, default=WEIGHTS, help='the folder of the files (default: %(default)s)')
    parser.add_argument('--trust', action='store_true', help='run the Python files of networks of FILE.py:FUNCTION')
    args = parser.parse_args(argv)
    args.no_download = True
    args.workers = 0
    device = torch.device('cpu')
    files = sorted(args.weights.rglob('*.pt'))
    loaders = {}
    wrong = 0
    recorded = tables.recorded()
    for path in files:
        try:
            about = read_published(path)[1]
            loader = None
            if args.data_dir is not None:
                shown = ('dataset', 'mean', 'std', 'per_image', 'batch_size', 'image_size')
                settings = {name: about['args'].get(name) for name in shown}
                key = json.dumps(settings)
                loader = loaders[key] = loaders.get(key) or test_images(args, about, device)
            about, claims = check(path, loader, device, args.trust)
            line = recorded.get(about.get('table'), {}).get((about.get('row'), about.get('seed')))
            for claim in ('zeros', 'weights', 'accuracy', 'commit'):
                if line is None or line[claim] != about[claim]:
                    claims[f'{claim} in runs.jsonl'] = (about[claim], None if line is None else line[claim])
            faults = [f'{claim}: file {said}, found {found}' for claim, (said, found) in claims.items() if said != found]
            seen = f'{about["zeros"]:,} zeros' + ('' if loader is None else f', {about["accuracy"]:.2f} %')
        except (FileError, data.DataError) as error:
            faults = [str(error)]
            seen = ''
        wrong += bool(faults)
        say(f'{path.relative_to(args.weights)}: {"WRONG: " + "; ".join(faults) if faults else seen + " as it says"}')
    say(f'{len(files)} files, {wrong} wrong' + ('' if args.data_dir else '; accuracies not counted, no --data-dir given'))
    return int(wrong > 0 or not files)


if __name__ == '__main__':
    sys.exit(verify())
