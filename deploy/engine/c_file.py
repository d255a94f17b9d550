"""write_c: a network as one C99 file without dependencies, for machines without PyTorch."""

import math
from pathlib import Path

import torch
from torch import nn

from ..outputs import eval_mode
from . import build
from .compile import SparseNetwork
from .graph import Graph
from .plan import Plan

ACTIVATE = {
    build.CLAMP: 'x < low ? low : x > high ? high : x',
    build.LEAKY: 'x < 0 ? x * low : x',
    build.HARDSWISH: 'x * fminf(fmaxf(x + 3, 0), 6) / 6',
    build.HARDSIGMOID: 'fminf(fmaxf(x + 3, 0), 6) / 6',
    build.SIGMOID: '1 / (1 + expf(-x))',
    build.SILU: 'x / (1 + expf(-x))',
    build.GELU: '0.5f * x * (1 + erff(x * 0.70710678f))',
    build.TANH: 'tanhf(x)',
    build.ELU: 'x > 0 ? x : low * expm1f(x)',
    build.GELU_TANH: '0.5f * x * (1 + tanhf(0.79788456f * (x + 0.044715f * x * x * x)))',
}

HEAD = """/* {title}

   void infer(const float *in, float *out)
   in:  {inputs} numbers, {input_shape}
   out: {outputs} numbers, {output_shape}

   Compile with: cc -std=c99 -O3 -c FILE   (and link with -lm)
   {weights} weights that are not zero of {all_weights}; {memory} bytes of working memory, static: one call at a time.
*/
#include <math.h>
#include <stdint.h>

static float activate(float x, int kind, float low, float high) {{
    switch (kind) {{
{cases}    default: return x;
    }}
}}

static void finish(float *out, const float *other, long count, int kind, float low, float high) {{
    for (long i = 0; i < count; i++) out[i] = activate(out[i] + (other ? other[i] : 0), kind, low, high);
}}
"""

FUNCTIONS = {
    build.CONV: """
/* Weight k of filter f (start[f] <= k < start[f + 1]) stands at index (channel * kernel_h + i) * kernel_w + j of the filter. */
static void convolution(const float *in, float *out, const float *other, int channels, int height, int width, int filters,
                        int out_height, int out_width, int kernel_h, int kernel_w, int stride_h, int stride_w,
                        int pad_h, int pad_w,
                        int dilation_h, int dilation_w, int groups, const float *bias,
                        const int32_t *start, const int32_t *index,
                        const float *value, int kind, float low, float high) {
    const long plane = (long)out_height * out_width;
    for (int f = 0; f < filters; f++) {
        float *sum = out + f * plane;
        const float *group = in + (long)(f / (filters / groups)) * (channels / groups) * height * width;
        for (long i = 0; i < plane; i++) sum[i] = bias ? bias[f] : 0;
        for (int32_t k = start[f]; k < start[f + 1]; k++) {
            const int tap = index[k] % (kernel_h * kernel_w);
            const int row = tap / kernel_w * dilation_h - pad_h, column = tap % kernel_w * dilation_w - pad_w;
            const float *from = group + (long)(index[k] / (kernel_h * kernel_w)) * height * width;
            int first = column < 0 ? (-column + stride_w - 1) / stride_w : 0;
            int last = column < width ? (width - 1 - column) / stride_w + 1 : 0;
            if (last > out_width) last = out_width;
            for (int y = 0; y < out_height; y++) {
                const int in_y = y * stride_h + row;
                if (in_y < 0 || in_y >= height) continue;
                const float *x_in = from + (long)in_y * width + column, w = value[k];
                float *x_out = sum + (long)y * out_width;
                if (stride_w == 1)
                    for (int x = first; x < last; x++) x_out[x] += w * x_in[x];
                else
                    for (int x = first; x < last; x++) x_out[x] += w * x_in[x * stride_w];
            }
        }
        finish(sum, other ? other + f * plane : 0, plane, kind, low, high);
    }
}
""",
    build.LINEAR: """
static void linear(const float *in, float *out, const float *other, int filters, const float *bias, const int32_t *start,
                   const int32_t *index, const float *value, int kind, float low, float high) {
    for (int f = 0; f < filters; f++) {
        float sum = bias ? bias[f] : 0;
        for (int32_t k = start[f]; k < start[f + 1]; k++) sum += value[k] * in[index[k]];
        out[f] = sum;
    }
    finish(out, other, filters, kind, low, high);
}
""",
    build.MAX_POOL: """
/* divisor: -1 maximum, 0 mean of the positions inside the image, else sum divided by it */
static void pool(const float *in, float *out, int channels, int height, int width, int out_height, int out_width, int kernel_h,
                 int kernel_w, int stride_h, int stride_w, int pad_h, int pad_w, int dilation_h, int dilation_w, int divisor,
                 int kind, float low, float high) {
    for (int c = 0; c < channels; c++)
        for (int y = 0; y < out_height; y++)
            for (int x = 0; x < out_width; x++) {
                float result = 0;
                int count = 0;
                for (int i = 0; i < kernel_h; i++)
                    for (int j = 0; j < kernel_w; j++) {
                        const int row = y * stride_h + i * dilation_h - pad_h, column = x * stride_w + j * dilation_w - pad_w;
                        if (row < 0 || row >= height || column < 0 || column >= width) continue;
                        const float value = in[((long)c * height + row) * width + column];
                        result = divisor >= 0 ? result + value : count && result > value ? result : value;
                        count++;
                    }
                if (divisor >= 0) result /= divisor ? divisor : count;
                out[((long)c * out_height + y) * out_width + x] = activate(result, kind, low, high);
            }
}
""",
    build.MEAN: """
static void mean(const float *in, float *out, int channels, long plane, int kind, float low, float high) {
    for (int c = 0; c < channels; c++) {
        float sum = 0;
        for (long i = 0; i < plane; i++) sum += in[c * plane + i];
        out[c] = activate(sum / plane, kind, low, high);
    }
}
""",
    build.POINTWISE: """
/* mode: 0 add the other tensor, 1 multiply by it, 2 multiply each plane by one number of it, 3 there is none */
static void pointwise(const float *in, float *out, const float *other, int channels, long plane, int mode, const float *scale,
                      const float *shift, int kind, float low, float high) {
    for (int c = 0; c < channels; c++)
        for (long i = c * plane; i < (c + 1) * plane; i++) {
            float x = in[i] * (scale ? scale[c] : 1) + (shift ? shift[c] : 0);
            if (mode == 0) x += other[i];
            if (mode == 1) x *= other[i];
            if (mode == 2) x *= other[c];
            out[i] = activate(x, kind, low, high);
        }
}
""",
    build.PAD: """
static void pad(const float *in, float *out, int channels, int height, int width, int out_height, int out_width,
                const int32_t *rows,
                const int32_t *columns, float value) {
    for (int c = 0; c < channels; c++)
        for (int y = 0; y < out_height; y++)
            for (int x = 0; x < out_width; x++, out++)
                *out = rows[y] < 0 || columns[x] < 0 ? value : in[((long)c * height + rows[y]) * width + columns[x]];
}
""",
    build.SPREAD: """
static void spread(const float *in, float *out, int channels, int height, int width, int out_height, int out_width,
                   int stride_h,
                   int stride_w, int pad_h, int pad_w) {
    for (long i = 0; i < (long)channels * out_height * out_width; i++) out[i] = 0;
    for (int c = 0; c < channels; c++)
        for (int y = 0; y < height; y++)
            for (int x = 0; x < width; x++, in++) {
                const int row = y * stride_h + pad_h, column = x * stride_w + pad_w;
                if (row < 0 || row >= out_height || column < 0 || column >= out_width) continue;
                out[((long)c * out_height + row) * out_width + column] = *in;
            }
}
""",
    build.COPY: """
static void copy(const float *in, float *out, long count) {
    for (long i = 0; i < count; i++) out[i] = in[i];
}
""",
}
FUNCTIONS[build.AVERAGE_POOL] = FUNCTIONS[build.MAX_POOL]


@torch.no_grad()
def write_c(model: nn.Module, example_input: torch.Tensor, path: str | Path) -> Path:
    """Write `model` in eval mode, for inputs of the shape of example_input, as one C99 file; returns its path.

    model: any network, or what sparse_compile gave. The file holds the weights that are not zero, the steps, and
    `void infer(const float *in, float *out)`. Raises ValueError for a network with an operation that the engine
    does not know, more than one input or output, or weights that are not float32.
    """
    name = type(model.model if isinstance(model, SparseNetwork) else model).__name__
    if isinstance(model, SparseNetwork):
        graph = model.graph(example_input)
    else:
        with eval_mode(model):
            graph = Graph(model, (example_input,))
    plan = Plan(graph, (example_input,), 1, measure=False, plain=True)
    unknown = sorted({work.name for work in plan.works if work.step is None})
    if unknown:
        raise ValueError(f'write_c cannot write {name}: it knows no C for {", ".join(unknown)}')
    if len(plan.returned) != 1 or plan.returned[0] not in plan.values:
        raise ValueError(f'write_c cannot write {name}: it has to return one tensor that depends on the input')
    tables = []
    calls = []
    kinds = set()
    weights = 0
    total = 0
    for number, work in enumerate(plan.works):
        kinds.add(build.LINEAR if work.step.kind == build.CONV and work.step.mode else work.step.kind)
        tables += _tables(number, work)
        calls += _calls(number, work)
        if work.weight is not None and work.step.kind != build.POINTWISE:
            weights += int(work.weight.count_nonzero())
            total += work.weight.numel()
    raw = plan.values[plan.raw[0]].buffer
    sizes = {number: memory.numel() for number, memory in enumerate(plan.memory) if number != raw}
    result = plan.values[plan.returned[0]]
    place = result.place()
    text = HEAD.format(
        title=f'{name}, written by write_c',
        inputs=example_input.numel(),
        input_shape=' x '.join(map(str, example_input.shape)),
        outputs=result.shape.numel(),
        output_shape=' x '.join(map(str, result.shape)),
        weights=weights,
        all_weights=total,
        memory=4 * sum(sizes.values()),
        cases=''.join(
            f'    case {kind}: return {ACTIVATE[kind]};\n' for kind in sorted({w.step.activation for w in plan.works})
        ),
    )
    text += ''.join(dict.fromkeys(FUNCTIONS[kind] for kind in sorted(kinds)))
    text += '\n' + '\n'.join(tables) + '\n'
    text += ''.join(f'static float buffer{number}[{size}];\n' for number, size in sizes.items())
    text += f'\nvoid infer(const float *in, float *out) {{\n    const float *buffer{raw} = in;\n'
    text += ''.join(f'    {call}\n' for call in calls)
    text += f'    for (long n = 0; n < {result.images}; n++)\n        for (long i = 0; i < {result.shape[1:].numel()}; i++)\n'
    text += f'            out[n * {result.shape[1:].numel()} + i] = buffer{place[0]}[{place[1]} + n * {place[2]} + i];\n}}\n'
    path = Path(path)
    path.write_text(text)
    return path


def _array(kind, name, values):
    """A constant table, ten values a line."""
    lines = [', '.join(values[start : start + 10]) for start in range(0, len(values), 10)] or ['0']
    return f'static const {kind} {name}[] = {{\n    ' + ',\n    '.join(lines) + '};'


def _floats(tensor):
    return [f'{value.hex()}f' if math.isfinite(value) else _number(value) for value in tensor.flatten().tolist()]


def _number(value):
    """A float as C99 reads it to the bit."""
    if math.isinf(value):
        return 'INFINITY' if value > 0 else '-INFINITY'
    return f'{float(value).hex()}f'


def _tables(number, work):
    """The constant arrays of a step."""
    tables = []
    if work.weight is not None and work.step.kind != build.POINTWISE:
        rows = work.weight.flatten(1)
        counts = torch.cat([torch.zeros(1, dtype=torch.long), (rows != 0).sum(1).cumsum(0)])
        places = rows.nonzero()
        tables.append(_array('int32_t', f'start{number}', [str(count) for count in counts.tolist()]))
        tables.append(_array('int32_t', f'index{number}', [str(place) for place in places[:, 1].tolist()]))
        tables.append(_array('float', f'value{number}', _floats(rows[rows != 0])))
    elif work.weight is not None:
        tables.append(_array('float', f'scale{number}', _floats(work.weight)))
    if work.bias is not None:
        tables.append(_array('float', f'bias{number}', _floats(work.bias)))
    for name, positions in zip(('rows', 'columns'), work.maps, strict=False):
        tables.append(_array('int32_t', f'{name}{number}', [str(position) for position in positions.tolist()]))
    return tables


def _calls(number, work):
    """The calls of a step, one for each image."""
    step = work.step
    bias = f'bias{number}' if work.bias is not None else '0'
    ending = f'{step.activation}, {_number(step.low)}, {_number(step.high)}'
    sizes = f'{step.channels}, {step.height}, {step.width}'
    out_sizes = f'{step.out_height}, {step.out_width}'
    window = ', '.join(
        str(getattr(step, f'{name}_{axis}')) for name in ('kernel', 'stride', 'pad', 'dilation') for axis in 'hw'
    )
    lists = f'start{number}, index{number}, value{number}'
    calls = []
    many = step.width if step.mode and step.kind == build.CONV else step.images  # tokens of a linear layer
    for image in range(many):
        source, target, other = (_address(place, image) for place in (step.source, step.target, step.other))
        if step.kind == build.LINEAR or step.kind == build.CONV and step.mode:
            calls.append(f'linear({source}, {target}, {other}, {step.filters}, {bias}, {lists}, {ending});')
        elif step.kind == build.CONV:
            shape = f'{sizes}, {step.filters}, {out_sizes}, {window}, {step.groups}'
            calls.append(f'convolution({source}, {target}, {other}, {shape}, {bias}, {lists}, {ending});')
        elif step.kind in (build.MAX_POOL, build.AVERAGE_POOL):
            divisor = -1 if step.kind == build.MAX_POOL else step.mode
            calls.append(f'pool({source}, {target}, {sizes}, {out_sizes}, {window}, {divisor}, {ending});')
        elif step.kind == build.MEAN:
            calls.append(f'mean({source}, {target}, {step.channels}, {step.height * step.width}, {ending});')
        elif step.kind == build.POINTWISE:
            scale = f'scale{number}' if work.weight is not None else '0'
            plane = f'{step.channels}, {step.height * step.width}'
            calls.append(f'pointwise({source}, {target}, {other}, {plane}, {step.mode}, {scale}, {bias}, {ending});')
        elif step.kind == build.PAD:
            calls.append(f'pad({source}, {target}, {sizes}, {out_sizes}, rows{number}, columns{number}, {_number(step.low)});')
        elif step.kind == build.SPREAD:
            ways = f'{step.stride_h}, {step.stride_w}, {step.pad_h}, {step.pad_w}'
            calls.append(f'spread({source}, {target}, {sizes}, {out_sizes}, {ways});')
        else:
            calls.append(f'copy({source}, {target}, {step.channels * step.height * step.width}L);')
    return calls


def _address(place, image):
    return '0' if place.buffer < 0 else f'buffer{place.buffer} + {place.offset + image * place.image}'
