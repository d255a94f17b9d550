"""The sparse engine: kernels against the plain loop in float64, networks against PyTorch in float64."""

import copy
import ctypes
import math
import os
import platform
import shutil
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, assert_equal, compiled, sparse
from torch import nn

import archs
from deploy import sparse_compile, write_c
from deploy.engine import SparseNetwork, build, reference
from deploy.engine import choices as engine_choices
from deploy.engine.memory import Value, mask_of, view

KERNELS = {
    'rows': {},
    'small blocks': {'block_bytes': 1},
    'few vectors': {'vectors': 2},
    'shifted': {'shifted': 1},
    'shifted, three vectors, blocks': {'shifted': 1, 'vectors': 3, 'block_bytes': 4096},
    'dense': {'dense': 1, 'vectors': 6},
    'dense, shifted, blocks': {'dense': 1, 'shifted': 1, 'vectors': 2, 'block_bytes': 4096},
    'chunks': {'chunks': 3},
}
# images, channels, height, width, filters, kernel, stride, padding, dilation, groups
GEOMETRIES = [
    (1, 3, 8, 8, 5, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (2, 4, 32, 32, 6, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (1, 2, 14, 14, 3, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    (3, 4, 7, 7, 4, (1, 1), (2, 2), (0, 0), (1, 1), 1),
    (5, 3, 2, 2, 9, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (1, 3, 40, 37, 2, (7, 7), (2, 2), (3, 3), (1, 1), 1),
    (1, 6, 11, 13, 6, (3, 3), (1, 1), (1, 1), (1, 1), 6),
    (2, 6, 9, 10, 4, (3, 2), (1, 3), (2, 0), (2, 1), 2),
    (1, 2, 5, 300, 3, (1, 5), (1, 2), (0, 4), (1, 3), 1),
    (1, 1, 1, 1, 1, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    (2, 3, 6, 5, 4, (5, 5), (3, 3), (2, 2), (1, 1), 1),
]


def buffer(values):
    """(floats with the engine's slack around, address of the first value)."""
    memory = torch.full([values.numel() + 2 * build.SLACK], 7.0)
    memory[build.SLACK : build.SLACK + values.numel()] = values.flatten()
    return memory, memory.data_ptr() + 4 * build.SLACK


def run_here(kernels, step, memories, starts, weight, bias, mask=None):
    """A convolution with these choices by kernels in this process; memories: of its input, output and residual."""
    step.weight, step.bias, step.mask = (None if tensor is None else tensor.data_ptr() for tensor in (weight, bias, mask))
    pointers = (ctypes.c_void_p * 3)(*(memory.data_ptr() + 4 * start for memory, start in zip(memories, starts, strict=True)))
    step.prepared = kernels.conv_prepare(ctypes.byref(step))
    assert kernels.engine_run(ctypes.byref(step), 1, pointers, step.chunks, None, None, 0) == 0
    kernels.conv_free(step.prepared)


def run_convolution(image, weight, bias, residual, geometry, kernels=None, run=None, **choices):
    """relu(convolution + residual) by the kernels of kernels.cpp."""
    images, channels, height, width, filters, kernel, stride, padding, dilation, groups = geometry
    fields = {'images': images, 'channels': channels, 'height': height, 'width': width, 'filters': filters, 'groups': groups}
    for axis, letter in enumerate('hw'):
        pairs = {'kernel': kernel, 'stride': stride, 'pad': padding, 'dilation': dilation}
        fields |= {f'{name}_{letter}': pair[axis] for name, pair in pairs.items()}
    out_height, out_width = residual.shape[2:]
    choices = {'vectors': 14, 'block_bytes': 1 << 15, 'chunks': 1} | choices
    step = build.Step(kind=build.CONV, low=0.0, high=math.inf, out_height=out_height, out_width=out_width, **fields | choices)
    held = [buffer(tensor) for tensor in (image, torch.zeros_like(residual), residual)]
    memories = [memory for memory, _ in held]
    size = filters * out_height * out_width
    plane = out_height * out_width
    step.source = build.Place(0, 0, channels * height * width, height * width, width)
    step.target, step.other = (build.Place(number, 0, size, plane, out_width) for number in (1, 2))
    (run or run_here)(kernels or build.library(), step, memories, [build.SLACK] * 3, weight, bias)
    around = torch.cat([held[1][0][: build.SLACK], held[1][0][-build.SLACK :]])
    assert bool((around == 7).all()), 'written outside of the output'
    return held[1][0][build.SLACK : -build.SLACK].view(residual.shape)


OPTIONS = {'native': [], 'at most AVX2': ['-mno-avx512f'], 'at most SSE': ['-march=x86-64', '-O1']}


@pytest.fixture(scope='module', params=OPTIONS.values(), ids=OPTIONS)
def kernels(request):
    """The kernels for this machine, and for narrower vectors."""
    if not request.param:
        return build.library()
    if platform.machine() != 'x86_64' or os.environ.get('SPARSE_ENGINE_KERNELS'):
        pytest.skip('these options are for x86 without sanitizers')
    return build.load(build.compile_kernels(request.param))


@pytest.mark.parametrize('geometry', GEOMETRIES, ids=str)
def test_convolution_is_the_plain_loop(geometry, kernels):
    check_plain_loop(geometry, kernels)


def check_plain_loop(geometry, kernels, run=None):
    images, channels, height, width, filters, kernel, stride, padding, dilation, groups = geometry
    torch.manual_seed(0)
    image, bias = torch.randn(images, channels, height, width), torch.randn(filters)
    weight = torch.randn(filters, channels // groups, *kernel) * (torch.rand(filters, channels // groups, *kernel) < 0.4)
    weight[0] = 0  # a filter without weights
    expected = reference.convolution(image, weight, bias, stride, padding, dilation, groups)
    torch_says = F.conv2d(image.double(), weight.double(), bias.double(), stride, padding, dilation, groups)
    torch.testing.assert_close(expected, torch_says)
    residual = torch.randn(expected.shape)
    expected = (expected + residual).clamp(min=0)
    for name, choices in KERNELS.items():
        found = run_convolution(image, weight, bias, residual, geometry, kernels, run, **choices)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1), name


BORDERED = {
    'direct': {'direct': 1},
    'direct, three vectors, blocks': {'direct': 1, 'vectors': 3, 'block_bytes': 1},
    'direct, dense': {'direct': 1, 'dense': 1, 'vectors': 6},
    'shifted': {'shifted': 1, 'vectors': 24},
    'shifted, two vectors, blocks': {'shifted': 1, 'vectors': 2, 'block_bytes': 1},
    'shifted, chunks': {'shifted': 1, 'vectors': 8, 'chunks': 3},
    'shifted, dense': {'shifted': 1, 'dense': 1, 'vectors': 6},
}


@pytest.mark.parametrize('images', [1, 2, 5])
@pytest.mark.parametrize('size', [(1, 2), (4, 4), (5, 5), (7, 7), (9, 8), (14, 14), (16, 16), (5, 37), (20, 64)], ids=str)
def test_convolution_with_a_border_of_zeros(images, size, kernels):
    """Tiles that lie in the plane, strips of one image and several images side by side; what lies around stays as it was."""
    check_border(images, size, kernels)


def check_border(images, size, kernels, run=None):
    torch.manual_seed(0)
    image, weight, bias = torch.randn(images, 3, *size), torch.randn(5, 3, 3, 3), torch.randn(5)
    weight *= torch.rand(weight.shape) < 0.4
    residual = torch.randn(images, 5, *size)
    expected = (reference.convolution(image, weight, bias, (1, 1), (1, 1), (1, 1), 1) + residual).clamp(min=0)
    step = build.Step(kind=build.CONV, low=0.0, high=math.inf, images=images, channels=3, filters=5, groups=1, chunks=1)
    for name, fixed in {'height': size[0], 'width': size[1], 'kernel': 3, 'stride': 1, 'pad': 1, 'dilation': 1}.items():
        for field in [name, f'out_{name}'] if name in ('height', 'width') else [f'{name}_h', f'{name}_w']:
            setattr(step, field, fixed)
    values = [Value(tensor.shape, 2) for tensor in (image, residual, residual)]
    for number, value in enumerate(values):
        value.buffer = number
    held = [torch.zeros(images * value.size + 2 * build.SLACK + 8 * value.pitch) for value in values]
    starts = [build.SLACK + 4 * value.pitch for value in values]
    for tensor, value in ((image, values[0]), (residual, values[2])):
        view(value, held, starts).copy_(tensor)
    step.source, step.target, step.other = (build.Place(*value.place()) for value in values)
    mask = mask_of(values[1])
    for name, settings in BORDERED.items():
        for field, value in ({'direct': 0, 'shifted': 0, 'dense': 0, 'vectors': 14, 'block_bytes': 1 << 15} | settings).items():
            setattr(step, field, value)
        held[1].zero_()
        (run or run_here)(kernels, step, held, starts, weight, bias, mask)
        found = view(values[1], held, starts)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max(), name
        assert held[1].count_nonzero() == found.count_nonzero(), f'{name}: written into the border'


def test_convolution_spelled_out():
    image = torch.tensor([[[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]])
    weight = torch.tensor(
        [[[[0.0, 0.0, 0.0], [10.0, 0.0, 1.0], [0.0, 0.0, 0.0]]]]
    )  # ten times the left, once the right neighbour
    bias, residual = torch.tensor([100.0]), torch.tensor([[[[0.0, 0.0, -999.0], [0.5, 0.0, 0.0]]]])
    geometry = (1, 1, 2, 3, 1, (3, 3), (1, 1), (1, 1), (1, 1), 1)
    expected = torch.tensor([[[[102.0, 113.0, 0.0], [105.5, 146.0, 150.0]]]])
    assert torch.equal(
        reference.convolution(image, weight, bias, (1, 1), (1, 1), (1, 1), 1)[0, 0, 0],
        expected.new_tensor([102, 113, 120]).double(),
    )
    for name, choices in KERNELS.items():
        assert torch.equal(run_convolution(image, weight, bias, residual, geometry, **choices), expected), name


def kernels_of(network):
    return {record['name']: record['kernel'] for record in network.report()}


NETWORKS = {
    'resnet20': (3, 32),
    'mobilenet_v1': (3, 32),
    'densenet': (3, 16),
    'wrn10_1': (3, 16),
    'lenet300_100': (1, 28),
}


@pytest.fixture(scope='module', params=NETWORKS)
def pair(request):
    """A network of archs/ with zeros, and the same compiled."""
    channels, size = NETWORKS[request.param]
    torch.manual_seed(0)
    model = sparse(archs.build(request.param, 10, 8 if request.param == 'resnet20' else None, channels, size), 0.95)
    return request.param, model, compiled(model, torch.randn(1, channels, size, size))


def test_networks_of_archs(pair):
    name, model, network = pair
    _, channels, size, _ = next(iter(network._plans))[1]
    assert not any('PyTorch' in kernel for kernel in kernels_of(network).values())
    for batch in (1, 3, 9):
        assert_equal(network, model, torch.randn(batch, channels, size, size))
    if name == 'resnet20':
        assert_equal(network, model, torch.randn(2, channels, size + 5, size + 2))
        network.threads = 3
        assert_equal(network, model, torch.randn(2, channels, size, size))
        network.threads = 1


class Everything(nn.Module):
    """One of each operation that the engine knows, and some that it does not."""

    def __init__(self):
        super().__init__()
        self.reflect = nn.Conv2d(3, 8, 3, padding=1, padding_mode='reflect')
        self.circular = nn.Conv2d(8, 8, 3, padding=1, padding_mode='circular')
        self.same = nn.Conv2d(8, 8, 4, padding='same')
        self.depthwise = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)
        self.squeeze = nn.Conv2d(8, 4, 1)
        self.excite = nn.Conv2d(4, 8, 1)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.tokens = nn.Linear(14, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = F.leaky_relu(self.reflect(x), 0.1)
        x = F.silu(self.circular(x))
        x = F.gelu(self.same(x)) + x
        x = F.hardswish(self.depthwise(x))
        scale = torch.sigmoid(self.excite(F.relu6(self.squeeze(x.mean((2, 3), keepdim=True)))))
        x = F.elu(self.norm(x * scale))
        x = torch.cat([x, F.max_pool2d(x, 3, 1, 1), F.avg_pool2d(x, 3, 1, 1)], 1)[:, 4:12]
        x = torch.cat([self.up(x), F.interpolate(x, scale_factor=2)], 1)
        x = F.adaptive_avg_pool2d(x, (3, 3)) * F.adaptive_max_pool2d(x, 3)
        x = F.hardsigmoid(self.tokens(x.flatten(2).transpose(1, 2)))
        x = F.softplus(x) * torch.tanh(x)
        return self.head(x.mean(1))


def test_every_operation():
    torch.manual_seed(0)
    model = sparse(Everything(), 0.5)
    network = compiled(model, torch.randn(2, 3, 12, 9))
    kernels = kernels_of(network)
    assert {name for name, kernel in kernels.items() if 'convolution' in kernel} >= {
        'reflect',
        'circular',
        'same',
        'depthwise',
        'up',
        'tokens',
    }
    assert any('PyTorch' in kernel for kernel in kernels.values())
    for shape in ((2, 3, 12, 9), (1, 3, 12, 9), (4, 3, 15, 12)):
        assert_equal(network, model, torch.randn(shape))


def test_result_is_the_callers_own():
    model = sparse(nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU()))
    network = compiled(model, torch.randn(1, 2, 8, 8))
    first = network(torch.ones(1, 2, 8, 8))
    kept = first.clone()
    network(torch.zeros(1, 2, 8, 8))
    assert torch.equal(first, kept)


def test_input_that_is_not_finite_runs_dense():
    model = sparse(nn.Sequential(nn.Conv2d(2, 3, 3, bias=False)), 0.9)
    network = compiled(model, torch.randn(1, 2, 8, 8))
    image = torch.randn(1, 2, 8, 8)
    image[0, 1, 7, 7] = math.inf
    torch.testing.assert_close(network(image), model(image), equal_nan=True, rtol=0, atol=1e-5)
    assert network(image).isnan().any()  # infinity times a zero weight


@pytest.mark.parametrize('size', [1, 15, 16, 100])
def test_not_finite_numbers_are_found_anywhere(size):
    values = torch.full([size], torch.finfo(torch.float32).max)
    kernels = build.library()
    assert kernels.all_finite(values.data_ptr(), size) == 1
    for place in range(size):
        for wrong in (math.inf, -math.inf, math.nan):
            broken = values.clone()
            broken[place] = wrong
            assert kernels.all_finite(broken.data_ptr(), size) == 0


def test_wrong_inputs_are_refused():
    model = nn.Sequential(nn.Conv2d(2, 3, 3))
    network = compiled(model, torch.randn(1, 2, 8, 8))
    with pytest.raises(ValueError, match='takes float32 tensors on the CPU, but input 0 is torch.float64 on cpu'):
        network(torch.zeros(1, 2, 8, 8, dtype=torch.float64))
    with pytest.raises(RuntimeError, match='channels'):
        network(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r'runs float32 networks on the CPU: 0.weight is torch.float64'):
        sparse_compile(copy.deepcopy(model).double(), torch.randn(1, 2, 8, 8))
    assert network(torch.zeros(0, 2, 8, 8)).shape == (0, 3, 6, 6)


def test_network_that_torch_export_refuses_runs_in_pytorch():
    class Branching(nn.Module):
        def forward(self, x):
            return x * 2 if x.sum() > 0 else x

    network = compiled(Branching(), torch.ones(2, 3))
    assert torch.equal(network(torch.ones(2, 3)), torch.full([2, 3], 2.0))
    assert 'torch.export cannot trace Branching' in network.report()[0]['kernel']


def test_later_changes_of_the_model_do_not_show():
    model = nn.Sequential(nn.Linear(3, 2))
    network = compiled(model, torch.ones(1, 3))
    before = network(torch.ones(1, 3))
    nn.init.zeros_(model[0].weight)
    assert torch.equal(network(torch.ones(1, 3)), before)
    assert not network.train().model.training


def test_pytorchs_number_of_threads_is_obeyed():
    network = compiled(nn.Sequential(nn.Linear(3, 2)), torch.ones(1, 3), threads=None)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            network(torch.ones(1, 3))
    finally:
        torch.set_num_threads(before)
    assert {key[0] for key in network._plans} >= {1, 2}


def test_two_callers_at_once():
    model = sparse(archs.build('resnet20', 10, 4, 3, 8))
    network = compiled(model, torch.randn(1, 3, 8, 8), threads=2)
    images = [torch.randn(1, 3, 8, 8) for _ in range(20)]
    expected = [network(image) for image in images]
    found = {}

    def work(start):
        for number in range(start, 20, 2):
            found[number] = network(images[number])

    callers = [threading.Thread(target=work, args=(start,)) for start in (0, 1)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert all(torch.equal(found[number], expected[number]) for number in range(20))


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.delenv('CXX', raising=False)
    with pytest.raises(build.CompilerError, match='kernels need a C\\+\\+ compiler once, and none was found: install g\\+\\+'):
        build.compile_kernels()


def test_measured_choices_give_the_same_outputs():
    torch.manual_seed(0)
    model = sparse(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(800, 10)), 0.6)
    network = sparse_compile(model, torch.randn(1, 3, 12, 12), threads=1)
    assert_equal(network, model, torch.randn(1, 3, 12, 12))
    assert engine_choices._chosen


def run_c(path, image, shape):
    """What infer() of a C file gives, compiled with cc -O3 and all warnings as errors."""
    library = path.with_suffix('.so')
    strict = ['-std=c99', '-O3', '-Wall', '-Wextra', '-Werror', '-Wno-unused-function']
    subprocess.run(['cc', *strict, '-fPIC', '-shared', str(path), '-o', str(library), '-lm'], check=True)
    out = torch.full(shape, math.nan)
    infer = ctypes.CDLL(str(library)).infer
    infer.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    infer(image.contiguous().data_ptr(), out.data_ptr())
    return out


def test_c_file_gives_the_same_outputs(pair, tmp_path):
    _, model, network = pair
    image = torch.randn(next(iter(network._plans))[1])
    path = write_c(network, image, tmp_path / 'network.c')
    assert_equal(lambda image: run_c(path, image, (1, 10)), model, torch.randn(image.shape))


def test_c_file_of_an_operation_without_c(tmp_path):
    class Rolled(nn.Module):
        def forward(self, x):
            return torch.roll(x, 1)

    with pytest.raises(ValueError, match='write_c cannot write Rolled: it knows no C for roll'):
        write_c(Rolled(), torch.ones(2, 3), tmp_path / 'network.c')
    assert not (tmp_path / 'network.c').exists()


def test_operations_in_place():
    """Later readers see the change, as PyTorch's do; a change through a view is left to PyTorch."""

    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 4, 3, padding=1)
            self.body = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Dropout(0.5, inplace=True))

        def forward(self, x):
            x = self.conv(x)
            y = x.relu_()
            x += 1
            return self.body(x * y)

    class ThroughView(nn.Module):
        def forward(self, x):
            x = x * 2
            x[:, 0] += 1
            return x

    model = sparse(InPlace(), 0.5)
    network = compiled(model, torch.randn(1, 2, 5, 5))
    assert_equal(network, model, torch.randn(1, 2, 5, 5))
    network = compiled(ThroughView(), torch.ones(1, 2))
    assert torch.equal(network(torch.ones(1, 2)), torch.tensor([[3.0, 2.0]]))


class Known(nn.Module):
    """What write_c knows besides the networks of archs/."""

    def __init__(self):
        super().__init__()
        self.reflect = nn.Conv2d(3, 8, 3, padding=1, padding_mode='reflect')
        self.depthwise = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)
        self.squeeze = nn.Conv2d(8, 8, 1)
        self.up = nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.head = nn.Linear(54, 5)

    def forward(self, x):
        x = F.gelu(self.depthwise(F.silu(self.reflect(x))))
        x = x * torch.sigmoid(self.squeeze(x.mean((2, 3), keepdim=True)))
        x = F.adaptive_avg_pool2d(F.hardswish(self.up(x)), 3)
        return self.head(x.flatten(1))


def test_c_file_of_other_operations(tmp_path):
    torch.manual_seed(0)
    model = sparse(Known(), 0.5)
    path = write_c(model, torch.randn(9, 3, 6, 6), tmp_path / 'network.c')
    assert_equal(lambda image: run_c(path, image, (9, 5)), model, torch.randn(9, 3, 6, 6))


RUN_STEP = """
#include "kernels.cpp"
#include <cstdio>
// Reads a Step, the length of each array and the arrays (input, output, residual, weight, bias, mask), and writes the output.
int main(int, char **argv) {
    FILE *file = fopen(argv[1], "rb");
    Step step;
    int64_t sizes[6], starts[3];
    bool good = fread(&step, sizeof step, 1, file) == 1;
    good = good && fread(sizes, sizeof sizes, 1, file) == 1 && fread(starts, sizeof starts, 1, file) == 1;
    float *arrays[6];
    for (int i = 0; i < 6; i++) {
        arrays[i] = (float *)malloc(4 * sizes[i] + 4);
        good = good && (int64_t)fread(arrays[i], 4, sizes[i], file) == sizes[i];
    }
    fclose(file);
    step.weight = arrays[3];
    step.bias = arrays[4];
    step.mask = sizes[5] ? (const int32_t *)arrays[5] : nullptr;
    step.prepared = conv_prepare(&step);
    float *buffers[3] = {arrays[0] + starts[0], arrays[1] + starts[1], arrays[2] + starts[2]};
    good = good && engine_run(&step, 1, buffers, 1, nullptr, nullptr, 0) == 0;
    file = fopen(argv[1], "wb");
    fwrite(arrays[1], 4, sizes[1], file);
    fclose(file);
    return !good;
}
"""


def test_kernels_on_arm(tmp_path):
    """The same text with NEON, compiled for another machine and run by an emulator."""
    compiler, emulator = shutil.which('aarch64-linux-gnu-g++'), shutil.which('qemu-aarch64')
    if not compiler or not emulator:
        pytest.skip('g++-aarch64-linux-gnu or qemu-user is not installed')
    (tmp_path / 'run.cpp').write_text(RUN_STEP)
    program = tmp_path / 'run'
    words = [compiler, '-std=c++17', '-O1', '-static', '-pthread', f'-I{build.SOURCE.parent}', '-Wno-psabi']
    subprocess.run([*words, tmp_path / 'run.cpp', '-o', program], check=True)

    def run(_, step, memories, starts, weight, bias, mask=None):
        arrays = [*memories, weight.flatten(), bias, torch.zeros(0) if mask is None else mask.view(torch.float32)]
        numbers = torch.tensor([*(array.numel() for array in arrays), *starts])
        content = [bytes(step), numbers.numpy().tobytes(), *(array.contiguous().numpy().tobytes() for array in arrays)]
        (tmp_path / 'step').write_bytes(b''.join(content))
        subprocess.run([emulator, program, tmp_path / 'step'], check=True)
        memories[1].copy_(torch.frombuffer(bytearray((tmp_path / 'step').read_bytes()), dtype=torch.float32))

    for images, size in ((1, (7, 7)), (5, (2, 2)), (1, (14, 14)), (2, (5, 37))):
        check_border(images, size, None, run)
    check_plain_loop(GEOMETRIES[7], None, run)


def library_path(name):
    """Where the compiler keeps a library; only the name if it has none."""
    return subprocess.run([*build.compiler(), f'-print-file-name={name}'], capture_output=True, text=True).stdout.strip()


def test_kernels_under_sanitizers():
    """This file's tests of kernels and networks again, with the kernels built for address and undefined-behaviour checks."""
    if os.environ.get('SPARSE_ENGINE_KERNELS'):
        pytest.skip('already inside')
    runtimes = [library_path('libasan.so'), library_path('libstdc++.so.6')]
    if not all(os.path.isabs(path) for path in runtimes):
        pytest.skip('the compiler has no libasan')
    checked = build.compile_kernels(['-O0', '-fsanitize=address,undefined', '-fno-sanitize-recover=all'])
    variables = {'SPARSE_ENGINE_KERNELS': str(checked), 'LD_PRELOAD': ' '.join(runtimes)}
    variables |= {'ASAN_OPTIONS': 'detect_leaks=0', 'OMP_NUM_THREADS': '1'}
    tests = 'convolution or every_operation'
    command = [sys.executable, '-m', 'pytest', '-s', '-p', 'no:xdist', __file__, '-k', tests]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert ' passed' in done.stdout


def test_one_comparison_that_was_disturbed_does_not_give_the_engine_up(monkeypatch):
    model = sparse(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), 0.9)
    outcomes = [True, True, False]
    monkeypatch.setattr(SparseNetwork, '_loses', lambda self, *_: outcomes.pop(0))
    network = sparse_compile(model, torch.randn(1, 3, 8, 8), threads=1)
    assert not outcomes and 'PyTorch' not in network.report()[0]['kernel']
    outcomes += [True, True, True]
    assert sparse_compile(model, torch.randn(1, 3, 8, 8), threads=1).report()[0]['kernel'] == 'PyTorch: PyTorch is faster'


@pytest.mark.parametrize('one_is_faster', [False, True])
def test_more_threads_are_used_only_where_they_are_faster(monkeypatch, one_is_faster):
    model = sparse(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), 0.9)
    image = torch.randn(1, 3, 8, 8)
    compared = []

    def loses(self, function, other, threads):
        function()
        other()
        compared.append(threads)
        return one_is_faster and len(compared) <= 3  # three times, then the comparison with PyTorch

    monkeypatch.setattr(SparseNetwork, '_loses', loses)
    network = sparse_compile(model, image, threads=2)
    assert {record['threads'] for record in network.report()} == {1 if one_is_faster else 2}
    assert compared == [2] * (4 if one_is_faster else 2)
    torch.testing.assert_close(network(image), model(image))
    assert sparse_compile(model, image, threads=1).report()[0]['threads'] == 1
