"""Tests of data.py, on datasets that make_data.py writes: none is downloaded, and no published one needed."""

import gzip
import hashlib
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import make_data
import numpy as np
import pytest
import torch
from helpers import read_all_digits
from torch.utils._python_dispatch import TorchDispatchMode

from args import parse
from harness import data

REPOSITORY = Path(__file__).resolve().parents[1]
LAYOUTS = {'mnist': make_data.mnist, 'cifar10': make_data.cifar10, 'cifar100': make_data.cifar100}


def make_args(dataset, root='.', **changes):
    args = dict(
        dataset=dataset,
        data_dir=str(root),
        no_download=True,
        batch_size=16,
        limit_train=None,
        val_size=None,
        drop_last=False,
        workers=0,
        seed=0,
        channels_last=False,
    )
    args.update({knob: data.DATASETS[dataset][knob] for knob in ('pad', 'pad_mode', 'flip', 'mean', 'std')})
    return Namespace(**{**args, **changes})


def load(dataset, root='.', **changes):
    return data.load(make_args(dataset, root, **changes), 'cpu')


def plain_batches(images, labels=None, batch_size=4, **options):
    """Batches whose pixels come out as x / 255."""
    images = torch.as_tensor(images, dtype=torch.uint8)
    labels = torch.arange(len(images)) if labels is None else labels
    zeros, ones = [0.0] * images.shape[1], [1.0] * images.shape[1]
    return data.Batches(images, labels, batch_size, 'cpu', zeros, ones, **options)


def whole_epoch(batches, epoch=None):
    """All images, as bytes again where they are x / 255, and all labels of one epoch."""
    if epoch is not None:
        batches.set_epoch(epoch)
    images, labels = map(torch.cat, zip(*batches, strict=True))
    return images, labels


def pixels(images):
    return images.mul(255).round().to(torch.uint8)


def numbered(count, channels=1, size=2):
    """Images of which the i-th is i everywhere."""
    return torch.arange(count).view(-1, 1, 1, 1).expand(-1, channels, size, size)


# Batches: evaluation


def test_evaluation_is_in_order_complete_and_unchanged():
    images = torch.arange(2 * 5 * 3 * 4).view(5, 2, 3, 4)
    batches = plain_batches(images, batch_size=2, pad=2, flip=True, drop_last=True)
    assert [len(labels) for _, labels in batches] == [2, 2, 1]
    assert len(batches) == 3 and batches.num_images == 5
    seen, labels = whole_epoch(batches)
    assert torch.equal(pixels(seen), images.to(torch.uint8))
    assert labels.tolist() == [0, 1, 2, 3, 4]
    assert seen.dtype == torch.float32 and labels.dtype == torch.int64


def test_normalisation_by_hand():
    images = torch.tensor([[[[0, 51]], [[255, 102]]]], dtype=torch.uint8)  # two channels of 1 x 2 pixels
    batches = data.Batches(images, torch.tensor([0]), 1, 'cpu', (0.2, 0.5), (0.5, 0.25))
    ((image, _),) = batches
    torch.testing.assert_close(image, torch.tensor([[[[-0.4, 0.0]], [[2.0, -0.4]]]]))


def test_zero_padding_is_black_before_normalisation():
    white = torch.full((100, 1, 1, 1), 255, dtype=torch.uint8)
    batches = data.Batches(white, torch.zeros(100), 100, 'cpu', (0.5,), (0.25,), train=True, pad=1)
    assert sorted(set(whole_epoch(batches)[0].flatten().tolist())) == [-2.0, 2.0]


@pytest.mark.parametrize('train', [False, True])
def test_channels_last_changes_the_memory_format_alone(train):
    images = torch.randint(0, 256, (4, 3, 5, 5), generator=torch.Generator().manual_seed(0))
    ((usual, _),) = plain_batches(images, train=train, pad=1, flip=True)
    ((other, _),) = plain_batches(images, train=train, pad=1, flip=True, channels_last=True)
    assert torch.equal(usual, other)
    assert usual.is_contiguous() and not other.is_contiguous()
    assert other.is_contiguous(memory_format=torch.channels_last)


# Batches: training


def test_training_shows_every_image_once_with_its_label():
    batches = plain_batches(numbered(10), labels=torch.arange(100, 110), train=True)
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    images, labels = whole_epoch(batches)
    assert torch.equal(pixels(images[:, 0, 0, 0]), (labels - 100).to(torch.uint8))
    assert labels.tolist() != list(range(100, 110))
    assert sorted(labels.tolist()) == list(range(100, 110))


def test_drop_last_leaves_out_the_partial_batch():
    batches = plain_batches(numbered(10), train=True, drop_last=True)
    assert len(batches) == 2 and batches.num_images == 10
    assert [len(labels) for _, labels in batches] == [4, 4]
    assert len(plain_batches(numbered(8), train=True, drop_last=True)) == 2


def test_an_epoch_depends_on_seed_and_epoch_alone():
    images = torch.randint(0, 256, (50, 1, 6, 6), generator=torch.Generator().manual_seed(0))

    def epoch(seed, number, global_seed):
        torch.manual_seed(global_seed)
        batches = plain_batches(images, train=True, pad=2, flip=True, seed=seed)
        return whole_epoch(batches, number)

    def same(first, second):
        return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    assert same(epoch(3, 7, global_seed=0), epoch(3, 7, global_seed=1))
    for other in (3, 8), (4, 7), (7, 3):
        shown, labels = epoch(*other, global_seed=0)
        reference, reference_labels = epoch(3, 7, global_seed=0)
        assert not torch.equal(labels, reference_labels)
        # Not only the order: the same image, too, is cropped or mirrored differently.
        assert not torch.equal(shown[labels.argsort()], reference[reference_labels.argsort()])


def test_iterating_again_repeats_the_epoch_and_set_epoch_changes_it():
    batches = plain_batches(numbered(30), train=True)
    first = whole_epoch(batches)[1]
    assert torch.equal(whole_epoch(batches)[1], first)
    assert not torch.equal(whole_epoch(batches, 1)[1], first)
    assert torch.equal(whole_epoch(batches, 0)[1], first)


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    whole_epoch(plain_batches(numbered(30), train=True, pad=1, flip=True), 5)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_batch_waits_for_the_device():
    """That is, no operation needs a value from the GPU to go on: item(), nonzero() or a boolean index."""
    waits = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            name = operation.__name__.split('.')[0]
            masked = name == 'index' and any(i is not None and i.dtype == torch.bool for i in args[1])
            if masked or name in ('_local_scalar_dense', 'nonzero', 'masked_select', 'equal'):
                waits.add(name)
            return operation(*args, **(kwargs or {}))

    batches = plain_batches(numbered(30), train=True, pad=1, flip=True)
    with Watch():
        assert len(list(batches)) == 8
        assert not waits
        images = batches.crops[torch.ones(30, dtype=torch.bool)]
        assert images[0, 0, 0, 0, 0, 0].item() == 0
    assert waits == {'index', '_local_scalar_dense'}  # the watch does see them


# The 2 x 3 image 1 2 3 / 4 5 6, padded by 1.
PADDED = {
    'zeros': [[0, 0, 0, 0, 0], [0, 1, 2, 3, 0], [0, 4, 5, 6, 0], [0, 0, 0, 0, 0]],
    'edge': [[1, 1, 2, 3, 3], [1, 1, 2, 3, 3], [4, 4, 5, 6, 6], [4, 4, 5, 6, 6]],
    'reflect': [[5, 4, 5, 6, 5], [2, 1, 2, 3, 2], [5, 4, 5, 6, 5], [2, 1, 2, 3, 2]],
}


def windows(padded, height, width, flip):
    """Counts the crops (nested tuples) of a padded image (a list of rows): each window, and its mirror image."""
    found = Counter()
    for top in range(len(padded) - height + 1):
        for left in range(len(padded[0]) - width + 1):
            rows = [row[left : left + width] for row in padded[top : top + height]]
            found[tuple(map(tuple, rows))] += 1
            if flip:
                found[tuple(tuple(row[::-1]) for row in rows)] += 1
    return found


def assert_occur_equally(images, expected):
    """The images are exactly those counted in `expected`, and about as often as counted there."""
    seen = Counter(tuple(map(tuple, image)) for image in images.tolist())
    assert seen.keys() == expected.keys()
    for image, count in expected.items():
        mean = len(images) * count / sum(expected.values())
        assert abs(seen[image] - mean) < 5 * mean**0.5


@pytest.mark.parametrize('flip', [False, True])
@pytest.mark.parametrize('pad_mode', PADDED)
def test_pad_modes_by_hand(pad_mode, flip):
    images = torch.tensor([[[[1, 2, 3], [4, 5, 6]]]]).expand(2000, -1, -1, -1)
    batches = plain_batches(images, batch_size=500, train=True, pad=1, pad_mode=pad_mode, flip=flip)
    seen = pixels(whole_epoch(batches)[0]).squeeze(1)
    assert_occur_equally(seen, windows(PADDED[pad_mode], 2, 3, flip))


def test_every_crop_and_mirroring_of_every_image_occurs_equally_often():
    pad, size, copies = 4, 6, 8000
    generator = torch.Generator().manual_seed(0)
    pair = torch.randint(1, 256, (2, 3, size, size), generator=generator)
    batches = plain_batches(
        pair.repeat(copies, 1, 1, 1),
        labels=torch.arange(2).repeat(copies),
        batch_size=1000,
        train=True,
        pad=pad,
        flip=True,
    )
    seen, labels = whole_epoch(batches)
    for label in 0, 1:
        ours = pixels(seen[labels == label])
        # One channel suffices to tell the crops apart; the other channels must then be cropped in the same
        # way.
        expected = {}
        for channel in range(3):
            rows = [[0] * pad + row + [0] * pad for row in pair[label, channel].tolist()]
            black = [[0] * (size + 2 * pad)] * pad
            expected[channel] = windows(black + rows + black, size, size, flip=True)
        assert len(expected[0]) == (2 * pad + 1) ** 2 * 2
        assert_occur_equally(ours[:, 0], expected[0])
        together = set(zip(*expected.values(), strict=True))
        assert {tuple(tuple(map(tuple, c)) for c in image) for image in ours.tolist()} == together


def test_same_statistics_as_torchvision_transforms():
    transforms = pytest.importorskip('torchvision.transforms')
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 8, 8), generator=generator, dtype=torch.uint8)
    one_by_one = transforms.Compose([transforms.RandomCrop(8, padding=4), transforms.RandomHorizontalFlip()])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = torch.stack([one_by_one(image) for _ in range(3000)]) / 255
    batches = plain_batches(image.expand(30000, -1, -1, -1), batch_size=5000, train=True, pad=4, flip=True)
    ours = whole_epoch(batches)[0]
    error = theirs.std(0) * (1 / 3000 + 1 / 30000) ** 0.5
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 5 * error).all()
    torch.testing.assert_close(ours.std(0), theirs.std(0), atol=0.02, rtol=0)


# Reading the sets


def test_digits(monkeypatch):
    monkeypatch.setattr(data, 'read_digits', read_all_digits)
    digits = pytest.importorskip('sklearn.datasets').load_digits()
    loaded = load('digits')
    assert (loaded.source, loaded.num_classes, loaded.in_channels, loaded.image_size) == ('bundled', 10, 1, 8)
    assert (loaded.train.num_images, loaded.val, loaded.test.num_images) == (1438, None, 359)
    images, labels = whole_epoch(loaded.test)
    assert labels.tolist() == digits.target[4::5].tolist()
    levels = (images * 0.3763 + 0.3059) * 16
    torch.testing.assert_close(levels[:, 0].double(), torch.tensor(digits.images[4::5]), atol=0.04, rtol=0)
    images, _ = whole_epoch(loaded.train)
    assert abs(images.mean()) < 0.001 and abs(images.std() - 1) < 0.001


@pytest.mark.parametrize('name', LAYOUTS)
def test_generated_sets_load(name, tmp_path):
    LAYOUTS[name](tmp_path, train=60, test=20)
    loaded = load(name, tmp_path)
    settings = data.DATASETS[name]
    channels, size = settings['in_channels'], settings['image_size']
    assert loaded.source == 'own' and loaded.val is None
    assert (loaded.num_classes, loaded.in_channels, loaded.image_size) == (
        settings['num_classes'],
        channels,
        size,
    )
    for batches, count in (loaded.train, 60), (loaded.test, 20):
        images, labels = whole_epoch(batches)
        assert images.shape == (count, channels, size, size) and batches.num_images == count
        assert sorted(labels.tolist()) == sorted(i % settings['num_classes'] for i in range(count))
    # The test set, which comes in order, pixel by pixel.
    rng = np.random.default_rng(0)
    means = make_data.class_means(rng, settings['num_classes'], channels)
    make_data.random_images(rng, 60, settings['num_classes'], size, means)
    expected, expected_labels = make_data.random_images(rng, 20, settings['num_classes'], size, means)
    mean, std = (torch.tensor(settings[key]).view(-1, 1, 1) for key in ('mean', 'std'))
    assert pixels(images * std + mean).tolist() == expected.tolist()
    assert labels.tolist() == expected_labels.tolist()


def test_cifar10_training_files_are_joined_in_order(tmp_path):
    make_data.cifar10(tmp_path, train=23, test=5)
    joined = []
    for i in range(1, 6):
        joined += pickle.loads((tmp_path / f'cifar-10-batches-py/data_batch_{i}').read_bytes())[b'labels']
    assert len(joined) == 23 and load('cifar10', tmp_path).train.labels.tolist() == joined


def test_a_hand_written_python_2_batch():
    """The published files are of this kind: no bytes objects, plain strings, numpy's names of old."""
    values = bytes(range(256)) * 12
    content = (
        b'\x80\x02}(U\x06labels]K\x07aU\x04data'
        b'cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01b'
        b'tR(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNN'
        b'J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T\x00\x0c\x00\x00' + values + b'tbu.'
    )
    images, labels = data.read_batch('batch', content, 'cifar10')
    assert labels.tolist() == [7]
    assert images.shape == (1, 3, 32, 32) and images.dtype == np.uint8
    assert images[0, 0, 0, :3].tolist() == [0, 1, 2]  # along a row, first channel
    assert images[0, 0, 1, 0] == 32 and images[0, 1, 0, 5] == 1024 % 256 + 5 and images[0, 2, 31, 31] == 255


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
def test_batches_of_every_pickle_protocol_and_numpy(protocol):
    batch = {b'data': np.arange(2 * 3072, dtype=np.uint8).reshape(2, 3072), b'fine_labels': [3, 99]}
    content = pickle.dumps(batch, protocol)
    if protocol == 2:  # in which names have no length written before them
        old, new = b'cnumpy.core.multiarray\n', b'cnumpy._core.multiarray\n'
        assert old in content or new in content
        contents = [content.replace(new, old), content.replace(old, new)]
    else:
        contents = [content]
    for content in contents:
        images, labels = data.read_batch('batch', content, 'cifar100')
        assert labels.tolist() == [3, 99] and images.reshape(2, 3072).tolist() == batch[b'data'].tolist()


def test_a_hand_written_idx_file():
    content = b'\0\0\x08\x03' + b'\0\0\0\x02' + b'\0\0\0\x01' + b'\0\0\0\x03' + bytes([1, 2, 3, 4, 5, 6])
    assert data.read_idx('idx', content, 3).tolist() == [[[1, 2, 3]], [[4, 5, 6]]]
    for wrong in content[:-1], content + b'\0', content[:9], b'', b'\0\0\x08\x01' + content[4:]:
        with pytest.raises(data.DataError, match='idx'):
            data.read_idx('idx', wrong, 3)


def test_mnist_is_also_read_from_gzipped_files(tmp_path):
    make_data.mnist(tmp_path, train=20, test=10)
    plain = load('mnist', tmp_path)
    folder = tmp_path / 'MNIST/raw'
    for name in data.MD5['mnist']:
        (folder / f'{name}.gz').write_bytes(gzip.compress((folder / name).read_bytes()))
        (folder / name).unlink()
    packed = load('mnist', tmp_path)
    for ours, theirs in zip(whole_epoch(packed.train), whole_epoch(plain.train), strict=True):
        assert torch.equal(ours, theirs)
    broken = folder / 'train-images-idx3-ubyte.gz'
    broken.write_bytes(broken.read_bytes()[:-20])
    with pytest.raises(data.DataError, match='train-images-idx3-ubyte.gz cannot be read'):
        load('mnist', tmp_path)


# Splits


def test_validation_is_the_end_of_the_training_set_and_the_limit_its_start(tmp_path):
    make_data.cifar100(tmp_path, train=60, test=20)
    everything = load('cifar100', tmp_path).train
    loaded = load('cifar100', tmp_path, limit_train=30, val_size=10)
    assert loaded.train.labels.tolist() == everything.labels[:30].tolist()
    assert loaded.val.labels.tolist() == everything.labels[-10:].tolist()
    assert (loaded.train.num_images, loaded.val.num_images, loaded.test.num_images) == (30, 10, 20)
    # Validation images come in order and unchanged: the middle crop of the padded training images.
    shown = whole_epoch(loaded.val)[0]
    assert torch.equal(shown, everything.normalise(everything.crops[50:, :, 4, 4]))
    assert load('cifar100', tmp_path, val_size=10).train.num_images == 50
    assert load('cifar100', tmp_path, limit_train=50, val_size=10).train.num_images == 50


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(val_size=60), 'validation split of 60'),
        (dict(val_size=-1), 'validation split of -1'),
        (dict(limit_train=61), 'train on 61 images: there are 60'),
        (dict(limit_train=51, val_size=10), 'train on 51 images: there are 50'),
        (dict(limit_train=0), 'train on 0'),
        (dict(limit_train=15, drop_last=True), '15 training images give no batch of 16'),
    ],
)
def test_more_than_there_is(changes, message, tmp_path):
    make_data.cifar10(tmp_path, train=60, test=5)
    with pytest.raises(data.DataError, match=message):
        load('cifar10', tmp_path, **changes)


# Files that are missing, damaged or hostile


def test_a_wrong_md5_is_refused(tmp_path):
    make_data.cifar100(tmp_path, train=10, test=10)
    folder = tmp_path / 'cifar-100-python'
    content = bytearray((folder / 'train').read_bytes())
    content[1000] ^= 1
    (folder / 'train').write_bytes(content)
    with pytest.raises(data.DataError, match='train is damaged .*MD5SUMS.*delete it'):
        load('cifar100', tmp_path)
    make_data.write_sums(folder)
    assert load('cifar100', tmp_path).source == 'own'
    (folder / 'MD5SUMS').unlink()
    with pytest.raises(data.DataError, match='train is damaged or not the published file .*16019d7e3df5f'):
        load('cifar100', tmp_path)


def test_files_with_the_published_md5_are_published(tmp_path, monkeypatch):
    make_data.cifar100(tmp_path, train=10, test=10)
    folder = tmp_path / 'cifar-100-python'
    (folder / 'MD5SUMS').unlink()
    sums = {file: hashlib.md5((folder / file).read_bytes()).hexdigest() for file in ('train', 'test')}
    monkeypatch.setitem(data.MD5, 'cifar100', sums)
    assert load('cifar100', tmp_path).source == 'published'


def test_a_bad_sums_file_is_refused(tmp_path):
    make_data.cifar100(tmp_path, train=10, test=10)
    (tmp_path / 'cifar-100-python/MD5SUMS').write_text('nonsense\n')
    with pytest.raises(data.DataError, match='MD5SUMS is not a list'):
        load('cifar100', tmp_path)


@pytest.mark.parametrize(
    ('name', 'file'),
    [
        ('cifar10', 'cifar-10-batches-py/data_batch_3'),
        ('cifar100', 'cifar-100-python/test'),
        ('mnist', 'MNIST/raw/t10k-labels-idx1-ubyte'),
    ],
)
@pytest.mark.parametrize('left', [0, 12, 0.5])
def test_a_truncated_file_is_refused_even_if_its_md5_is_listed(name, file, left, tmp_path):
    LAYOUTS[name](tmp_path, train=20, test=20)
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(content[: int(left * len(content)) if left == 0.5 else left])
    make_data.write_sums((tmp_path / file).parent)
    with pytest.raises(data.DataError, match=f'{file} is not .*delete it .*run again to download'):
        load(name, tmp_path)


GOOD = np.zeros((4, 3072), np.uint8)


@pytest.mark.parametrize(
    'batch',
    [
        [1, 2],
        {b'data': GOOD},
        {b'data': GOOD, b'fine_labels': [1, 2, 3]},
        {b'data': GOOD, b'fine_labels': [1, 2, 3, 100]},
        {b'data': GOOD, b'fine_labels': [1, 2, 3, -1]},
        {b'data': GOOD, b'fine_labels': [1, 2, 3, 0.5]},
        {b'data': GOOD, b'fine_labels': [[1], [2], [3], [4]]},
        {b'data': GOOD[:, :-1], b'fine_labels': [1, 2, 3, 4]},
        {b'data': GOOD.astype(np.int16), b'fine_labels': [1, 2, 3, 4]},
        {b'data': GOOD.reshape(4, 32, 32, 3), b'fine_labels': [1, 2, 3, 4]},
        {b'data': GOOD[:0], b'fine_labels': []},
    ],
)
def test_an_ill_shaped_batch_is_refused(batch, tmp_path):
    make_data.cifar100(tmp_path, train=10, test=10)
    path = tmp_path / 'cifar-100-python/test'
    path.write_bytes(pickle.dumps(batch, 2))
    make_data.write_sums(path.parent)
    with pytest.raises(data.DataError, match='cifar-100-python/test (is not|has) '):
        load('cifar100', tmp_path)


def test_mnist_labels_must_fit_the_images(tmp_path):
    make_data.mnist(tmp_path, train=20, test=20)
    header = b'\0\0\x08\x01\0\0\0\x13'
    (tmp_path / 'MNIST/raw/train-labels-idx1-ubyte').write_bytes(header + bytes(19))
    make_data.write_sums(tmp_path / 'MNIST/raw')
    with pytest.raises(data.DataError, match=r'train-images-idx3-ubyte has uint8 images \(20, 1, 28, 28\)'):
        load('mnist', tmp_path)


class Hostile:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize('protocol', [2, 4])
@pytest.mark.parametrize('way', ['copy', 'system', 'eval', 'numpy'])
def test_a_malicious_pickle_is_refused_and_runs_nothing(way, protocol, tmp_path):
    mark = tmp_path / 'mark'
    hostile = {
        'copy': Hostile(shutil.copyfile, __file__, str(mark)),
        'system': Hostile(os.system, f'touch {mark}'),
        'eval': Hostile(eval, f'open({str(mark)!r}, "w").close()'),
        'numpy': Hostile(np.savetxt, str(mark), [1.0]),
    }[way]
    content = pickle.dumps({b'data': GOOD, b'fine_labels': [1, 2, 3, 4], b'extra': hostile}, protocol)
    pickle.loads(content)
    assert mark.exists()  # so it is malicious indeed
    mark.unlink()
    make_data.cifar100(tmp_path, train=10, test=10)
    path = tmp_path / 'cifar-100-python/train'
    path.write_bytes(content)
    make_data.write_sums(path.parent)
    with pytest.raises(data.DataError, match='cifar-100-python/train .*it asks for'):
        load('cifar100', tmp_path)
    assert not mark.exists()


def test_arrays_may_not_be_built_by_calling_numpy(tmp_path):
    content = pickle.dumps({b'data': Hostile(np.ndarray, (4, 3072), np.dtype('u1')), b'labels': [1] * 4}, 2)
    with pytest.raises(data.DataError):
        data.read_batch('batch', content, 'cifar10')


@pytest.mark.parametrize('name', LAYOUTS)
def test_missing_without_download(name, tmp_path):
    with pytest.raises(data.DataError) as caught:
        load(name, tmp_path / 'nowhere')
    message = str(caught.value)
    for part in (
        *data.MD5[name],
        str(tmp_path / 'nowhere'),
        '--data-dir',
        'drop --no-download',
        '--dataset digits',
    ):
        assert part in message
    assert not list(tmp_path.iterdir())


def test_the_data_dir_may_start_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    make_data.cifar100(tmp_path, train=10, test=10)
    assert load('cifar100', '~').train.num_images == 10


# Downloading, with a stand-in for torchvision


def stand_in(monkeypatch, download):
    """Makes `torchvision.datasets.CIFAR100(root=..., download=True)` call download(root)."""

    def dataset(root, download, call=download):
        assert download
        call(Path(root))

    module = SimpleNamespace(datasets=SimpleNamespace(CIFAR100=dataset))
    monkeypatch.setitem(sys.modules, 'torchvision', module)


@pytest.mark.parametrize(
    'error',
    [RuntimeError('Error:\nno route'), OSError('no route'), EOFError('no route'), ValueError('no route')],
)
def test_a_failed_download_leaves_nothing(error, tmp_path, monkeypatch, capsys):
    def download(root):
        make_data.cifar100(root, train=5, test=5)
        (root / 'cifar-100-python.tar.gz').write_bytes(b'half')
        raise error

    stand_in(monkeypatch, download)
    root = tmp_path / 'new/deep'
    with pytest.raises(data.DataError, match='could not be downloaded .*: no route.*--dataset digits'):
        load('cifar100', root, no_download=False)
    assert not list(tmp_path.iterdir())
    # Neither is anything removed that was there before.
    root.joinpath('cifar-100-python').mkdir(parents=True)
    kept = root / 'cifar-100-python/test'
    kept.write_text('kept')
    with pytest.raises(data.DataError):
        load('cifar100', root, no_download=False)
    assert [path for path in root.rglob('*') if path.is_file()] == [kept] and kept.read_text() == 'kept'


def test_an_interrupted_download_leaves_nothing(tmp_path, monkeypatch):
    def download(root):
        (root / 'cifar-100-python.tar.gz').write_bytes(b'half')
        raise KeyboardInterrupt

    stand_in(monkeypatch, download)
    with pytest.raises(KeyboardInterrupt):
        load('cifar100', tmp_path, no_download=False)
    assert not list(tmp_path.iterdir())


def test_a_download_brings_the_missing_files_alone(tmp_path, monkeypatch, capsys):
    make_data.cifar100(tmp_path, train=10, test=10)
    folder = tmp_path / 'cifar-100-python'
    (folder / 'MD5SUMS').unlink()
    sums = {file: hashlib.md5((folder / file).read_bytes()).hexdigest() for file in ('train', 'test')}
    monkeypatch.setitem(data.MD5, 'cifar100', sums)
    (folder / 'train').unlink()
    (folder / 'test').touch()
    before = (folder / 'test').stat()

    stand_in(monkeypatch, lambda root: make_data.cifar100(root, train=10, test=10))
    loaded = load('cifar100', tmp_path, no_download=False)
    assert loaded.source == 'published' and loaded.train.num_images == 10
    assert sorted(path.name for path in tmp_path.rglob('*')) == ['cifar-100-python', 'test', 'train']
    assert (folder / 'test').stat().st_ino == before.st_ino
    out, err = capsys.readouterr()
    assert out == '' and 'downloading cifar100' in err


def test_own_data_is_not_completed_by_a_download(tmp_path, monkeypatch):
    stand_in(monkeypatch, lambda root: pytest.fail('this must not be called'))
    make_data.cifar100(tmp_path, train=10, test=10)
    (tmp_path / 'cifar-100-python/test').unlink()
    with pytest.raises(data.DataError, match='cifar100 needs test in .*remove MD5SUMS'):
        load('cifar100', tmp_path, no_download=False)


def test_a_download_needs_torchvision(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'torchvision', None)
    with pytest.raises(data.DataError, match='ModuleNotFoundError.*--dataset digits'):
        load('mnist', tmp_path, no_download=False)


# ImageNet, that is folders of images


@pytest.fixture
def folders(tmp_path):
    pytest.importorskip('torchvision')
    make_data.imagefolder(tmp_path, train=18, test=6)
    return tmp_path


def test_imagenet_loads_folders(folders):
    loaded = load('imagenet', folders, batch_size=4, val_size=5, drop_last=True)
    assert (loaded.num_classes, loaded.in_channels, loaded.image_size, loaded.source) == (3, 3, 224, 'own')
    assert [len(labels) for _, labels in loaded.train] == [4, 4, 4] and len(loaded.train) == 3
    assert [len(labels) for _, labels in loaded.val] == [4, 1] and len(loaded.val) == 2
    assert (loaded.train.num_images, loaded.val.num_images, loaded.test.num_images) == (13, 5, 6)
    images, labels = whole_epoch(loaded.test)
    assert images.shape == (6, 3, 224, 224) and images.dtype == torch.float32
    assert labels.tolist() == [0, 0, 1, 1, 2, 2] and labels.dtype == torch.int64


def test_imagenet_splits_do_not_depend_on_the_seed_and_mix_the_classes(folders):
    def samples(**changes):
        loaded = load('imagenet', folders, **changes)
        return [batches and batches.images.samples for batches in (loaded.train, loaded.val)]

    everything, none = samples()
    train, val = samples(val_size=6)
    assert none is None and len(train) == 12 and len(val) == 6
    assert sorted(train + val) == sorted(everything) and len(set(everything)) == 18
    assert samples(val_size=6, seed=1) == [train, val]
    limited, same_val = samples(val_size=6, limit_train=6)
    assert limited == train[:6] and same_val == val
    assert len({label for _, label in limited}) > 1 and len({label for _, label in val}) > 1


def test_imagenet_evaluation_takes_the_centre(folders):
    from PIL import Image

    # Green where the middle 224 of 512 columns are: the shorter side is 256 already, so nothing is resized.
    picture = np.zeros((256, 512, 3), np.uint8)
    picture[:, 144:368] = (0, 255, 51)
    last = folders / 'val/class2/last.png'
    green = torch.tensor([-1.0, 2.0, 0.0]).view(3, 1, 1)

    def shown():
        return whole_epoch(load('imagenet', folders, mean=(0.5, 0.5, 0.2), std=(0.5, 0.25, 0.1)).test)[0][-1]

    Image.fromarray(picture).save(last)
    torch.testing.assert_close(shown(), green.expand(3, 224, 224))
    # Half the size is doubled first, and shows the same but for the columns blurred by that.
    Image.fromarray(picture[::2, ::2].copy()).save(last)
    torch.testing.assert_close(shown()[:, :, 3:-3], green.expand(3, 224, 218))


def test_imagenet_epochs_depend_on_seed_and_epoch_alone(folders):
    def epoch(number, **changes):
        return whole_epoch(load('imagenet', folders, **changes).train, number)

    state = torch.get_rng_state()
    images, labels = epoch(2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    for workers in 0, 2:
        again = epoch(2, workers=workers)
        assert torch.equal(again[0], images) and torch.equal(again[1], labels)
    for other in epoch(3), epoch(2, seed=1):
        assert not torch.equal(other[0], images) and not torch.equal(other[1], labels)
    # The flip knob: without it fewer of the same crops are mirrored, but none is moved.
    plain, _ = epoch(2, flip=False)
    mirrored = [not torch.equal(a, b) for a, b in zip(plain, images, strict=True)]
    assert 0 < sum(mirrored) < 18
    for a, b, swapped in zip(plain, images, mirrored, strict=True):
        assert torch.equal(a.flip(2) if swapped else a, b)


def test_imagenet_augmentation_changes_with_the_epoch(folders):
    train = load('imagenet', folders).train
    first, second = (whole_epoch(train, epoch) for epoch in (0, 1))
    assert torch.equal(whole_epoch(train, 0)[0], first[0])
    train.images.epoch = 0
    one = train.images[5][0]
    train.images.epoch = 1
    assert not torch.equal(train.images[5][0], one)


def test_imagenet_channels_last(folders):
    images, _ = next(iter(load('imagenet', folders, channels_last=True).test))
    assert images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()


def test_imagenet_folders_that_will_not_do(folders, tmp_path):
    with pytest.raises(data.DataError, match='train on 19 images: there are 18'):
        load('imagenet', folders, limit_train=19)
    with pytest.raises(data.DataError, match='needs train/CLASS/ and val/CLASS/'):
        load('imagenet', folders / 'train')
    (folders / 'train/class9').mkdir()
    with pytest.raises(data.DataError, match='class9'):
        load('imagenet', folders)
    (folders / 'train/class9').rmdir()
    (folders / 'val').rename(folders / 'held')
    (folders / 'val').symlink_to(folders / 'train')
    with pytest.raises(data.DataError, match='different folders'):
        load('imagenet', folders)
    (folders / 'val').unlink()
    (folders / 'held').rename(folders / 'val')
    (folders / 'val/class2').rename(folders / 'val/class3')
    with pytest.raises(data.DataError, match='same classes'):
        load('imagenet', folders)


@pytest.mark.parametrize('workers', [0, 2])
def test_a_broken_jpeg_is_named(folders, workers):
    broken = sorted((folders / 'train').rglob('*.jpg'))[3]
    whole = broken.read_bytes()
    try:
        for content in (whole[:200], b'', b'not a picture'):
            broken.write_bytes(content)
            with pytest.raises(data.DataError, match=f'{broken.name} cannot be read as an image') as caught:
                whole_epoch(load('imagenet', folders, workers=workers).train)
            assert '\n' not in str(caught.value)
            assert str(caught.value).startswith(str(broken))
            assert not multiprocessing.active_children()  # the workers have ended
    finally:
        broken.write_bytes(whole)


# Folders of anybody's images


def test_folders_of_any_image_size(folders):
    loaded = load('folder', folders, image_size=32, batch_size=4, val_size=5)
    assert (loaded.num_classes, loaded.in_channels, loaded.image_size, loaded.source) == (3, 3, 32, 'own')
    for batches in (loaded.train, loaded.val, loaded.test):
        assert next(iter(batches))[0].shape == (4, 3, 32, 32)
    assert load('folder', folders).image_size == load('imagenet', folders).image_size == 224


def test_evaluation_of_folders_takes_the_centre(folders):
    from PIL import Image

    # Of size 28 the shorter side becomes 32, as it is here, so the middle 28 of 64 columns are shown: the green ones.
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:, 18:46] = (0, 255, 51)
    Image.fromarray(picture).save(folders / 'val/class2/last.png')
    shown = whole_epoch(load('folder', folders, image_size=28, mean=(0.5, 0.5, 0.2), std=(0.5, 0.25, 0.1)).test)[0][-1]
    torch.testing.assert_close(shown, torch.tensor([-1.0, 2.0, 0.0]).view(3, 1, 1).expand(3, 28, 28))


def test_grey_and_palette_images_have_three_channels(folders):
    from PIL import Image

    for mode in ('L', 'P', 'RGBA', 'CMYK'):
        image = Image.fromarray(np.full((40, 40, 3), 99, np.uint8)).convert(mode, palette=Image.Palette.ADAPTIVE)
        image.save(folders / f'val/class2/z{mode}.{"tif" if mode == "CMYK" else "png"}')
    images, _ = whole_epoch(load('folder', folders, image_size=16, mean=(0, 0, 0), std=(1, 1, 1)).test)
    assert images.shape == (10, 3, 16, 16) and torch.allclose(images[-4:], torch.tensor(99 / 255), atol=0.02)


def test_folders_that_will_not_do(folders, tmp_path):
    with pytest.raises(data.DataError, match=r'needs train/CLASS/ and val/CLASS/ folders of images \(.*absent'):
        load('folder', tmp_path / 'absent')
    (folders / 'val/class2').rename(folders / 'val/class3')
    differ = r'differ in class2 \(in train alone\), class3 \(in val alone\)$'
    with pytest.raises(data.DataError, match=differ):
        load('folder', folders)
    (folders / 'val/class3').rename(folders / 'val/class2')
    (folders / 'train/empty').mkdir()
    with pytest.raises(data.DataError, match='no images in empty'):
        load('folder', folders)
    for name in ('one', 'two', 'three', 'four'):
        shutil.copytree(folders / 'val/class2', folders / f'val/{name}')
    (folders / 'train/empty').rmdir()
    with pytest.raises(data.DataError, match=r'four \(in val alone\).* and 1 more$'):
        load('folder', folders)


def test_image_size_is_for_folders():
    with pytest.raises(SystemExit):
        parse(['--dataset=cifar10', '--image-size=64'])
    args = parse(['--dataset=folder', '--image-size=64'])
    assert (args.image_size, args.mean, args.std, args.flip) == (64, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], True)


def test_imagenet_needs_torchvision(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torchvision', None)
    monkeypatch.delitem(sys.modules, 'torchvision.datasets', raising=False)
    with pytest.raises(data.DataError, match='needs torchvision'):
        load('imagenet', tmp_path)


# The modules themselves


def test_make_data_from_the_command_line(tmp_path):
    script = Path(make_data.__file__)
    command = [sys.executable, script, 'cifar100', tmp_path, '--train', '7', '--test', '3']
    subprocess.run(command, check=True)
    loaded = load('cifar100', tmp_path)
    assert (loaded.train.num_images, loaded.test.num_images) == (7, 3)


def test_per_image_standardisation_by_hand():
    # values 0, 30, 30, 60 twice: mean 30, standard deviation sqrt(900 / 2) = 21.2132; a constant image becomes 0
    images = torch.tensor([[[[0, 30], [30, 60]]] * 2, [[[7, 7], [7, 7]]] * 2], dtype=torch.uint8).view(2, 2, 2, 2)
    batches = data.Batches(images, torch.zeros(2), 2, 'cpu', [0.5, 0.5], [0.1, 0.1], per_image=True)
    (shown, _), *_ = batches
    root = 2**0.5
    assert torch.allclose(shown[0], torch.tensor([[[-root, 0], [0, root]]] * 2)) and shown[1].count_nonzero() == 0
    wide = data.standardised(255 * torch.rand(3, 3, 8, 8))
    assert torch.allclose(wide.mean((1, 2, 3)), torch.zeros(3), atol=1e-6)
    assert torch.allclose(wide.flatten(1).std(1, correction=0), torch.ones(3), atol=1e-5)


def test_per_image_is_after_the_crop_and_in_evaluation_too():
    loaded = load('digits', per_image=True, pad=2)
    for batches in (loaded.train, loaded.test):
        images, _ = next(iter(batches))
        assert torch.allclose(images.mean((1, 2, 3)), torch.zeros(len(images)), atol=1e-5)
    assert next(iter(load('digits').test))[0].mean((1, 2, 3)).abs().max() > 0.1
