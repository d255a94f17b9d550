"""What NNI's pruners share: config lists, masks chosen by index, and masks that hold. The pruners are in methods/.

    config_list = [{'sparsity': 0.5, 'op_types': ['Conv2d']}, {'exclude': True, 'op_names': ['conv1']}]
    pruner = L1FilterPruner(model, config_list, optimizer)
    pruner.compress()                          # prunes in place; train on as before
    pruner.export_model('model.pt', 'mask.pt')

NNI (github.com/microsoft/nni, the pruners of version 1.7, 2020) masked each layer in a wrapper, in the forward pass. Here layers
stay plain: masks multiply the weights in place, after every step of the optimizer and, whoever else changed a weight, before the
next forward pass, so that module types and state_dict keys never change and a pruned weight is zero wherever one looks.
Further differences from NNI's code:
- the number pruned of n weights or filters is floor(n sparsity), but never all n; they are chosen by index, the lowest first
  among equals, where a threshold pruned all equals of the last one;
- with a filter its bias goes, and the scale and shift of the batch norm that follows, so that the filter's output is zero;
- the momentum of a pruned weight is cleared, or it would come back;
- an entry of the config list that is misspelt, contradicts itself or matches nothing is a ValueError, not a warning; `exclude`
  works in every pruner; the sparsity may be 0.

A pruner is its criterion: scores(weights), from {name: weight} to {name: scores}, the least of which are pruned. A score is for
a filter (1-d, one for each index of the weight's first dimension) or for a weight (of the weight's shape).
"""

import copy
import difflib
import importlib.util
import math
from functools import partial

import torch
from torch import fx, nn

import distributed
import methods
from shrink import agree

# The types that 'default' stands for.
DEFAULT_TYPES = ('Conv1d', 'Conv2d', 'Conv3d', 'ConvTranspose1d', 'ConvTranspose2d', 'ConvTranspose3d', 'Linear', 'Bilinear')
DEFAULT_TYPES += ('PReLU', 'Embedding', 'EmbeddingBag')

ACTIVATIONS = {'relu': nn.functional.relu, 'relu6': nn.functional.relu6}

# One-shot criteria by the names of base_algo and pruning_algorithm.
ALGORITHMS = {
    'level': 'LevelPruner',
    'slim': 'SlimPruner',
    'l1': 'L1FilterPruner',
    'l2': 'L2FilterPruner',
    'fpgm': 'FPGMPruner',
    'taylorfo': 'TaylorFOWeightFilterPruner',
    'apoz': 'ActivationAPoZRankFilterPruner',
    'mean_activation': 'ActivationMeanRankFilterPruner',
}


def algorithm(name):
    """The one-shot pruner class of a base_algo or pruning_algorithm. Raises ValueError for another name."""
    if name not in ALGORITHMS:
        raise ValueError(f'there is no pruning algorithm {name!r}{meant(name, ALGORITHMS)}; there are {", ".join(ALGORITHMS)}')
    return getattr(methods, ALGORITHMS[name])


# -------------------------------------------------------------------------------------------------------- the config list


def is_share(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1


def is_names(value):
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(name, str) for name in value)


def is_count(value):
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_positive(value):
    return is_count(value) and value > 0


# What the value of each key must be: the check, and how to say it.
CHECKS = {key: (is_share, 'a number in [0, 1)') for key in ('sparsity', 'initial_sparsity', 'final_sparsity')}
CHECKS |= {key: (is_names, 'a list of names') for key in ('op_types', 'op_names')}
CHECKS |= {key: (is_count, 'a whole number, 0 or more') for key in ('start_epoch', 'end_epoch')}
CHECKS |= {key: (is_positive, 'a whole number, 1 or more') for key in ('frequency', 'prune_iterations')}
CHECKS['exclude'] = (lambda value: isinstance(value, bool), 'True or False')


def select_layers(model, config_list, required=('sparsity',), optional=(), types=None):
    """The layers that a config list names -> ({name: layer}, {name: the entry that decides about it}), in the model's order.

    A layer matches an entry when its type's name is in `op_types` and its dotted name in `op_names`, as far as the entry has
    them; it needs one of the two. Among the op_types 'default' is DEFAULT_TYPES. The last matching entry decides; where that
    has `exclude: True` the layer is left out. required, optional: the keys of an entry beside these three. types: the types of
    layers that the pruner takes, None for any with a weight. Raises ValueError, naming the entry and what was expected.
    """
    if not isinstance(config_list, (list, tuple)) or not config_list or not all(isinstance(e, dict) for e in config_list):
        raise ValueError(f'config_list must be a list of dicts, one or more, got {config_list!r}')
    chosen = {}
    for number, entry in enumerate(config_list):
        try:
            check_entry(entry, required, optional)
            for name, layer in matches(model, entry, types).items():
                chosen[name] = (layer, entry, number)
        except ValueError as error:
            raise ValueError(f'config_list[{number}] = {entry}: {error}') from None
    pruned = {name: chosen[name] for name, _ in model.named_modules() if name in chosen and not excludes(chosen[name][1])}
    if not pruned:
        raise ValueError('config_list excludes every layer that it names: nothing is left to prune')
    for name, (layer, entry, number) in pruned.items():
        kind, fault = type(layer).__name__, None
        if types is not None and kind not in types:
            fault = f'{name} is a {kind}; this pruner takes {" and ".join(types)} only'
        elif not isinstance(layer._parameters.get('weight'), nn.Parameter):
            fault = f'{name}, a {kind}, has no weight to prune'
        if fault:
            raise ValueError(f'config_list[{number}] = {entry}: {fault}')
    return {name: layer for name, (layer, *_) in pruned.items()}, {name: entry for name, (_, entry, _) in pruned.items()}


def excludes(entry):
    return entry.get('exclude', False)


def meant(name, choices):
    """' (did you mean x?)', or nothing."""
    near = difflib.get_close_matches(str(name), list(choices), 1)
    return f' (did you mean {near[0]!r}?)' if near else ''


def check_entry(entry, required, optional):
    """Keys and values of one entry. Raises ValueError."""
    allowed = ['op_types', 'op_names', 'exclude', *required, *optional]
    for key, value in entry.items():
        if key not in allowed:
            raise ValueError(f'unknown key {key!r}{meant(key, allowed)}; expected {", ".join(allowed)}')
        check, expected = CHECKS[key]
        if not check(value):
            raise ValueError(f'{key} must be {expected}, got {value!r}')
    if 'op_types' not in entry and 'op_names' not in entry:
        raise ValueError('expected op_types or op_names, to say which layers are meant')
    values = [key for key in (*required, *optional) if key in entry]
    if excludes(entry) and values:
        raise ValueError(f'contradicts itself: exclude is True and {values[0]} is given')
    if missing := [key for key in required if key not in entry and not excludes(entry)]:
        raise ValueError(f'expected {missing[0]}')


def matches(model, entry, types):
    """{name: layer} of one entry, in which everything that it names must occur. Raises ValueError."""
    modules = dict(model.named_modules())
    kinds = sorted({type(module).__name__ for module in modules.values()})
    if 'op_types' in entry:
        check_types(entry['op_types'], kinds, None if excludes(entry) else types)
    for name in entry.get('op_names', ()):
        if name not in modules:
            raise ValueError(f'the model has no layer {name!r}{meant(name, modules)}')
    wanted = set(entry.get('op_types', kinds))
    wanted |= set(DEFAULT_TYPES) if 'default' in wanted else set()
    named = {name: module for name, module in modules.items() if name in entry.get('op_names', modules)}
    found = {name: module for name, module in named.items() if type(module).__name__ in wanted}
    if 'op_names' in entry and len(found) < len(named):
        name = next(name for name in named if name not in found)
        raise ValueError(f'contradicts itself: {name} is a {type(named[name]).__name__}, which is not among its op_types')
    if not found:
        raise ValueError(f'no layer of the model has these op_types; it has {", ".join(kinds)}')
    for name in entry.get('op_names', ()) if excludes(entry) else ():
        inside = (
            [f'{name}.{child}' for child, _ in found[name].named_children()] if 'weight' not in found[name]._parameters else []
        )
        if inside:
            raise ValueError(f'{name} is a {type(found[name]).__name__} and no layer itself; name those in it, as {inside[0]}')
    return found


def check_types(op_types, kinds, types):
    """The names in op_types: of the model's types, of torch.nn's, or 'default'. Raises ValueError for any other."""
    known = {*kinds, *DEFAULT_TYPES, 'default'}
    for kind in op_types:
        if kind not in known and not hasattr(nn, kind):
            raise ValueError(f'unknown op_type {kind!r}{meant(kind, known)}; the model has {", ".join(kinds)}')
        if types is not None and kind not in types:
            raise ValueError(f'op_type {kind!r}: this pruner takes {" and ".join(types)} only')


# --------------------------------------------------------------------------------------------------------------- selection


def num_pruned(n, sparsity):
    """floor(n sparsity); a product within 1e-6 below a whole number is that number, as 0.29 * 100 = 28.999999999999996 shows."""
    return math.floor(n * sparsity + 1e-6)


def least(scores, number):
    """Bool tensor of the shape of `scores`, True for its `number` least values; of equal ones the first go first."""
    flat = scores.reshape(-1)
    if number <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    last = flat.kthvalue(number).values
    chosen = flat < last
    ties = (flat == last).nonzero().squeeze(1)
    chosen[ties[: number - int(chosen.sum())]] = True
    return chosen.view(scores.shape)


def ranks(scores, keep=None):
    """{name: scores} in float, with minus infinity for what `keep` ({name: bool tensor}) has pruned already.

    Raises ValueError for a score that is not a number.
    """
    for name, score in scores.items():
        if bool(score.isnan().any()):
            raise ValueError(f'the importance of {name} is not a number: its weights or gradients hold NaN')
    scores = {
        name: score.float() if score.dtype in (torch.float16, torch.bfloat16) else score for name, score in scores.items()
    }
    return scores if keep is None else {name: torch.where(keep[name], score, -math.inf) for name, score in scores.items()}


@torch.no_grad()
def keep_by_layer(scores, sparsity, previous=None):
    """{name: scores}, {name: share to prune} -> {name: bool tensor}, False for the num_pruned(n, share) least of n scores.

    At least one of each layer is kept. previous: what is kept now, of the same form; what it has pruned is chosen first.
    """
    keep = {}
    for name, score in ranks(scores, previous).items():
        n = score.numel()
        keep[name] = ~least(score, min(num_pruned(n, sparsity[name]), n - 1))
    return keep


@torch.no_grad()
def keep_globally(scores, sparsity, previous=None, sizes=None):
    """The same with one ranking of all layers: False for the least of all scores, but each layer keeps its largest one.

    sparsity: a share of all scores. With sizes, {name: weights in a filter}, it is a share of the weights: the filters with the
    least scores go as long as they fit into it.
    """
    flat = {name: score.reshape(-1).clone() for name, score in ranks(scores, previous).items()}
    for score in flat.values():
        score[(score == score.max()).nonzero()[-1]] = math.inf  # the last one standing
    every = torch.cat(list(flat.values()))
    if sizes is None:
        number = num_pruned(every.numel(), sparsity)
    else:
        size = torch.cat([torch.full_like(score, sizes[name], dtype=torch.int64) for name, score in flat.items()])
        order = every.argsort(stable=True)
        number = int((size[order].cumsum(0) <= num_pruned(int(size.sum()), sparsity)).sum())
    kept = ~least(every, min(number, every.numel() - len(flat)))
    parts = kept.split([score.numel() for score in flat.values()])
    return {name: part.view(scores[name].shape) for name, part in zip(flat, parts, strict=True)}


def over(keep, weight):
    """What is kept of a weight's filters (1-d) or of its elements, as a bool mask of the weight's shape."""
    if keep.dim() < weight.dim():
        keep = keep.view(-1, *[1] * (weight.dim() - 1))
    return torch.empty_like(weight, dtype=torch.bool).copy_(keep.expand(weight.shape))  # in the weight's memory layout


# ---------------------------------------------------------------------------------------------- which batch norm is whose


class LayerTracer(fx.Tracer):
    """Takes every convolution and batch norm as one operation, subclasses too."""

    def is_leaf_module(self, module, name):
        return isinstance(module, (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)) or super().is_leaf_module(
            module, name
        )


def batch_norms(model):
    """{name of a convolution: name of the batch norm that takes its output, and nothing else, and is all that takes it}.

    Found in the graph of torch.fx. Where the model cannot be traced: the batch norm that comes next among the modules without
    children, if its size fits.
    """
    try:
        nodes = list(LayerTracer().trace(model).nodes)
    except Exception:  # whatever its forward raises when it meets no tensors
        leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
        pairs = [(a, b) for a, b in zip(leaves, leaves[1:], strict=False) if feeds(a[1], b[1])]
        return {a[0]: b[0] for a, b in pairs}
    calls = [node.target for node in nodes if node.op == 'call_module']
    modules, found = dict(model.named_modules()), {}
    for node in nodes:
        if node.op == 'call_module' and len(node.users) == 1 and calls.count(node.target) == 1:
            user = next(iter(node.users))
            if user.op == 'call_module' and feeds(modules[node.target], modules[user.target]) and calls.count(user.target) == 1:
                found[node.target] = user.target
    return found


def feeds(conv, norm):
    """Whether the one is a convolution and the other a batch norm of its size, with scale and shift."""
    return (
        isinstance(conv, nn.modules.conv._ConvNd)
        and not conv.transposed  # whose filters lie in dimension 1
        and isinstance(norm, nn.modules.batchnorm._BatchNorm)
        and norm.num_features == conv.out_channels
        and norm.affine
    )


# --------------------------------------------------------------------------------------------------------------- the bases


class Compressor:
    """The base of the pruners: a one-shot pruner that ranks within each layer.

    model: an nn.Module, pruned in place. config_list: see select_layers. optimizer: its steps are followed by the masks; it may
    be missing, or be given later with bind().
    layers, entries: {name: layer} to prune, and {name: the entry that decided}. sparsity: {name: share}.
    masks: {name: {'weight': bool tensor, 'bias': bool tensor or None}}, True where kept; all True before compress().
    """

    TYPES = None  # op_types that the pruner takes, None for any with a weight
    REQUIRED, OPTIONAL = ('sparsity',), ()  # keys of an entry
    FILTERS = True  # a score is for a filter, whose bias and batch norm go with it; False: for a weight

    def __init__(self, model, config_list, optimizer=None):
        self.model, self.optimizer = model, optimizer
        self.layers, self.entries = select_layers(model, config_list, self.REQUIRED, self.OPTIONAL, self.TYPES)
        self.sparsity = {name: entry.get('sparsity', 0.0) for name, entry in self.entries.items()}
        self.norms = batch_norms(model) if self.FILTERS else {}
        self.groups = []  # see decide_together()
        self.handles, self.step_handle, self.bound = [], None, False
        self.pending = True  # masks are to be made
        self.set_masks(None)

    # What a criterion defines.

    @staticmethod
    def scores(weights):
        """{name: weight} -> {name: scores}; the least are pruned."""
        raise NotImplementedError

    def importance(self):
        """{name: scores} of the layers as they are now, or None while what it takes has not been seen."""
        return self.scores({name: layer.weight.detach() for name, layer in self.layers.items()})

    def choose(self, scores):
        """{name: scores} -> {name: bool tensor} of what to keep; what is pruned already stays pruned."""
        return keep_by_layer(scores, self.sparsity, self.keep)

    def one_sparsity(self):
        """The sparsity of all entries, for a ranking of all layers together. Raises ValueError where they differ."""
        values = sorted(set(self.sparsity.values()))
        if len(values) > 1:
            raise ValueError(f'all layers are ranked together, so the entries need one sparsity, not {values}')
        return values[0]

    # What a user calls.

    def compress(self):
        """Make the masks (where the criterion has to see training batches: once it has), let them hold; returns the model."""
        self.update_mask()
        self.hook()
        return self.model

    def update_mask(self):
        """Make the masks again, from the weights or from what was seen of training, and apply them; pruned stays pruned."""
        if self.make_masks():
            self.apply()

    def refresh(self):
        """Make the masks for a sparsity that has changed: at once, or when enough training batches were seen."""
        self.update_mask()

    @torch.no_grad()
    def make_masks(self):
        """Set the masks, without touching a weight -> whether there is something to make them from."""
        scores = self.importance()
        if scores is not None:
            keep = self.choose(agree(scores, self.groups))
            self.set_masks(agree(keep, self.groups))
            self.pending = False
        return scores is not None

    def decide_together(self, groups):
        """Give the layers of each group ([[layer names], ...], see shrink.dependency_groups) one mask, by their mean scores.

        Filters that end in one residual stream can only be removed together: masks that disagree leave it at its full width.
        """
        before = {
            norm: conv for conv, norm in self.norms.items()
        }  # where batch norms are pruned, by the convolutions they follow
        names = {before.get(name, name): name for name in self.layers}
        groups = [[names[name] for name in group if name in names] for group in groups]
        self.groups = [group for group in groups if len(group) > 1]

    def update_epoch(self, epoch):
        """Say that epoch `epoch` (from 0) begins: of use to pruners with a schedule."""

    def step(self):
        """Apply the masks, for a training loop without an optimizer that the pruner knows."""
        self.apply()

    def bind(self, optimizer):
        """Follow the steps of this optimizer, and no more of the one before."""
        self.unbind()
        self.optimizer = optimizer
        self.step_handle, self.bound = optimizer.register_step_post_hook(self.after_step), True
        self.apply()

    def unbind(self):
        if self.step_handle is not None:
            self.step_handle.remove()
        self.step_handle, self.bound = None, False

    def unhook(self):
        """Leave the model and the optimizer as if there were no pruner; weights stay as they are."""
        self.unbind()
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def load_model_state_dict(self, state):
        """Load a plain state dict into the model; the masks hold on it."""
        self.model.load_state_dict(state)
        self.apply()

    def export_model(self, model_path, mask_path=None, onnx_path=None, input_shape=None, device=None):
        """Save the pruned model: plain names, exact zeros.

        model_path: its state_dict. mask_path: {layer: {'weight': tensor, 'bias': tensor or None}}, zeros and ones of the weight's
        dtype. onnx_path: the model as ONNX, traced on `device` (None: the CPU) with an input of `input_shape`, batch dimension
        included. Raises ValueError for a missing input_shape, and when the criterion has not seen a training batch, ImportError
        where ONNX is not installed; nothing is written then.
        """
        if onnx_path is not None:
            check_onnx(input_shape)
        self.finish()
        torch.save({name: tensor.detach().cpu() for name, tensor in self.model.state_dict().items()}, model_path)
        if mask_path is not None:
            torch.save(self.plain_masks(), mask_path)
        if onnx_path is not None:
            self.export_onnx(onnx_path, input_shape, device)

    # Masks.

    def set_masks(self, keep):
        """Set the masks to {name: bool tensor, True for each filter or weight to keep}; None keeps all. Does not apply them."""
        self.keep, self.masks, self.parts = keep, {}, []
        for name, layer in self.layers.items():
            kept = torch.ones_like(layer.weight, dtype=torch.bool) if keep is None else over(keep[name], layer.weight)
            bias = None
            if self.FILTERS and getattr(layer, 'bias', None) is not None:
                bias = kept.flatten(1).any(1) if kept.dim() > 1 else kept.clone()
            self.masks[name] = {'weight': kept, 'bias': bias}
            self.part(layer, 'weight', kept)
            self.part(layer, 'bias', bias)
            if self.FILTERS and keep is not None:
                self.follow(name, keep[name])
        self.dirty, self.versions = True, None  # to be applied

    def part(self, layer, key, mask):
        """Remember to multiply a parameter of a layer by a mask, if there is anything to prune."""
        if mask is not None and layer._parameters.get(key) is not None and not bool(mask.all()):
            self.parts.append((layer._parameters, key, mask.to(layer._parameters[key].dtype)))

    def follow(self, name, kept):
        """What goes with the filters of a convolution: scale and shift of its batch norm."""
        if name in self.norms:
            norm = self.model.get_submodule(self.norms[name])
            self.part(norm, 'weight', kept)
            self.part(norm, 'bias', kept)

    @torch.no_grad()
    def apply(self):
        """Set what is pruned to zero: weights, and their momentum in the optimizer."""
        self.dirty = False
        if not self.parts:
            return
        parameters = [parameters[key] for parameters, key, _ in self.parts]
        factors = [factor for *_, factor in self.parts]
        if factors[0].device != parameters[0].device:
            factors = [factor.to(parameter.device) for factor, parameter in zip(factors, parameters, strict=True)]
            self.parts = [(*part[:2], factor) for part, factor in zip(self.parts, factors, strict=True)]
        tensors = list(parameters)
        if self.optimizer is not None:
            for parameter, factor in zip(parameters, list(factors), strict=True):
                state = self.optimizer.state.get(parameter, {})
                for key in ('momentum_buffer', 'exp_avg'):  # of SGD, of Adam
                    if state.get(key) is not None:
                        tensors.append(state[key])
                        factors.append(factor)
        torch._foreach_mul_(tensors, factors)
        self.versions = [parameter._version for parameter in parameters]

    @torch.no_grad()
    def mask_gradients(self):
        """Set the gradients of what is pruned to zero, so that they do not count when gradients are clipped."""
        pairs = [(parameters[key].grad, factor) for parameters, key, factor in self.parts]
        if pairs := [pair for pair in pairs if pair[0] is not None]:
            torch._foreach_mul_(*map(list, zip(*pairs, strict=True)))

    def load_masks(self, masks):
        """Take over masks, as in `masks` or in a file of export_model, and apply them. Raises ValueError for other layers'."""
        if masks.keys() != self.layers.keys():
            raise ValueError(f'the masks are of {", ".join(masks)}; this pruner has {", ".join(self.layers)}')
        keep = {name: masks[name]['weight'].to(layer.weight.device).bool() for name, layer in self.layers.items()}
        if odd := [name for name, mask in keep.items() if mask.shape != self.layers[name].weight.shape]:
            shapes = [tuple(tensor.shape) for tensor in (keep[odd[0]], self.layers[odd[0]].weight)]
            raise ValueError(f'the mask of {odd[0]} has the shape {shapes[0]}, its weight {shapes[1]}')
        self.set_masks(
            {name: mask.flatten(1).any(1) if self.FILTERS and mask.dim() > 1 else mask for name, mask in keep.items()}
        )
        self.pending = False
        self.apply()

    def plain_masks(self):
        """The masks as zeros and ones of the weight's dtype."""
        return {
            name: {key: None if mask is None else mask.to('cpu', self.layers[name].weight.dtype) for key, mask in both.items()}
            for name, both in self.masks.items()
        }

    def finish(self):
        """Have the masks made, if they were not, and applied."""
        if self.pending and not self.make_masks():
            raise ValueError(f'{type(self).__name__} has seen no training batch yet, so it cannot know what to prune')
        self.apply()

    # Hooks.

    def hook(self):
        """Let the masks hold: after each step of the optimizer, and before each forward pass."""
        self.unhook()
        self.handles.append(self.model.register_forward_pre_hook(self.before_forward))
        if self.optimizer is not None:
            self.bind(self.optimizer)

    def after_step(self, *_):
        self.apply()

    def before_forward(self, *_):
        """Apply the masks if anything has changed a masked parameter; if not, do not touch it: a graph may need it as it is."""
        if self.bound and torch.compiler.is_compiling():
            return  # after_step() does, and this would break the graph
        changed = self.dirty or self.parts and self.versions != [parameters[key]._version for parameters, key, _ in self.parts]
        if changed or not self.bound and self.revived():  # updates by hand may go through .data, which counts no version
            self.apply()

    def revived(self):
        """Whether something that is pruned is not zero."""
        parts = [(parameters[key].detach(), factor) for parameters, key, factor in self.parts]
        return any(bool((tensor * (1 - factor.to(tensor.device))).any()) for tensor, factor in parts)

    def __deepcopy__(self, memo):
        """A copy of the model, as for a running average, takes a copy of the pruner along in its hooks, but no optimizer."""
        twin = memo[id(self)] = copy.copy(self)
        left = {'optimizer': None, 'step_handle': None, 'bound': False, 'handles': [], 'watchers': []}
        twin.__dict__ = {key: left[key] if key in left else copy.deepcopy(value, memo) for key, value in vars(self).items()}
        return twin

    # ONNX.

    def export_onnx(self, path, input_shape, device):
        hooked, bound = bool(self.handles), self.bound
        self.unhook()  # the copy is to have no hooks
        device = torch.device('cpu' if device is None else device)
        model = copy.deepcopy(self.model).to(device).eval()
        if hooked:
            self.hook()
        elif bound:
            self.bind(self.optimizer)
        example = torch.zeros(tuple(input_shape), device=device)
        torch.onnx.export(model, (example,), str(path), dynamo=True, verbose=False)


def check_onnx(input_shape):
    """Raises ImportError or ValueError when a model cannot be exported as ONNX."""
    missing = [name for name in ('onnx', 'onnxscript') if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f'ONNX export needs {" and ".join(missing)}: pip install {" ".join(missing)}')
    if input_shape is None:
        raise ValueError('ONNX export needs input_shape, the shape of an input with its batch dimension, as (1, 3, 32, 32)')


class GlobalPruner(Compressor):
    """The base of criteria that can also rank all layers together; the entries then need one sparsity.

    global_sort: whether they do; the default is GLOBAL, of the class.
    """

    GLOBAL = False

    def __init__(self, model, config_list, optimizer=None, *, global_sort=None):
        super().__init__(model, config_list, optimizer)
        self.global_sort = self.GLOBAL if global_sort is None else global_sort
        if self.global_sort:
            self.one_sparsity()

    def choose(self, scores):
        return keep_globally(scores, self.one_sparsity(), self.keep) if self.global_sort else super().choose(scores)


class FilterPruner(Compressor):
    """The base of pruners of whole filters of Conv2d layers."""

    TYPES = ('Conv2d',)


class StatisticsPruner(FilterPruner):
    """The base of criteria that have to see statistics_batch_num training batches; the masks are made right after the last.

    Sums are kept, not what was summed. A training batch is a forward pass of the model in training mode with gradients enabled.
    Where torch.distributed runs, the sums of all processes count.
    """

    def __init__(self, model, config_list, optimizer=None, statistics_batch_num=1):
        super().__init__(model, config_list, optimizer)
        if not is_positive(statistics_batch_num):
            raise ValueError(f'statistics_batch_num must be a whole number, 1 or more, got {statistics_batch_num!r}')
        self.statistics_batch_num, self.sums, self.counts, self.watchers = statistics_batch_num, {}, {}, []

    def compress(self):
        super().compress()
        self.watch()
        return self.model

    def refresh(self):
        self.watch()

    def watch(self):
        """Begin to watch training, and make the masks when enough batches were seen."""
        self.unwatch()
        self.batches, self.pending, self.old = 0, True, set(self.sums)  # old sums stand until there are new ones
        self.watchers = self.listen()

    def unwatch(self):
        for handle in self.watchers:
            handle.remove()
        self.watchers = []

    def unhook(self):
        super().unhook()
        self.unwatch()

    def listen(self):
        """Register what calls add() for each layer and batch_done() -> handles to remove it."""
        raise NotImplementedError

    def add(self, name, values, count=1):
        """Add [filters] values, sums over `count` places, to a layer's sums; what was seen before watch() no longer counts."""
        if name in self.old:
            self.old.remove(name)
            del self.sums[name], self.counts[name]
        self.sums[name] = self.sums.get(name, 0) + values.double()
        self.counts[name] = self.counts.get(name, 0) + count

    def batch_done(self):
        self.batches += 1
        if self.batches == self.statistics_batch_num:
            self.unwatch()
            self.gather()
            self.make_masks()

    def gather(self):
        """Add up what the processes of a distributed training have seen, so that their masks are the same."""
        for name in self.sums:
            distributed.total(self.sums[name])
            self.counts[name] *= distributed.world()  # all see batches of one size

    def importance(self):
        if not self.sums:
            return None
        if unseen := [name for name in self.layers if name not in self.sums]:
            raise ValueError(f'no training batch has reached {", ".join(unseen)}: exclude it from config_list')
        return {name: (self.sums[name] / self.counts[name]).float() for name in self.layers}


class ActivationPruner(StatisticsPruner):
    """The base of criteria on the activations of a convolution: `activation` of its own output, before any batch norm."""

    def __init__(self, model, config_list, optimizer=None, activation='relu', statistics_batch_num=1):
        super().__init__(model, config_list, optimizer, statistics_batch_num)
        if activation not in ACTIVATIONS:
            raise ValueError(f'activation must be {" or ".join(ACTIVATIONS)}, got {activation!r}')
        self.activation = ACTIVATIONS[activation]

    @staticmethod
    def of_activation(activation):
        """Activations -> what is averaged for each filter, of the same shape."""
        raise NotImplementedError

    def listen(self):
        watched = [layer.register_forward_hook(partial(self.see, name)) for name, layer in self.layers.items()]
        return [*watched, self.model.register_forward_hook(self.after_forward)]

    def training(self):
        return self.model.training and torch.is_grad_enabled()

    def see(self, name, layer, inputs, output):
        if self.training():
            values = self.of_activation(self.activation(output.detach().float()))
            others = [dim for dim in range(values.dim()) if dim != values.dim() - 3]  # batch and places
            self.add(name, values.sum(others), values.numel() // values.shape[-3])

    def after_forward(self, *_):
        if self.training():
            self.batch_done()
