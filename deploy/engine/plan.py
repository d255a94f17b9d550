"""A plan: what the engine does for inputs of one shape. Buffers, prepared weights, and the kernel chosen for each layer."""

import ctypes
import time

import torch

from . import build, choices
from .geometry import borders_of, plane_sizes, split_strides
from .lower import Lowering
from .memory import Value, mask_of, place_buffers, view
from .work import Made, Work

LABELS = {build.LINEAR: 'linear', build.MAX_POOL: 'max pool', build.AVERAGE_POOL: 'average pool', build.MEAN: 'mean'}
LABELS |= {
    build.POINTWISE: 'elementwise',
    build.PAD: 'padding',
    build.SPREAD: 'spread',
    build.COPY: 'copy',
    build.PHASES: 'phases',
}


class Plan:
    """Everything for inputs of one shape, on so many threads.

    run(inputs) gives the network's output, or None when an input holds NaN or infinity. plain: only the steps, without borders,
    phases and prepared weights, for write_c.
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
        self.prepared = []
        self._add_input_copies()
        if not plain:
            self.works = split_strides(self.works, self.found)
        self._make_values()
        self.memory, starts = place_buffers(self.values.values())
        self.pointers = (ctypes.c_void_p * len(starts))()
        for number, (buffer, start) in enumerate(zip(self.memory, starts, strict=True)):
            self.pointers[number] = buffer.data_ptr() + 4 * start
        self.tensors = {node: view(value, self.memory, starts) for node, value in self.values.items()}
        self._fill_steps()
        for work in self.works:
            if work.step is not None and work.step.kind in choices.PREPARED and not plain:
                values = [self.values[node] for node in (work.node, *work.sources)]
                work.step = choices.prepare(work, values, threads, self._nanoseconds if measure else None)
                self.prepared.append(work.step)
        self._make_segments()

    def __del__(self):
        for step in getattr(self, 'prepared', []):
            choices.free(step)

    # ------------------------------------------------------------------------------------------------------------------ memory

    def _add_input_copies(self):
        """The first steps: the network's inputs, which lie in the caller's memory, into buffers of the engine."""
        self.raw = [Made(f'input {number}') for number in range(len(self.graph.inputs))]
        copies = []
        for raw, node in zip(self.raw, self.graph.inputs, strict=True):
            shape = self.found[node].shape
            self.found[raw] = self.found[node]
            step = build.Step(kind=build.COPY, **plane_sizes(shape))
            copies.append(Work(node, str(raw), [raw], [shape], step, shape=shape))
        self.works = copies + self.works

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
        borders = {} if self.plain else borders_of(self.works)
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
                    value.parent = whole
                    value.before = before
                before += value.shape[1] * whole.plane

    def found_shape(self, node):
        value = self.found.get(node)
        return value.shape if isinstance(value, torch.Tensor) else torch.Size()

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
                layout = values[0].layout()
                if layout not in self.masks:
                    self.masks[layout] = mask_of(values[0])
                step.mask = self.masks[layout].data_ptr()
            if work.maps:
                step.rows, step.columns = (positions.data_ptr() for positions in work.maps)
            if step.kind in (build.POINTWISE, build.COPY) and not any(value.border for value in values) and step.mode != 2:
                step.width = step.width * step.height
                step.height = 1
                if work.weight is None:
                    step.width = step.width * step.channels
                    step.channels = 1

    def _copies(self, work):
        """A concatenation: one copy for each part that could not be written where it belongs."""
        copies = []
        before = 0
        whole = self.values[work.node]
        for source, shape in zip(work.sources, work.shapes, strict=True):
            value = self.values[source]
            if value.parent is not whole or value.before != before:
                part = Made(f'part of {work.name}')
                self.values[part] = piece = Value(shape, whole.border)
                piece.parent = whole
                piece.before = before
                step = build.Step(kind=build.COPY, **plane_sizes(shape))
                copies.append(Work(part, work.name, [source], [shape], step, shape=shape))
            before += shape[1] * whole.plane
        return copies

    # ----------------------------------------------------------------------------------------------------------------- running

    def _nanoseconds(self, step):
        """How long one step takes."""
        taken = ctypes.c_int64()
        if self.kernels.engine_run(ctypes.byref(step), 1, self.pointers, self.threads, ctypes.byref(taken), None, 0):
            raise MemoryError('the sparse engine ran out of memory')
        return taken.value

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
