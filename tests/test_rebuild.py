"""The network of a finished run is rebuilt from what the run wrote down, whatever its data had of classes."""

import json

import pytest
import torch
from helpers import run_main, same_state
from make_data import imagefolder

from deploy.files import read_published
from harness import published
from harness.rebuild import network_of, rebuild_run


@pytest.fixture(scope='module')
def three_classes(tmp_path_factory):
    """A run on a folder of images in three classes, the data set that does not say how many it has."""
    pytest.importorskip('torchvision')
    root = tmp_path_factory.mktemp('images')
    imagefolder(root, train=3, test=3)
    words = ['--dataset=imagenet', f'--data-dir={root}', '--method=dense', '--epochs=1', '--width=1', '--limit-train=3']
    run_main(root / 'run', *words)
    return root / 'run'


def test_a_run_names_the_shape_of_its_data(three_classes):
    result = json.loads((three_classes / 'result.json').read_text())
    assert (result['num_classes'], result['in_channels'], result['image_size']) == (3, 3, 224)


def test_three_classes_are_rebuilt_for_shrinking_and_from_the_published_file(three_classes, tmp_path):
    state = torch.load(three_classes / 'model.pt', weights_only=True)
    model, example = rebuild_run(three_classes)
    assert same_state(model.state_dict(), state) and model(example).shape == (1, 3) and example.shape == (1, 3, 224, 224)
    again, about = read_published(published.publish(three_classes, tmp_path / 'p.pt'))
    model, _ = published.rebuild(again, about)
    assert same_state(model.state_dict(), state)


def test_runs_of_before_have_the_shape_of_their_dataset():
    args = {'model': 'resnet20', 'width': 4, 'dropout': 0.0, 'bn_momentum': None, 'dataset': 'digits'}
    model, shape = network_of(args, {})
    assert shape == (1, 8, 8) and model(torch.zeros(2, *shape)).shape == (2, 10)
    model, shape = network_of(args, {'num_classes': 7})
    assert model(torch.zeros(2, *shape)).shape == (2, 7)
