"""Masks that hold: what is pruned of a module is zero wherever one looks.

A Hold belongs to one module. It multiplies the module's parameters by their masks, in place,
- after each step of any optimizer that trains one of them, with the momentum that this optimizer keeps of them (torch has a
  hook for the steps of all optimizers, so wrapped ones, several ones and SAM's inner one are followed, and nobody names them);
- before the module runs, alone or as part of a larger one, if something has changed a parameter;
- before its state_dict is taken.

It lives in the hooks of the module, so a copy of the module has a Hold of its own, also one that was pickled. Module types,
parameters and state_dict keys stay as they are. Nothing waits for a GPU, and torch.compile still finds one graph: in compiled
code a Hold does nothing before the module runs, as the optimizer's step has done it.

A change that autograd does not count, as `weight.data.copy_(...)` is one, cannot be seen before the module runs. So a module
that no optimizer has stepped on yet, and any in eval mode, is multiplied before each run; a training step with an optimizer
compares version numbers only. A module that never runs itself, as the output layer of nn.MultiheadAttention, is held by steps
and state_dicts alone.
"""

import weakref

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .momentum import momenta

HOLDS = weakref.WeakSet()  # all that are attached to a module


class Hold:
    """Holds parameters of a module at zero where they are pruned; attached to the module from construction on."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.masks = {}  # {name of a parameter: its mask, of the parameter's dtype}
        self.versions = {}  # {name of a parameter: its version number when the mask was last applied}
        self.trained = False  # whether an optimizer was seen to step on it
        module.register_forward_pre_hook(self.before_forward)
        module.register_state_dict_pre_hook(self.before_state_dict)
        HOLDS.add(self)

    def __setstate__(self, state):
        """A copy, too, is attached: the hooks were copied with the module. Nobody has trained it yet."""
        self.__dict__.update(state)
        self.trained = False
        self.versions = {}
        HOLDS.add(self)

    def unhook(self) -> None:
        """Leave the module alone from now on; its zeros stay."""
        for hooks in (self.module._forward_pre_hooks, self.module._state_dict_pre_hooks):
            for key, hook in list(hooks.items()):
                if getattr(hook, '__self__', None) is self:
                    del hooks[key]
        HOLDS.discard(self)

    def set_masks(self, masks: dict[str, torch.Tensor]) -> None:
        """Take over other masks; they are applied at the next occasion."""
        self.masks = masks
        self.versions = {}

    def apply(self) -> None:
        """Multiply by the masks. Autograd takes no note: where nothing has changed, this changes nothing either."""
        for name in self.masks:
            parameter = self.module._parameters.get(name)
            if is_real(parameter):
                parameter.data.mul_(fitting_mask(self.masks, name, parameter))
                self.versions[name] = parameter._version

    def is_changed(self) -> bool:
        """Whether autograd has counted a change of a masked parameter, or whether it is another one."""
        for name in self.masks:
            parameter = self.module._parameters.get(name)
            if is_real(parameter) and parameter._version != self.versions.get(name):
                return True
        return False

    def before_forward(self, module, *_):
        if torch.compiler.is_compiling() or module is not self.module:
            return  # a replica of nn.DataParallel is another module
        if self.trained and module.training and not self.is_changed():
            return
        if not torch.jit.is_tracing():
            self.apply()

    def before_state_dict(self, module, *_):
        if module is self.module:
            self.apply()


def is_real(parameter: torch.Tensor | None) -> bool:
    """Whether there is a Parameter, on a real device.

    It is none while torch.func.functional_call runs the module with something else in its place, which is the user's.
    """
    return isinstance(parameter, nn.Parameter) and not parameter.is_meta


@torch.no_grad()
def apply_masks(masked: dict[nn.Module, dict[str, torch.Tensor]], optimizer: torch.optim.Optimizer | None = None) -> None:
    """Multiply parameters, and the momentum that an optimizer keeps of them, by their masks, all at once.

    masked: {module: {name of a parameter: its mask}}; a mask that is elsewhere than its parameter is moved there for good.
    """
    tensors = []
    masks = []
    for module, of_module in masked.items():
        for name in of_module:
            parameter = module._parameters.get(name)
            if is_real(parameter):
                for tensor in [parameter, *momenta(optimizer, parameter)]:
                    tensors.append(tensor)
                    masks.append(fitting_mask(of_module, name, parameter))
    if tensors:
        torch._foreach_mul_(tensors, masks)


def fitting_mask(masks: dict[str, torch.Tensor], name: str, parameter: torch.Tensor) -> torch.Tensor:
    """The mask where the parameter is, in its dtype. Raises ValueError when the parameter has another shape by now."""
    mask = masks[name]
    if mask.shape != parameter.shape:
        shapes = f'{tuple(parameter.shape)} now, its mask {tuple(mask.shape)}'
        raise ValueError(f'a pruned {name} has the shape {shapes}: call unhook() of the pruner before layers are changed')
    if mask.device != parameter.device or mask.dtype != parameter.dtype:
        mask = masks[name] = mask.to(parameter)
    return mask


def after_any_step(optimizer, *_):
    """Apply the masks of what an optimizer has just stepped on."""
    if not HOLDS:
        return
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group['params']}
    stepped = []
    for hold in list(HOLDS):
        if any(id(hold.module._parameters.get(name)) in trained for name in hold.masks):
            stepped.append(hold)
    apply_masks({hold.module: hold.masks for hold in stepped}, optimizer)
    for hold in stepped:
        hold.trained = True
        hold.versions = {name: hold.module._parameters[name]._version for name in hold.masks}


register_optimizer_step_post_hook(after_any_step)
