"""From zeros to a smaller network: remove the filters and channels that a pruned network no longer needs.

    small = shrink(model, example_input)                     # a new, dense network with equal outputs in eval mode
    small = shrink(model, example_input, round_to=8)         # channel counts that hardware likes
    groups = dependency_groups(model, example_input)         # layers whose filters can only be removed together
    python main.py --shrink runs/my_run                      # the same for a finished run

How it works. torch.export reads the network, and every channel of every tensor gets a number (ties.py). Numbers that one index
selects together (through batch norm, activation, pooling, depthwise convolution, residual addition, gating, concatenation,
flattening) are one class. Forward, each channel is either unknown or a known constant: a filter of zeros emits its bias, its
batch norm makes another constant of it, ReLU may make that zero. Backward, a class is needed if someone reads it
(decisions.py).
The rest is cut out of the model's own modules, in all layers at once (cutting.py). Constants that are not zero go into the bias
of the layer that reads them, if that is a linear layer or a convolution without zero padding. With padding the border differs
from the rest, which no bias can do: there one constant channel stays, and takes over the weights of the others. An operation
that
is not known keeps all that it reads: that can cost savings but not correctness. In the end outputs are compared; where the code
of the model names a size, as in view(-1, 64), what feeds that line is kept, and the rest tried again.

Torch-Pruning finds such groups too, but decides by layer (a channel dead in one place and not in another), takes a convolution
of one input channel for a depthwise one and has trouble with concatenation; here it is the oracle of the tests instead.
Outputs are equal in eval mode. In training mode they are as long as only zeros were removed: batch norm in training sees a
filter of zeros as its shift alone, whatever its running mean.
"""

import copy
import math
import traceback
import warnings
from collections import defaultdict

import torch
from torch import nn

from .cutting import Kept, cut, take
from .decisions import Decision
from .graph import line_of, owner_of, place_of, plain_copy, reason, unwrapped
from .outputs import TOLERANCE, change_tensors, difference, noise_like, run
from .ties import Mix, read_channels

__all__ = ['Kept', 'decided_together', 'dependency_groups', 'even_parts', 'rebuild_optimizer', 'shrink', 'take']


def shrink(
    model: nn.Module, example_input: torch.Tensor | tuple | dict, round_to: int = 1, return_kept: bool = False
) -> nn.Module | tuple[nn.Module, dict[str, 'Kept']]:
    """A smaller network that computes what `model` computes in eval mode, to 1e-5 of the largest output.

    model: any network that torch.export can read; it is left as it is, and the new one has the same classes, names and modes.
    Out of DataParallel, DistributedDataParallel or torch.compile it is taken with a warning.
    example_input: a batch [B, ...] on the model's device, or a tuple or dict of arguments. Outputs may be nested in any way.
    round_to: keep some dead filters, so that the number of filters of every layer that loses any, but depthwise ones, is a
    multiple of this, or all of them. A layer without live filters keeps one (or round_to).
    return_kept: also return {tensor name: Kept}, for rebuild_optimizer(); tensors that are not in it are whole.
    Raises ValueError when the network cannot be read, or when the outputs would differ, with the reason.
    """
    small, kept, _, blamed = decide(model, example_input, round_to)
    for node in blamed:
        warnings.warn(f'{place_of(node)} names sizes in its code, so the channels that it reads stay', stacklevel=2)
    return (small, kept) if return_kept else small


def decide(model, example_input, round_to=1, training=True):
    """(smaller network, {tensor name: Kept}, Decision, [operations that name sizes in their code]); shrink() has the
    arguments. training: cut branches that run in training only, too."""
    if round_to < 1:
        raise ValueError(f'round_to must be 1 or more, got {round_to}')
    model = unwrapped(model)
    channels = read_channels(model, example_input, training=training)
    base = plain_copy(model)
    noise = noise_like(base, example_input)
    expected = run(base, noise)
    stay = []
    while True:
        small = copy.deepcopy(base)
        decision = Decision(channels, round_to, [channels.guesses[node] for node in stay])
        kept = cut(small, decision)
        blamed, problem = _trial(base, small, noise, expected, channels, decision)
        if problem is None:
            return small, kept, decision, stay
        if not blamed:
            raise ValueError(problem)
        stay += blamed


def _trial(base, small, noise, expected, channels, decision):
    """([operations to blame], what is wrong): (.., None) where the smaller network computes the same."""
    cut_guesses = [
        node for node, shadow in channels.guesses.items() if not decision.keep[channels.classes[shadow[shadow >= 0]]].all()
    ]
    try:
        gap = difference(expected, run(small, noise))
    except Exception as error:  # whatever the model's own code raises when it meets another size
        return _blamed(error, cut_guesses, small), f'the smaller network does not run, so it is not made ({reason(error)})'
    if not gap <= TOLERANCE:  # it may be NaN; rounding is no reason to refuse
        double = change_tensors(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, noise)
        try:
            gap = difference(run(copy.deepcopy(base).double(), double), run(copy.deepcopy(small).double(), double))
        except RuntimeError:  # a network whose code makes tensors of single precision
            pass
    if gap <= TOLERANCE:
        return [], None
    return cut_guesses, f'the smaller network would differ by {gap:.1e} of the largest output, so it is not made'


def _blamed(error, guesses, network):
    """Of the operations whose sizes may be written down: those on a line that failed, or else in the innermost module that
    failed
    or one around it, or else all."""
    lines = set()
    failed = ''
    names = {module: name for name, module in network.named_modules()}
    for frame, number in traceback.walk_tb(error.__traceback__):
        lines.add((frame.f_code.co_filename, number))
        module = frame.f_locals.get('self')
        failed = names.get(module, failed) if isinstance(module, nn.Module) else failed
    found = [node for node in guesses if line_of(node) in lines]
    while not found and failed:
        found = [node for node in guesses if owner_of(node) == failed]
        failed = failed.rpartition('.')[0]
    return found or guesses


def dependency_groups(model: nn.Module, example_input: torch.Tensor | tuple | dict, depthwise: bool = False) -> list[list[str]]:
    """[[layer names], ...]: convolutions and linear layers whose filters can only be removed together, in the model's order.

    Those are the layers that end in one residual stream. Layers that share some of their filters only (added after a
    concatenation) are in no group. depthwise=True adds depthwise convolutions to the layer that feeds them, and makes groups
    of these: their filters are removed together too, but a zero in either is enough.
    """
    return _groups(read_channels(unwrapped(model), example_input), model, depthwise)


def decided_together(model: nn.Module, example_input: torch.Tensor | tuple | dict) -> tuple[list[list[str]], dict[str, int]]:
    """(dependency_groups(depthwise=True), even_parts()) of a model that is read once: what decide_together() of the pruners
    takes."""
    channels = read_channels(unwrapped(model), example_input)
    return _groups(channels, model, True), _parts(channels)


def _groups(channels, model, depthwise):
    groups = defaultdict(list)
    order = list(dict(model.named_modules()))
    found = {}
    for step in channels.steps:
        if isinstance(step, Mix) and (depthwise or not step.depthwise):
            found.setdefault(step.weight.rpartition('.')[0], channels.classes[step.out])
    for name in sorted(found, key=order.index):
        groups[tuple(found[name].tolist())].append(name)
    return [group for group in groups.values() if len(group) > 1]


def even_parts(model: nn.Module, example_input: torch.Tensor | tuple | dict) -> dict[str, int]:
    """{layer name: parts}: layers whose filters, in order, are so many equal parts of which each must lose as many.

    Those are grouped convolutions and the layers in front of them, and layers whose output is cut into halves by chunk or
    split.
    Filters that are chosen evenly in each part can all be removed; chosen freely, the fullest part decides for all.
    """
    return _parts(read_channels(unwrapped(model), example_input))


def _parts(channels):
    mixes = [step for step in channels.steps if isinstance(step, Mix) and not step.depthwise]
    grouped = [(step.groups, channels.classes[step.inputs]) for step in mixes if step.groups > 1]
    grouped += [(len(numbers), channels.classes[numbers].flatten()) for _, numbers in channels.blocks]
    parts = {}
    for step in mixes:
        filters = channels.classes[step.out]
        name = step.weight.rpartition('.')[0]
        wanted = [step.groups, *(number for number, classes in grouped if torch.equal(classes, filters))]
        if math.lcm(*wanted) > 1:
            parts[name] = math.lcm(*wanted)
    return parts


def rebuild_optimizer(
    optimizer: torch.optim.Optimizer, old_model: nn.Module, new_model: nn.Module, kept: dict[str, Kept]
) -> torch.optim.Optimizer:
    """An optimizer for the smaller network that goes on where `optimizer` stands.

    kept: of shrink(return_kept=True). Every parameter of the new network is in the group of the old one of its name, with the
    group's settings, and its state (momentum, Adam's averages) is cut like the parameter; a bias that shrink() had to make
    joins the group of the biases, or else of its weight, without state. What the old optimizer did not train, the new one does
    not. `optimizer` is left as it is; hooks and schedulers stay with it. Works with every optimizer of torch.optim whose state
    has the shape of the parameters. Raises ValueError for the others, which are Adafactor once it has stepped, and LBFGS; for a
    wrapper of another optimizer; and for an optimizer of parameters that are not in the old model.
    """
    kind = type(optimizer).__name__
    for key, value in vars(optimizer).items():
        if isinstance(value, torch.optim.Optimizer):
            raise ValueError(f'this {kind} steps with another optimizer, {key!r}: rebuild that one')
        if key != 'param_groups' and isinstance(value, (list, tuple)) and any(torch.is_tensor(item) for item in value):
            raise ValueError(f'{kind} keeps tensors that cannot be cut: make a new one for the smaller network')
    names = {parameter: name for name, parameter in old_model.named_parameters()}
    new = dict(new_model.named_parameters())
    groups = []
    for group in optimizer.param_groups:
        if any(parameter not in names for parameter in group['params']):
            raise ValueError('the optimizer has parameters that are not in the old model')
        groups.append(group | {'params': [new[names[parameter]] for parameter in group['params']]})
    state = defaultdict(dict)
    for parameter, of_parameter in optimizer.state.items():
        name = names[parameter]
        for key, value in of_parameter.items():
            if not _can_be_cut(value, parameter, kept.get(name)):
                raise ValueError(
                    f'{kind} keeps {key} of {name} in the shape {tuple(value.shape)}, which cannot be cut like the weight: '
                    'make a new one for the smaller network'
                )
            state[new[name]][key] = _cut_state(value, parameter, kept.get(name))
    for name, parameter in new.items():
        if name not in names.values():
            _add_bias(groups, new, name, parameter)
    result = copy.copy(optimizer)  # of its class, with hooks of its own
    for key, value in vars(optimizer).items():
        if isinstance(value, (bool, int, float, str)):
            setattr(result, key, value)  # as whether a GradScaler may leave unscaling to it
    result.state = state
    result.param_groups = groups
    return result


def _can_be_cut(value, parameter, kept):
    """Whether a value of a parameter's state is a number, or has its shape, or need not be cut."""
    return kept is None or not torch.is_tensor(value) or value.numel() == 1 or value.shape == parameter.shape


def _cut_state(value, parameter, kept):
    if not torch.is_tensor(value):
        return copy.deepcopy(value)
    return take(value, kept) if kept is not None and value.shape == parameter.shape else value.clone()


def _add_bias(groups, new, name, bias):
    """Train a bias that shrink() has made, if its weight is trained: in the group of other biases, or its weight's."""
    weight = new[name.rpartition('.')[0] + '.weight']
    own = [group for group in groups if any(parameter is weight for parameter in group['params'])]
    if not own:
        return
    biases = [group for group in groups if any(parameter.dim() == 1 for parameter in group['params'])]
    home = (biases or own)[0]
    home['params'].append(bias)
    if 'param_names' in home:
        home['param_names'] = [*home['param_names'], name]
