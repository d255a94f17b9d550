"""Weight initialisation of He et al., "Delving Deep into Rectifiers", ICCV 2015."""

from torch import nn


def kaiming_normal(net):
    """Draw all conv and linear weights of `net` from He's normal (fan in); biases keep PyTorch's default."""
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
    return net
