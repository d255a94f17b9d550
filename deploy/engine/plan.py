"""A plan: what the engine does for inputs of one shape. Buffers, prepared weights, and the kernel chosen for each layer."""

import ctypes
import time

import torch

from . import build
from .lower import Lowering
from .work import Work

PREPARED = {build.CONV: 'conv', build.LINEAR: 'linear'}
LABELS = {build.LINEAR: 'linear', build.MAX_POOL: 'max pool', build.AVERAGE_POOL: 'average pool', build.MEAN: 'mean'}
LABELS |= {
    build.POINTWISE: 'elementwise',
    build.PAD: 'padding',
    build.SPREAD: 'spread',
    build.COPY: 'copy',
    build.PHASES: 'phases',
}
LARGE = 1 << 40
NEAR = 40 << 10  # bytes of inputs that stay in the nearest cache; FAR: of any number of channels
FAR = 1 << 30
MOST_SPLIT = 1 << 18  # floats of an image's phases
MOST_BORDER = 3  # a border of zeros is at most so wide; other convolutions copy what they need
_chosen = {}  # what measuring found before, by geometry and share of non-zero weights


class Value:
    """The memory of one tensor: its own buffer, or a slice of the channels of a concatenation.

    Images of four axes may have a border of zeros: `border` rows above and below, and as many columns between two rows.
    """

    def __init__(self, shape, border=0):
        self.shape = torch.Size(shape)
        self.images = shape[0] if shape else 1
        self.border = border
        self.pitch, self.plane, self.size = plain_strides(self.shape)  # floats between two rows, channels and images
        if border:
            self.pitch = shape[3] + border
            self.plane = -(-(shape[2] + border) * self.pitch // 16) * 16  # a multiple of every vector
            self.size = shape[1] * self.plane
        self.parent = None
        self.before = 0  # floats of the parent's image before this slice
        self.first = None  # index of the work that writes it, and of the last one that reads it
        self.last = None
        self.buffer = None

    def layout(self):
        """What buffers must have in common to be shared: where the zeros of the border lie."""
        return (self.pitch, self.plane, self.shape[2:]) if self.border else ()

    def root(self):
        return self if self.parent is None else self.parent.root()

    def place(self, shape=None):
        """Where it lies, read as this shape: (buffer, floats before the first image, ... between images, planes, rows)."""
        before, value = 0, self
        while value.parent is not None:
            before += value.before
            value = value.parent
        pitch, plane = self.pitch, self.plane
        if not self.border and shape is not None:
            pitch, plane, _ = plain_strides(shape)
        return value.buffer, before, value.size, plane, pitch


def plain_strides(shape):
    """(floats of a row, of a channel, of an image) of a tensor without border."""
    plane = torch.Size(shape[2:]).numel()
    return (shape[-1] if len(shape) > 2 else 1), plane, torch.Size(shape[1:]).numel()


class Plan:
    """Everything for inputs of one shape, on so many threads.

    run(inputs) gives the network's output, or None when an input holds NaN or infinity. plain: only the steps, without borders,
    phases and
    prepared weights, for write_c.
    """

    def __init__(self, graph, inputs, threads, measure=True, plain=False):
        self.graph = graph
        self.threads = threads
        self.plain = plain
        self.kernels = None if plain else build.library()
        self.found, self.known = graph.shapes(inputs)
        lowering = Lowering(graph, self.found, self.known)
        self.works = lowering.works
        self.root_of = lowering.root_of
        self.handles = []
        self._add_input_copies()
        if not plain:
            self._split_strides()
        self._make_values()
        self._place_buffers()
        self._fill_steps()
        for work in self.works:
            if work.step is not None and work.step.kind in PREPARED and not plain:
                self._prepare(work, measure)
        self._make_segments()

    def __del__(self):
        for name, handle in getattr(self, 'handles', []):
            getattr(self.kernels, f'{name}_free')(handle)

    # ------------------------------------------------------------------------------------------------------------------ memory

    def _add_input_copies(self):
        """The first steps: the network's inputs, which lie in the caller's memory, into buffers of the engine."""
        self.raw = [_Made(f'input {number}') for number in range(len(self.graph.inputs))]
        copies = []
        for raw, node in zip(self.raw, self.graph.inputs, strict=True):
            shape = self.found[node].shape
            self.found[raw] = self.found[node]
            step = build.Step(kind=build.COPY, **plane_sizes(shape))
            copies.append(Work(node, str(raw), [raw], [shape], step, shape=shape))
        self.works = copies + self.works

    def _split_strides(self):
        """Put a step that splits the input into its phases before convolutions with strides that are small enough to gain."""
        split = {}  # by source and stride: the number of phases
        for work in self.works:
            if can_split(work):
                key = work.sources[0], work.step.stride_h, work.step.stride_w
                split[key] = max(split.get(key, 1), phases(work.step))
        made, works = {}, []
        for work in self.works:
            if can_split(work):
                old = work.step
                key = work.sources[0], old.stride_h, old.stride_w
                if key not in made:
                    made[key] = _Made(f'phases of {work.name}')
                    shape = torch.Size([old.images, old.channels * split[key], old.out_height, old.out_width])
                    self.found[made[key]] = torch.empty(shape, device='meta')
                    step = build.Step(kind=build.PHASES, phases=split[key])
                    for name in build.INTEGERS:
                        setattr(step, name, getattr(old, name))
                    works.append(Work(made[key], str(made[key]), work.sources[:1], work.shapes[:1], step, shape=shape))
                work.sources[0] = made[key]
                work.shapes[0] = self.found[made[key]].shape
                work.step.phases = split[key]
            works.append(work)
        self.works = works

    def _borders(self):
        """{height and width: border of the tensors of that size}: as wide as the convolutions need that keep the size."""
        borders = {}
        for work in self.works:
            step = work.step
            if step is None or step.kind != build.CONV or step.mode:
                continue
            if step.phases or keeps_size(step) and step.height > 1:
                size = step.out_height, step.out_width
                borders[size] = max(borders.get(size, 0), reach(step))
        return {size: border for size, border in borders.items() if border <= MOST_BORDER}

    def _make_values(self):
        """A value for every tensor that a step of the engine reads or writes."""
        engine = [work for work in self.works if work.step is not None or work.parts]
        plain = {
            self.root_of(node) for node in self.graph.nodes if self.found_shape(node) != self.found_shape(self.root_of(node))
        }
        plain |= set(self.raw) | {self.root_of(node) for node in self.graph.outputs}
        for work in engine:
            if work.step is not None and (work.step.kind == build.LINEAR or work.step.kind == build.CONV and work.step.mode):
                plain |= {work.node, *work.sources}
        borders = {} if self.plain else self._borders()
        self.values = {}
        for node in [node for work in engine for node in (work.node, *work.sources)]:
            shape = self.found[node].shape
            border = borders.get(tuple(shape[2:]), 0) if len(shape) == 4 and node not in plain else 0
            self.values.setdefault(node, Value(shape, border))
        for index, work in enumerate(self.works):
            if work.node in self.values:
                self.values[work.node].first = index
            for source in work.sources:
                if source in self.values:
                    self.values[source].last = index
        self.returned = [self.root_of(node) for node in self.graph.outputs]
        for node in self.returned:
            if node in self.values:
                self.values[node].last = len(self.works)
        # a step writes into the concatenation that reads its result: from the last one to the first, so that they nest
        made = {work.node for work in engine}
        reshaped = {
            self.root_of(node)
            for node in self.graph.nodes
            if self.found_shape(node)[:1] != self.found_shape(self.root_of(node))[:1]
        }
        for work in reversed([work for work in engine if work.parts]):
            before = 0
            whole = self.values[work.node]
            for source in work.sources:
                value = self.values[source]
                movable = (
                    source in made and value.parent is None and source not in reshaped and value.layout() == whole.layout()
                )
                if movable and work.sources.count(source) == 1:
                    value.parent, value.before = whole, before
                before += value.shape[1] * whole.plane

    def found_shape(self, node):
        value = self.found.get(node)
        return value.shape if isinstance(value, torch.Tensor) else torch.Size()

    def _place_buffers(self):
        """Give every root value a buffer; those that are never needed at the same time share one."""
        spans = {}
        for value in self.values.values():
            root = value.root()
            first = -1 if value.first is None else value.first
            last = max(first, -1 if value.last is None else value.last)
            old = spans.get(root, (first, last))
            spans[root] = min(old[0], first), max(old[1], last)
        sizes, layouts, free = [], [], []  # free: (number of buffer, index after which it is)
        for root, (first, last) in sorted(spans.items(), key=lambda item: item[1][0]):
            size, layout = root.images * root.size, root.layout()
            fitting = [
                (n, end) for n, end in free if end < first and layouts[n] == layout and sizes[n] >= size >= sizes[n] // 4
            ]
            if fitting and first >= 0:
                entry = min(fitting, key=lambda entry: sizes[entry[0]])
                free.remove(entry)
                root.buffer = entry[0]
            else:
                root.buffer = len(sizes)
                sizes.append(size)
                layouts.append(layout)
            if first >= 0:
                free.append((root.buffer, last))
        edges = [layout[0] * MOST_BORDER + MOST_BORDER if layout else 0 for layout in layouts]
        self.memory = [torch.zeros(size + 2 * (build.SLACK + edge) + 16) for size, edge in zip(sizes, edges, strict=True)]
        self.starts = []
        for memory, edge in zip(self.memory, edges, strict=True):
            skip = -(memory.data_ptr() // 4 + build.SLACK + edge) % 16  # first images begin at a multiple of 64 bytes
            self.starts.append(build.SLACK + edge + skip)
        self.pointers = (ctypes.c_void_p * len(sizes))()
        for number, memory in enumerate(self.memory):
            self.pointers[number] = memory.data_ptr() + 4 * self.starts[number]
        self.tensors = {node: self._view(value) for node, value in self.values.items()}

    def _view(self, value):
        """The value as a tensor of PyTorch over the same memory."""
        number, before, image, plane, pitch = value.place()
        if value.border:
            strides = [image, plane, pitch, 1]
        else:
            strides = [1]
            for size in reversed(value.shape[2:]):
                strides.insert(0, strides[0] * size)
            strides = [image, *strides] if value.shape[1:] else [1]
        return self.memory[number].as_strided(value.shape, strides, self.starts[number] + before)

    def _fill_steps(self):
        steps = []
        for work in self.works:
            steps += self._copies(work) if work.parts else [work]
        self.works = steps
        self.masks = {}
        for work in steps:
            if work.step is None:
                continue
            step = work.step
            shapes = [work.shape, *work.shapes]
            values = [self.values[node] for node in (work.node, *work.sources)]
            places = [build.Place(*value.place(shape)) for value, shape in zip(values, shapes, strict=True)]
            if step.kind == build.LINEAR or step.kind == build.CONV and step.mode:  # an image is a token
                for place, shape, size in zip(places, shapes, (step.filters, step.channels, step.filters), strict=False):
                    place.image = size if len(shape) != 2 else place.image
            step.target, step.source = places[:2]
            step.other = places[2] if len(places) > 2 else build.Place(-1, 0, 0, 0, 0)
            step.weight = None if work.weight is None else work.weight.data_ptr()
            step.bias = None if work.bias is None else work.bias.data_ptr()
            if values[0].border:
                step.mask = self._mask(values[0]).data_ptr()
            if work.maps:
                step.rows, step.columns = (positions.data_ptr() for positions in work.maps)
            if step.kind in (build.POINTWISE, build.COPY) and not any(value.border for value in values) and step.mode != 2:
                step.width, step.height = step.width * step.height, 1
                if work.weight is None:
                    step.width, step.channels = step.width * step.channels, 1

    def _mask(self, value):
        """-1 at the pixels of a plane's rows, 0 in the border, and behind."""
        layout = value.layout()
        if layout not in self.masks:
            height, width = value.shape[2:]
            mask = torch.zeros(value.plane + 256, dtype=torch.int32)
            mask[: height * value.pitch].view(height, value.pitch)[:, :width] = -1
            self.masks[layout] = mask
        return self.masks[layout]

    def _copies(self, work):
        """A concatenation: one copy for each part that could not be written where it belongs."""
        copies, before = [], 0
        whole = self.values[work.node]
        for source, shape in zip(work.sources, work.shapes, strict=True):
            value = self.values[source]
            if value.parent is not whole or value.before != before:
                part = _Made(f'part of {work.name}')
                self.values[part] = piece = Value(shape, whole.border)
                piece.parent, piece.before = whole, before
                step = build.Step(kind=build.COPY, **plane_sizes(shape))
                copies.append(Work(part, work.name, [source], [shape], step, shape=shape))
            before += shape[1] * whole.plane
        return copies

    # ----------------------------------------------------------------------------------------------------------------- choices

    def _prepare(self, work, measure):
        step = work.step
        density = float((work.weight != 0).sum()) / work.weight.numel()
        candidates = self._candidates(work, density)
        key = self._key(step, density)
        if key in _chosen:
            candidates = [_chosen[key]]
        best = None
        for candidate in candidates:
            trial = build.Step.from_buffer_copy(step)
            for name, value in candidate.items():
                setattr(trial, name, value)
            if step.kind == build.CONV:
                trial.chunks = self._chunks(trial)
            trial.prepared = getattr(self.kernels, f'{PREPARED[step.kind]}_prepare')(ctypes.byref(trial))
            seconds = self._time(trial) if measure and len(candidates) > 1 else 0.0
            if best is None or seconds < best[0]:
                if best is not None:
                    self._free(best[1])
                best = seconds, trial, candidate
            else:
                self._free(trial)
        if measure:
            _chosen[key] = best[2]
        work.step = best[1]
        self.handles.append((PREPARED[step.kind], best[1].prepared))

    def _free(self, step):
        getattr(self.kernels, f'{PREPARED[step.kind]}_free')(step.prepared)

    def _key(self, step, density):
        names = [name for name in build.INTEGERS if name != 'activation']
        pitches = step.source.pitch, step.target.pitch, step.other.pitch
        return (step.kind, float(f'{density:.1g}'), self.threads, *pitches, *(getattr(step, name) for name in names))

    def _candidates(self, work, density):
        """Settings worth a measurement, the most likely one first."""
        step = work.step
        if step.kind == build.LINEAR:
            kinds = [{'dense': 0}, {'dense': 1}] if density > 0.15 else [{'dense': 0}]
            return kinds[::-1] if density > 0.5 else kinds
        rows = {'dense': 0, 'shifted': 0, 'direct': 0, 'vectors': 14, 'block_bytes': NEAR}
        direct = rows | {'direct': 1}
        pointwise = step.kernel_h == step.kernel_w == 1
        values = [self.values[node] for node in (work.node, *work.sources)]
        alike = all(value.pitch == values[0].pitch for value in values)
        found = []
        if step.phases or not step.mode and keeps_size(step) and alike and values[1].border >= reach(step):
            found = [direct | {'vectors': vectors} for vectors in (10, 14, 24, 8, 5)]
            found += [direct | {'vectors': vectors, 'block_bytes': FAR} for vectors in (14, 24)]
        if not pointwise and not step.phases:
            found += [rows | {'shifted': 1, 'vectors': vectors} for vectors in (18, 14, 8)]
        if not found or not pointwise and not step.phases:
            found += [rows, rows | {'block_bytes': 2 * NEAR}]
        if density > 0.25:
            dense = [found[0] | {'dense': 1, 'vectors': 6}, found[0] | {'dense': 1, 'vectors': 4}]
            if not step.phases:
                dense.append(rows | {'dense': 1, 'vectors': 6, 'shifted': int(not pointwise)})
            found = dense + found if density > 0.6 else found + dense
        return found

    def _chunks(self, step):
        """In how many pieces the filters are shared out, so that four tasks come to a thread."""
        if self.threads == 1:
            return 1
        tiles = step.images * step.groups * -(-step.out_height * step.out_width // (16 * step.vectors))
        return max(1, -(-4 * self.threads // tiles))

    def _time(self, step):
        """Nanoseconds of a step, the best of a few."""
        taken = ctypes.c_int64()
        best = LARGE
        for _ in range(3):
            self._call([step], taken)
            best = min(best, taken.value)
        return best

    def _call(self, steps, nanoseconds=None):
        array = (build.Step * len(steps))(*steps)
        taken = None if nanoseconds is None else ctypes.byref(nanoseconds)
        if self.kernels.engine_run(array, len(steps), self.pointers, self.threads, taken, None, 0):
            raise MemoryError('the sparse engine ran out of memory')

    # ----------------------------------------------------------------------------------------------------------------- running

    def _make_segments(self):
        """Runs of engine steps in one array each, between operations that PyTorch does."""
        self.segments = []
        group = []
        for work in [*self.works, None]:
            if work is not None and work.step is not None:
                group.append(work)
                continue
            if group:
                array = (build.Step * len(group))(*(item.step for item in group))
                self.segments.append((array, list(group)))
                group = []
            if work is not None:
                self.segments.append((None, [work]))
        self.fresh = {}  # returned tensors that a step writes directly into new memory: {place in outputs: value}
        for place, node in enumerate(self.returned):
            value = self.values.get(node)
            if value is None or any(node in work.sources for work in self.works) or self.returned.count(node) > 1:
                continue
            alone = sum(other.root().buffer == value.root().buffer for other in self.values.values()) == 1
            if alone and any(work.node is node and work.step is not None for work in self.works):
                self.fresh[place] = value
        self.checks = [self.values[raw].images * self.values[raw].size for raw in self.raw]
        self.single = len(self.segments) == len(self.raw) == len(self.graph.outputs) == 1 and 0 in self.fresh
        if self.single:
            self.shape = tuple(self.found[self.graph.outputs[0]].shape)
            self.buffers = self.values[self.raw[0]].buffer, self.fresh[0].buffer

    def run(self, inputs, times=None):
        """The network's output; None when an input is not finite. times: {id of a work: nanoseconds}, filled in when given."""
        inputs = [value.contiguous() for value in inputs]
        if self.single and times is None:
            return self._run_at_once(inputs[0])
        with torch.no_grad():
            return self._run_by_segments(inputs, times)

    def _run_by_segments(self, inputs, times):
        for raw, value, count in zip(self.raw, inputs, self.checks, strict=True):
            if not self.kernels.all_finite(value.data_ptr(), count):
                return None
            self.pointers[self.values[raw].buffer] = value.data_ptr()
        made = {}
        for place, value in self.fresh.items():
            made[place] = torch.empty(value.shape)
            self.pointers[value.buffer] = made[place].data_ptr()
        held = {}  # values of PyTorch's operations that no step reads
        for array, works in self.segments:
            if array is None:
                self._run_in_pytorch(works[0], held, times)
                continue
            taken = None if times is None else (ctypes.c_int64 * len(works))()
            if self.kernels.engine_run(array, len(works), self.pointers, self.threads, taken, None, 0):
                raise MemoryError('the sparse engine ran out of memory')
            if times is not None:
                times.update(zip((id(work) for work in works), taken, strict=True))
        results = []
        for place, node in enumerate(self.graph.outputs):
            if place in made:
                result = made[place].view(self.found[node].shape)
            elif not isinstance(node, torch.fx.Node):
                result = node
            else:
                result = self._value(node, held)
                result = result.clone() if isinstance(result, torch.Tensor) else result
            results.append(result)
        return self.graph.build_output(results)

    def _run_at_once(self, image):
        """The whole network in one call."""
        array, works = self.segments[0]
        result = torch.empty(self.shape)
        address = image.data_ptr()
        self.pointers[self.buffers[0]] = address
        self.pointers[self.buffers[1]] = result.data_ptr()
        failed = self.kernels.engine_run(array, len(works), self.pointers, self.threads, None, address, self.checks[0])
        if failed == 1:
            raise MemoryError('the sparse engine ran out of memory')
        return None if failed else self.graph.build_output([result])

    def _value(self, node, held):
        """The tensor, number or tuple that a node of the graph stands for."""
        if node in self.known or isinstance(self.found[node], (int, float)):
            return self.found[node]
        root = self.root_of(node)
        value = held[root] if root in held else self.tensors[root]
        return value if root is node else value.reshape(self.found[node].shape)

    def _run_in_pytorch(self, work, held, times):
        began = time.perf_counter_ns()
        arguments = torch.fx.map_arg((work.node.args, work.node.kwargs), lambda node: self._value(node, held))
        result = work.node.target(*arguments[0], **arguments[1])
        if work.node in self.values:
            self.tensors[work.node].copy_(result)
        else:
            held[work.node] = result
        if times is not None:
            times[id(work)] = time.perf_counter_ns() - began

    def label(self, work):
        """What runs a work, in words."""
        step = work.step
        if step is None:
            return f'PyTorch {work.name}'
        if step.kind == build.CONV:
            how = 'direct' if step.direct else 'shifted rows' if step.shifted else 'packed rows'
            kind = 'dense' if step.dense else 'sparse'
            return f'{kind} convolution, {how}, {step.vectors} vectors, {step.block_bytes >> 10} KiB'
        if step.kind == build.LINEAR:
            return 'dense linear' if step.dense else 'sparse linear'
        return LABELS[step.kind]


class _Made:
    """Stands for a value that is no node of the graph."""

    def __init__(self, name):
        self.name = name

    def __str__(self):
        return self.name


def keeps_size(step):
    """Whether a convolution's output has the size of its input, pixel by pixel."""
    same = step.out_height == step.height and step.out_width == step.width
    return same and step.stride_h == step.stride_w == 1


def reach(step):
    """How far a convolution reads over the edge, in pixels of its output."""
    found = 0
    for letter in 'hw':
        kernel, stride, pad, dilation = (getattr(step, f'{name}_{letter}') for name in ('kernel', 'stride', 'pad', 'dilation'))
        found = max(found, -(-pad // stride), ((kernel - 1) * dilation - pad) // stride)
    return found


def phases(step):
    """Into how many phases a convolution with strides needs its input split: only one where each output reads one pixel."""
    return 1 if step.kernel_h == step.kernel_w == 1 and step.pad_h == step.pad_w == 0 else step.stride_h * step.stride_w


def can_split(work):
    """Whether a convolution has strides, its phases hold the whole input, and they fit into the second cache."""
    step = work.step
    if step is None or step.kind != build.CONV or step.mode or step.stride_h == step.stride_w == 1:
        return False
    whole = step.out_height * step.stride_h >= step.height and step.out_width * step.stride_w >= step.width
    floats = step.channels * phases(step) * step.out_height * step.out_width
    return whole and reach(step) <= MOST_BORDER and floats <= MOST_SPLIT


def plane_sizes(shape):
    """The fields of a step that copies a tensor: with four axes by planes, else an image at a time."""
    if len(shape) == 4:
        sizes = dict(zip(('images', 'channels', 'height', 'width'), shape, strict=True))
    else:
        inner = torch.Size(shape[1:]).numel()
        sizes = {'images': shape[0] if shape else 1, 'channels': 1, 'height': 1, 'width': inner}
    return sizes | {'out_height': sizes['height'], 'out_width': sizes['width'], 'filters': sizes['channels']}
