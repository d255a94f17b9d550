"""Which batch norm follows which convolution."""

import itertools

from torch import fx, nn

LAYERS = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)


class LayerTracer(fx.Tracer):
    """Takes every convolution and batch norm as one operation, subclasses too."""

    def is_leaf_module(self, module, name):
        return isinstance(module, LAYERS) or super().is_leaf_module(module, name)


def batch_norms(model: nn.Module) -> dict[str, str]:
    """{name of a convolution: name of the batch norm that takes its output, and nothing else, and is all that takes it}.

    Found in the graph of torch.fx. Where the model cannot be traced: the batch norm that comes next among the modules without
    children, if its size fits.
    """
    try:
        nodes = list(LayerTracer().trace(model).nodes)
    except Exception:  # whatever its forward raises when it meets no tensors
        return next_modules(model)
    modules = dict(model.named_modules())
    calls = [node.target for node in nodes if node.op == 'call_module']
    called_once = {target for target in calls if calls.count(target) == 1}
    norms = {}
    for node in nodes:
        if node.op != 'call_module' or node.target not in called_once or len(node.users) != 1:
            continue
        user = next(iter(node.users))
        if user.op == 'call_module' and user.target in called_once and feeds(modules[node.target], modules[user.target]):
            norms[node.target] = user.target
    return norms


def next_modules(model: nn.Module) -> dict[str, str]:
    """The same by the order of the modules alone."""
    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    norms = {}
    for (name, module), (next_name, next_module) in itertools.pairwise(leaves):
        if feeds(module, next_module):
            norms[name] = next_name
    return norms


def feeds(conv: nn.Module, norm: nn.Module) -> bool:
    """Whether the one is a convolution and the other a batch norm of its size, with scale and shift."""
    return (
        isinstance(conv, nn.modules.conv._ConvNd)
        and isinstance(norm, nn.modules.batchnorm._BatchNorm)
        and norm.num_features == conv.out_channels
        and norm.affine
    )
