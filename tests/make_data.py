"""Writes small random datasets in the layouts of the published ones, for tests and for trying things offline:

    python tests/make_data.py {cifar10,cifar100,mnist,imagefolder} DIR [--train N] [--test N] [--seed S]

Every class has its own mean image under the noise, so that a network can learn to tell them apart. An MD5SUMS
file beside the files tells `data.py` to accept them; DIR, not the folder inside, is its
--data-dir.
"""

import argparse
import hashlib
import pickle
from pathlib import Path

import numpy as np


def random_images(rng, count, num_classes, size, means):
    """uint8 images [count, C, size, size] around the means [K, C, 4, 4] of their classes, and the labels."""
    labels = rng.permutation(np.arange(count) % num_classes)
    blocks = np.kron(means[labels], np.ones((size // 4, size // 4)))
    return np.clip(blocks + rng.normal(0, 24, blocks.shape), 0, 255).astype(np.uint8), labels


def class_means(rng, num_classes, channels):
    return rng.uniform(32, 224, (num_classes, channels, 4, 4))


def write_sums(folder):
    """(Re)writes MD5SUMS, as `md5sum * > MD5SUMS` in the folder would."""
    files = sorted(path for path in Path(folder).iterdir() if path.name != 'MD5SUMS')
    lines = [f'{hashlib.md5(path.read_bytes()).hexdigest()}  {path.name}\n' for path in files]
    (Path(folder) / 'MD5SUMS').write_text(''.join(lines))


def write_batch(path, images, **labels):
    """One CIFAR file: a dict with bytes for keys, pickled with protocol 2."""
    batch = {b'batch_label': path.name.encode(), b'data': images.reshape(len(images), -1)}
    batch.update({key.encode(): values.tolist() for key, values in labels.items()})
    path.write_bytes(pickle.dumps(batch, protocol=2))


def cifar10(root, train=512, test=128, seed=0):
    """Writes ROOT/cifar-10-batches-py, the training images in five files."""
    rng = np.random.default_rng(seed)
    folder = Path(root) / 'cifar-10-batches-py'
    folder.mkdir(parents=True, exist_ok=True)
    means = class_means(rng, 10, 3)
    images, labels = random_images(rng, train, 10, 32, means)
    for i, part in enumerate(np.array_split(np.arange(train), 5), start=1):
        write_batch(folder / f'data_batch_{i}', images[part], labels=labels[part])
    images, labels = random_images(rng, test, 10, 32, means)
    write_batch(folder / 'test_batch', images, labels=labels)
    write_sums(folder)


def cifar100(root, train=512, test=128, seed=0):
    """Writes ROOT/cifar-100-python."""
    rng = np.random.default_rng(seed)
    folder = Path(root) / 'cifar-100-python'
    folder.mkdir(parents=True, exist_ok=True)
    means = class_means(rng, 100, 3)
    for name, count in ('train', train), ('test', test):
        images, labels = random_images(rng, count, 100, 32, means)
        write_batch(folder / name, images, coarse_labels=labels // 5, fine_labels=labels)
    write_sums(folder)


def mnist(root, train=512, test=128, seed=0):
    """Writes ROOT/MNIST/raw."""
    rng = np.random.default_rng(seed)
    folder = Path(root) / 'MNIST' / 'raw'
    folder.mkdir(parents=True, exist_ok=True)
    means = class_means(rng, 10, 1)
    for name, count in ('train', train), ('t10k', test):
        images, labels = random_images(rng, count, 10, 28, means)
        header = np.array([0x803, count, 28, 28], '>u4').tobytes()
        (folder / f'{name}-images-idx3-ubyte').write_bytes(header + images.tobytes())
        header = np.array([0x801, count], '>u4').tobytes()
        (folder / f'{name}-labels-idx1-ubyte').write_bytes(header + labels.astype(np.uint8).tobytes())
    write_sums(folder)


def imagefolder(root, train=18, test=6, seed=0, num_classes=3, size=40):
    """Writes JPEGs into ROOT/train/CLASS/ and ROOT/val/CLASS/, `train` and `test` of them in all."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    means = class_means(rng, num_classes, 3)
    for split, count in ('train', train), ('val', test):
        images, labels = random_images(rng, count, num_classes, size, means)
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            folder = Path(root) / split / f'class{label}'
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.transpose(1, 2, 0)).save(folder / f'{i}.jpg')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('layout', choices=['cifar10', 'cifar100', 'mnist', 'imagefolder'])
    parser.add_argument('root', metavar='DIR')
    for option in 'train', 'test', 'seed':
        parser.add_argument(f'--{option}', type=int, default=argparse.SUPPRESS, metavar='N')
    options = vars(parser.parse_args())
    globals()[options.pop('layout')](**options)
