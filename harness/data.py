"""Datasets: where the images come from and how they become batches on the device.

The small sets (digits, mnist, cifar10, cifar100) are held in memory as uint8 tensors on the device, so that
`Batches` shuffles, crops and mirrors whole batches there. ImageNet does not fit and goes through
torchvision's transforms and a DataLoader (`FolderBatches`). Both are iterated in the same way, and what they
draw depends on (seed, epoch) alone, so that a resumed epoch shows exactly the images the interrupted one
would have shown.
"""

import gzip
import hashlib
import io
import math
import pickle
import sys
import tempfile
import traceback
import zlib
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch

from pruners.processes import rank, world

# `pad`, `pad_mode`, `flip`, `mean` and `std` are defaults that the command line may override; mean and std
# are per channel, of pixels in [0, 1]. Feather's authors use CIFAR-10's constants for CIFAR-100 too, and so
# do we.
GREY = dict(num_classes=10, in_channels=1, pad=0, pad_mode='zeros', flip=False)
COLOUR = dict(in_channels=3, pad_mode='zeros', flip=True)
CIFAR = dict(COLOUR, image_size=32, pad=4, mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))
# ImageNet's `pad` is unused (its training crops are resized ones) and its classes are counted when loading.
# So are those of `folder`, ImageNet's layout with any classes and --image-size.
IMAGENET = dict(COLOUR, image_size=224, pad=0, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
DATASETS = {
    'digits': dict(GREY, image_size=8, mean=(0.3059,), std=(0.3763,)),
    'mnist': dict(GREY, image_size=28, mean=(0.1307,), std=(0.3081,)),
    'cifar10': dict(CIFAR, num_classes=10),
    'cifar100': dict(CIFAR, num_classes=100),
    'imagenet': dict(IMAGENET, num_classes=1000),
    'folder': dict(IMAGENET, num_classes=None),
}

# Where torchvision puts each set, and the md5 of each (uncompressed) file: training files come before test
# files.
FOLDERS = {'mnist': 'MNIST/raw', 'cifar10': 'cifar-10-batches-py', 'cifar100': 'cifar-100-python'}
MD5 = {
    'mnist': {
        'train-images-idx3-ubyte': '6bbc9ace898e44ae57da46a324031adb',
        'train-labels-idx1-ubyte': 'a25bea736e30d166cdddb491f175f624',
        't10k-images-idx3-ubyte': '2646ac647ad5339dbf082846283269ea',
        't10k-labels-idx1-ubyte': '27ae3e4e09519cfbb04c329615203637',
    },
    'cifar10': {
        'data_batch_1': 'c99cafc152244af753f735de768cd75f',
        'data_batch_2': 'd4bba439e000b95fd0a9bffe97cbabec',
        'data_batch_3': '54ebc095f3ab1f0389bbae665268c751',
        'data_batch_4': '634d18415352ddfa80567beed471001a',
        'data_batch_5': '482c414d41f54cd18b22e5b47cb7c3cb',
        'test_batch': '40351d587109b95175f43aff81a1287e',
    },
    'cifar100': {'train': '16019d7e3df5f24257cddd939b257f8d', 'test': 'f0ef6b0ae62326f3e7ffdfab6717acfc'},
}

Data = namedtuple('Data', 'train val test num_classes in_channels image_size source')


class DataError(Exception):
    """The data cannot be used as asked; the message is one sentence for the user."""


def load(args, device):
    """Returns the `Data` that `args` asks for: batches for training, validation (or None) and test.

    `args` has dataset, data_dir, no_download, batch_size, limit_train, val_size, pad, pad_mode, flip, mean,
    std, drop_last, workers and image_size (imagenet and folder only), seed and channels_last. The last `val_size`
    training images become the validation set (None or 0: there is none); of those before them the first
    `limit_train` (None: all) are trained on. `source` is 'published' (files with the published md5), 'own' (with those of an
    MD5SUMS file, or unchecked, as for imagenet) or 'bundled' (digits). Raises DataError for data that is
    missing, damaged or less than asked for.
    """
    settings = DATASETS[args.dataset]
    channels = settings['in_channels']
    size = settings['image_size']
    if args.dataset in ('imagenet', 'folder'):
        return load_folders(args, device)
    if args.dataset == 'digits':
        (images, labels), test, source = read_digits()
    else:
        (images, labels), test, source = read_stored(args.dataset, args.data_dir, args.no_download)

    common = dict(device=device, mean=args.mean, std=args.std, channels_last=args.channels_last)
    common |= dict(per_image=vars(args).get('per_image'))  # runs of before do not have it
    shown = dict(pad=args.pad, pad_mode=args.pad_mode, flip=args.flip, seed=args.seed, drop_last=args.drop_last)
    end, start = split_sizes(len(images), args)
    train = Batches(images[:end], labels[:end], args.batch_size, train=True, **shown, **common)
    val = Batches(images[start:], labels[start:], args.batch_size, **common) if args.val_size else None
    test = Batches(*test, args.batch_size, **common)
    return Data(train, val, test, settings['num_classes'], channels, size, source)


def split_sizes(total, args):
    """Of `total` training images: where those to train on end, and where those for validation start."""
    start = total - (args.val_size or 0)
    if not 0 < start <= total:
        raise DataError(f'a validation split of {args.val_size} leaves nothing of {total} training images')
    end = start if args.limit_train is None else args.limit_train
    if not 0 < end <= start:
        raise DataError(f'cannot train on {end} images: there are {start} (without the validation split)')
    if args.drop_last and end < args.batch_size:
        raise DataError(f'with --drop-last, {end} training images give no batch of {args.batch_size}')
    return end, start


def number_of_batches(images, size, train, drop_last):
    """Batches an epoch; in training a last one that has not an image for each process is left out."""
    whole, rest = divmod(images, size)
    return whole + (rest >= (world() if train else 1) and not drop_last)


def share(whole):
    """(the first image of a batch that this process has, the step to its next); whole: it has all of them."""
    return (0, 1) if whole else (rank(), world())


def epoch_seed(*numbers):
    """One 32-bit seed from several non-negative integers, such as (seed, epoch)."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def normaliser(mean, std, device, channels_last, per_image=False):
    """The function from uint8 images [B, C, H, W] to float32 ones, (x / 255 - mean) / std; or see standardised()."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    if per_image:
        return lambda images: standardised(images.to(torch.float32, memory_format=layout))
    mean, std = (torch.tensor(v, dtype=torch.float32, device=device).view(-1, 1, 1) for v in (mean, std))
    return lambda images: images.to(torch.float32, memory_format=layout).div_(255).sub_(mean).div_(std)


def standardised(images):
    """Each image minus the mean of all its values, over their standard deviation, but at least 1 / sqrt(number of values).

    images: float [B, C, H, W], pixels in [0, 255]. This is TensorFlow's per_image_standardization.
    """
    values = images.flatten(1)
    mean = values.mean(1).view(-1, 1, 1, 1)
    std = values.std(1, correction=0).clamp(min=values.shape[1] ** -0.5).view(-1, 1, 1, 1)
    return (images - mean) / std


class Batches:
    """A dataset in memory: iterating yields (images float32 [B, C, H, W], labels int64 [B]) on the device.

    `images` is uint8 [N, C, H, W], `labels` int64 [N]; `mean` and `std` have C values, for pixels in [0, 1];
    with `per_image` each image is standardised by its own instead.
    For evaluation (the default) everything comes once, in order and unchanged. With `train` the images come
    shuffled, each cropped at a random place after padding every side by `pad` pixels and, with `flip`,
    mirrored half the time. `pad_mode` is 'zeros' (black before normalisation), 'edge' or 'reflect'. The last
    partial batch is left out only if both `train` and `drop_last`. The draws depend on (seed, epoch) alone:
    call `set_epoch` before each epoch, or the same one is repeated. Of several processes each has a share of a batch; where
    `whole` is set to True, each has all of it.
    """

    whole = False

    def __init__(
        self,
        images,
        labels,
        batch_size,
        device,
        mean,
        std,
        train=False,
        pad=0,
        pad_mode='zeros',
        flip=False,
        drop_last=False,
        seed=0,
        channels_last=False,
        per_image=False,
    ):
        self.num_images = len(images)
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.train = train
        self.drop_last = drop_last and train
        self.seed = seed
        self.epoch = 0
        self.pad, self.flip = (pad, flip) if train else (0, False)
        self.normalise = normaliser(mean, std, device, channels_last, per_image)
        self.labels = labels.to(device)
        height, width = images.shape[2:]
        if self.pad:
            sides = ((0, 0), (0, 0), (pad, pad), (pad, pad))
            mode = 'constant' if pad_mode == 'zeros' else pad_mode
            images = torch.from_numpy(np.pad(images.cpu().numpy(), sides, mode))
        # Every crop of every image as a view, [N, C, 2 * pad + 1, 2 * pad + 1, H, W], that takes no memory.
        self.crops = images.to(device).unfold(2, height, 1).unfold(3, width, 1)

    def __len__(self):
        return number_of_batches(self.num_images, self.batch_size, self.train, self.drop_last)

    def size(self, index):
        """Images in batch `index`, over all processes."""
        return min(self.batch_size, self.num_images - index * self.batch_size)

    def set_epoch(self, epoch):
        """Choose the order and augmentation of the coming iterations; `epoch` counts from 0."""
        self.epoch = epoch

    def draw(self):
        """Order, crop row, crop column and mirroring (0 or 1) of a training epoch: int64 [4, N].

        Drawn on the CPU, the same for every device, and moved at once, so that no batch waits for its draws.
        """
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch))
        order = torch.randperm(self.num_images, generator=generator)
        corner = torch.randint(2 * self.pad + 1, (2, self.num_images), generator=generator)
        mirror = torch.randint(2, (1, self.num_images), generator=generator)
        return torch.cat([order[None], corner, mirror]).to(self.device)

    def __iter__(self):
        drawn = self.draw() if self.train else None
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            first, step = share(self.whole)
            part = slice(start + first, min(start + self.batch_size, self.num_images), step)
            if part.start >= part.stop:  # an evaluation's last batch may have nothing for this process
                return
            if self.train:
                order, top, left, mirror = drawn[:, part]
                images = self.crops[order, :, top, left]
                labels = self.labels[order]
                if self.flip:
                    images = torch.where(mirror.bool().view(-1, 1, 1, 1), images.flip(3), images)
            else:
                images = self.crops[part, :, 0, 0]
                labels = self.labels[part]
            yield self.normalise(images), labels


def read_digits():
    """scikit-learn's 1,797 scanned digits: ((images, labels) for training, the same for test, 'bundled')."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(f'--dataset digits needs scikit-learn ({error})') from error
    digits = load_digits()
    # Grey levels 0..16 become 0..255 (rounded), so that x / 255 is in [0, 1] here as everywhere.
    images = torch.tensor(np.rint(digits.images * (255 / 16)), dtype=torch.uint8).unsqueeze(1)
    labels = torch.tensor(digits.target, dtype=torch.int64)
    test = torch.arange(len(images)) % 5 == 4
    return (images[~test], labels[~test]), (images[test], labels[test]), 'bundled'


def read_stored(name, data_dir, no_download):
    """Returns ((images, labels) for training, the same for test, source) of mnist, cifar10 or cifar100.

    Missing files are downloaded first. If the set's folder holds a file MD5SUMS (lines of `md5  filename`, of
    the uncompressed files), its sums replace the published ones: that is how modified or generated data is
    used.
    """
    folder = Path(data_dir).expanduser() / FOLDERS[name]
    own = read_sums(folder / 'MD5SUMS')
    missing = [file for file in MD5[name] if not stored(folder / file).exists()]
    if missing and (no_download or own):
        way = 'remove MD5SUMS to use the published set' if own else 'drop --no-download to fetch it'
        raise DataError(
            f'{name} needs {", ".join(missing)} in {folder}: let --data-dir name the folder that holds '
            f'{FOLDERS[name]}, {way}, or use --dataset digits, which needs no download'
        )
    if missing:
        download(name, folder, missing)

    paths = [folder / file for file in MD5[name]]
    contents = [read_checked(stored(path), own.get(path.name, MD5[name][path.name])) for path in paths]
    if name == 'mnist':
        arrays = list(map(read_idx, paths, contents, (3, 1, 3, 1)))
        parts = [(paths[0], arrays[0][:, None], arrays[1]), (paths[2], arrays[2][:, None], arrays[3])]
    else:
        files = zip(paths, contents, strict=True)
        parts = [(path, *read_batch(path, content, name)) for path, content in files]
    *train, test = [to_tensors(*part, DATASETS[name]) for part in parts]
    return tuple(map(torch.cat, zip(*train, strict=True))), test, 'own' if own else 'published'


def stored(path):
    """The file that holds `path`: itself, or its gzipped form where only that exists."""
    packed = path.with_name(path.name + '.gz')
    return packed if packed.exists() and not path.exists() else path


def damaged(path, reason):
    """The DataError for a file that is there but cannot be used."""
    return DataError(f'{path} {reason}: delete it (and any MD5SUMS beside it) and run again to download it')


def read_sums(path):
    """{filename: md5} of a file as md5sum writes it, {} if there is none."""
    try:
        pairs = [line.split(maxsplit=1) for line in path.read_text().splitlines()]
        return {name.lstrip('*'): md5 for md5, name in pairs}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f'{path} is not a list of `md5  filename` lines ({error})') from error


def read_checked(path, md5):
    """The (decompressed) bytes of a file, which must have this md5."""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == '.gz' else content
    except (OSError, EOFError, zlib.error) as error:
        raise damaged(path, f'cannot be read ({error})') from error
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        meant = 'where it is meant to differ, MD5SUMS beside it must list its md5'
        raise damaged(path, f'is damaged or not the published file (md5 {found}, not {md5}; {meant})')
    return content


def read_idx(path, content, dims):
    """The uint8 array in an idx file: a magic number and the `dims` sizes, 4 bytes each, then the values."""
    magic, *sizes = np.frombuffer(content[: 4 + 4 * dims].ljust(4 + 4 * dims), '>u4').tolist()
    if magic != 0x0800 + dims or len(content) != 4 + 4 * dims + math.prod(sizes):
        raise damaged(path, f'is not a whole idx file of bytes in {dims} dimension(s)')
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(sizes)


class ArrayUnpickler(pickle.Unpickler):
    """Unpickles numbers, strings, containers and numpy arrays, and nothing that could run code.

    A pickle calls what it names, so it may name only these. The arrays are rebuilt by our own functions, as
    numpy has moved its own between versions; `ndarray` is only ever an argument of theirs, so None stands in
    for it.
    """

    allowed = {
        '_codecs.encode': lambda text, encoding: text.encode('latin1'),
        'numpy.dtype': np.dtype,
        'numpy.ndarray': None,
        'numpy.core.multiarray._reconstruct': lambda kind, shape, typecode: np.empty(0, np.uint8),
        'numpy.core.numeric._frombuffer': lambda raw, kind, *shape: np.reshape(np.frombuffer(raw, kind), *shape),
    }

    def find_class(self, module, name):
        called = f'{module}.{name}'.replace('numpy._core.', 'numpy.core.')
        if called not in self.allowed:
            raise pickle.UnpicklingError(f'it asks for {called}')
        return self.allowed[called]


def read_batch(path, content, name):
    """The (images [N, 3, 32, 32], labels [N]) arrays in a pickled CIFAR file."""
    try:
        batch = ArrayUnpickler(io.BytesIO(content), encoding='bytes').load()
        images = batch[b'data']
        labels = batch[b'fine_labels' if name == 'cifar100' else b'labels']
        if images.shape != (len(labels), 3 * 32 * 32):
            raise ValueError(f'data of shape {images.shape} for {len(labels)} labels')
        return images.reshape(-1, 3, 32, 32), np.asarray(labels)
    except Exception as error:  # a bad pickle can raise anything
        raise damaged(path, f'is not a CIFAR batch ({type(error).__name__}: {error})') from error


def to_tensors(path, images, labels, settings):
    """The arrays as (uint8 [N, C, H, W], int64 [N]) tensors; DataError naming `path` if they do not fit."""
    shape = (len(labels), settings['in_channels'], settings['image_size'], settings['image_size'])
    if images.shape != shape or images.dtype != np.uint8 or not len(labels):
        raise damaged(path, f'has {images.dtype} images {images.shape} where uint8 {shape} is due')
    if labels.ndim != 1 or labels.dtype.kind not in 'iu' or labels.min() < 0 or labels.max() >= settings['num_classes']:
        raise damaged(path, f'has labels other than 0 to {settings["num_classes"] - 1}')
    return torch.tensor(images), torch.tensor(labels, dtype=torch.int64)


def download(name, folder, missing):
    """Have torchvision fetch the set into a temporary folder, then move the missing files into `folder`.

    So a download that fails or is interrupted leaves nothing that the next run could take for data.
    """
    print(f'downloading {name} to {folder}', file=sys.stderr)
    near = next(path for path in (folder, *folder.parents) if path.exists())  # moving within a disk is atomic
    try:
        import torchvision

        with tempfile.TemporaryDirectory(dir=near) as fetched:
            dataset = {'mnist': 'MNIST', 'cifar10': 'CIFAR10', 'cifar100': 'CIFAR100'}[name]
            getattr(torchvision.datasets, dataset)(root=fetched, download=True)
            folder.mkdir(parents=True, exist_ok=True)
            for file in missing:
                (Path(fetched) / FOLDERS[name] / file).replace(folder / file)
    except Exception as error:  # torchvision, the network, the archive, the disk: the ways on are the same
        cause = (str(error).strip().splitlines() or ['no reason given'])[-1]
        raise DataError(
            f'{name} could not be downloaded ({type(error).__name__}: {cause}): put its files into {folder}, '
            'or use --dataset digits, which needs no download'
        ) from error


def load_folders(args, device):
    """`load` for imagenet and folder: DIR/train and DIR/val (the test set) with one folder of images per class.

    Training images are random crops (of 8 to 100 % of the area, torchvision's default) resized to args.image_size; test images
    are resized, so that the shorter side is 8/7 of it, and cropped in the centre, as is usual for ImageNet at 224.
    As folders are sorted by class, the training images are first put in a random order (the same for all
    seeds), from which the validation split and `limit_train` are then taken as for the other sets.
    """
    try:
        from torchvision.datasets import ImageFolder
        from torchvision.transforms import v2
    except (ImportError, RuntimeError, OSError) as error:
        raise DataError(f'--dataset {args.dataset} needs torchvision ({error}): pip install torchvision') from error
    root = Path(args.data_dir).expanduser()
    try:
        train, test = (ImageFolder(root / split, allow_empty=True) for split in ('train', 'val'))
    except OSError as error:  # no such folder, or no class in it
        reason = str(error).splitlines()[0]
        raise DataError(f'{root} needs train/CLASS/ and val/CLASS/ folders of images ({reason})') from error
    for split in (train, test):
        filled = {label for _, label in split.samples}
        if empty := [name for name, label in split.class_to_idx.items() if label not in filled]:
            raise DataError(
                f'{split.root} has no images in {", ".join(empty[:5])}: every class needs some, in train and in val'
            )
    if (root / 'train').samefile(root / 'val'):
        raise DataError(f'{root}/train and {root}/val must be different folders with the same classes; they are one folder')
    if odd := sorted(set(train.classes) ^ set(test.classes)):
        where = ', '.join(f'{name} (in {"train" if name in train.classes else "val"} alone)' for name in odd[:3])
        more = f' and {len(odd) - 3} more' if len(odd) > 3 else ''
        raise DataError(f'{root}/train and {root}/val must have the same classes, and differ in {where}{more}')

    size = vars(args).get('image_size') or DATASETS[args.dataset]['image_size']
    flips = [v2.RandomHorizontalFlip()] if args.flip else []
    random_crop = v2.Compose([train.loader, v2.RandomResizedCrop(size), *flips, v2.PILToTensor()])
    centre_crop = v2.Compose([train.loader, v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size), v2.PILToTensor()])

    def batches(samples, transform, train=False):
        return FolderBatches(Images(samples, transform, args.seed), args, device, train)

    end, start = split_sizes(len(train), args)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    samples = [train.samples[i] for i in order]
    val = batches(samples[start:], centre_crop) if args.val_size else None
    train_batches = batches(samples[:end], random_crop, train=True)
    return Data(train_batches, val, batches(test.samples, centre_crop), len(train.classes), 3, size, 'own')


class Images(torch.utils.data.Dataset):
    """(uint8 image [3, H, W], class) per (path, class) sample, augmented as (seed, epoch, index) say.

    Neither the number of workers nor anything else that draws random numbers changes what is seen.
    """

    def __init__(self, samples, transform, seed):
        self.samples = samples
        self.transform = transform
        self.seed = seed
        self.epoch = 0

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        path, label = self.samples[index]
        # torchvision draws from the global CPU generator: give it this image's seed for as long as it takes.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(epoch_seed(self.seed, self.epoch, 1 + index))
            try:
                return self.transform(path), label
            except (OSError, SyntaxError, ValueError, EOFError) as error:  # what PIL raises for damaged files
                raise DataError(f'{path} cannot be read as an image ({" ".join(str(error).split())[:80]})') from None


class FolderBatches:
    """`Images` through a DataLoader, used as `Batches` is: yields normalised batches on the device."""

    whole = False

    def __init__(self, images, args, device, train):
        self.images = images
        self.num_images = len(images)
        self.device = torch.device(device)
        self.train = train
        self.batch_size = args.batch_size
        self.workers = args.workers
        self.drop_last = train and args.drop_last
        self.normalise = normaliser(args.mean, args.std, device, args.channels_last, vars(args).get('per_image'))

    def __len__(self):
        return number_of_batches(self.num_images, self.batch_size, self.train, self.drop_last)

    def size(self, index):
        """Images in batch `index`, over all processes."""
        return min(self.batch_size, self.num_images - index * self.batch_size)

    def set_epoch(self, epoch):
        """Choose the order and augmentation of the coming iterations; `epoch` counts from 0."""
        self.images.epoch = epoch  # also seen by the workers, as each epoch starts new ones

    def __iter__(self):
        generator = torch.Generator().manual_seed(epoch_seed(self.images.seed, self.images.epoch))
        count = self.num_images
        order = torch.randperm(count, generator=generator) if self.train else torch.arange(count)
        first, step = share(self.whole)
        shares = [batch[first::step].tolist() for batch in order.split(self.batch_size)[: len(self)]]
        loader = torch.utils.data.DataLoader(
            self.images,
            batch_sampler=[share for share in shares if share],
            num_workers=self.workers,
            pin_memory=self.device.type == 'cuda',
            generator=generator,  # one without it draws from the global one
        )
        try:
            for images, labels in loader:
                images, labels = (tensor.to(self.device, non_blocking=True) for tensor in (images, labels))
                yield self.normalise(images), labels
        except DataError as error:  # from a worker it comes with that one's traceback
            # Its frames hold the loader: collected late, its workers no longer hear that they are to end, and each of them is
            # waited for, five seconds long.
            traceback.clear_frames(error.__traceback__)
            raise DataError(str(error).strip().splitlines()[-1].split('DataError: ')[-1]) from None
