"""Packing: a masked network becomes a smaller one with the same outputs; each layer runs the way that measured fastest.

    packed = pack(model, example_input)             # an fx.GraphModule of plain torch.nn layers, in eval mode
    print('\\n'.join(packed.meta['layers']))         # how each convolution runs
    dense = fold(model, example_input)              # what to compare its speed with: full size, batch norms folded

Dynamic Structure Pruning (Park et al., AAAI 2023) leaves convolutions whose filters read different input channels, group by
group; filters that read the same ones form a branch. First all channels go that nobody needs (shrinking.py). Then a convolution
can run
- whole: one convolution over all channels that its input still has, with zeros where a filter does not read one;
- gathered: one convolution over the channels that any of its filters reads;
- as branches: one smaller convolution for each set of filters that read the same channels;
with channel counts as they are or rounded up to multiples of 8 or 16 by zeros. In front of an addition, the live filters alone
may be computed and added into the other summand. Which way is fastest depends on the layer, the batch and the machine, so it is
measured at the example's batch size; at the end the whole network is measured against simpler ones and the folded dense one.

Deviations from the authors' packing: any number of branches and any network that torch.export reads, where theirs knows ResNets
with one to four branches; dead blocks, strides and dilations as they are; batch norms folded; a constant that a dead filter's
batch norm still emits is kept, in the bias of its readers where that is exact; nothing runs as branches where that is slower.
"""

import copy
import math
import time

import torch
from torch import nn

from .graph import name_of, plain_copy, shape_of, unwrapped
from .layers import POOLS, Network, full_size, is_rigid, read_layers
from .outputs import arguments, change_tensors, difference, noise_like, run
from .reporting import held_by_operations
from .shrinking import decide
from .ways import MULTIPLES
from .writing import Sketch, source_of, write

MARGIN = 0.98  # what is less simple, or larger, must take less than this share of the time
CLOSE = 1e-4  # of the largest output: what rounding may do in single precision where batch norms are folded


def pack(model: nn.Module, example_input: torch.Tensor | tuple | dict, how: str = 'measured') -> nn.Module:
    """A smaller network with the outputs of the masked model in eval mode -> fx.GraphModule.

    model: any network that torch.export can read; it is not changed. Out of DataParallel, DistributedDataParallel or
    torch.compile it is taken with a warning. A kernel is pruned where the convolution's bool buffer `mask` (shape [out,
    in / groups, 1, 1]) is False, and where all of its weights are exactly zero.
    example_input: a batch [B, ...] on the model's device, or a tuple or dict of arguments. The result takes the same arguments
    in any batch size, unless a warning names the only one, and is fastest at this one. Outputs nest as the model's, in plain
    dicts, tuples and lists.
    how: 'measured', or one way for all convolutions: 'whole', 'gathered', 'branches' (whole where a layer has no such way).
    Layers are copies and channel indices buffers. `meta['layers']` of the result has a line for each convolution: the way, and
    inputs -> filters of each branch; 'added' where only these filters are added to the other summand of the addition behind;
    'dense' and the reason where it cannot be packed. Behind them it names the dead filters that stay, and what holds them.
    Raises ValueError for a model that torch.export cannot read, and where outputs would differ.
    """
    if how not in ('measured', 'whole', 'gathered', 'branches'):
        raise ValueError(f"how must be 'measured', 'whole', 'gathered' or 'branches', not {how!r}")
    base, network, held = prepared(model, example_input)
    packed = fastest(network, lambda: full_layers(base, example_input)) if how == 'measured' else write(network, always(how))
    packed.meta['layers'] += held
    check(base, packed, example_input)
    return packed


def fold(model: nn.Module, example_input: torch.Tensor | tuple | dict, tune: bool = True) -> nn.Module:
    """The masked model at full size with its batch norms folded: what a packed network is compared with -> fx.GraphModule.

    tune: in the memory layout that measured fastest, among which packing chooses too; else contiguous, PyTorch's default.
    """
    base = masked_copy(model)
    network = full_layers(base, example_input)
    dense = [write(layout, always('whole')) for layout in (layouts(network) if tune else [network])]
    folded = dense[simplest(times_of(dense, network)) if tune else 0]
    check(base, folded, example_input)
    return folded


def prepared(model, example):
    """(the masked network, what the layers of its smaller one compute, [dead filters that stay and what holds them])."""
    base = masked_copy(model)
    small, held = smaller(base, example)
    return base, read_layers(small, example, base), held


@torch.no_grad()
def masked_copy(model):
    """A copy of a network, out of its wrappers, with the masks of its convolutions applied and removed."""
    network = plain_copy(unwrapped(model)).eval()
    for layer in network.modules():
        mask = layer._buffers.get('mask')
        if mask is not None and torch.is_tensor(getattr(layer, 'weight', None)):
            if mask.shape[:2] == layer.weight.shape[:2] and mask.numel() == mask.shape[0] * mask.shape[1]:
                layer.weight.mul_(mask)
                del layer.mask
    return network


def smaller(base, example):
    """(the network without the channels that nobody needs, [what stays although it is dead, and why])."""
    try:
        small, _, decision, blamed = decide(base, example, training=False)
    except ValueError as error:
        if 'cannot trace' in str(error):
            raise
        return copy.deepcopy(base), [f'no channels are removed: {error}']
    return small, [str(held) for held in held_by_operations(decision, blamed)]


def full_layers(base, example):
    return full_size(read_layers(copy.deepcopy(base), example, base))


def check(base, packed, example):
    """Raise ValueError where the packed network's outputs are not those of the masked model."""
    noise = noise_like(base, example)
    if _too_far(run(base, noise), run(packed, noise)):  # rounding is no reason to refuse
        double = change_tensors(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, noise)
        expected = run(base, noise)
        found = run(packed, noise)
        try:
            expected = run(copy.deepcopy(base).double(), double)
            found = run(copy.deepcopy(packed).double(), double)
        except RuntimeError:  # a network whose code makes tensors of single precision
            pass
        if _too_far(expected, found):
            gap = difference(expected, found)
            raise ValueError(f'{type(base).__name__} cannot be packed: outputs would differ by {gap:.1e} of the largest')


def _too_far(expected, found):
    """Whether any output differs by more than rounding may do where batch norms are folded; NaN where both have it is equal."""
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in found]:
        return True
    pairs = zip(expected, found, strict=True)
    return any(not torch.allclose(one.double(), two.double(), 0, _most(one), equal_nan=True) for one, two in pairs)


def _most(expected):
    finite = expected.double().nan_to_num(0.0, 0.0, 0.0).abs()
    return CLOSE * float(finite.max()) + 1e-6 if expected.numel() else 0.0


# ------------------------------------------------------------------------------------------------- choosing by measurement


def always(kind, multiple=1):
    """Chooses one kind of way for all convolutions, with counts rounded up to the multiple; whole where one has no such way."""

    def choose(network, node, layout, ways, into_sum):
        found = [way for way in ways if way.kind == kind and way.multiple <= multiple]
        found = [way for way in found if not way.added] or found
        return max(found, key=lambda way: way.multiple, default=ways[0])

    return choose


def measured(network, node, layout, ways, into_sum):
    """The fastest way to run a convolution by itself, with the addition that follows."""
    if len(ways) == 1:
        return ways[0]
    inputs = [_random(len(layout), shape_of(node.args[0])[2:], network)]
    if into_sum:
        inputs.append(_random(shape_of(node)[1], shape_of(node)[2:], network))
    modules = [_alone(network, node, layout, way, into_sum) for way in ways]
    return ways[simplest(measure([lambda module=module: module(*inputs) for module in modules], network.tensor.device))]


def simplest(times):
    """The index of the shortest time, but that of an earlier one unless it is beaten by the margin."""
    best = 0
    for k, seconds in enumerate(times):
        if seconds < MARGIN * times[best]:
            best = k
    return best


def _random(channels, size, network):
    example = network.tensor
    convs = network.convolutions()
    dtype = example.dtype if example.is_floating_point() else torch.get_default_dtype()
    x = torch.randn(len(example), channels, *size, device=example.device, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last) if len(network.channels_last) == len(convs) and x.dim() == 4 else x


def _alone(network, node, layout, way, into_sum):
    """A module that runs a convolution in this way, and adds the result to its second input if an addition follows."""
    sketch = Sketch(network)
    layer = network.layers[node]
    x = sketch.graph.placeholder('x')
    other = sketch.graph.placeholder('other') if into_sum else None
    pieces = sketch.convolve(x, node, layout, way)
    dims = len(shape_of(node))
    if into_sum:
        y = sketch.add_into(other, pieces, layer.name, len(layer.need), dims)
    else:
        y, filters = sketch.join(pieces)
        if is_rigid(network, node):
            y = sketch.arrange(y, filters, list(range(len(layer.need))), layer.name, dims)
    sketch.graph.output(y)
    with torch.no_grad():
        return sketch.finish()


def measure(functions, device, seconds=0.2, most=50):
    """The shortest time of each function, called in turn so that a disturbance hits all alike.

    For about `seconds` in all, at least 4 and at most `most` times; those far behind after three are not called again.
    """
    best = [math.inf] * len(functions)
    start = time.perf_counter()
    rounds = 0
    with torch.no_grad():
        for function in functions:
            function()  # the first call sets things up
        while rounds < 4 or rounds < most and time.perf_counter() - start < seconds:
            for k, function in enumerate(functions):
                if rounds > 2 and best[k] > 1.2 * min(best):
                    continue
                _wait(device)
                began = time.perf_counter()
                function()
                _wait(device)
                best[k] = min(best[k], time.perf_counter() - began)
            rounds += 1
    return best


def _wait(device):
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def fastest(network, full):
    """The fastest of: all convolutions whole, at one multiple or another; each as it measured; the folded dense network.

    full: gives the Network at full size.
    """
    candidates = layouts(network)
    count = len(MULTIPLES)
    whole = [write(layout, always('whole', multiple)) for layout in candidates for multiple in MULTIPLES]
    dense = [write(layout, always('whole')) for layout in layouts(full())]
    times = times_of(whole + dense, network)
    slow = 1.25 * min(times[: len(whole)])
    candidates = [layout for k, layout in enumerate(candidates) if min(times[k * count : k * count + count]) < slow]
    last = [whole[simplest(times[: len(whole)])], *(write(layout, measured) for layout in candidates)]
    last.append(dense[simplest(times[len(whole) :])])
    times = times_of(last, network)
    best = simplest(times[:-1])
    return last[-1 if MARGIN * times[best] > times[-1] else best]


def times_of(networks, network):
    args, kwargs = arguments(network.example)
    calls = [lambda packed=packed: packed(*args, **kwargs) for packed in networks]
    return measure(calls, network.tensor.device, 2, 300)


def layouts(network: Network):
    """The network in the memory layouts that are worth a try: contiguous with the convolutions in front of max pools in
    channels_last, as that is how a CPU pools fast, and channels_last throughout."""
    convs = network.convolutions()
    pooled = set()
    for node in network.program.nodes:
        if name_of(node) in POOLS and network.kinds[node] == 'pass':
            source = source_of(node)
            while network.kinds[source] in ('same', 'pass', 'norm'):
                source = source_of(source)
            pooled |= {source} & set(convs)
    if not convs:
        return [network]
    return [network._replace(channels_last=frozenset(pooled)), network._replace(channels_last=frozenset(convs))]
