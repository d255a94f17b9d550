"""A plan: what the engine does for inputs of one shape. Buffers, prepared weights, and the kernel chosen for each layer."""

import ctypes
import time
from collections import Counter

import torch

from . import build
from .lower import Lowering

PREPARED = {build.CONV: 'conv', build.LINEAR: 'linear'}
LABELS = {build.LINEAR: 'linear', build.MAX_POOL: 'max pool', build.AVERAGE_POOL: 'average pool', build.MEAN: 'mean'}
LABELS |= {build.POINTWISE: 'elementwise', build.PAD: 'padding', build.SPREAD: 'spread'}
LARGE = 1 << 40
_chosen = {}  # what measuring found before, by geometry and share of non-zero weights


class Value:
    """The memory of one tensor: its own buffer, or a slice of the channels of a concatenation."""

    def __init__(self, shape):
        self.shape = torch.Size(shape)
        self.images = shape[0]
        self.size = self.shape.numel() // max(1, shape[0])  # floats of an image
        self.parent = None
        self.before = 0  # floats of the parent's image before this slice
        self.first = None  # index of the work that writes it, and of the last one that reads it
        self.last = None
        self.buffer = None

    def root(self):
        return self if self.parent is None else self.parent.root()

    def place(self):
        """(buffer, floats before the first image, floats between images)."""
        before, value = 0, self
        while value.parent is not None:
            before += value.before
            value = value.parent
        return value.buffer, before, value.size


class Plan:
    """Everything for inputs of one shape, on so many threads.

    run(inputs) gives the network's output, or None when an input holds NaN or infinity.
    """

    def __init__(self, graph, inputs, threads, measure=True):
        self.graph = graph
        self.threads = threads
        self.kernels = build.library()
        self.found, self.known = graph.shapes(inputs)
        lowering = Lowering(graph, self.found, self.known)
        self.works = lowering.works
        self.root_of = lowering.root_of
        self.memory = []
        self.handles = []
        self._make_values()
        self._place_buffers()
        self._fill_steps()
        for work in self.works:
            if work.step is not None and work.step.kind in PREPARED:
                self._prepare(work, measure)
        self._make_segments()

    def __del__(self):
        for name, handle in getattr(self, 'handles', []):
            getattr(self.kernels, f'{name}_free')(handle)

    # ------------------------------------------------------------------------------------------------------------------ memory

    def _make_values(self):
        """A value for every tensor that a step of the engine reads or writes."""
        self.values = {}
        nodes = list(self.graph.inputs)
        for work in self.works:
            nodes += [work.node, *work.sources] if work.step is not None or work.parts else []
        for node in nodes:
            if node not in self.values:
                self.values[node] = Value(self.found[node].shape)
        readers = Counter()
        end = len(self.works)
        for index, work in enumerate(self.works):
            if work.node in self.values:
                self.values[work.node].first = index
            for source in work.sources:
                if source in self.values:
                    self.values[source].last = index
                    readers[source] += 1
        self.returned = [self.root_of(node) for node in self.graph.outputs]
        for node in self.returned:
            if node in self.values:
                self.values[node].last = end
        # a step writes into the concatenation that reads its result: from the last concatenation to the first, so that they nest
        views = {
            self.root_of(node) for node, value in self._aliases() if value.shape[:1] != self.found[self.root_of(node)].shape[:1]
        }
        made = {work.node for work in self.works if work.step is not None or work.parts}
        for work in reversed(self.works):
            before = 0
            for source in work.sources if work.parts else []:
                value = self.values[source]
                if source in made and value.parent is None and source not in views and work.sources.count(source) == 1:
                    value.parent, value.before = self.values[work.node], before
                before += value.size

    def _aliases(self):
        return [(node, self.found[node]) for node in self.graph.nodes if node is not self.root_of(node)]

    def _place_buffers(self):
        """Give every root value a buffer; those that are never needed at the same time share one."""
        spans = {}
        for value in self.values.values():
            root = value.root()
            first = -1 if value.first is None else value.first
            last = max(first, -1 if value.last is None else value.last)
            old = spans.get(root, (first, last))
            spans[root] = min(old[0], first), max(old[1], last)
        sizes, free = [], []  # free: (number of buffer, index from which on)
        for root, (first, last) in sorted(spans.items(), key=lambda item: item[1][0]):
            size = root.images * root.size
            fitting = [entry for entry in free if entry[1] < first and sizes[entry[0]] >= size >= sizes[entry[0]] // 4]
            if fitting and first >= 0:
                entry = min(fitting, key=lambda entry: sizes[entry[0]])
                free.remove(entry)
                root.buffer = entry[0]
            else:
                root.buffer = len(sizes)
                sizes.append(size)
            if first >= 0:
                free.append((root.buffer, last))
        self.memory = [torch.zeros(size + 2 * build.SLACK + 16) for size in sizes]
        self.starts = []
        for memory in self.memory:
            skip = -(memory.data_ptr() // 4 + build.SLACK) % 16  # first images begin at a multiple of 64 bytes
            self.starts.append(build.SLACK + skip)
        self.pointers = (ctypes.c_void_p * len(sizes))()
        for number, memory in enumerate(self.memory):
            self.pointers[number] = memory.data_ptr() + 4 * self.starts[number]
        self.tensors = {node: self._view(value) for node, value in self.values.items()}

    def _view(self, value):
        """The value as a tensor of PyTorch over the same memory."""
        number, before, image = value.place()
        strides = [1]
        for size in reversed(value.shape[2:]):
            strides.insert(0, strides[0] * size)
        strides = [image, *strides] if value.shape[1:] else [1]
        return self.memory[number].as_strided(value.shape, strides, self.starts[number] + before)

    def _fill_steps(self):
        steps = []
        for work in self.works:
            if work.parts:
                steps += self._copies(work)
            else:
                steps.append(work)
        self.works = steps
        for work in steps:
            if work.step is None:
                continue
            places = [build.Place(*self.values[node].place()) for node in (work.sources[0], work.node)]
            other = self.values[work.sources[1]].place() if len(work.sources) > 1 else (-1, 0, 0)
            step = work.step
            step.source, step.target, step.other = *places, build.Place(*other)
            if step.kind == build.LINEAR or step.mode == 1 and step.kind == build.CONV:  # an image is a token
                inner = {'source': step.channels, 'target': step.filters, 'other': step.filters}
                for name, node in zip(inner, [work.sources[0], work.node, *work.sources[1:]], strict=False):
                    if len(self.values[node].shape) != 2:
                        place = getattr(step, name)
                        place.image = inner[name]
            if step.kind == build.POINTWISE and step.channels == 1 and not self.values[work.node].shape[1:]:
                step.source.image = step.target.image = step.other.image = 1
            step.weight = None if work.weight is None else work.weight.data_ptr()
            step.bias = None if work.bias is None else work.bias.data_ptr()
            if work.maps:
                step.rows, step.columns = (values.data_ptr() for values in work.maps)

    def _copies(self, work):
        """A concatenation: one copy for each part that could not be written where it belongs."""
        from .lower import Work

        copies, before = [], 0
        whole = self.values[work.node]
        for source in work.sources:
            value = self.values[source]
            if value.parent is not whole or value.before != before:
                part = _Slice()
                self.values[part] = piece = Value(value.shape)
                piece.parent, piece.before = whole, before
                plane = {
                    'images': value.images,
                    'channels': 1,
                    'height': 1,
                    'width': value.size,
                    'out_height': 1,
                    'out_width': value.size,
                }
                step = build.Step(kind=build.POINTWISE, mode=3, low=-float('inf'), high=float('inf'), **plane)
                copies.append(Work(part, work.name, [source], step))
            before += value.size
        return copies

    # ----------------------------------------------------------------------------------------------------------------- choices

    def _prepare(self, work, measure):
        step = work.step
        flat = step.kernel_h == step.kernel_w == step.stride_h == step.stride_w == 1 and step.pad_h == step.pad_w == 0
        if step.kind == build.CONV and flat and not step.mode:
            step.width, step.height = step.width * step.height, 1
            step.out_width, step.out_height = step.out_width * step.out_height, 1
        density = float((work.weight != 0).sum()) / work.weight.numel()
        candidates = self._candidates(step, density, flat)
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
        return (step.kind, float(f'{density:.1g}'), self.threads, *(getattr(step, name) for name in names))

    def _candidates(self, step, density, flat):
        """Settings worth a measurement, the most likely one first."""
        if step.kind == build.LINEAR:
            kinds = [{'dense': 0}, {'dense': 1}] if density > 0.15 else [{'dense': 0}]
            return kinds[::-1] if density > 0.5 else kinds
        plain = {'dense': 0, 'shifted': 0, 'direct': 0, 'vectors': 14, 'block_bytes': 32 << 10}
        if step.mode:
            found = [plain, plain | {'vectors': 8}]
        elif flat:
            found = [plain, plain | {'block_bytes': 96 << 10}, plain | {'direct': 1}, plain | {'direct': 1, 'vectors': 7}]
        else:
            found = [plain, plain | {'shifted': 1}, plain | {'vectors': 8, 'shifted': 1}, plain | {'block_bytes': 256 << 10}]
        dense = {'dense': 1, 'shifted': int(not flat and not step.mode), 'vectors': 6}
        if density > 0.25:
            found += [found[0] | dense, found[0] | dense | {'vectors': 4}]
            found += [found[0] | dense | {'direct': 1}] if flat and not step.mode else []
        return found[-2:] + found[:-2] if density > 0.6 else found

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
        if self.kernels.engine_run(array, len(steps), self.pointers, self.threads, taken):
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
        self.fresh = {}  # returned tensors that a step can write directly: {place in outputs: buffer}
        counts = Counter(value.root() for value in self.values.values())
        for place, node in enumerate(self.returned):
            value = self.values.get(node)
            last = value is not None and value.parent is None and counts[value] == 1 and value.first is not None
            written = any(work.step is not None and work.node is node for work in self.works)
            read = any(node in work.sources for work in self.works)
            alone = last and sum(other.buffer == value.buffer for other in self.values.values()) == 1
            if alone and written and not read and self.returned.count(node) == 1:
                self.fresh[place] = value

    def run(self, inputs, times=None):
        """The network's output; None when an input is not finite. times: {work: nanoseconds}, filled in when given."""
        for node, given in zip(self.graph.inputs, inputs, strict=True):
            value = self.values[node]
            number = value.buffer
            self.tensors[node].copy_(given)
            if not self.kernels.all_finite(self.pointers[number], value.images * value.size):
                return None
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
            if self.kernels.engine_run(array, len(works), self.pointers, self.threads, taken):
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
            return f'{"dense" if step.dense else "sparse"} convolution, {how}, {step.vectors} vectors, {step.block_bytes >> 10} KiB'
        if step.kind == build.LINEAR:
            return 'dense linear' if step.dense else 'sparse linear'
        return LABELS[step.kind]


class _Slice:
    """Stands for a part of a concatenation that is copied there."""
