"""A graph at one batch size as a list of calls on fixed memory: what a CUDA graph is to a GPU.

At batch 1 a Vision Mamba calls some 500 small kernels; allocating their outputs and preparing their
arguments in Python takes longer than computing them. A tape does that once: intermediate tensors
get places in one block of memory, reused once nobody reads them any more, and a run is a loop of
calls with prepared arguments. It computes the same bits as the graph.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils import _pytree as pytree

from ouro_compiler.kernels.cpp.launch import Function, load_function, words
from ouro_compiler.kernels.cpp.toolchain import BuildError
from ouro_compiler.kernels.cpu import IMPLEMENTATIONS
from ouro_compiler.kernels.launch import Launch, Recording
from ouro_compiler.runtime.record import Record, Step, record_graph, storage_number, tensors_of

_ALIGNMENT = 64


@dataclass(eq=False)
class _Buffer:
    """Memory of one intermediate tensor and its views, needed from step `first` to step `last`."""

    size: int
    first: int
    last: int
    offset: int = 0


class Tape:
    """Runs a graph of one input at one batch size; not to be used by two threads at once."""

    def __init__(self, gm: fx.GraphModule, images: Tensor) -> None:
        record = record_graph(gm, images, IMPLEMENTATIONS, _loaded)
        self._buffers = _buffers(record)
        self.bytes = _place(list(self._buffers.values()))
        self._memory = torch.empty(self.bytes + _ALIGNMENT, dtype=torch.uint8)
        self._base = -self._memory.data_ptr() % _ALIGNMENT
        self._record = record
        self._images = self._real(record.images)
        self._outputs = pytree.tree_map_only(Tensor, self._real, record.outputs)
        self._steps = [self._prepare(step) for step in record.steps]
        self._names = record.names
        self._lock = threading.Lock()
        record.kept.clear()

    def __call__(self, images: Tensor) -> Any:
        """The graph's outputs for images of the shape it was made for, in memory of their own."""
        with self._lock:
            self._images.copy_(images)
            threads = torch.get_num_threads()
            for function, arguments in self._steps:
                function(arguments, threads)
            return pytree.tree_map_only(Tensor, Tensor.clone, self._outputs)

    def traced(self, images: Tensor, labels: Mapping[str, str]) -> Any:
        """The same as a call, each step a `record_function` of its node's label, or else name."""
        with self._lock:
            self._images.copy_(images)
            threads = torch.get_num_threads()
            for name, (function, arguments) in zip(self._names, self._steps, strict=True):
                with torch.profiler.record_function(labels.get(name, name)):
                    function(arguments, threads)
            return pytree.tree_map_only(Tensor, Tensor.clone, self._outputs)

    def _real(self, fake: Tensor) -> Tensor:
        """The tensor that a fake one stands for."""
        constant = self._record.constants.get(storage_number(fake))
        if constant is not None:
            return constant.as_strided(fake.shape, fake.stride(), fake.storage_offset())
        buffer = self._buffers[storage_number(fake)]
        start = self._base + buffer.offset
        memory = self._memory[start : start + buffer.size].view(fake.dtype)
        return memory.as_strided(
            fake.shape, fake.stride(), memory.storage_offset() + fake.storage_offset()
        )

    def _prepare(self, step: Step) -> tuple[Function, Any]:
        if isinstance(step, Launch):
            function = load_function(step.spec)
            return function, words(step.args, lambda fake: self._real(fake).data_ptr())
        args = pytree.tree_map_only(Tensor, self._real, step.args)
        return _call(step.function), (args, [self._real(fake) for fake in step.results])


def _call(function: Callable[..., Any]) -> Function:
    def run(arguments: Any, _threads: int) -> None:
        (args, kwargs), places = arguments
        found = [x for x in pytree.tree_leaves(function(*args, **kwargs)) if isinstance(x, Tensor)]
        for place, value in zip(places, found, strict=True):
            place.copy_(value)

    return run


def _loaded(recording: Recording) -> bool:
    """Load the kernels of an operator; False if one cannot be built."""
    try:
        with unset_fake_temporarily():  # a kernel's self-test at its first use runs it
            for launch in recording.launches:
                load_function(launch.spec)
    except BuildError:
        return False
    return True


def _buffers(record: Record) -> dict[int, _Buffer]:
    """The memory behind the images, what the steps name and the outputs, by storage."""
    outputs = [one for one in pytree.tree_leaves(record.outputs) if isinstance(one, Tensor)]
    found: dict[int, _Buffer] = {}
    used = [(0, [record.images]), *enumerate(map(tensors_of, record.steps))]
    for step, tensors in [*used, (len(record.steps), outputs)]:
        for one in tensors:
            number = storage_number(one)
            if number not in record.constants:
                size = one.untyped_storage().nbytes()
                found.setdefault(number, _Buffer(size, step, step)).last = step
    return found


def _place(buffers: list[_Buffer]) -> int:
    """Give every buffer an offset, first fit and large ones first; returns the bytes needed."""
    placed: list[_Buffer] = []
    for buffer in sorted(buffers, key=lambda one: -one.size):
        offset = 0
        for other in sorted(placed, key=lambda one: one.offset):
            if other.last < buffer.first or buffer.last < other.first:
                continue
            if offset + buffer.size <= other.offset:
                break
            offset = max(offset, -(-(other.offset + other.size) // _ALIGNMENT) * _ALIGNMENT)
        buffer.offset = offset
        placed.append(buffer)
    return max((one.offset + one.size for one in buffers), default=0)
