"""What a network costs once its dead channels are removed, as a function of the filters that are kept."""

import copy

import torch
from torch import nn

from deploy.channels import channel_graph, live_masks
from deploy.shrinking import Channels
from sparse_utils import count_macs, prunable_layers

from .search import trial

COSTS = ('params', 'macs')


class Cost:
    """What a network costs once the dead channels are removed: a function of the filters that are kept.

    kind: 'params', weights of convolutions and linear layers, or 'macs' of one example. names: count these layers only, None for
    all. Raises ValueError for a model that cannot be traced.
    """

    def __init__(self, model, example_input, kind='params', names=None):
        self.graph = channel_graph(model, example_input)
        channels = Channels(copy.deepcopy(model), example_input)
        self.readers, self.followers, self.number = channels.readers, channels.followers, len(channels.parent)
        self.convs = {node.module: node.detail[:2] for node in self.graph.nodes if node.kind == 'conv'}
        self.grouped = any(node.detail[2] > 1 for node in self.graph.nodes if node.kind == 'conv')
        macs = {name: dense for name, (dense, _) in count_macs(model, example_input).items()}
        self.layers = {}  # {name: what the whole layer costs}
        for name, layer in prunable_layers(model).items() if names is None else [(n, model.get_submodule(n)) for n in names]:
            self.layers[name] = layer.weight.numel() if kind == 'params' else macs.get(name, 0)

    def __call__(self, keep):
        """keep: {convolution: bool tensor [out]} -> the cost, a whole number."""
        alive = self.alive(keep)
        return sum(round(whole * self.share(name, alive)) for name, whole in self.layers.items())

    def alive(self, keep):
        """Bool [classes of channels]: False where every convolution that writes such a channel has a dead filter there."""
        live = {name: torch.ones(out, dtype=torch.bool) for name, (out, _) in self.convs.items()}
        live |= {name: kept.cpu() for name, kept in keep.items()}
        if self.grouped:  # else, as each layer keeps a filter, nothing else dies
            masks = {name: live[name].view(-1, 1).repeat(1, inputs) for name, (_, inputs) in self.convs.items()}
            live = {name: mask.any(1) for name, mask in live_masks(self.graph, masks).items()}
        alive = torch.ones(self.number, dtype=torch.bool)
        classes = {name: reader.filters for name, reader in self.readers.items()} | self.followers
        written = {name: classes[name] for name in live if name in classes}
        for numbers in written.values():
            alive[numbers] = False
        for name, numbers in written.items():
            alive[numbers[live[name]]] = True
        return alive

    def share(self, name, alive):
        """What part of a layer's weights stays."""
        if name in self.followers:
            return alive[self.followers[name]].float().mean().item()
        if name not in self.readers:
            return 1.0
        reader = self.readers[name]
        rows, columns = (alive[numbers] for numbers in (reader.filters, reader.inputs))
        return int(rows.sum()) * int(columns.sum()) / (len(rows) * len(columns))


def convolutions(base, keep):
    """{layer: bool [out]} -> {convolution: bool [out]}: with slim, of the convolutions that the batch norms follow."""
    if 'BatchNorm2d' not in (base.TYPES or ()):
        return keep
    return {conv: keep[norm] for conv, norm in base.norms.items() if norm in keep}


def usual_example(model):
    """An input of zeros of a usual size that the model takes, or None."""
    convs = [module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)]
    lines = [module.in_features for module in model.modules() if isinstance(module, nn.Linear)]
    shapes = [(1, channels, size, size) for channels in dict.fromkeys(convs) for size in (32, 28, 224, 64)]
    like = next(model.parameters())
    with trial(model), torch.no_grad():
        model.eval()
        for shape in shapes or [(1, features) for features in dict.fromkeys(lines)]:
            try:
                model(example := torch.zeros(shape, device=like.device, dtype=like.dtype))
                return example
            except Exception:  # whatever a model raises for an input of the wrong shape
                continue
    return None
