"""The method that CONTRIBUTING.md shows is complete: put into methods/, it runs and keeps the contract."""

import re

import pytest
import torch
from helpers import ROOT, run_main, same_state

import methods


@pytest.fixture
def shown(tmp_path, monkeypatch):
    """The code block of CONTRIBUTING.md as a module of methods/."""
    code = re.search(r'```python\n(.*?)```', (ROOT / 'CONTRIBUTING.md').read_text(), re.DOTALL)[1]
    assert len(code.splitlines()) < 40
    (tmp_path / 'methods').mkdir()
    (tmp_path / 'methods' / 'random_masks.py').write_text(code)
    monkeypatch.setattr(methods, '__path__', [*methods.__path__, str(tmp_path / 'methods')])


def test_the_shown_method_runs_and_keeps_its_zeros(shown, tmp_path):
    assert 'random_masks' in methods.names()
    words = ['--method=random_masks', '--ptarget=0.8', '--epochs=2']
    result, one = run_main(tmp_path / 'a', *words)
    layers = [tensor for name, tensor in one.items() if tensor.dim() > 1]
    assert [int((tensor == 0).sum()) for tensor in layers] == [min(round(0.8 * t.numel()), t.numel() - 1) for t in layers]
    assert same_state(one, run_main(tmp_path / 'b', *words)[1])
    other = run_main(tmp_path / 'c', *words, '--seed=1')[1]
    assert any(not torch.equal(one[name] == 0, other[name] == 0) for name in one)
    assert result['sparsity'] == pytest.approx(0.8, abs=0.005)
