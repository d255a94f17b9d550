"""Which batch norm follows which convolution."""

from torch import fx, nn


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
