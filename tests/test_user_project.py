"""The library from people's own projects: beside files of theirs that have the names of ours, and copied without the rest."""

import os
import shutil
import subprocess
import sys

from helpers import ROOT

NAMES = ['args', 'data', 'record', 'export', 'main', 'utils', 'distributed']

OWN_SCRIPT = """
import torch, args, data, record, export, main, utils, distributed
from methods import L1FilterPruner
from methods.dsp import GroupWrapper
from deploy import pack, shrink
from torch import nn
images, labels = torch.randn(8, 3, 8, 8), torch.randint(0, 2, (8,))
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 2))
optimizer, criterion = torch.optim.SGD(model.parameters(), 0.1), nn.CrossEntropyLoss()
pruner = L1FilterPruner(model, [{'sparsity': 0.5, 'op_types': ['Conv2d'], 'op_names': ['0']}], optimizer)
pruner.compress()
groups = GroupWrapper(model, optimizer, criterion, 2e-3, 2, 2, 0.5, example_input=images)
for _ in range(2):
    groups.initialize()
    optimizer.zero_grad()
    criterion(model(images), labels).backward()
    optimizer.step()
    groups.after_step(images, labels)
pruner.export_model('weights.pt')
model.load_state_dict(torch.load('weights.pt', weights_only=True), strict=False)
small, packed = shrink(model.eval(), images), pack(model, images, 'whole')
print([list(network.get_submodule('0').weight.shape) for network in (model, small, packed)])
print([bool(((network(images) - model(images)).abs() < 1e-5).all()) for network in (small, packed)])
print([module.X for module in (args, data, record, export, main, utils, distributed)])
"""

COPIED_SCRIPT = """
import importlib.util
import torch
from deploy import pack, shrink
from torch import nn
assert importlib.util.find_spec('methods') is None
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
with torch.no_grad():
    model[0].weight[[0, 2]] = 0
    model[0].bias[[0, 2]] = 0
images = torch.randn(2, 3, 8, 8)
for small in (shrink(model, images), pack(model, images, 'whole')):
    print([tuple(p.shape) for p in small.parameters() if p.dim() == 4], (small(images) - model(images)).abs().max() < 1e-5)
"""


def run(folder, script, path):
    """The script in a new Python that finds its own folder and `path` -> what it printed."""
    (folder / 'script.py').write_text(script)
    environment = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'} | {'OMP_NUM_THREADS': '1'}
    if path is not None:
        environment['PYTHONPATH'] = str(path)
    command = [sys.executable, 'script.py']
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_project_whose_files_have_the_names_of_ours(tmp_path):
    for number, name in enumerate(NAMES):
        (tmp_path / f'{name}.py').write_text(f'X = {number}\n')
    printed = run(tmp_path, OWN_SCRIPT, ROOT)
    assert printed.splitlines()[-3:] == [
        '[[8, 3, 3, 3], [4, 3, 3, 3], [4, 3, 3, 3]]',
        '[True, True]',
        '[0, 1, 2, 3, 4, 5, 6]',
    ], printed


def test_deploy_and_sparse_utils_copied_alone(tmp_path):
    shutil.copytree(ROOT / 'deploy', tmp_path / 'deploy', ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copy(ROOT / 'sparse_utils.py', tmp_path)
    printed = run(tmp_path, COPIED_SCRIPT, None)
    assert printed == 2 * '[(2, 3, 3, 3), (2, 2, 3, 3)] tensor(True)\n'
