"""The kernels as a library: compiled when they are first needed, kept in the user's cache folder, called through ctypes."""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name('kernels.cpp')
OPTIONS = [
    '-std=c++17',
    '-O3',
    '-march=native',
    '-fno-signed-zeros',
    '-fno-trapping-math',
    '-fPIC',
    '-shared',
    '-pthread',
    '-Wno-psabi',
]

CLAMP, LEAKY, HARDSWISH, HARDSIGMOID, SIGMOID, SILU, GELU, TANH, ELU, GELU_TANH = range(10)  # enum Activation of kernels.cpp
CONV, LINEAR, MAX_POOL, AVERAGE_POOL, MEAN, POINTWISE, PAD, SPREAD, COPY, PHASES = range(10)  # enum Kind
SLACK = 256  # floats around every buffer that the kernels may read


class CompilerError(RuntimeError):
    """There is no C++ compiler, or it cannot compile the kernels."""


class Place(ctypes.Structure):
    """Where a tensor lies: number of the buffer, floats before its first image, and between two images, channels and rows."""

    _fields_ = [(name, ctypes.c_int64) for name in ('buffer', 'offset', 'image', 'plane', 'pitch')]


INTEGERS = """images channels height width filters out_height out_width kernel_h kernel_w stride_h stride_w pad_h pad_w
dilation_h dilation_w groups mode activation""".split()
CHOICES = ['dense', 'shifted', 'direct', 'phases', 'vectors', 'block_bytes', 'chunks']


class Step(ctypes.Structure):
    """struct Step of kernels.cpp."""

    _fields_ = [
        ('kind', ctypes.c_int64),
        *((name, Place) for name in ('source', 'target', 'other')),
        *((name, ctypes.c_int64) for name in INTEGERS),
        *((name, ctypes.c_double) for name in ('low', 'high')),
        *((name, ctypes.c_void_p) for name in ('weight', 'bias', 'mask', 'rows', 'columns')),
        *((name, ctypes.c_int64) for name in CHOICES),
        ('prepared', ctypes.c_void_p),
    ]


def cpu_features():
    """What distinguishes this machine's processor for a compiler with -march=native."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return f'{platform.machine()} {platform.processor()}'
    named = [line for line in lines if line.startswith(('model name', 'flags', 'Features', 'CPU part'))]
    return platform.machine() + '\n'.join(sorted(set(named)))


def compiler():
    """The command of the C++ compiler, as a list: $CXX, or the first of c++, g++ and clang++. Raises CompilerError."""
    asked = os.environ.get('CXX')
    for command in [shlex.split(asked)] if asked else [['c++'], ['g++'], ['clang++']]:
        if shutil.which(command[0]):
            return command
    raise CompilerError('kernels need a C++ compiler once, and none was found: install g++ or clang++, or set CXX to one')


def cache_folder():
    """Where compiled kernels are kept: $XDG_CACHE_HOME or ~/.cache, in the folder sparse_engine."""
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'sparse_engine'


def compile_kernels(options=(), folder=None, source=SOURCE):
    """The path of the compiled kernels, compiled now unless the same source, compiler and processor have been here before.

    options: further ones for the compiler, such as sanitizers. source: another C++ file. Raises CompilerError.
    """
    command = compiler()
    version = subprocess.run([*command, '--version'], capture_output=True, text=True).stdout
    options = [*OPTIONS, *options]
    key = '\n'.join([source.read_text(), *command, version, *options, cpu_features()])
    folder = Path(folder or cache_folder())
    path = folder / f'kernels-{hashlib.sha256(key.encode()).hexdigest()[:20]}.so'
    if path.exists():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CompilerError(f'kernels are kept in {folder}, or under $XDG_CACHE_HOME: {error.strerror}') from None
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / 'kernels.so'
        done = subprocess.run([*command, *options, str(source), '-o', str(made)], capture_output=True, text=True)
        if done.returncode:
            reason = ' '.join(done.stderr.split())[:300]
            raise CompilerError(f'{" ".join(command)} cannot compile {source.name}: {reason}')
        os.replace(made, path)
    return path


@cache
def library():
    """The compiled kernels. SPARSE_ENGINE_KERNELS names a library to load instead, for tests. Raises CompilerError."""
    return load(os.environ.get('SPARSE_ENGINE_KERNELS') or compile_kernels())


def load(path):
    """A library of kernels with the types of its functions. Raises CompilerError when it was built from another source."""
    kernels = ctypes.CDLL(str(path))
    for name in ('conv', 'linear'):
        prepare = getattr(kernels, f'{name}_prepare')
        prepare.argtypes = [ctypes.POINTER(Step)]
        prepare.restype = ctypes.c_void_p
        getattr(kernels, f'{name}_free').argtypes = [ctypes.c_void_p]
    run = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    kernels.engine_run.argtypes = run
    kernels.all_finite.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    kernels.peak.argtypes = [ctypes.c_int64, ctypes.c_void_p]
    for name in ('engine_run', 'all_finite', 'peak', 'lanes', 'step_size'):
        getattr(kernels, name).restype = ctypes.c_int64
    if kernels.step_size() != ctypes.sizeof(Step):
        raise CompilerError('the kernels of the sparse engine and build.py disagree about struct Step')
    return kernels
