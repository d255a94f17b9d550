"""What a plan is made of: one step of the engine, or one operation that PyTorch runs."""

from dataclasses import dataclass, field

import torch


@dataclass
class Work:
    """One step of the engine, or one operation that PyTorch runs (step None)."""

    node: object  # whose value it gives
    name: str
    sources: list  # nodes that it reads, those that own the memory
    shapes: list  # as which they are read
    step: object = None
    weight: torch.Tensor = None  # kept alive for the step's pointers
    bias: torch.Tensor = None
    maps: list = field(default_factory=list)
    shape: object = None  # of the result
    parts: bool = False  # concatenation: a copy of each source into its slice


class Made:
    """Stands for a value that is no node of the graph."""

    def __init__(self, name):
        self.name = name

    def __str__(self):
        return self.name
