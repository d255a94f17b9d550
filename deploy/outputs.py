"""Running networks side by side: in eval mode, and how far their outputs are apart."""

import contextlib
import math

import torch

TOLERANCE = 1e-5  # of the largest output


@contextlib.contextmanager
def eval_mode(model):
    """The model in eval mode; afterwards each module has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:  # eval() is not there in a network read from a .pt2 file
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def compare(one, other, example_input):
    """The largest difference of two networks' outputs in eval mode, as a share of the largest output of the first."""
    outputs = []
    for model in (one, other):
        with eval_mode(model):
            outputs.append(model(example_input.clone()))
    if not all(isinstance(output, torch.Tensor) for output in outputs):
        raise ValueError(f'{type(one).__name__} must return one tensor')
    if outputs[0].shape != outputs[1].shape:
        return math.inf
    difference = (outputs[0] - outputs[1]).abs().max().item()
    return 0.0 if difference == 0 else difference / max(outputs[0].abs().max().item(), 1e-30)
