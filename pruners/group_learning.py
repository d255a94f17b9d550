"""Dynamic Structure Pruning, the first half: learn groups of filters with the weights, in anyone's training loop.

"Dynamic Structure Pruning for Compressing CNNs", Park, Kim, Kim, Choi and Lee, AAAI 2023, arXiv 2303.09736.

    grouper = GroupWrapper(model, optimizer, criterion, regularization_power, total_num_iterations, num_groups, temperature)
    ...                                                  # each step: grouper.initialize(), then forward, backward,
    grouper.after_step(x, y)                             # optimizer.step(), and this

The second half, which prunes the input channels of each group, is in group_pruning.py.

W[o,c] is a convolution's weight (summed over its kernel where nothing else is said), a[k,o] are the logits of its groups, and
p[k,o] is the probability that filter o is in group k. The regulariser of one convolution is

    R = sum_k S[k] sum_c L[k,c]      L[k,c] = sqrt(sum_o (p[k,o] W[o,c])^2)      S[k] = (sum_o sqrt p[k,o])^2

with the norm L of input channel c inside group k, and the soft size S of group k. The gradient of R shrinks the weights in
every step; it is scaled for each layer, and grows linearly over training. The logits follow the gradient of R after a
look-ahead step of the weights, with its second-order term.

What is computed is what the authors' released code computes. Deviations, all of them where that code fails or wastes:
- norms, sizes and all derivatives are matrix products of the [out, in] squared kernel norms, for all convolutions of one shape
  together; there is no copy of the weight per group;
- the look-ahead runs on the user's own model and optimizer, whose tensors are set back afterwards, so any number of parameter
  groups and any optimizer will do; the momentum of the look-ahead does not reach the user's;
- each division by a norm has the same small epsilon, so that an input channel of zeros gives no NaN;
- the first convolution and the shortcuts are left out by default. They are found by running the model on `example_input`, and
  by the names `downsample` and `shortcut`; or name them yourself;
- the scale of a layer counts the size of its input relative to that of the image.
"""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from deploy.outputs import eval_mode

from .own_weight import why_not_own

EPS = 1e-8  # added to norms and sums before they divide
SHORTCUTS = {'downsample', 'shortcut'}  # a convolution with this in its name is one of a shortcut


def default_example(model: nn.Module) -> torch.Tensor:
    """Zeros [1, C, 32, 32] where the model is, with the channels of its first convolution."""
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None:
        raise ValueError('the model has no 2-d convolution')
    return torch.zeros(1, first.in_channels, 32, 32, device=first.weight.device)


@torch.no_grad()
def input_sizes(model: nn.Module, example_input: torch.Tensor) -> dict[str, int]:
    """{name of a 2-d convolution: elements of its input for one example}, in the order in which they first run."""
    names = {module: name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    sizes = {}

    def record(conv, inputs):
        sizes.setdefault(names[conv], inputs[0][0].numel())

    hooks = [conv.register_forward_pre_hook(record) for conv in names]
    try:
        with eval_mode(model):
            model(example_input)
    finally:
        for hook in hooks:
            hook.remove()
    return sizes


def group_convs(
    model: nn.Module, example_input: torch.Tensor, exclude: list[str] | None = None, say: Callable = print
) -> dict[str, nn.Conv2d]:
    """{name: convolution} of those that get groups, in the model's order; says in one line which they are.

    exclude: names of convolutions to leave out; None is the paper's choice, the first one to run and those of shortcuts. Left
    out in any case: those with groups of their own, which are narrow already, and those that the forward pass does not reach.
    Raises ValueError for an unknown name, when none is left, and for a weight that is computed from others.
    """
    convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    order = list(input_sizes(model, example_input))
    if exclude is None:
        exclude = [name for i, name in enumerate(order) if i == 0 or SHORTCUTS & set(name.split('.'))]
    if unknown := set(exclude) - set(convs):
        raise ValueError(f'{sorted(unknown)[0]!r} is to be excluded but is no convolution; there are {", ".join(convs)}')
    narrow = [name for name in order if convs[name].groups > 1 and name not in exclude]
    chosen = {name: conv for name, conv in convs.items() if name in order and name not in [*exclude, *narrow]}
    if not chosen:
        raise ValueError('no convolution is left to group')
    for name, conv in chosen.items():
        if reason := why_not_own(conv):
            raise ValueError(f'{name} {reason}')
    note = f'; not {", ".join(narrow)}, which have groups of their own' if narrow else ''
    left = f' all but {", ".join(name for name in order if name in exclude)}' if exclude else ''
    say(f'filter groups: {len(chosen)} of {len(convs)} convolutions,{left}{note}')
    return chosen


class Terms(NamedTuple):
    """The derivatives of the regulariser R, and what they are made of, at one weight or a stack of them."""

    penalty: torch.Tensor  # [..., out, in]: dR/dW = penalty * W
    to_p: torch.Tensor  # [..., groups, out]: dR/dp
    size: torch.Tensor  # [..., groups, 1]: S
    inverse: torch.Tensor  # [..., groups, in]: 1 / (eps + L)
    norm_to_p: torch.Tensor  # [..., groups, out]: sum_c dL/dp
    size_to_p: torch.Tensor  # [..., groups, out]: dS/dp


def regulariser_terms(weight: torch.Tensor, p: torch.Tensor) -> Terms:
    """The derivatives of R = sum_k S[k] sum_c L[k,c] for a weight [out, in, h, w] and probabilities p [groups, out].

    Or for a stack of convolutions: [n, out, in, h, w] and [n, groups, out].
    """
    energy = weight.square().sum((-2, -1))
    root = p.sqrt()
    size = root.sum(-1, keepdim=True).square()
    norm = (p.square() @ energy).sqrt()
    inverse = 1 / (EPS + norm)
    penalty = (size * p.square()).mT @ inverse
    norm_to_p = p * (inverse @ energy.mT)
    size_to_p = root * size / (p * root.sum(-1, keepdim=True) + EPS)
    to_p = size * norm_to_p + norm.sum(-1, keepdim=True) * size_to_p
    return Terms(penalty, to_p, size, inverse, norm_to_p, size_to_p)


def second_order_term(start: Terms, p: torch.Tensor, weight: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
    """What a look-ahead that moved the weight by `moved` = D adds to dR/dp, to first order in D; shapes as above.

    start: the terms at `weight`, where the look-ahead began. With n = p W / L it is, as the authors compute it,
    dS/dp sum(p n D) + S (sum(2 n D) - dL/dp sum(p n D / L)), with sums over c, h and w.
    """
    overlap = (weight * moved).sum((-2, -1)).mT  # [in, out]
    along = start.inverse @ overlap
    bend = start.norm_to_p * p.square() * (start.inverse.square() @ overlap)
    return start.size_to_p * p.square() * along + start.size * (2 * p * along - bend)


class Stack(NamedTuple):
    """Convolutions of one shape and one parameter group of the optimizer. A GPU computes them faster together."""

    places: list[int]  # in GroupWrapper.convs
    weights: list[torch.Tensor]
    scales: torch.Tensor  # [n, 1, 1]
    settings: int  # the place of their parameter group in optimizer.param_groups

    def weight(self) -> torch.Tensor:
        """A copy of the weights, [n, out, in, h, w]."""
        return torch.stack(self.weights)


class GroupWrapper:
    """Differentiable group learning: each step shrinks the weights of the model by groups, and trains the groups.

    model, optimizer, criterion: the user's; the loss is criterion(model(x), y). regularization_power: lambda, the strength at
    the end of training; it grows linearly over total_num_iterations steps. num_groups: from 1 up. temperature: of the Gumbel
    softmax. example_input: a batch [B, C, H, W] that the model accepts (default: zeros [1, C, 32, 32]). exclude: see
    group_convs. For the look-ahead: autocast, a context such as torch.autocast('cuda', torch.bfloat16); forward, what to call
    instead of the model, as it is compiled or distributed; accumulate, the number of pieces in which to pass a batch.
    say: prints the choice.

    From construction on each chosen convolution has a parameter `group` [num_groups, out_channels], its logits, zero at first;
    it is no parameter of the user's optimizer. Penalties follow the learning rate of the weight's own parameter group. The
    look-ahead neither clips gradients nor adds extra losses. Raises ValueError for settings that cannot work.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: Callable,
        regularization_power: float,
        total_num_iterations: int,
        num_groups: int,
        temperature: float,
        example_input: torch.Tensor | None = None,
        *,
        exclude: list[str] | None = None,
        autocast: contextlib.AbstractContextManager | None = None,
        forward: Callable | None = None,
        accumulate: int = 1,
        say: Callable = print,
    ):
        if not (regularization_power >= 0 and total_num_iterations >= 1 and num_groups >= 1 and temperature > 0):
            raise ValueError(
                'needs a regularization_power from 0, total_num_iterations and num_groups from 1, temperature above 0'
            )
        example_input = default_example(model) if example_input is None else example_input
        self.model = model
        self.optimizer = optimizer
        self.criterion = criterion
        self.power = regularization_power
        self.total = total_num_iterations
        self.temperature = temperature
        self.autocast = contextlib.nullcontext() if autocast is None else autocast
        self.forward = model if forward is None else forward
        self.accumulate = accumulate
        self.convs = group_convs(model, example_input, exclude, say)
        self.stacks = self._stacks(example_input, num_groups)
        for conv in self.convs.values():
            set_group(conv, nn.Parameter(conv.weight.new_zeros(num_groups, conv.out_channels)))
        self.logits = [conv.group for conv in self.convs.values()]
        self.adam = torch.optim.Adam(self.logits, lr=1e-3, eps=1e-12)
        self.step = 0
        self.p = None  # the probabilities of this step, [groups, out] a convolution

    def _stacks(self, example_input, num_groups):
        """The convolutions in stacks. Raises ValueError for one that the optimizer does not train."""
        settings = {id(p): i for i, group in enumerate(self.optimizer.param_groups) for p in group['params']}
        names = list(self.convs)
        members = {}  # {(shape, parameter group): names}
        for name, conv in self.convs.items():
            if id(conv.weight) not in settings:
                raise ValueError(f'the optimizer does not train {name}: exclude that convolution')
            members.setdefault((conv.weight.shape, settings[id(conv.weight)]), []).append(name)
        scales = self.scales(example_input, num_groups)
        stacks = []
        for (_, group), alike in members.items():
            weights = [self.convs[name].weight for name in alike]
            factors = weights[0].new_tensor([scales[name] for name in alike]).view(-1, 1, 1)
            stacks.append(Stack([names.index(name) for name in alike], weights, factors, group))
        return stacks

    def scales(self, example_input: torch.Tensor, num_groups: int) -> dict[str, float]:
        """{name: sqrt(input size) * kernel height * (G / out)^1.5}; 16 channels of the image's height and width are size 1."""
        sizes = input_sizes(self.model, example_input)
        unit = 16 * example_input.shape[2:].numel()
        return {
            name: (sizes[name] / unit) ** 0.5 * conv.kernel_size[0] * (num_groups / conv.out_channels) ** 1.5
            for name, conv in self.convs.items()
        }

    def initialize(self) -> None:
        """Draw the group probabilities of this step, by Gumbel softmax; call it before the forward."""
        drawn = F.gumbel_softmax(torch.cat(self.logits, 1) / self.temperature, dim=0)  # each filter is drawn by itself
        self.p = drawn.split([logits.shape[1] for logits in self.logits], 1)

    @torch.no_grad()
    def after_step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Learn from the batch (x, y) that the optimizer has just stepped on: a second pass of the model, as long as the first.

        Weights come out shrunk; batch norm's statistics, the optimizer's state and the gradients as they were.
        """
        if self.p is None:
            raise ValueError('call initialize() before the forward pass of each step')
        probabilities = [p.detach() for p in self._stack(self.p)]
        here = self._terms(probabilities)
        with Rewind(self.model, self.optimizer):
            self._shrink(here)
            begun = [stack.weight() for stack in self.stacks]
            self._look_ahead(x, y)
            ahead = self._terms(probabilities)
            self._shrink(ahead)
            moved = [stack.weight() - weight for stack, weight in zip(self.stacks, begun, strict=True)]
        slopes = []  # dR/dp; the weights are again those at which the terms `here` were taken
        for i, stack in enumerate(self.stacks):
            slopes.append(ahead[i].to_p + second_order_term(here[i], probabilities[i], stack.weight(), moved[i]))
        self._learn(slopes)
        hard = [F.one_hot(a.argmax(-2), a.shape[-2]).mT.to(a.dtype) for a in self._stack(self.logits)]
        self._shrink(self._terms(hard))
        self.step += 1
        self.p = None

    def _stack(self, tensors):
        """One tensor [groups, out] a convolution -> one [n, groups, out] a stack."""
        return [torch.stack([tensors[place] for place in stack.places]) for stack in self.stacks]

    def _terms(self, probabilities):
        return [regulariser_terms(stack.weight(), p) for stack, p in zip(self.stacks, probabilities, strict=True)]

    def _shrink(self, terms):
        """W -= dR/dW * scale * lambda * learning rate * (t + 1) / T; after T steps the strength stays."""
        strength = self.power * min((self.step + 1) / self.total, 1)
        for stack, of_stack in zip(self.stacks, terms, strict=True):
            rate = self.optimizer.param_groups[stack.settings]['lr']
            factors = 1 - of_stack.penalty * stack.scales * (strength * rate)
            for weight, factor in zip(stack.weights, factors, strict=True):
                weight.mul_(factor[:, :, None, None])

    def _look_ahead(self, x, y):
        """One step of the user's optimizer on the same batch; the gradients of the step before stay."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group['params']]
        before = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        pieces = [(x, y, 1)]
        if self.accumulate > 1:
            pairs = zip(x.chunk(self.accumulate), y.chunk(self.accumulate), strict=True)
            pieces = [(images, labels, len(labels) / len(y)) for images, labels in pairs]
        for images, labels, share in pieces:
            with torch.enable_grad():
                with self.autocast:
                    loss = self.criterion(self.forward(images), labels)
                (share * loss).backward()
        self.optimizer.step()
        for parameter, grad in zip(parameters, before, strict=True):
            parameter.grad = grad

    def _learn(self, slopes):
        """Back through the draw of p to the logits, and a step of their Adam."""
        with torch.enable_grad():
            total = sum((p * slope).sum() for p, slope in zip(self._stack(self.p), slopes, strict=True))
        for logits, grad in zip(self.logits, torch.autograd.grad(total, self.logits), strict=True):
            logits.grad = grad
        self.adam.step()
        self.adam.zero_grad()

    def state_dict(self) -> dict:
        """What a resumed run needs beside the states of model and optimizer."""
        return {'step': self.step, 'adam': self.adam.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.step = state['step']
        self.adam.load_state_dict(state['adam'])
        for values in self.adam.state.values():  # with its step count on the GPU, Adam would wait for it at each step
            values['step'] = values['step'].cpu()


class Rewind:
    """On leaving the context, trained parameters, all buffers and the optimizer's state are again what they were, in place."""

    def __init__(self, model, optimizer):
        self.optimizer = optimizer
        self.states = {parameter: dict(state) for parameter, state in optimizer.state.items()}
        in_state = [value for state in self.states.values() for value in state.values() if torch.is_tensor(value)]
        trained = [parameter for group in optimizer.param_groups for parameter in group['params']]
        self.tensors = [*trained, *model.buffers(), *in_state]
        self.copies = [tensor.detach().clone() for tensor in self.tensors]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for tensor, copy in zip(self.tensors, self.copies, strict=True):
            tensor.copy_(copy)
        self.optimizer.state.clear()  # what the step has added
        self.optimizer.state.update(self.states)


def set_group(conv: nn.Conv2d, group: torch.Tensor) -> None:
    """Let the convolution hold `group`, a Parameter or a buffer, in place of what it had under that name."""
    if hasattr(conv, 'group'):
        delattr(conv, 'group')
    if isinstance(group, nn.Parameter):
        conv.group = group
    else:
        conv.register_buffer('group', group)


def remove_groups(model: nn.Module) -> nn.Module:
    """Take groups and masks off the model's convolutions, which are then plain layers again; zeros stay. Returns the model."""
    for conv in model.modules():
        if isinstance(conv, nn.Conv2d):
            for name in {'group', 'mask'} & {*conv._parameters, *conv._buffers}:
                delattr(conv, name)
    return model


def hard_groups(logits: torch.Tensor, round_to: int = 1) -> torch.Tensor:
    """The group of each filter, [out]: that of its largest logit; logits [groups, out].

    round_to: sizes of groups are made multiples of it, as far as out is one, by moving the filters that lose least by it.
    """
    group = logits.argmax(0)
    if round_to == 1:
        return group
    sizes = group.bincount(minlength=len(logits))
    spare = sizes % round_to  # above 0 a group gives so many filters away, below 0 it takes them
    for k in spare.argsort(descending=True, stable=True)[: int(spare.sum()) // round_to].tolist():
        spare[k] -= round_to
    loss = (logits.gather(0, group[None]) - logits).flatten()  # of moving filter o to group k, at k * out + o
    spare = spare.tolist()
    groups = group.tolist()
    for place in loss.argsort(stable=True).tolist():
        target, index = divmod(place, len(groups))
        if spare[groups[index]] > 0 > spare[target]:
            spare[groups[index]] -= 1
            spare[target] += 1
            groups[index] = target
    return torch.tensor(groups, device=group.device)
