"""sparse_compile: a network that computes with its non-zero weights alone, on a CPU."""

import copy
import threading
import time

import torch
from torch import nn

from ..latency import threads_of_the_cpu
from . import build
from .graph import Graph, GraphError
from .plan import Plan

PLANS = 16  # input shapes that are kept
ROUNDS = 8  # of the network and PyTorch in turn, to choose between them
TRIES = 3  # a pause apart, before the engine is given up: another program may keep a thread of it waiting through all rounds
SHARE = 1e-5  # of the largest output: how far the engine may be away from PyTorch


def sparse_compile(model: nn.Module, example_input: torch.Tensor | tuple, threads: int | None = None) -> 'SparseNetwork':
    """A module with the outputs of `model` in eval mode that computes with the non-zero weights alone.

    example_input: a tensor, or a tuple of tensors. threads: of the CPU (default: torch.get_num_threads() at each call), or one
    where that is measured to be faster, as for one image of a small network. Other batch and image sizes make their own plan
    when they first come; for another image size the network is read again, which takes seconds. The weights are copied: later
    changes of `model` do not show.
    Raises build.CompilerError without a C++ compiler, and ValueError for a network or an input that is not float32 on the CPU.
    """
    return SparseNetwork(model, example_input, threads)


class SparseNetwork(nn.Module):
    """What sparse_compile returns. report() says layer by layer what runs how."""

    def __init__(self, model, example_input, threads=None, measure=True):
        super().__init__()
        inputs = example_input if isinstance(example_input, tuple) else (example_input,)
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and (tensor.dtype != torch.float32 or tensor.device.type != 'cpu'):
                raise ValueError(
                    f'the sparse engine runs float32 networks on the CPU: {name} is {tensor.dtype} on {tensor.device}; '
                    'call .float().cpu() first'
                )
        self.threads = threads
        self.measure = measure
        build.library()
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._plans = {}  # by number of threads and input shapes: a Plan, or why PyTorch runs all of the network
        self._graphs = []
        self._lock = threading.Lock()
        self._check(inputs)
        self._plan(inputs)

    def train(self, mode=True):
        """The network stays in eval mode."""
        return self

    def _check(self, inputs):
        for number, value in enumerate(inputs):
            if not isinstance(value, torch.Tensor) or value.dtype != torch.float32 or value.device.type != 'cpu':
                kind = f'{value.dtype} on {value.device}' if isinstance(value, torch.Tensor) else type(value).__name__
                raise ValueError(f'the sparse engine takes float32 tensors on the CPU, but input {number} is {kind}')

    def forward(self, *inputs):
        self._check(inputs)
        result = None
        if all(value.numel() for value in inputs):
            with self._lock:
                plan = self._plan(inputs)
                result = plan.run(inputs) if isinstance(plan, Plan) else None
        if result is None:
            with torch.no_grad():
                result = self.model(*inputs)
        return result

    def _plan(self, inputs):
        """The plan for inputs of these shapes, or a sentence where PyTorch is faster or the network cannot be read."""
        threads = self.threads or torch.get_num_threads()
        key = threads, *(tuple(value.shape) for value in inputs)
        if key not in self._plans:
            while len(self._plans) >= PLANS:
                self._plans.pop(next(iter(self._plans)))
            self._plans[key] = self._make_plan(inputs, threads)
        return self._plans[key]

    @torch.no_grad()
    def _make_plan(self, inputs, threads):
        expected = self.model(*inputs)  # an input that the network refuses is refused here, in its own words
        try:
            plan = Plan(self.graph(*inputs), inputs, threads, self.measure)
            result = plan.run(inputs)
            if self.measure and threads > 1 and self._is_slower(_on(plan, threads, inputs), _on(plan, 1, inputs), threads):
                # the steps of a small network are over before a second thread has heard of them
                plan = Plan(self.graph(*inputs), inputs, 1)
                result = plan.run(inputs)
        except GraphError as error:
            return str(error)
        if result is not None and not _close(result, expected):
            return 'the outputs of the engine differ from those of PyTorch'
        if self.measure and self._is_slower(lambda: plan.run(inputs), lambda: self.model(*inputs), threads):
            return 'PyTorch is faster'
        return plan

    def graph(self, *inputs):
        """The graph of the network for inputs of these shapes, read once. Raises GraphError."""
        shapes = [value.shape for value in inputs]
        found = next((graph for graph in self._graphs if graph.takes(shapes)), None)
        if found is None:
            found = Graph(self.model, inputs)
            if not found.takes(shapes):  # an axis of size 1 was read as 2
                raise GraphError(f'{type(self.model).__name__} cannot be read for inputs of the shapes {shapes}')
            self._graphs.append(found)
        return found

    def _is_slower(self, function, other, threads):
        """Whether `other` is faster, in TRIES comparisons one after another, where PyTorch has so many threads."""
        for attempt in range(TRIES):
            time.sleep(0.03 * attempt)
            if not self._loses(function, other, threads):
                return False
        return True

    def _loses(self, function, other, threads):
        """Whether `other` is faster in the best of rounds in turn, which other programs disturb least.

        Two rounds are enough where one of them takes more than twice as long.
        """
        best = {function: float('inf'), other: float('inf')}
        with threads_of_the_cpu(threads):
            for number in range(ROUNDS):
                if number == 2 and max(best.values()) > 2 * min(best.values()):
                    break
                for each in best:
                    began = time.perf_counter()
                    each()
                    best[each] = min(best[each], time.perf_counter() - began)
        return best[function] > best[other]

    def report(self, *inputs):
        """One record a layer or operation: name, zeros, weights, kernel, threads, milliseconds. inputs: by default random."""
        shape = None
        if not inputs:
            shape = next(iter(self._plans))[1:]
            inputs = tuple(torch.rand(size) for size in shape)
        self._check(inputs)
        with self._lock:
            plan = self._plan(inputs)
            if not isinstance(plan, Plan):
                return [{'name': 'the whole network', 'zeros': 0, 'weights': 0, 'kernel': f'PyTorch: {plan}', 'ms': None}]
            best = {}
            for _ in range(5):
                times = {}
                plan.run(inputs, times)
                best = {key: min(value, best.get(key, value)) for key, value in times.items()}
        records = []
        for work in plan.works:
            is_layer = work.weight is not None and work.step.kind in (build.CONV, build.LINEAR)
            weights = work.weight.numel() if is_layer else 0
            zeros = weights - int(work.weight.count_nonzero()) if is_layer else 0
            record = {'name': work.name, 'zeros': zeros, 'weights': weights, 'kernel': plan.label(work)}
            records.append(record | {'threads': plan.threads, 'ms': best.get(id(work), 0) / 1e6})
        return records


def _on(plan, threads, inputs):
    """A function that runs the plan on so many threads."""

    def run():
        usual = plan.threads
        plan.threads = threads
        plan.run(inputs)
        plan.threads = usual

    return run


def _close(result, expected):
    """Whether two nestings of tensors agree to SHARE of the largest number (ten times that: both round in float32)."""
    results, others = (torch.utils._pytree.tree_leaves(value) for value in (result, expected))
    for one, other in zip(results, others, strict=True):
        if isinstance(one, torch.Tensor) and one.is_floating_point():
            scale = other.abs().max().item() if other.numel() else 0.0
            if one.shape != other.shape or not (one - other).abs().max().item() <= 10 * SHARE * scale + 1e-30:
                return False
    return True
