"""The sparse engine: networks whose zeros save time, on a CPU.

kernels.cpp   what runs, in C++; build.py compiles and loads it
graph.py      the network as torch.export reads it
lower.py      its operations as steps of the engine: layers.py, pointwise.py, pools.py; work.py is one of them
geometry.py   what convolutions read: borders of zeros, strides as phases
memory.py     where tensors lie
choices.py    which kernel a layer takes, by measuring
plan.py       all that together, for inputs of one shape
compile.py    sparse_compile, what a user calls
c_file.py     write_c: a network as one C99 file
reference.py  the plain loops in float64
"""

from .c_file import write_c
from .compile import SparseNetwork, sparse_compile

__all__ = ['SparseNetwork', 'sparse_compile', 'write_c']
