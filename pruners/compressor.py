"""What NNI's pruners share: masks chosen by index, and masks that hold. The pruners are in methods/.

    config_list = [{'sparsity': 0.5, 'op_types': ['Conv2d']}, {'exclude': True, 'op_names': ['conv1']}]
    pruner = L1FilterPruner(model, config_list, optimizer)
    pruner.compress()                          # prunes in place; train on as before
    pruner.export_model('model.pt', 'mask.pt')

NNI (github.com/microsoft/nni, the pruners of version 1.7, 2020) masked each layer in a wrapper, in the forward pass. Here
layers stay plain: masks multiply the weights in place, after every step of any optimizer, before a pruned layer runs, and
before a state_dict is taken (see holding.py). So module types and state_dict keys never change, and a pruned weight is zero
wherever one looks, in copies of the model too. In a compiled model only the steps of optimizers and state_dict() are followed:
call step() after changes by hand there. Further differences from NNI's code:
- the number pruned of n weights or filters is floor(n sparsity), but never all n; they are chosen by index, the lowest first
  among equals, where a threshold pruned all equals of the last one;
- with a filter its bias goes, and the scale and shift of the batch norm that follows, so that the filter's output is zero;
- the momentum of a pruned weight is cleared, or it would come back;
- what is pruned stays pruned: masks that are made again, or loaded, can only grow;
- an entry of the config list that is misspelt, contradicts itself or matches nothing is a ValueError, not a warning, and so is
  a layer that computes its weight from others; `exclude` works in every pruner; the sparsity may be 0;
- filters are those of all convolutions, transposed ones and subclasses too. Those that end in one residual stream can only be
  removed together: see decide_together().

A pruner is its criterion: score(weight) gives a layer's scores, the lowest of which are pruned. A score is for a filter, [out],
or for a weight, of the weight's shape.
"""

import copy
from functools import partial

import torch
from torch import nn

from deploy.formats import missing_onnx_packages

from . import processes
from .batch_norms import batch_norms
from .config_list import is_positive, select_layers, warn_of_others
from .holding import Hold, apply_masks
from .selection import (
    Keep,
    Scores,
    even_scores,
    expand_mask,
    filters_first,
    join_groups,
    keep_by_layer,
    keep_globally,
)

ACTIVATIONS = {'relu': nn.functional.relu, 'relu6': nn.functional.relu6}


class Compressor:
    """The base of the pruners: a one-shot pruner that ranks within each layer.

    model: an nn.Module, pruned in place. config_list: see select_layers. optimizer: whose momentum of what is pruned is cleared
    at once; without it, or with another one, that happens with its next step, which the masks follow in any case.
    layers, entries: {name: layer} to prune, and {name: the entry that decided}. sparsity: {name: share}.
    masks: {name: {'weight': bool tensor, 'bias': bool tensor or None}}, True where kept; all True before compress().
    """

    TYPES = None  # op_types that the pruner takes, None for any with a weight
    REQUIRED = ('sparsity',)  # keys that an entry must have
    OPTIONAL = ()  # keys that it may have
    FILTERS = True  # a score is for a filter, whose bias and batch norm go with it; False: for a weight

    def __init__(self, model: nn.Module, config_list: list[dict], optimizer: torch.optim.Optimizer | None = None):
        self.model = model
        self.optimizer = unwrapped(optimizer)
        self.layers, self.entries = select_layers(model, config_list, self.REQUIRED, self.OPTIONAL, self.TYPES)
        if self.TYPES is None:
            warn_of_others(type(self).__name__, model, config_list)
        self.sparsity = {name: entry.get('sparsity', 0.0) for name, entry in self.entries.items()}
        self.norms = batch_norms(model) if self.FILTERS else {}
        self.groups = []  # see decide_together()
        self.parts = {}
        self.holds = None  # {module: Hold} while the masks hold
        self.set_masks(None)

    # What a criterion defines.

    @staticmethod
    def score(weight: torch.Tensor) -> torch.Tensor:
        """The scores of a layer: for filters [out] (dimension 0 of `weight`), else of its shape. The lowest are pruned."""
        raise NotImplementedError

    def scores(self, weights: dict[str, torch.Tensor]) -> Scores:
        """{name: tensor of the shape of the layer's weight} -> {name: scores}"""
        if not self.FILTERS:
            return {name: self.score(weight) for name, weight in weights.items()}
        return {name: self.score(filters_first(self.layers[name], weight)) for name, weight in weights.items()}

    def importance(self) -> Scores | None:
        """{name: scores} of the layers as they are now, or None while what they are made from has not been seen."""
        return self.scores({name: layer.weight.detach() for name, layer in self.layers.items()})

    def choose(self, scores: Scores) -> Keep:
        """{name: scores} -> {name: bool tensor} of what to keep; what is pruned already stays pruned."""
        return keep_by_layer(scores, self.sparsity, self.keep)

    def one_sparsity(self) -> float:
        """The sparsity of all entries, for a ranking of all layers together. Raises ValueError where they differ."""
        values = sorted(set(self.sparsity.values()))
        if len(values) > 1:
            raise ValueError(f'all layers are ranked together, so the entries need one sparsity, not {values}')
        return values[0]

    # What a user calls.

    def compress(self) -> nn.Module:
        """Make the masks and let them hold; returns the model.

        Where the criterion has to see training batches, the masks are made once it has.
        """
        self.hook()
        self.update_mask()
        return self.model

    def update_mask(self) -> None:
        """Make the masks again, from the weights or from what was seen of training, and let them hold; pruned stays pruned."""
        if self.make_masks():
            self.apply()
            self.hook()

    def refresh(self) -> None:
        """Make the masks for a sparsity that has changed: at once, or when enough training batches were seen."""
        self.update_mask()

    @torch.no_grad()
    def make_masks(self) -> bool:
        """Set the masks, without touching a weight -> whether there is something to make them from."""
        scores = self.importance()
        if scores is None:
            return False
        keep = self.choose(self.joined(scores))
        self.set_masks(join_groups(keep, self.groups))
        return True

    def joined(self, scores: Scores) -> Scores:
        """The scores by which layers that decide together choose, evenly in their parts."""
        return even_scores(join_groups(scores, self.groups), self.parts)

    def decide_together(self, groups: list[list[str]], parts: dict[str, int] | None = None) -> None:
        """Give the layers of each group, [[layer names], ...], one mask, by their mean scores; call it before compress().

        Filters that end in one residual stream can only be removed together: masks that disagree leave it at its full width.
        groups: dependency_groups(model, example_input, depthwise=True), of deploy. Layers that are not pruned are left out of a
        group. Where batch norms are pruned, a group names the convolutions that they follow.
        parts: even_parts(model, example_input), of deploy: layers whose filters are chosen evenly in so many equal parts, as
        the groups of a grouped convolution can only lose as many each.
        """
        conv_before = {norm: conv for conv, norm in self.norms.items()}
        names = {conv_before.get(name, name): name for name in self.layers}
        groups = [[names[name] for name in group if name in names] for group in groups]
        self.groups = [group for group in groups if len(group) > 1]
        self.parts = {names[name]: number for name, number in (parts or {}).items() if name in names}

    def update_epoch(self, epoch: int) -> None:
        """Say that epoch `epoch` (from 0) begins: of use to pruners with a schedule."""

    def step(self) -> None:
        """Apply the masks now."""
        self.apply()

    def bind(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the masks hold, and clear the momentum of what is pruned in this optimizer, now and whenever masks are made."""
        self.optimizer = unwrapped(optimizer)
        self.apply()
        self.hook()

    def hook(self) -> None:
        """Let the masks hold: after each step of any optimizer, before a pruned layer runs, and in each state_dict."""
        if self.holds is None:
            self.holds = {}
        self.update_holds()

    def unhook(self) -> None:
        """Leave the model and the optimizer as if there were no pruner; weights stay as they are."""
        for hold in (self.holds or {}).values():
            hold.unhook()
        self.holds = None

    def load_model_state_dict(self, state: dict) -> None:
        """Load a plain state dict into the model; the masks hold on it."""
        self.model.load_state_dict(state)
        self.apply()

    def export_model(self, model_path, mask_path=None, onnx_path=None, input_shape=None, device=None) -> None:
        """Save the pruned model: plain names, exact zeros.

        model_path: its state_dict. mask_path: {layer: {'weight': tensor, 'bias': tensor or None}}, zeros and ones of the
        weight's dtype. onnx_path: the model as ONNX, traced on `device` (None: the CPU) with an input of `input_shape`, batch
        dimension included. Raises ValueError for a missing input_shape, and when the criterion has not seen a training batch,
        ImportError where ONNX is not installed; nothing is written then.
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

    def set_masks(self, keep: Keep | None) -> None:
        """Set the masks to {name: bool tensor, True for each filter or weight to keep}; None keeps all.

        They are applied by apply(); those that hold, at the next occasion.
        """
        self.keep = keep
        self.pending = keep is None  # whether masks are to be made
        self.masks = {}
        self.masked = {}  # {module: {name of a parameter: its mask}} of all that has something pruned
        for name, layer in self.layers.items():
            weight = torch.ones_like(layer.weight, dtype=torch.bool) if keep is None else expand_mask(keep[name], layer)
            bias = None
            if self.FILTERS and getattr(layer, 'bias', None) is not None:
                bias = torch.ones_like(layer.bias, dtype=torch.bool) if keep is None else keep[name].clone()
            self.masks[name] = {'weight': weight, 'bias': bias}
            if keep is not None:
                self.mask_parameter(layer, 'weight', weight)
                self.mask_parameter(layer, 'bias', bias)
                if self.FILTERS:
                    self.mask_neighbour(name, keep[name])
        if self.holds is not None:
            self.update_holds()

    def mask_parameter(self, module: nn.Module, name: str, mask: torch.Tensor | None) -> None:
        """Remember to multiply a parameter of a module by a mask, if there is anything to prune."""
        parameter = module._parameters.get(name)
        if mask is not None and parameter is not None and not bool(mask.all()):
            self.masked.setdefault(module, {})[name] = mask.to(parameter.dtype)

    def update_holds(self) -> None:
        """Let the present masks hold, in place of those before."""
        for module, hold in list(self.holds.items()):
            if module not in self.masked:
                hold.unhook()
                del self.holds[module]
        for module, masks in self.masked.items():
            if module not in self.holds:
                self.holds[module] = Hold(module)
            self.holds[module].set_masks(masks)

    def mask_neighbour(self, name: str, kept: torch.Tensor) -> None:
        """What goes with the filters of a convolution, kept [out]: scale and shift of its batch norm."""
        if name in self.norms:
            norm = self.model.get_submodule(self.norms[name])
            self.mask_parameter(norm, 'weight', kept)
            self.mask_parameter(norm, 'bias', kept)

    def apply(self) -> None:
        """Set what is pruned to zero: weights, and their momentum in the optimizer."""
        apply_masks(self.masked, self.optimizer)

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Set the gradients of what is pruned to zero, so that they do not count when gradients are clipped."""
        gradients = []
        masks = []
        for module, of_module in self.masked.items():
            for name, mask in of_module.items():
                gradient = module._parameters[name].grad
                if gradient is not None:
                    gradients.append(gradient)
                    masks.append(mask.to(gradient.device))
        if gradients:
            torch._foreach_mul_(gradients, masks)

    def load_masks(self, masks: dict[str, dict]) -> None:
        """Take over masks, as in `masks` or in a file of export_model, and let them hold; later ones can only grow.

        Raises ValueError for the masks of other layers, of other shapes, or, in a pruner of filters, of parts of filters.
        """
        if masks.keys() != self.layers.keys():
            raise ValueError(f'the masks are of {", ".join(masks)}; this pruner has {", ".join(self.layers)}')
        keep = {}
        for name, layer in self.layers.items():
            mask = masks[name]['weight'].to(layer.weight.device).bool()
            if mask.shape != layer.weight.shape:
                shapes = f'the shape {tuple(mask.shape)}, its weight {tuple(layer.weight.shape)}'
                raise ValueError(f'the mask of {name} has {shapes}')
            keep[name] = self.whole_filters(name, mask) if self.FILTERS else mask
        self.set_masks(keep)
        self.apply()
        self.hook()

    def whole_filters(self, name: str, mask: torch.Tensor) -> torch.Tensor:
        """A mask of the weight's shape -> [out]. Raises ValueError where a filter is pruned in part."""
        weights = filters_first(self.layers[name], mask)
        weights = weights.reshape(len(weights), -1)
        if not torch.equal(weights.any(1), weights.all(1)):
            raise ValueError(f'the mask of {name} prunes parts of filters; {type(self).__name__} prunes whole ones')
        return weights.any(1)

    def plain_masks(self) -> dict[str, dict]:
        """The masks as zeros and ones of the weight's dtype, on the CPU."""
        plain = {}
        for name, masks in self.masks.items():
            dtype = self.layers[name].weight.dtype
            plain[name] = {key: None if mask is None else mask.to('cpu', dtype) for key, mask in masks.items()}
        return plain

    def finish(self) -> None:
        """Have the masks made, if they were not, and applied."""
        if self.pending and not self.make_masks():
            raise ValueError(f'{type(self).__name__} has seen no training batch yet, so it cannot know what to prune')
        self.apply()

    def __deepcopy__(self, memo):
        """A pruner that watches training is copied with its model, as for a running average: it then has no optimizer."""
        twin = copy.copy(self)
        memo[id(self)] = twin
        for key, value in vars(self).items():
            setattr(twin, key, None if key == 'optimizer' else copy.deepcopy(value, memo))
        return twin

    # ONNX.

    def export_onnx(self, path, input_shape, device):
        device = torch.device('cpu' if device is None else device)
        model = copy.deepcopy(self.model).to(device).eval()
        example = torch.zeros(tuple(input_shape), device=device)
        torch.onnx.export(model, (example,), str(path), dynamo=True, verbose=False)


def unwrapped(optimizer):
    """The torch optimizer inside a wrapper such as those of accelerate and Lightning, or inside several."""
    while isinstance(getattr(optimizer, 'optimizer', None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def check_onnx(input_shape):
    """Raises ImportError or ValueError when a model cannot be exported as ONNX."""
    if missing := missing_onnx_packages():
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
        if not self.global_sort:
            return super().choose(scores)
        return keep_globally(scores, self.one_sparsity(), self.keep)


class FilterPruner(Compressor):
    """The base of pruners of whole filters of convolutions, transposed ones too."""

    TYPES = ('Conv1d', 'Conv2d', 'Conv3d', 'ConvTranspose1d', 'ConvTranspose2d', 'ConvTranspose3d')


class StatisticsPruner(FilterPruner):
    """The base of criteria that have to see statistics_batch_num training batches; the masks are made right after the last.

    Sums are kept, not the terms. A training batch is a forward pass of the model in training mode with gradients enabled.
    Where torch.distributed runs, the sums of all processes count.
    """

    def __init__(self, model, config_list, optimizer=None, statistics_batch_num=1):
        super().__init__(model, config_list, optimizer)
        if not is_positive(statistics_batch_num):
            raise ValueError(f'statistics_batch_num must be a whole number, 1 or more, got {statistics_batch_num!r}')
        self.statistics_batch_num = statistics_batch_num
        self.sums = {}  # {layer: [filters], float64}
        self.counts = {}  # {layer: over how many places each sum goes}
        self.watchers = []  # handles of the hooks of watch()

    def compress(self):
        super().compress()
        self.watch()
        return self.model

    def refresh(self):
        self.watch()

    def watch(self):
        """Begin to watch training, and make the masks when enough batches were seen."""
        self.unwatch()
        self.batches = 0
        self.pending = True
        self.old = set(self.sums)  # sums from before, which stand until there are new ones
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
            del self.sums[name]
            del self.counts[name]
        self.sums[name] = self.sums.get(name, 0) + values.double()
        self.counts[name] = self.counts.get(name, 0) + count

    def batch_done(self):
        self.batches += 1
        if self.batches == self.statistics_batch_num:
            self.unwatch()
            self.add_processes()
            self.make_masks()

    def add_processes(self):
        """Add up what the processes of a distributed training have seen, so that their masks are the same."""
        for name in self.sums:
            processes.total(self.sums[name])
            self.counts[name] *= processes.world()  # all see batches of one size

    def watched(self) -> dict:
        """What was seen so far, for a file: tensors and plain types."""
        return {'sums': self.sums, 'counts': self.counts, 'old': sorted(self.old)}

    def load_watched(self, state: dict) -> None:
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
        watched = [layer.register_forward_hook(partial(self.add_output, name)) for name, layer in self.layers.items()]
        return [*watched, self.model.register_forward_hook(self.after_forward)]

    def is_training(self):
        return self.model.training and torch.is_grad_enabled()

    def add_output(self, name, layer, inputs, output):
        if self.is_training():
            values = self.of_activation(self.activation(output.detach().float()))
            channels = values.dim() - (layer.weight.dim() - 1)  # of [batch, channels, places ...], or without the batch
            others = [dim for dim in range(values.dim()) if dim != channels]
            self.add(name, values.sum(others), values.numel() // values.shape[channels])

    def after_forward(self, *_):
        if self.is_training():
            self.batch_done()
