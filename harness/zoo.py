"""How much shrink() removes from other people's networks, beside Torch-Pruning: the same dead channels for both.

    python bench.py zoo                    # all of NETWORKS; results/bench/zoo.md
    python -m harness.zoo resnet50 timm/resnet50

A network of random weights and batch norms that look trained; Torch-Pruning chooses 30 % of the channels of each group of
layers (MagnitudeImportance). Those channels are set to zero in a copy, with bias and batch norm, and the copy is shrunk;
Torch-Pruning cuts its own. Parameters that each removes, seconds, and the largest difference of our outputs from the masked
network's. Where Torch-Pruning fails, 30 % are chosen by their L1 norm in our dependency groups.
"""

import copy
import time
import warnings

import torch
from torch import nn

from deploy.live import norms_behind
from deploy.outputs import compare
from deploy.shrinking import dependency_groups, shrink
from deploy.ties import read_channels

RATIO, SIZE = 0.3, 64
TORCHVISION = (
    'resnet18 resnet50 resnext50_32x4d wide_resnet50_2 vgg16_bn vgg11 alexnet squeezenet1_1 densenet121 densenet169 googlenet'
    ' inception_v3 mobilenet_v2 mobilenet_v3_small mobilenet_v3_large mnasnet0_5 mnasnet1_0'
    ' shufflenet_v2_x0_5 shufflenet_v2_x1_0'
    ' efficientnet_b0 efficientnet_b1 efficientnet_v2_s regnet_y_400mf regnet_x_400mf convnext_tiny vit_b_32 swin_t swin_v2_t'
    ' maxvit_t resnet34'
).split()
TIMM = (
    'resnet50 resnet50d resnet26t resnetv2_50 resnext50_32x4d res2net50_26w_4s skresnet18 seresnet50 ecaresnet26t densenet121'
    ' cspresnet50 cspdarknet53 darknet53 vovnet39a dla34 hrnet_w18_small repvgg_a0 mobilenetv2_100 mobilenetv3_small_100'
    ' efficientnet_b0 efficientnet_lite0 mixnet_s ghostnet_100 regnety_004 nfnet_l0 convnext_atto'
    ' edgenext_xx_small vit_tiny_patch16_224'
    ' mobileone_s0 rexnet_100'
).split()
NETWORKS = [*TORCHVISION, *(f'timm/{name}' for name in TIMM)]
SIZES = {'inception_v3': 96, 'maxvit_t': 224, 'alexnet': 96, 'timm/vit_tiny_patch16_224': 224}


def build(name):
    """(network in eval mode, example) by its name; `timm/NAME` is timm's."""
    size = SIZES.get(name, SIZE)
    torch.manual_seed(0)
    if name.startswith('timm/'):
        import timm

        net = timm.create_model(name.removeprefix('timm/'))
    else:
        from torchvision import models

        options = {'init_weights': False} if name in ('googlenet', 'inception_v3') else {}
        net = models.get_model(name, **options, **({'image_size': size} if name.startswith('vit') else {}))
    generator = torch.Generator().manual_seed(1)
    for norm in [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]:
        norm.running_mean.copy_(torch.randn(norm.num_features, generator=generator) / 10)
        norm.running_var.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
        if norm.affine:
            norm.weight.data.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
            norm.bias.data.copy_(torch.randn(norm.num_features, generator=generator) / 10)
    return net.eval(), torch.randn(2, 3, size, size, generator=generator)


def parameters(net):
    return sum(parameter.numel() for parameter in net.parameters())


def torch_pruning_cuts(net, example, masked):
    """Let Torch-Pruning cut `net` in place, and set the channels that it chooses to zero in `masked`."""
    import torch_pruning

    names = {module: name for name, module in net.named_modules()}
    last = [module for module in net.modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1]
    heads = [module for module in net.modules() if isinstance(module, nn.Linear) and module.out_features == 1000]
    pruner = torch_pruning.pruner.MetaPruner(
        net, example[:1], torch_pruning.importance.MagnitudeImportance(p=1), pruning_ratio=RATIO, ignored_layers=[last, *heads]
    )
    functions = torch_pruning.function
    rows = (functions.prune_conv_out_channels, functions.prune_linear_out_channels, functions.prune_depthwise_conv_out_channels)
    for group in pruner.step(interactive=True):
        for dependency, places in group:
            target, how = dependency.target.module, dependency.handler
            if target not in names or how not in (*rows, functions.prune_batchnorm_out_channels):
                continue
            layer = masked.get_submodule(names[target])
            for tensor in (layer.weight, layer.bias):
                if tensor is not None:
                    with torch.no_grad():
                        tensor[[place for place in places if place < len(tensor)]] = 0
        group.prune()


def own_choice(net, example):
    """Where Torch-Pruning fails: the 30 % of filters with the smallest L1 norm of each group of layers, set to zero."""
    groups = dependency_groups(net, example, depthwise=True)
    layers = {name: module for name, module in net.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    grouped = {name for group in groups for name in group}
    norms = norms_behind(read_channels(net, example))
    for group in [*groups, *([name] for name in list(layers)[:-1] if name not in grouped)]:
        own = [layers[name] for name in group if name in layers]
        if not own or own[0].weight.shape[0] == 1000:
            continue
        score = sum(layer.weight.detach().abs().flatten(1).mean(1) for layer in own)
        dead = score.argsort()[: int(RATIO * len(score))]
        for name in group:
            for module in [layers.get(name), net.get_submodule(norms[name]) if name in norms else None]:
                for tensor in [] if module is None else [module.weight, module.bias]:
                    if tensor is not None:
                        tensor.data[dead] = 0


def compare_network(name):
    """{what the page of results shows of one network}; 'theirs' is None, and 'reason' says why, where Torch-Pruning fails."""
    net, example = build(name)
    masked, theirs, whole = copy.deepcopy(net), copy.deepcopy(net), parameters(net)
    row = {'network': name, 'parameters': whole, 'theirs': None, 'reason': ''}
    start = time.perf_counter()
    try:
        torch_pruning_cuts(theirs, example, masked)
        with torch.no_grad():
            theirs(example)
        row |= {'theirs': whole - parameters(theirs), 'their seconds': time.perf_counter() - start}
    except Exception as error:
        row['reason'] = f'{type(error).__name__}: {" ".join(str(error).split())[:80]}'
        masked = copy.deepcopy(net)
        own_choice(masked, example)
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        try:
            small = shrink(masked, example)
            row |= {'ours': whole - parameters(small), 'seconds': time.perf_counter() - start}
            row['difference'] = compare(masked, small, example)
        except ValueError as error:
            row |= {'ours': 0, 'seconds': time.perf_counter() - start, 'refused': str(error)[:300]}
    row['said'] = [str(warning.message) for warning in said if 'names sizes' in str(warning.message)]
    return row


def zoo(names=None, say=print):
    """compare_network of each network, a line each while it goes -> the rows."""
    rows = []
    for name in names or NETWORKS:
        row = compare_network(name)
        theirs = row['theirs']
        share = f'{theirs:,} ({row["ours"] / theirs:.4f})' if theirs else f'fails ({row["reason"]})'
        gap = f'outputs differ by {row["difference"]:.1e}' if 'difference' in row else row['refused']
        lines = f'; {len(row["said"])} lines name sizes' if row['said'] else ''
        say(
            f'{name}: {row["ours"]:,} of {row["parameters"]:,} removed, {row["seconds"]:.1f} s, {gap}{lines}; '
            f'Torch-Pruning {share}'
        )
        rows.append(row)
    return rows


if __name__ == '__main__':
    import sys

    torch.set_num_threads(1)
    zoo(sys.argv[1:])
