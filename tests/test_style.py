"""The linter and the formatter, and what must not stand in the repository."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize('words', [['check'], ['format', '--check']])
def test_ruff(words):
    ruff = shutil.which('ruff', path=str(Path(sys.executable).parent)) or shutil.which('ruff')
    if ruff is None:
        pytest.skip('ruff is not installed')
    done = subprocess.run([ruff, *words, '.'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
