"""ImageNet ResNets from torchvision: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016.

Deviation from the paper: torchvision's resnet50 puts the stride of a bottleneck on its 3x3 conv. Untrained.
"""

from torch import nn


def torchvision_resnet(name, num_classes, in_channels=3):
    # Imported here because nothing else needs torchvision. One that does not match the installed torch fails
    # with a RuntimeError instead of an ImportError.
    try:
        from torchvision import models
    except (ImportError, RuntimeError) as error:
        raise RuntimeError(f'{name} needs torchvision, which cannot be imported here: {error}') from error
    net = {'resnet18': models.resnet18, 'resnet50': models.resnet50}[name](num_classes=num_classes)
    if in_channels != 3:
        old = net.conv1
        net.conv1 = nn.Conv2d(
            in_channels, old.out_channels, old.kernel_size, old.stride, old.padding, bias=old.bias is not None
        )
        nn.init.kaiming_normal_(net.conv1.weight, mode='fan_out', nonlinearity='relu')  # as torchvision does
    return net
