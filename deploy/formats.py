"""Networks in files for other programs: .pt2, ONNX and TorchScript.

    write_pt2(model, example_input, 'small.pt2') for torch.export, ExecuTorch, AOTInductor
    write_onnx(model, example_input, 'small.onnx')
    model = read('small.pt2', trust=True)        any of them but ONNX, and what network_file.save() wrote

A .pt2 or TorchScript file holds a program, so read() wants `trust` for it.
"""

import contextlib
import copy
import importlib.util
import warnings
import zipfile
from pathlib import Path

import torch
from torch import nn

from . import files
from .network_file import description_paths, load, reason


def write_pt2(model: nn.Module, example_input: torch.Tensor, path: str | Path) -> None:
    """Write the .pt2 file of torch.export, for any batch size; example_input: a batch. Read it with read(path, trust=True)."""
    program = torch.export.export(*_exportable(model, example_input), dynamic_shapes=({0: torch.export.Dim('batch')},))
    files.write_atomically(Path(path), lambda file: torch.export.save(program, file))


def missing_onnx_packages() -> list[str]:
    """Those of the packages that PyTorch needs to write ONNX files which are not installed."""
    return [name for name in ('onnx', 'onnxscript') if importlib.util.find_spec(name) is None]


def write_onnx(model: nn.Module, example_input: torch.Tensor, path: str | Path) -> None:
    """Write an ONNX file with inputs `input` and outputs `output`, for any batch size. Raises ValueError, naming the packages
    to install, where those that PyTorch needs for it are missing."""
    if missing := missing_onnx_packages():
        raise ValueError(f'ONNX files need {" and ".join(missing)}: pip install {" ".join(missing)}')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of the exporter's own making
        program = torch.onnx.export(
            *_exportable(model, example_input),
            dynamo=True,
            verbose=False,
            input_names=['input'],
            output_names=['output'],
            dynamic_shapes=({0: torch.export.Dim('batch')},),
        )
    files.write_atomically(Path(path), lambda file: file.write(program.model_proto.SerializeToString()))


def write_torchscript(model: nn.Module, example_input: torch.Tensor, path: str | Path) -> None:
    """Write a TorchScript file by tracing. PyTorch deprecates the format: prefer .pt2 where the choice is free."""
    model, (example,) = _exportable(model, example_input)
    with _quiet_jit():
        traced = torch.jit.trace(model, example)
        files.write_atomically(Path(path), lambda file: torch.jit.save(traced, file))


@contextlib.contextmanager
def _quiet_jit():
    """Without the deprecation warnings of torch.jit: whoever asks for TorchScript has been told by write_torchscript()."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)
        warnings.filterwarnings('ignore', '.*deprecated', FutureWarning)
        yield


def _exportable(model, example_input):
    """(a copy in eval mode, (a batch of at least two,)): torch.export takes a batch of one for a constant."""
    example = example_input.detach()
    return copy.deepcopy(model).eval(), (torch.cat([example, example]) if len(example) == 1 else example,)


def read(path: str | Path, trust: bool = False) -> nn.Module:
    """A network, in eval mode, from a file of save(), write_pt2() or write_torchscript(), whichever it is.

    The last two kinds hold a program, which runs as code on this machine when it is loaded or used: they are refused unless
    `trust` says that the file comes from a source you trust. Raises ValueError for those, and for files that are neither.
    """
    path = Path(path)
    kind = file_kind(path)
    if kind == 'description':
        return load(path)
    if kind in ('.pt2', 'TorchScript') and not trust:
        raise ValueError(
            f'{path} is a {kind} file, which can carry code that runs when it is read: '
            'use trust only if you know where it comes from'
        )
    try:
        if kind == '.pt2':
            with warnings.catch_warnings():
                warnings.filterwarnings('ignore', 'The given buffer is not writable')  # torch 2.12 says so of its own reading
                return torch.export.load(path).module()
        if kind == 'TorchScript':
            with _quiet_jit():
                return torch.jit.load(path, map_location='cpu').eval()
    except Exception as error:
        raise ValueError(f'{path} cannot be read as a {kind} file: {reason(error)}') from None
    raise ValueError(f'{path} holds {kind}, not a network that can be rebuilt from it')


def file_kind(path):
    """'description' (of save()), '.pt2', 'TorchScript', or words for what else it is. Only looks at the file, runs nothing."""
    if path.suffix == '.json' or description_paths(path)[1].is_file() and path.suffix in ('', '.pt'):
        return 'description'
    if not path.is_file():
        raise ValueError(f'there is no file {path}')
    if path.suffix == '.onnx':
        return 'an ONNX network (open it with onnxruntime)'
    if not zipfile.is_zipfile(path):
        return 'something unknown'
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if path.suffix == '.pt2' or any(name.endswith('archive_format') for name in names):
        return '.pt2'
    if any(name.endswith('/constants.pkl') or '/code/' in name for name in names):
        return 'TorchScript'
    return f'weights only, without the description {description_paths(path)[1].name} beside it'
