"""From zeros to a smaller or faster network. Needs sparse_utils.py beside it, and nothing else of this repository.

from deploy import shrink, pack, save, load
small = shrink(model, example_input)
"""

from .engine import sparse_compile, write_c
from .formats import read, write_onnx, write_pt2, write_torchscript
from .latency import gains, measure_latency
from .network_file import load, save
from .packing import fold, pack
from .reporting import report
from .shrinking import decided_together, dependency_groups, even_parts, rebuild_optimizer, shrink

__all__ = [
    'decided_together',
    'dependency_groups',
    'even_parts',
    'fold',
    'gains',
    'load',
    'measure_latency',
    'pack',
    'read',
    'rebuild_optimizer',
    'report',
    'save',
    'shrink',
    'sparse_compile',
    'write_c',
    'write_onnx',
    'write_pt2',
    'write_torchscript',
]
