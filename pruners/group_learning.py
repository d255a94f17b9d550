"""Dynamic Structure Pruning: learn filter groups, then prune each group's input channels, in anyone's training loop.

"Dynamic Structure Pruning for Compressing CNNs", Park, Kim, Kim, Choi and Lee, AAAI 2023, arXiv 2303.09736.

    grouper = GroupWrapper(model, optimizer, criterion, regularization_power, total_num_iterations, num_groups, temperature)
    ...                                                  # each step: grouper.initialize(), then forward, backward,
    grouper.after_step(x, y)                             # optimizer.step(), and this
    pruner = PruneWrapper(model, num_groups, fp_every_nth_conv)
    flops, params = pruner.initialize(pruning_rate)      # once, with the group-learned weights; each step: pruner.after_step()

W[o,c] is a convolution's weight (summed over its kernel where nothing else is said), a[k,o] the logits of its groups, and
p[k,o] the probability that filter o is in group k. The regulariser of one convolution, R = sum_k S[k] sum_c L[k,c], weighs the
norm L[k,c] = sqrt(sum_o (p[k,o] W[o,c])^2) of input channel c inside group k with the soft size S[k] = (sum_o sqrt p[k,o])^2. Its
gradient, scaled for each layer and ramped linearly up over training, shrinks the weights with every step; the logits follow the
gradient of R after a look-ahead step of the weights, with its second-order term.

What is computed is what the authors' released code computes. Deviations, all of them where that code fails or wastes:
- norms, sizes and all derivatives are matrix products of the [out, in] squared kernel norms, for all convolutions of one shape
  together; no copy of the weight per group;
- the look-ahead runs on the user's own model and optimizer, whose tensors are set back afterwards, so any number of parameter
  groups and any optimizer will do; the momentum of the look-ahead does not reach the user's;
- each division by a norm has the same small epsilon, so that an input channel of zeros gives no NaN;
- the first convolution and the shortcuts, which are left out by default, are found by running the model on `example_input`, and
  by the names `downsample` and `shortcut`; or name them yourself. The layer's scale counts its input relative to the image;
- the threshold beta is searched exactly, over the finitely many values at which anything changes; a channel is pruned when the
  cumulated importance up to and with it is below beta, so a small beta prunes little, where the authors' prunes everything;
- what is dead follows from the masks and the network's graph alone: nothing runs, and batch norm's statistics stay.
"""

import contextlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from deploy.outputs import eval_mode

EPS = 1e-8  # added to norms and sums before they divide
SHORTCUTS = {'downsample', 'shortcut'}  # a convolution with this in its name is one of a shortcut


def default_example(model):
    """Zeros [1, C, 32, 32] where the model is, with the channels of its first convolution."""
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None:
        raise ValueError('the model has no 2-d convolution')
    return torch.zeros(1, first.in_channels, 32, 32, device=first.weight.device)


@torch.no_grad()
def input_sizes(model, example_input):
    """{name of a 2-d convolution: elements of its input for one example}, in the order in which they first run."""
    sizes = {}
    names = {module: name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}

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


def group_convs(model, example_input, exclude=None, say=print):
    """{name: convolution} that get groups, in the model's order, and one line that says which.

    exclude: names of convolutions to leave out; None is the paper's choice, the first one to run and those of shortcuts. Left
    out in any case: those with groups of their own, which are narrow already, and those that the forward pass does not reach.
    Raises ValueError for an unknown name, when none is left, and for a weight that is parametrized by another method.
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
        if parametrize.is_parametrized(conv, 'weight'):
            raise ValueError(f'the weight of {name} is parametrized by another method: make it a plain layer, or exclude it')
    note = f'; not {", ".join(narrow)}, which have groups of their own' if narrow else ''
    left = f' all but {", ".join(name for name in order if name in exclude)}' if exclude else ''
    say(f'filter groups: {len(chosen)} of {len(convs)} convolutions,{left}{note}')
    return chosen


class Terms(NamedTuple):
    """What the regulariser is made of, at one weight or a stack of them: see terms()."""

    penalty: torch.Tensor  # [..., out, in]: dR/dW = penalty * W
    to_p: torch.Tensor  # [..., groups, out]: dR/dp
    size: torch.Tensor  # [..., groups, 1]: S
    inverse: torch.Tensor  # [..., groups, in]: 1 / (eps + L)
    norm_to_p: torch.Tensor  # [..., groups, out]: sum_c dL/dp
    size_to_p: torch.Tensor  # [..., groups, out]: dS/dp


def terms(weight, p):
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


def second_order(kept, p, weight, moved):
    """What a look-ahead that moved the weight by `moved` = D adds to dR/dp, to first order in D; shapes as for terms().

    kept: terms() at `weight`, where the look-ahead set out. With n = p W / L it is, as the authors compute it,
    dS/dp sum(p n D) + S (sum(2 n D) - dL/dp sum(p n D / L)), with sums over c, h and w.
    """
    overlap = (weight * moved).sum((-2, -1)).mT  # [in, out]
    along = kept.inverse @ overlap
    bend = kept.norm_to_p * p.square() * (kept.inverse.square() @ overlap)
    return kept.size_to_p * p.square() * along + kept.size * (2 * p * along - bend)


class Stack(NamedTuple):
    """Convolutions of one shape and one parameter group of the optimizer, which are computed together: for a GPU's sake."""

    places: list  # in GroupWrapper.convs
    weights: list
    scales: torch.Tensor  # [n, 1, 1]
    settings: int  # the place of their parameter group in optimizer.param_groups

    def stacked(self):
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
        model,
        optimizer,
        criterion,
        regularization_power,
        total_num_iterations,
        num_groups,
        temperature,
        example_input=None,
        *,
        exclude=None,
        autocast=None,
        forward=None,
        accumulate=1,
        say=print,
    ):
        if not (regularization_power >= 0 and total_num_iterations >= 1 and num_groups >= 1 and temperature > 0):
            raise ValueError(
                'needs a regularization_power from 0, total_num_iterations and num_groups from 1, temperature above 0'
            )
        example_input = default_example(model) if example_input is None else example_input
        self.model, self.optimizer, self.criterion = model, optimizer, criterion
        self.power, self.total, self.temperature = regularization_power, total_num_iterations, temperature
        self.autocast = contextlib.nullcontext() if autocast is None else autocast
        self.forward, self.accumulate = model if forward is None else forward, accumulate
        self.convs = group_convs(model, example_input, exclude, say)
        self.stacks = self._stacks(example_input, num_groups)
        for conv in self.convs.values():
            set_group(conv, nn.Parameter(conv.weight.new_zeros(num_groups, conv.out_channels)))
        self.logits = [conv.group for conv in self.convs.values()]
        self.adam = torch.optim.Adam(self.logits, lr=1e-3, eps=1e-12)
        self.step, self.p = 0, None

    def _stacks(self, example_input, num_groups):
        settings = {id(p): i for i, group in enumerate(self.optimizer.param_groups) for p in group['params']}
        scales, members = self.scales(example_input, num_groups), {}
        for place, (name, conv) in enumerate(self.convs.items()):
            if id(conv.weight) not in settings:
                raise ValueError(f'the optimizer does not train {name}: exclude that convolution')
            members.setdefault((conv.weight.shape, settings[id(conv.weight)]), []).append((place, conv.weight, scales[name]))
        stacks = []
        for (_, group), found in members.items():
            places, weights, factors = map(list, zip(*found, strict=True))
            stacks.append(Stack(places, weights, weights[0].new_tensor(factors).view(-1, 1, 1), group))
        return stacks

    def scales(self, example_input, num_groups):
        """{name: sqrt(input size) * kernel height * (G / out)^1.5}; 16 channels of the image's height and width are size 1."""
        sizes, unit = input_sizes(self.model, example_input), 16 * example_input.shape[2:].numel()
        return {
            name: (sizes[name] / unit) ** 0.5 * conv.kernel_size[0] * (num_groups / conv.out_channels) ** 1.5
            for name, conv in self.convs.items()
        }

    def initialize(self):
        """Draw the group probabilities of this step, by Gumbel softmax; call it before the forward."""
        drawn = F.gumbel_softmax(torch.cat(self.logits, 1) / self.temperature, dim=0)  # each filter is drawn by itself
        self.p = drawn.split([logits.shape[1] for logits in self.logits], 1)

    @torch.no_grad()
    def after_step(self, x, y):
        """Learn from the batch (x, y) that the optimizer has just stepped on: a second pass of the model, as long as the first.

        Weights come out shrunk; batch norm's statistics, the optimizer's state and the gradients as they were.
        """
        if self.p is None:
            raise ValueError('call initialize() before the forward pass of each step')
        probabilities = [p.detach() for p in self._stack(self.p)]
        kept = self._terms(probabilities)
        with Rewind(self.model, self.optimizer):
            self._shrink(kept)
            start = [stack.stacked() for stack in self.stacks]
            self._look_ahead(x, y)
            ahead = self._terms(probabilities)
            self._shrink(ahead)
            moved = [stack.stacked() - begun for stack, begun in zip(self.stacks, start, strict=True)]
        slopes = [  # the weights are again those at which `kept` was taken
            there.to_p + second_order(first, p, stack.stacked(), change)
            for there, first, p, stack, change in zip(ahead, kept, probabilities, self.stacks, moved, strict=True)
        ]
        self._learn(slopes)
        logits = self._stack(self.logits)
        self._shrink(self._terms([F.one_hot(a.argmax(-2), a.shape[-2]).mT.to(a.dtype) for a in logits]))
        self.step += 1
        self.p = None

    def _stack(self, tensors):
        """One tensor [groups, out] a convolution -> one [n, groups, out] a stack."""
        return [torch.stack([tensors[place] for place in stack.places]) for stack in self.stacks]

    def _terms(self, probabilities):
        return [terms(stack.stacked(), p) for stack, p in zip(self.stacks, probabilities, strict=True)]

    def _shrink(self, found):
        """W -= dR/dW * scale * lambda * learning rate * (t + 1) / T; after T steps the strength stays."""
        strength = self.power * min((self.step + 1) / self.total, 1)
        for stack, at in zip(self.stacks, found, strict=True):
            rate = self.optimizer.param_groups[stack.settings]['lr']
            kept = 1 - at.penalty * stack.scales * (strength * rate)
            for weight, share in zip(stack.weights, kept, strict=True):
                weight.mul_(share[:, :, None, None])

    def _look_ahead(self, x, y):
        """One step of the user's optimizer on the same batch; the gradients of the step before stay."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group['params']]
        before = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        pieces = [(x, y, 1)]
        if self.accumulate > 1:
            chunks = zip(x.chunk(self.accumulate), y.chunk(self.accumulate), strict=True)
            pieces = [(some, their, len(their) / len(y)) for some, their in chunks]
        for some, their, share in pieces:
            with torch.enable_grad():
                with self.autocast:
                    loss = self.criterion(self.forward(some), their)
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

    def state_dict(self):
        """What a resumed run needs beside the states of model and optimizer."""
        return {'step': self.step, 'adam': self.adam.state_dict()}

    def load_state_dict(self, state):
        self.step = state['step']
        self.adam.load_state_dict(state['adam'])
        for values in self.adam.state.values():  # with its step count on the GPU, Adam would wait for it at each step
            values['step'] = values['step'].cpu()


class Rewind:
    """On leaving the context, trained parameters, all buffers and the optimizer's state are again what they were, in place."""

    def __init__(self, model, optimizer):
        self.optimizer = optimizer
        self.states = {parameter: dict(state) for parameter, state in optimizer.state.items()}
        held = [value for state in self.states.values() for value in state.values() if torch.is_tensor(value)]
        trained = [parameter for group in optimizer.param_groups for parameter in group['params']]
        self.tensors = [*trained, *model.buffers(), *held]
        self.copies = [tensor.detach().clone() for tensor in self.tensors]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for tensor, copy in zip(self.tensors, self.copies, strict=True):
            tensor.copy_(copy)
        self.optimizer.state.clear()  # what the step has added
        self.optimizer.state.update(self.states)


def set_group(conv, group):
    """Let the convolution hold `group`, a Parameter or a buffer, in place of what it had under that name."""
    if hasattr(conv, 'group'):
        delattr(conv, 'group')
    if isinstance(group, nn.Parameter):
        conv.group = group
    else:
        conv.register_buffer('group', group)


def strip(model):
    """Take groups and masks off the model's convolutions, which are then plain layers again; zeros stay. Returns the model."""
    for conv in model.modules():
        if isinstance(conv, nn.Conv2d):
            for name in {'group', 'mask'} & {*conv._parameters, *conv._buffers}:
                delattr(conv, name)
    return model


def hard_groups(logits, round_to=1):
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
    spare, homes = spare.tolist(), group.tolist()
    for place in loss.argsort(stable=True).tolist():
        to, filter_ = divmod(place, len(homes))
        if spare[homes[filter_]] > 0 > spare[to]:
            spare[homes[filter_]] -= 1
            spare[to] += 1
            homes[filter_] = to
    return torch.tensor(homes, device=group.device)
