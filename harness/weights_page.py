"""results/weights/README.md: what each published weight file holds, and how to load it. Made by python -m harness.table."""

import ast
import re
from pathlib import Path

from deploy.files import read_published

from .markdown import markdown

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / 'results' / 'weights'

HEAD = """# Published weights

Zeros are exact, and the files are small because the zeros are not stored. In one line, from a clone of this repository in DIR:

```python
net = torch.hub.load(DIR, 'resnet20_cifar10', source='local', method='feather', sparsity=98)  # fast=True: the sparse engine
```

`./launch verify --data-dir DIR` counts zeros and accuracy of each file again. Accuracy is that of the last epoch. Each was made
by the command beside it; cite the paper beside it when you use it.

"""


COLUMNS = ['file', 'accuracy %', 'zeros', 'MMACs non-zero', 'kB', 'command', 'paper']


def page():
    """The text of results/weights/README.md."""
    lines = [cells(path.relative_to(WEIGHTS), read_published(path)[1]) for path in sorted(WEIGHTS.rglob('*.pt'))]
    return HEAD + markdown(COLUMNS, lines)


def cells(file, about):
    """The cells of a line of the page."""
    size = (WEIGHTS / file).stat().st_size
    return [
        f'[{file}]({file})',
        f'{about["accuracy"]:.2f}',
        f'{about["zeros"]:,} of {about["weights"]:,}',
        f'{about["macs_nonzero"] / 1e6:.2f} of {about["macs_dense"] / 1e6:.2f}' if 'macs_nonzero' in about else '',
        f'{size / 1e3:,.1f}',
        f'`./launch configs/{about["table"]} --row {about["row"]} --seed {about["seed"]}`',
        source(about['args']['method']),
    ]


def source(method):
    """Where a method was published, as the head of its module says: 'CVPR 2021, arXiv 2105.01571'; '' where it says nothing."""
    text = ast.get_docstring(ast.parse((ROOT / 'methods' / f'{method}.py').read_text()))
    found = re.search(r'([\w/]+ )?(\d{4})[,;] arXiv (\d{4}\.\d{4,5})', ' '.join(text.split()))
    return found[0].replace(';', ',') if found else ''
