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
import importlib.util
from functools import partial

import torch
from torch import nn

from . import processes
from .batch_norms import batch_norms
from .config_list import is_positive, select_layers
from .selection import agree, keep_by_layer, keep_globally, over

ACTIVATIONS = {'relu': nn.functional.relu, 'relu6': nn.functional.relu6}


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
        self.pending = keep is None
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
            processes.total(self.sums[name])
            self.counts[name] *= processes.world()  # all see batches of one size

    def watched(self):
        """What was seen so far, for a file: tensors and plain types."""
        return {'sums': self.sums, 'counts': self.counts, 'old': sorted(self.old)}

    def load_watched(self, state):
        """Take back what watched() gave."""
        self.sums = dict(state['sums'])
        self.counts = dict(state['counts'])
        self.old = set(state['old'])

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
