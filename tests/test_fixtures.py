"""Files that an earlier commit wrote load with today's code, and their networks give what they gave (fixtures/7e1127b)."""

import pytest
import torch
from helpers import ROOT

from deploy import load, read
from deploy.files import read_published
from harness import published

OLD = ROOT / 'tests' / 'fixtures' / '7e1127b'
SAID = torch.load(OLD / 'outputs.pt', weights_only=True)


def assert_gives_what_it_gave(network, name):
    """Equal to the bit on the processor that wrote them; with other kernels they differ by up to 8e-7 of the largest."""
    with torch.no_grad():
        outputs = network.eval()(SAID['images'])
    torch.testing.assert_close(outputs, SAID[name], rtol=0, atol=3e-6 * float(SAID[name].abs().max()))


@pytest.mark.parametrize('name', ['packed', 'small'])
def test_networks_that_became_smaller(name):
    for network in (load(OLD / name), read(OLD / f'{name}.pt'), read(OLD / f'{name}.json')):
        assert_gives_what_it_gave(network, name)
    stored = torch.load(OLD / f'{name}.pt', weights_only=True)
    assert all(torch.equal(network.state_dict()[key], tensor) for key, tensor in stored.items())


def test_published_weights():
    state, about = read_published(OLD / 'published.pt')
    network, args = published.rebuild(state, about)
    assert (args.method, args.model, args.width, about['commit']) == ('feather', 'resnet20', 2, '7e1127b')
    zeros = sum(int((tensor == 0).sum()) for tensor in network.state_dict().values() if tensor.dim() > 1)
    assert zeros == about['zeros'] == 3451
    assert_gives_what_it_gave(network, 'published')
