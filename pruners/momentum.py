"""The momentum that an optimizer keeps of a weight. A pruned weight loses it, or the next step would bring the weight back."""

import torch

MOMENTUM = ('momentum_buffer', 'exp_avg')  # of SGD; of Adam and its kin


def momenta(optimizer: torch.optim.Optimizer | None, parameter: torch.Tensor) -> list[torch.Tensor]:
    """The momentum buffer of SGD, the running average of gradients of Adam and its kin; [] where there is none yet."""
    if optimizer is None:
        return []
    state = optimizer.state.get(parameter, {})
    return [state[key] for key in MOMENTUM if state.get(key) is not None]
