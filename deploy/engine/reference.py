"""What the kernels compute, in float64 and as plain loops: slow, and compared with in tests."""

import torch
import torch.nn.functional as F


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
