"""Every common flag, and how a YAML table, a method's defaults and the command line combine.

A table row becomes command-line words placed before the user's own, so that argparse checks types, choices and unknown names
for both, and the user's flag wins. Below both stand the method's DEFAULTS, below those the defaults here, which are Feather's
example run (CIFAR-100). Importing this parses nothing.
"""

import argparse
import contextlib
import difflib
import json
from pathlib import Path

import yaml

import archs
import methods
from harness import data
from methods._flags import PLACE, count, fraction, nonnegative, positive, share

COMMANDS = {  # flags that train nothing, and what they do
    'publish': 'Write the weights of a finished run into a small file that anybody can check.',
    'evaluate': 'Check what a file of weights says, or evaluate a packed or shrunk network.',
    'sparse-compile': 'Time the zeros of a finished run on the CPU, beside dense engines: sparse.json in its folder.',
    'shrink': 'Make a smaller network of what a finished run has pruned: small.pt and small.json in its folder.',
}
TABLE_KEYS = ['title', 'times', 'summary', 'defaults', 'seeds', 'rows']
ROW_KEYS = ['id', 'seeds', 'paper', 'minutes', 'note']  # of a table row, beside flags


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f'{self.prog}: error: {message}\n')


def common_parser():
    """The flags that every method has, --help among them."""
    commands = [f'main.py --{name} {"FILE" if name == "evaluate" else "RUN"}\n    {does}' for name, does in COMMANDS.items()]
    parser = Parser(
        prog='main.py',
        description='Train and sparsify a network.',
        epilog='with what a finished run has left (--help after each shows its flags):\n  ' + '\n  '.join(commands),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument('-h', '--help', action='store_true', help='show this help, with the flags of the chosen --method')

    add = parser.add_argument_group('what is run').add_argument
    add('--method', default='feather', help='one of: ' + ', '.join(methods.names()) + ' (default: %(default)s)')
    add(
        '--model',
        default='resnet20',
        help=f'network of archs/: {", ".join(archs.names())}, and any wrn<depth>_<k>[_nobias]; or torchvision/NAME, timm/NAME, '
        'or FILE.py:FUNCTION, a function that returns an nn.Module (default: %(default)s)',
    )
    switch = argparse.BooleanOptionalAction
    text = (
        "start from the published weights of torchvision's or timm's network; a pipeline then skips its dense training, unless "
    )
    text += 'the data has another number of classes, so that the classifier is fresh'
    add('--pretrained', action=switch, default=None, help=text)
    text = 'channels of the first stage of a CIFAR ResNet (default: 32; He et al. have 16), a wide ResNet (16k) or a VGG (64)'
    add('--width', type=positive, help=text)
    text = 'a narrower network with at most the parameters, or MACs, that --ptarget leaves: a control, for --method dense'
    add('--small-dense', choices=['parameters', 'macs'], help=text)
    add('--dropout', type=nonnegative, default=0.0, help='dropout rate of a wide ResNet (default: %(default)s)')
    add('--bn-momentum', type=nonnegative, help="momentum of batch norm's running statistics (default: PyTorch's 0.1)")
    add('--ptarget', type=fraction, default=0.95, help='final target pruning ratio, a fraction of zeros (default: %(default)s)')
    add(
        '--from',
        metavar='RUN',
        help='start from the weights of this finished run (its folder or model.pt), or of a file with a state dict, instead of '
        'pretraining; {seed} is filled in',
    )
    text = 'estimate the statistics of batch norms again, on N training images, before the final evaluation'
    add('--recalibrate', dest='recalibrate_images', type=positive, metavar='N', help=text)
    add('--pthres', type=count, default=0, help='prune only layers with at least so many weights (default: %(default)s)')

    add = parser.add_argument_group('data').add_argument
    add('--dataset', choices=list(data.DATASETS), default='cifar100', help='(default: %(default)s)')
    add('--image-size', type=positive, metavar='N', help='side of the images, for --dataset folder and imagenet (default: 224)')
    add('--limit-train', type=positive, metavar='N', help='train on the first N images only')
    add(
        '--val-size',
        type=count,
        default=0,
        metavar='N',
        help='set the last N training images aside for validation (default: %(default)s)',
    )
    add('--pad', type=count, help='random crops from images padded by so many pixels (default: 4 for CIFAR, else 0)')
    add('--pad-mode', choices=['zeros', 'edge', 'reflect'], help='what the padding holds (default: zeros)')
    add('--flip', action=switch, help='random horizontal flips (default: for CIFAR and ImageNet)')
    add('--mean', type=float, nargs='+', help="normalisation, a value a channel (default: the dataset's)")
    add('--std', type=float, nargs='+', help="normalisation, a value a channel (default: the dataset's)")
    text = "normalise each image by its own mean and standard deviation, instead of --mean and --std (RigL's CIFAR-10)"
    add('--per-image', action=switch, default=None, help=text)
    add('--drop-last', action=switch, default=False, help='leave out the last, smaller batch of an epoch')

    add = parser.add_argument_group('training').add_argument
    add('--epochs', type=positive, default=160, help='number of epochs of the main training stage (default: %(default)s)')
    add('--batch-size', type=positive, default=128, help='(default: %(default)s)')
    add(
        '--accumulate',
        type=positive,
        default=1,
        metavar='N',
        help='compute the gradient of a batch in N pieces, which take less memory (default: %(default)s)',
    )
    add('--lr', type=nonnegative, default=0.1, help='initial learning rate (default: %(default)s)')
    add('--lr-schedule', choices=['cosine', 'multistep', 'constant'], default='cosine', help='(default: %(default)s)')
    add('--lr-restarts', type=count, default=0, help='warm restarts of the cosine, evenly spread (default: %(default)s)')
    add(
        '--lr-milestones',
        type=fraction,
        nargs='+',
        default=[0.5, 0.75],
        metavar='SHARE',
        help='shares of training after which multistep decays (default: 0.5 0.75)',
    )
    add('--lr-gamma', type=nonnegative, default=0.1, help='factor of each multistep decay (default: %(default)s)')
    add(
        '--lr-update',
        choices=['step', 'epoch'],
        default='step',
        help='how often the learning rate changes (default: every %(default)s)',
    )
    add('--warmup-epochs', type=nonnegative, default=0.0, help='linear warm-up of the learning rate (default: %(default)s)')
    add('--optimizer', choices=['sgd', 'adam'], default='sgd', help='(default: %(default)s)')
    add('--momentum', type=nonnegative, default=0.9, help='of SGD (default: %(default)s)')
    add('--nesterov', action=switch, default=False, help='Nesterov momentum')
    add('--wd', type=nonnegative, default=5e-4, help='weight decay (default: %(default)s)')
    add('--wd-all', action=switch, default=False, help='decay biases and batch norm too (default: weights only)')
    add('--clip', type=nonnegative, default=3.0, help='clip the gradient to this norm, 0 for never (default: %(default)s)')
    add('--label-smoothing', type=share, default=0.0, help='(default: %(default)s)')
    add('--seed', type=count, default=0, help='of weights, order and augmentation (default: %(default)s)')

    add = parser.add_argument_group('speed').add_argument
    add('--amp', action=switch, default=False, help='bfloat16 autocast in training; evaluation stays in float32')
    add('--channels-last', action=switch, default=False, help='channels-last memory format, faster with --amp')
    add(
        '--compile',
        nargs='?',
        const='default',
        choices=['default', 'reduce-overhead', 'max-autotune'],
        help='torch.compile the training forward; reduce-overhead uses CUDA graphs',
    )
    add(
        '--cuda-graphs',
        action='store_true',
        help='launch the kernels of a pass together, as they were recorded: the same numbers, sooner where a small network '
        'leaves a GPU idle',
    )

    place_flags(parser.add_argument_group('place').add_argument)

    add = parser.add_argument_group('run').add_argument
    add('--sname', help='name at the end of the run folder (default: method_model)')
    add(
        '--out', metavar='DIR', help="the run's folder; a run interrupted there is continued (default: runs/<datetime>_<sname>)"
    )
    add('--resume', metavar='DIR', help='continue the run in this folder with the arguments it was started with')
    add('--config', metavar='FILE', help='a YAML table; see --row')
    add('--row', metavar='ID', help='the row of --config to run')
    return parser


def place_flags(add):
    """Where the data is and what computes."""
    add('--data-dir', default='./data', help='folder of the datasets, in the layout of torchvision (default: %(default)s)')
    add('--no-download', action='store_true', help='fail when the dataset is not there, instead of downloading it')
    add(
        '--workers',
        type=count,
        nargs='?',
        const=8,
        default=0,
        help='loader processes for folders of images, 8 for the bare switch; other data stays in memory (default: %(default)s)',
    )
    add('--gpu', type=count, default=0, metavar='ID', help='GPU device id (default: %(default)s)')
    add('--no-cuda', action='store_true', help='run on the CPU even where there is a GPU')
    add('--device', help='cpu, cuda, cuda:1, ...; overrides --gpu and --no-cuda (default: the GPU if there is one)')


def parser_for(words, description=True):
    """(the parser with the flags of the method that `words` name, that method). Raises ValueError for an unknown method."""
    parser = common_parser()
    method = methods.load(parser.parse_known_args(words)[0].method)
    method.add_args(parser.add_argument_group(f'--method {method.__module__.split(".")[-1]}'))
    parser.set_defaults(**method.DEFAULTS)
    return parser, method


def flags_of(words):
    """All flags of a run, as `--lr`, for the method that the words of a command line name."""
    parser, _ = parser_for([*config_words(common_parser().parse_known_args(words)[0]), *words])
    return {flag for action in parser._actions for flag in action.option_strings}


def parse(argv):
    """The command line (a list of words) -> Namespace. Usage errors print one sentence and exit with status 2."""
    if command := command_of(argv):
        return parse_command(command, argv)
    first, _ = common_parser().parse_known_args(argv)
    if first.resume:
        return resumed(common_parser(), argv)
    try:
        words = config_words(first) + argv
        parser, _ = parser_for(words)
    except ValueError as error:
        common_parser().error(str(error))
    if first.help:
        parser.print_help()
        parser.exit()
    check_words(parser, words[: len(words) - len(argv)], first)
    args = parser.parse_args(words)
    del args.help
    args.command = None
    fill_in_data(parser, args)
    if args.small_dense and args.method != 'dense':
        parser.error('--small-dense is a control: use it with --method dense')
    if args.dropout >= 1:
        parser.error('--dropout must be below 1')
    if args.pretrained and vars(args)['from']:
        parser.error('--pretrained and --from both give weights to start from: leave one out')
    args.model = archs.absolute(args.model)
    args.sname = args.sname or f'{args.method}_{short_name(args.model)}'
    return args


def short_name(model):
    """A network's name that can be a part of a file name."""
    if archs.is_file(model):
        path, _, function = model.rpartition(':')
        return f'{Path(path).stem}-{function}'
    return model.replace('/', '-')


def fill_in_data(parser, args):
    """The dataset's defaults, so that args.json shows what was used."""
    of_dataset = data.DATASETS[args.dataset] | methods.load(args.method).DATASET_DEFAULTS.get(args.dataset, {})
    for knob in ('pad', 'pad_mode', 'flip', 'mean', 'std'):
        if getattr(args, knob) is None:
            setattr(args, knob, of_dataset[knob])
    if args.image_size and args.dataset not in ('imagenet', 'folder'):
        size = data.DATASETS[args.dataset]['image_size']
        parser.error(f'--image-size is for --dataset folder and imagenet; the images of {args.dataset} are {size}x{size}')
    channels = data.DATASETS[args.dataset]['in_channels']
    args.mean = list(args.mean)
    args.std = list(args.std)
    if len(args.mean) != channels or len(args.std) != channels:
        parser.error(f'--mean and --std take one value for each of the {channels} channels of {args.dataset}')
    if min(args.std) <= 0:
        parser.error('--std must be positive')


# --------------------------------------------------------------------------------------------------------------- commands


def command_of(argv):
    """The name of a flag that trains nothing, among the words of a command line, or None."""
    flags = [word.split('=')[0] for word in argv]
    return next((name for name in COMMANDS if f'--{name}' in flags), None)


def parse_command(command, argv):
    """`--publish RUN` or another of COMMANDS with its few flags -> Namespace with `command`."""
    parser = Parser(prog='main.py', description=COMMANDS[command], allow_abbrev=False)
    add = parser.add_argument
    shown = ' (default: %(default)s)'
    add(f'--{command}', required=True, metavar='FILE' if command == 'evaluate' else 'RUN')
    if command == 'publish':
        add('--to', metavar='FILE', help='where to (default: results/weights/<table>/<row>-s<seed>.pt, or RUN/published.pt)')
    if command == 'shrink':
        add('--round-to', type=positive, default=1, metavar='N', help='keep multiples of N filters, as hardware likes' + shown)
        add('--pt2', action='store_true', help='also write small.pt2, for torch.export')
        add('--onnx', action='store_true', help='also write small.onnx')
        add('--torchscript', action='store_true', help='also write small.ts, deprecated by PyTorch')
        add('--threads', type=positive, default=2, help='of the CPU, for the measurement' + shown)
        return parser.parse_args(argv, argparse.Namespace(command=command, device='cpu', gpu=0, no_cuda=True))
    if command == 'sparse-compile':
        add('--threads', type=positive, default=2, help='of the CPU' + shown)
        place_flags(add)
        return parser.parse_args([*argv, '--no-cuda'], argparse.Namespace(command=command))
    if command == 'evaluate':
        add('--dataset', choices=list(data.DATASETS), help='(default: the one the file was trained on)')
        ours = "normalisation of a network that lies in no run folder (default: the dataset's)"
        add('--mean', type=float, nargs='+', help=ours)
        add('--std', type=float, nargs='+', help='the same')
        add('--image-size', type=positive, metavar='N', help='of --dataset folder and imagenet, for such a network')
        add(
            '--trust',
            action='store_true',
            help='read .pt2 and TorchScript files too, and networks of Python files: code that runs',
        )
    place_flags(add)
    return parser.parse_args(argv, argparse.Namespace(command=command))


def resumed(parser, argv):
    """The arguments a run folder was started with; only PLACE flags may be given anew."""
    folder = Path(parser.parse_known_args(argv)[0].resume)
    try:
        args = argparse.Namespace(**json.loads((folder / 'args.json').read_text()))
    except (OSError, ValueError, TypeError):
        parser.error(f'--resume {folder}: no readable args.json there, so this is not the folder of a run')
    given = {word.split('=')[0] for word in argv if word.startswith('--')}
    flags = {'--' + name.replace('_', '-') for name in PLACE}
    if given - flags:
        parser.error(f'--resume takes its arguments from {folder}/args.json; leave out {", ".join(sorted(given - flags))}')
    with contextlib.suppress(ValueError):
        methods.load(args.method).add_args(parser)  # --chain is one of a method's own
    args.command = None
    now = parser.parse_args(argv)
    for name in PLACE:
        if '--' + name.replace('_', '-') in given:
            setattr(args, name, getattr(now, name))
    args.out = str(folder)
    args.resume = str(folder)
    return args


# ---------------------------------------------------------------------------------------------------------------- tables


def load_table(path):
    """A YAML table -> {'defaults': {...}, 'seeds': [...], 'rows': [...]}. Raises ValueError, one sentence, for a faulty one."""
    try:
        table = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ValueError(f'cannot read the config {path}: {error.strerror}') from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f'{path} is no valid YAML: {" ".join(str(error).split())}') from None
    if not isinstance(table, dict) or not isinstance(table.get('rows'), list) or not table['rows']:
        raise ValueError(f'{path}: a table needs `rows`, a list of rows with an `id` each')
    if unknown := set(table) - set(TABLE_KEYS):
        raise ValueError(f'{path}: unknown key {sorted(map(str, unknown))[0]!r}; a table has {", ".join(TABLE_KEYS)}')
    table = {'title': Path(path).stem, 'times': False, 'summary': 'mean', 'defaults': {}, 'seeds': [0]} | table
    if table['summary'] not in ('mean', 'median'):
        raise ValueError(f'{path}: `summary` is mean or median, not {table["summary"]!r}')
    if not isinstance(table['defaults'], dict):
        raise ValueError(f'{path}: `defaults` is a mapping of flags')
    ids = [row.get('id') if isinstance(row, dict) else None for row in table['rows']]
    for name in ids:
        if not isinstance(name, str) or not name or set(name) & set('/\\ \t\n') or name.startswith('.'):
            raise ValueError(f'{path}: every row needs an `id` that can be a file name, got {name!r}')
        if ids.count(name) > 1:
            raise ValueError(f'{path}: two rows have the id {name!r}')
    for row in table['rows']:
        row['seeds'] = seeds = row.get('seeds', table['seeds'])
        if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
            raise ValueError(f'{path}: `seeds` is a list of whole numbers')
    return table


def row_words(table, row):
    """A row over the table's defaults as command-line words."""
    words = []
    for key, value in (table['defaults'] | {k: v for k, v in row.items() if k not in ROW_KEYS}).items():
        flag = '--' + str(key).replace('_', '-')
        if isinstance(value, bool):
            words.append(flag if value else flag.replace('--', '--no-', 1))
        elif isinstance(value, list):
            words += [flag, *map(str, value)]
        else:
            words.append(f'{flag}={value}')
    return words


def config_words(first):
    """The words of --config and --row, or none."""
    if first.config is None:
        if first.row is not None:
            raise ValueError('--row names a row of a table: give the table with --config')
        return []
    table = load_table(first.config)
    rows = {row['id']: row for row in table['rows']}
    if first.row is None and len(rows) > 1:
        raise ValueError(f'{first.config} has {len(rows)} rows; choose one with --row: {", ".join(rows)}')
    name = first.row if first.row is not None else next(iter(rows))
    if name not in rows:
        raise ValueError(f'{first.config} has no row {name!r}; its rows are {", ".join(rows)}')
    return [f'--seed={rows[name]["seeds"][0]}', *row_words(table, rows[name])]


def check_words(parser, words, first):
    """An unknown key of a table is the table's fault: say so, and which key may have been meant."""
    flags = [flag for action in parser._actions for flag in action.option_strings]
    for flag in (word.split('=')[0] for word in words if word.startswith('--')):
        if flag not in flags or flag in ('--config', '--row', '--resume', '--out'):
            near = difflib.get_close_matches(flag, flags, 1)
            hint = f' (did you mean {near[0][2:]}?)' if near else ''
            if flag.replace('--no-', '--', 1) in flags:  # a switch that has no opposite, given as false
                hint = f' (leave {flag[5:]} out)'
            parser.error(f'{first.config}: unknown key {flag[2:]!r}{hint}')
