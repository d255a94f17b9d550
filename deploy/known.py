"""The layers and operations that a file of a network may name: everything else is refused when it is read.

They compute with tensors and do nothing else: none of them reads or writes a file, or runs what it is given.
"""

import builtins
import operator

import torch
import torch.nn.functional as F

# The layers that a description may name, and the constructor arguments that are stored; all are attributes of the same name.
_CONV = 'in_channels out_channels kernel_size stride padding dilation groups bias padding_mode'
_TRANSPOSED = 'in_channels out_channels kernel_size stride padding output_padding groups bias dilation padding_mode'
_NORM = 'num_features eps momentum affine track_running_stats'
_MAX_POOL = 'kernel_size stride padding dilation return_indices ceil_mode'
_LAYERS = {
    **dict.fromkeys(['Conv1d', 'Conv2d', 'Conv3d'], _CONV),
    **dict.fromkeys(['ConvTranspose1d', 'ConvTranspose2d', 'ConvTranspose3d'], _TRANSPOSED),
    **dict.fromkeys(['BatchNorm1d', 'BatchNorm2d', 'BatchNorm3d', 'InstanceNorm1d', 'InstanceNorm2d'], _NORM),
    **dict.fromkeys(['MaxPool1d', 'MaxPool2d', 'MaxPool3d'], _MAX_POOL),
    'AvgPool1d': 'kernel_size stride padding ceil_mode count_include_pad',
    **dict.fromkeys(['AvgPool2d', 'AvgPool3d'], 'kernel_size stride padding ceil_mode count_include_pad divisor_override'),
    **dict.fromkeys(['AdaptiveAvgPool1d', 'AdaptiveAvgPool2d', 'AdaptiveAvgPool3d'], 'output_size'),
    **dict.fromkeys(['AdaptiveMaxPool1d', 'AdaptiveMaxPool2d', 'AdaptiveMaxPool3d'], 'output_size return_indices'),
    'Linear': 'in_features out_features bias',
    'GroupNorm': 'num_groups num_channels eps affine',
    'LayerNorm': 'normalized_shape eps elementwise_affine',
    **dict.fromkeys(['ReLU', 'ReLU6', 'SiLU', 'SELU', 'Mish', 'Hardswish', 'Hardsigmoid'], 'inplace'),
    **dict.fromkeys(['ELU', 'CELU'], 'alpha inplace'),
    'LeakyReLU': 'negative_slope inplace',
    'Hardtanh': 'min_val max_val inplace',
    'PReLU': 'num_parameters',
    'GELU': 'approximate',
    'Softplus': 'beta threshold',
    **dict.fromkeys(['Sigmoid', 'Tanh', 'Identity'], ''),
    **dict.fromkeys(['Softmax', 'LogSoftmax'], 'dim'),
    **dict.fromkeys(['Dropout', 'Dropout1d', 'Dropout2d', 'Dropout3d', 'AlphaDropout'], 'p inplace'),
    'Flatten': 'start_dim end_dim',
    'Upsample': 'size scale_factor mode align_corners recompute_scale_factor',
    'PixelShuffle': 'upscale_factor',
    **dict.fromkeys(['ZeroPad2d', 'ReflectionPad2d', 'ReplicationPad2d'], 'padding'),
    'ChannelShuffle': 'groups',
}
LAYERS = {name: tuple(arguments.split()) for name, arguments in _LAYERS.items()}
# The functions and methods that may be called between the layers.
_OPERATORS = 'add iadd sub isub mul imul truediv itruediv floordiv neg getitem'
_TORCH = (
    'add sub mul div cat concat stack flatten relu sigmoid tanh softmax mean sum amax squeeze unsqueeze reshape permute'
    ' transpose chunk split narrow index_select index_add clamp neg clone matmul adaptive_avg_pool1d'
)
_FUNCTIONAL = (
    'relu relu6 leaky_relu elu gelu silu mish hardswish hardsigmoid hardtanh sigmoid tanh softplus softmax log_softmax'
    ' max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d interpolate pad pixel_shuffle'
)
_METHODS = (
    'add add_ sub mul mul_ div size dim view reshape flatten mean sum amax relu relu_ sigmoid tanh softmax permute transpose'
    ' contiguous squeeze unsqueeze chunk split clamp expand index_select clone detach'
)
FUNCTIONS = {f'operator.{name}': getattr(operator, name) for name in _OPERATORS.split()}
FUNCTIONS |= {f'torch.{name}': getattr(torch, name) for name in _TORCH.split()}
FUNCTIONS |= {f'functional.{name}': getattr(F, name) for name in _FUNCTIONAL.split()}
FUNCTIONS['getattr'] = builtins.getattr  # of `shape` only
METHODS = set(_METHODS.split())
DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool)}
LAYOUTS = {str(layout): layout for layout in (torch.contiguous_format, torch.preserve_format, torch.channels_last)}
# Operations of ATen as torch.export names them, in all overloads that change none of their arguments: what packing does not
# write as a layer.
_ATEN = (
    'relu relu6 leaky_relu elu celu selu gelu silu mish hardswish hardsigmoid hardtanh sigmoid tanh softplus log_sigmoid '
    'softsign prelu softmax log_softmax logsumexp abs neg exp log log1p expm1 sqrt rsqrt square pow reciprocal sign floor '
    'ceil round sin cos erf add sub rsub mul div floor_divide remainder maximum minimum clamp clamp_min clamp_max where '
    'masked_fill eq ne lt le gt ge logical_and logical_or logical_not bitwise_not isnan mean sum amax amin max min std '
    'var norm linalg_vector_norm prod cumsum argmax argmin topk sort cat stack flatten unflatten reshape permute '
    'transpose t movedim squeeze unsqueeze expand expand_as repeat repeat_interleave roll flip slice select narrow split '
    'split_with_sizes chunk unbind index index_select index_add gather pad constant_pad_nd reflection_pad1d '
    'reflection_pad2d replication_pad1d replication_pad2d pixel_shuffle pixel_unshuffle channel_shuffle max_pool1d '
    'max_pool2d max_pool3d max_pool2d_with_indices avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d '
    'adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d '
    'upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d '
    'upsample_trilinear3d conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution linear '
    'addmm mm bmm matmul einsum batch_norm instance_norm group_norm layer_norm native_layer_norm rms_norm '
    'scaled_dot_product_attention embedding arange zeros ones full zeros_like ones_like full_like new_zeros new_ones '
    'new_full scalar_tensor tril triu meshgrid contiguous clone alias detach to _to_copy type_as float double half '
    'grid_sampler affine_grid_generator im2col col2im unfold '
)


def _overloads(name):
    packet = getattr(torch.ops.aten, name)
    found = {f'aten.{name}.{overload}': getattr(packet, overload) for overload in packet.overloads()}
    return {key: operation for key, operation in found.items() if not operation._schema.is_mutable and '.out' not in key}


for _name in _ATEN.split():
    if hasattr(torch.ops.aten, _name):
        FUNCTIONS |= _overloads(_name)
FUNCTION_NAMES = {function: name for name, function in FUNCTIONS.items()}
