"""The published networks in one line, and read without this repository as the README shows it."""

import re
import subprocess
import sys
import textwrap

import pytest
import torch
from helpers import ROOT

import hubconf
from deploy.files import read_published

FILE = ROOT / 'results' / 'weights' / 'cifar10_10ep' / 'feather-98-s0.pt'


def test_a_project_elsewhere_loads_a_network_in_one_line(tmp_path):
    script = f"""
        import torch
        options = dict(source='local', method='feather', sparsity=98)
        net = torch.hub.load({str(ROOT)!r}, 'resnet20_cifar10', **options)
        fast = torch.hub.load({str(ROOT)!r}, 'resnet20_cifar10', **options, fast=True)
        images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            torch.testing.assert_close(fast(images), net(images), rtol=1e-4, atol=1e-4)
        print(sum(int((p == 0).sum()) for p in net.parameters() if p.dim() > 1), net.training, net.published['accuracy'])
    """
    script = textwrap.dedent(script)
    done = subprocess.run([sys.executable, '-c', script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ['265478 False 79.54']


def test_what_torch_hub_lists_are_networks():
    """It takes every function or class in hubconf.py for a network, imported ones too."""
    listed = [name for name, value in vars(hubconf).items() if callable(value) and not name.startswith('_')]
    assert listed == ['resnet20_cifar10', 'lenet300_100_mnist']


def test_a_network_that_is_not_published_is_refused_with_what_there_is():
    with pytest.raises(ValueError, match='no published network feather-42 of seed 0: there is .*dense-s0, .*feather-98-s0'):
        hubconf.resnet20_cifar10(sparsity=42)
    with pytest.raises(ValueError, match='there is nothing'):
        hubconf.lenet300_100_mnist(table='none')
    assert hubconf.lenet300_100_mnist(rounds=10, seed=2)(torch.zeros(1, 1, 28, 28)).shape == (1, 10)


def test_the_lines_of_the_readme_that_need_nothing_of_ours(monkeypatch):
    blocks = re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL)
    (lines,) = [block for block in blocks if 'zlib' in block]
    assert not re.search(r'import (archs|deploy|harness|hubconf)', lines)
    monkeypatch.chdir(ROOT)
    names = {}
    exec(lines, names)
    state, about = read_published(FILE)
    assert list(names['state']) == list(state)
    assert all(torch.equal(names['state'][name], tensor) for name, tensor in state.items())
    assert names['about']['accuracy'] == about['accuracy']
