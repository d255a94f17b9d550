"""What several test files use: main.py on something tiny, kills at any write, small networks and data."""

import contextlib
import copy
import functools
import json
import math
import multiprocessing
import os
import shutil
import socket
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import main as program
import methods
from args import parse
from deploy import files
from deploy.engine import SparseNetwork
from harness import data
from harness.training import make_optimizer, one_step

ROOT = Path(__file__).parent.parent
TINY = ['--dataset=digits', '--model=resnet20', '--width=4', '--limit-train=96', '--batch-size=32', '--epochs=3', '--no-cuda']


read_all_digits = data.read_digits  # before conftest.py puts the next function in its place


@functools.cache
def read_few_digits():
    """The digits with the first 64 test images only: a run of the tests would spend half its time on the other 295."""
    train, (images, labels), source = read_all_digits()
    return train, (images[:64], labels[:64]), source


SERVER = multiprocessing.get_context('forkserver')
SERVER.set_forkserver_preload(['helpers', 'torch.utils.tensorboard', 'sklearn.datasets'])


def main_in_child(runs, output, environment, before):
    """What start_main() starts: main.py of these words, in a process that has imported everything already."""
    with open(output, 'ab') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    data.read_digits = read_few_digits
    if before is not None:
        before()
    for words in runs:
        program.main(words)


def start_main(*runs, output, environment=None, before=None):
    """main.py as a process of its own, begun at once -> multiprocessing.Process; what it prints goes to `output`.

    runs: lists of main.py's words, one run after the other. It is forked from a clean process that has imported torch and the
    rest once. before() is called in it first.
    """
    runs = [[*map(str, words)] for words in runs]
    process = SERVER.Process(target=main_in_child, args=(runs, output, environment or {}, before))
    with pytest.MonkeyPatch.context() as patch:  # for the server, which starts with the first process
        patch.setenv('PYTHONPATH', f'{ROOT}{os.pathsep}{ROOT / "tests"}')
        process.start()
    return process


def run_two(*runs, output):
    """main.py as two processes, in the environment that torchrun gives them -> (worst exit status, what they printed)."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    common = {'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}
    environments = [common | {'RANK': str(rank), 'LOCAL_RANK': str(rank)} for rank in (0, 1)]
    processes = [start_main(*runs, output=output, environment=environment) for environment in environments]
    for process in processes:
        process.join()
    return max(process.exitcode for process in processes), output.read_text()


def run_main(out, *words):
    """main.py on a tiny problem -> (result.json, model.pt) of the run folder `out`."""
    program.main([*TINY, f'--out={out}', *words])
    return read_run(out)


def read_run(out):
    return json.loads((Path(out) / 'result.json').read_text()), torch.load(Path(out) / 'model.pt', weights_only=True)


def same_state(a, b):
    """Equal names in equal order, and bit-identical tensors."""
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


# Methods whose target is met to the weight: {name: zeros of n weights at a target}
EXACT = {
    'feather': lambda n, target: math.floor((n - 1) * target) + 1,
    'st3': lambda n, target: math.floor((n - 1) * target) + 1,
    'gmp': lambda n, target: round(target * n),
    'lrr': lambda n, target: round(target * n),
    'probmask': lambda n, target: n - round((1 - target) * n),
}
EXACT |= dict.fromkeys(['static', 'rigl', 'granet', 'snip', 'grasp', 'synflow', 'ac_dc', 'spartan', 'dpf'], EXACT['gmp'])
EXACT['sr_ste'] = lambda n, target: (n - 36) // 2  # 2:4 in all layers but the first, which has one input channel
# Shorter pipelines; what they do is the same
QUICK = {
    'dsp': ['--group-epochs=1', '--finetune-epochs=2', '--cycles=2', '--val-size=0'],
    'lottery_ticket': ['--prune-iterations=1'],
    'lrr': ['--rate=0.6'],
    'probmask': ['--finetune-epochs=1'],
}
TURN, SEARCH = ['--admm-iterations=1', '--admm-epochs=1'], ['--val-size=64', '--finetune-epochs=1']
ANNEAL = ['--cool-down-rate=0.2', '--search-steps=2']
QUICK |= {
    'netadapt': [*SEARCH, '--layers', 'stage3.0.conv1', '--sparsity-per-iteration=0.3', '--short-term-steps=1'],
    'simulated_annealing': [*SEARCH, *ANNEAL],
    'admm': ['--finetune-epochs=1', '--admm-iterations=2', '--admm-epochs=1'],
    'autocompress': [*SEARCH, *ANNEAL, *TURN, '--num-iterations=1'],
}
ONE_SHOT = ['level', 'slim', 'fpgm', 'l1_filter', 'l2_filter', 'apoz', 'mean_activation', 'taylor_fo', 'agp', 'random_filter']
QUICK |= {name: ['--finetune-epochs=1'] for name in ONE_SHOT}
QUICK |= {name: ['--frequency=2'] for name in ('rigl', 'granet', 'dpf')}  # runs are shorter than their usual frequency
QUICK |= {'synflow': ['--rounds=5']}
QUICK |= {'group_norm': ['--finetune-epochs=1', '--sparse-epochs=1', '--prune-steps=3']}


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the code may catch it."""


def kill_at(monkeypatch, number, halfway=False):
    """Let the process die after its file write of this number, or in the middle of it."""
    write, calls = files.write_atomically, []

    def dying(path, content):
        calls.append(path.name)
        if len(calls) == number and halfway:
            path.with_name(path.name + '.tmp').write_bytes(b'half')
            raise Killed
        write(path, content)
        if len(calls) == number:
            raise Killed

    monkeypatch.setattr(files, 'write_atomically', dying)
    return calls


def kill_everywhere(tmp_path, monkeypatch, words, halfway=False):
    """Kill a run at its first, second, ... write, start it again, and compare the end -> how many writes there are."""
    whole = run_main(tmp_path / 'whole', *words)
    for number in range(1, 1000):
        out = tmp_path / str(number)
        with monkeypatch.context() as patch:
            calls = kill_at(patch, number, halfway)
            with contextlib.suppress(Killed):
                run_main(out, *words)
        if len(calls) < number:
            return len(calls)
        assert_ends_as(whole, out, words)


def run_with_copies(out, words):
    """main.py -> (result.json, model.pt, folders): what a kill after the first, second, ... write would leave, one folder each.

    What a run writes depends on its arguments alone, so a copy of the folder made at that moment is what the kill would leave,
    and costs no second run.
    """
    write, copies = files.write_atomically, []

    def write_and_copy(path, content):
        write(path, content)
        copies.append(out.with_name(f'{out.name}-{len(copies) + 1}'))
        shutil.copytree(out, copies[-1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, 'write_atomically', write_and_copy)
        result, state = run_main(out, *words)
    return result, state, copies


def assert_ends_as(whole, out, words):
    """Start the run in `out` again; it must end like the one whose (result, state) is `whole`."""
    left = sorted(path.name for path in out.iterdir())
    result, state = run_main(out, *words)
    assert same_state(state, whole[1]), f'it was killed when there were {left}'
    assert len((out / 'log.jsonl').read_text().splitlines()) == result['epochs'] == whole[0]['epochs']
    for key in ('accuracy', 'best_accuracy', 'zeros', 'macs_nonzero'):
        assert result[key] == whole[0][key]


def resume_everywhere(out, words):
    """Go on from what a kill after each write of a run would leave, and compare the end -> how many writes there are."""
    result, state, copies = run_with_copies(out, words)
    for folder in copies:
        assert_ends_as((result, state), folder, words)
    return len(copies)


class Residual(nn.Module):
    """Modules in another order than that of the computation; stem and back end in one stream."""

    def __init__(self):
        super().__init__()
        self.fc, self.back, self.norm = nn.Linear(6, 3), nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.front, self.stem = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(2, 6, 3, padding=1)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(x + self.norm(self.back(F.relu(self.front(x)))))
        return self.fc(x.mean((2, 3)))


def residual():
    torch.manual_seed(0)
    return Residual()


def of_target(sparsity):
    return [{'sparsity': sparsity, 'op_types': ['Conv2d']}]


class Digits(nn.Module):
    """NNI's own test network, for images of one channel."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.pool = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(2)
        self.conv2, self.fc = nn.Conv2d(8, 8, 1), nn.Linear(32, 2)

    def forward(self, x):
        return self.fc(self.conv2(self.pool(F.relu(self.bn1(self.conv1(x))))).flatten(1))


def batches():
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(16, 1, 12, 12, generator=generator), torch.randint(0, 2, (16,), generator=generator)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), 8)


def evaluator(model):
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    val_loader = batches()
    model.eval()
    correct = 0
    with torch.no_grad():
        for data, target in val_loader:
            data, target = data.to(device), target.to(device)
            output = model(data)
            # get the index of the max log-probability
            pred = output.argmax(dim=1, keepdim=True)
            correct += pred.eq(target.view_as(pred)).sum().item()
    accuracy = correct / len(val_loader.dataset)
    return accuracy


class GoldenNet(nn.Module):
    """The network whose trajectories under the authors' code are in tests/golden."""

    def __init__(self):
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.dw = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.c2, self.b2 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.c3, self.fc = nn.Conv2d(16, 16, 1, bias=False), nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.dw(F.relu(self.b1(self.c1(x)))))
        x = F.relu(self.c3(F.relu(self.b2(self.c2(x)))))
        return self.fc(x.mean((2, 3)))


class OwnConv(nn.Conv2d):
    pass


LAYERS = [
    (lambda: nn.Conv2d(4, 6, 3, dilation=2), (2, 4, 9, 9)),
    (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode='circular'), (2, 4, 9, 9)),
    (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode='reflect'), (2, 4, 9, 9)),
    (lambda: nn.Conv2d(4, 6, 3, padding='same'), (2, 4, 9, 9)),
    (lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2), (2, 4, 9, 9)),
    (lambda: nn.Conv2d(4, 4, 3, groups=4), (2, 4, 9, 9)),
    (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (2, 4, 9, 9)),
    (lambda: nn.Conv1d(4, 6, 3), (2, 4, 9)),
    (lambda: nn.Conv3d(4, 6, 2), (2, 4, 3, 3, 3)),
    (lambda: OwnConv(4, 6, 3), (2, 4, 9, 9)),
    (lambda: nn.Linear(9, 5), (2, 9)),
]


class Sharing(nn.Module):
    """One convolution used by two parents, and two linear layers that are tied to one weight."""

    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())
        self.b = nn.Sequential(self.a[0])
        self.f, self.g = nn.Linear(3, 3), nn.Linear(3, 3)
        self.g.weight = self.f.weight

    def forward(self, x):
        return self.g(self.f(self.b(self.a(x)).mean((2, 3))))


def log_of(folder):
    """log.jsonl without the figures of time."""
    lines = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]
    return [{key: value for key, value in line.items() if 'second' not in key} for line in lines]


def weights_of(state):
    """The prunable weights of a state dict, as one vector."""
    return torch.cat([tensor.flatten() for tensor in state.values() if tensor.dim() > 1])


def small():
    """A network of 784 prunable weights in two layers, for images [B, 2, 6, 6] of 5 classes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5))


def method_on(model, name, *words, steps=30):
    """(method, fit) on a model, as the loop has them before the first of `steps` steps; the words are main.py's."""
    method = methods.load(name)(parse([*TINY, f'--method={name}', *words]))
    method.prepare(model, steps, method.args)
    fit = Namespace(args=method.args, batches=steps // method.args.epochs, model=model, forward=model, replayed=None)
    fit.optimizer = make_optimizer(method.args, method.param_groups(model, method.args))
    fit.criterion, fit.autocast, fit.example = nn.CrossEntropyLoss(), contextlib.nullcontext(), torch.zeros(1, 2, 6, 6)
    method.attach(fit)
    return method, fit


def random_batch(step):
    """Images and labels for small(), different ones at each step."""
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(8, 2, 6, 6, generator=generator), torch.randint(0, 5, (8,), generator=generator)


def train_on_noise(method, fit, steps):
    """Train on random batches, with the end of each epoch -> yields each step of `steps` when it is done."""
    for step in steps:
        one_step(method, fit, step, random_batch(step))
        yield step
        if (step + 1) % fit.batches == 0:
            method.after_epoch(step // fit.batches)


# ------------------------------------------------------------------------------------------------------- the sparse engine


def sparse(model, share=0.8, seed=0):
    """The model in eval mode with zeros at random places, and batch norms that do something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Conv1d, nn.ConvTranspose2d, nn.Linear)):
                module.weight.mul_(torch.rand(module.weight.shape, generator=generator) > share)
            if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm1d)):
                for tensor in (module.weight, module.bias, module.running_mean):
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) - 0.3)
                module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
    return model.eval()


@torch.no_grad()
def assert_equal(network, model, *inputs):
    """Within 1e-5 of the largest output of the float64 network, or twice PyTorch's own error."""
    exact = copy.deepcopy(model).double()(*(value.double() for value in inputs))
    scale = exact.abs().max()
    allowed = max(1e-5 * scale, 2 * (model(*inputs) - exact).abs().max())
    found = network(*inputs)
    assert found.shape == exact.shape and found.dtype == torch.float32
    assert (found - exact).abs().max() <= allowed


def compiled(model, *inputs, threads=1):
    """Built without measuring, so that the engine runs even where PyTorch is faster."""
    return SparseNetwork(model, inputs, threads, measure=False)
