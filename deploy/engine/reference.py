"""What the kernels compute, in float64 and as plain loops: slow, and compared with in tests."""

import math

import torch
import torch.nn.functional as F

from . import build


def convolution(image, weight, bias, stride, padding, dilation, groups):
    """One output at a time, over the non-zero weights of its filter. image: [N, C, H, W] -> [N, filters, H', W'] in float64."""
    image = F.pad(image.double(), (padding[1], padding[1], padding[0], padding[0]))
    weight = weight.double()
    filters, _, kernel_h, kernel_w = weight.shape
    height = (image.shape[2] - dilation[0] * (kernel_h - 1) - 1) // stride[0] + 1
    width = (image.shape[3] - dilation[1] * (kernel_w - 1) - 1) // stride[1] + 1
    out = torch.zeros(len(image), filters, height, width, dtype=torch.float64)
    for f in range(filters):
        if bias is not None:
            out[:, f] += bias[f].double()
        first_channel = f // (filters // groups) * weight.shape[1]
        for channel, i, j in weight[f].nonzero().tolist():
            rows = slice(i * dilation[0], i * dilation[0] + (height - 1) * stride[0] + 1, stride[0])
            columns = slice(j * dilation[1], j * dilation[1] + (width - 1) * stride[1] + 1, stride[1])
            out[:, f] += weight[f, channel, i, j] * image[:, first_channel + channel, rows, columns]
    return out


def activation(values, kind, low=0.0, high=math.inf):
    """The activations of kernels.cpp."""
    if kind == build.CLAMP:
        return values.clamp(low, high)
    if kind == build.LEAKY:
        return torch.where(values < 0, values * low, values)
    if kind == build.ELU:
        return torch.where(values > 0, values, low * torch.expm1(values))
    functions = {
        build.HARDSWISH: F.hardswish,
        build.HARDSIGMOID: F.hardsigmoid,
        build.SIGMOID: torch.sigmoid,
        build.SILU: F.silu,
        build.GELU: F.gelu,
        build.TANH: torch.tanh,
        build.GELU_TANH: lambda x: F.gelu(x, approximate='tanh'),
    }
    return functions[kind](values)
