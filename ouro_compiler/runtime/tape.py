"""A graph at one batch size as a list of calls on fixed memory: what a CUDA graph is to a GPU.

At batch 1 a Vision Mamba calls some 500 small kernels; allocating their outputs and preparing their
arguments in Python takes longer than computing them. A tape does that once: intermediate tensors
get places in one block of memory, reused once nobody reads them any more, and a run is a loop of
calls with prepared arguments. It computes the same bits as the graph.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils import _pytree as pytree

from ouro_compiler.kernels.cpp.launch import Function, load_function, words
from ouro_compiler.kernels.cpp.toolchain import BuildError
from ouro_compiler.kernels.cpu import IMPLEMENTATIONS
from ouro_compiler.kernels.launch import Launch, record_launches

_ALIGNMENT = 64


@dataclass(eq=False)
class _Buffer:
    """Memory of one intermediate tensor and its views, needed from step `first` to step `last`."""

    size: int
    first: int
    last: int
    offset: int = 0


@dataclass
class _Call:
    """A node without a kernel: a function, what it takes, and where its results are copied."""

    function: Callable[..., Any]
    args: Any
    results: list[Tensor]


@dataclass
class _Record:
    """Steps with the fake tensors they name, and the memory behind those."""

    steps: list[Launch | _Call] = field(default_factory=list)
    names: list[str] = field(default_factory=list)  # of the node behind each step
    buffers: dict[int, _Buffer] = field(default_factory=dict)
    constants: dict[int, Tensor] = field(default_factory=dict)
    kept: list[Tensor] = field(default_factory=list)  # so that no storage's number is used again

    def use(self, fake: Tensor, step: int) -> None:
        """Note that a step reads or writes a tensor."""
        number = _number(fake)
        if number in self.constants:
            return
        self.kept.append(fake)
        buffer = self.buffers.setdefault(
            number, _Buffer(fake.untyped_storage().nbytes(), step, step)
        )
        buffer.last = max(buffer.last, step)


class Tape:
    """Runs a graph of one input at one batch size; not to be used by two threads at once."""

    def __init__(self, gm: fx.GraphModule, images: Tensor) -> None:
        record = _Record()
        mode = FakeTensorMode()
        with mode, torch.no_grad():
            recorder = _Recorder(gm, mode, record)
            fake = mode.from_tensor(images)
            record.use(fake, 0)
            outputs = recorder.run(fake)
            pytree.tree_map_only(Tensor, lambda one: record.use(one, len(record.steps)), outputs)
        self.bytes = _place(list(record.buffers.values()))
        self._memory = torch.empty(self.bytes + _ALIGNMENT, dtype=torch.uint8)
        self._base = -self._memory.data_ptr() % _ALIGNMENT
        self._record = record
        self._images = self._real(fake)
        self._outputs = pytree.tree_map_only(Tensor, self._real, outputs)
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
        constant = self._record.constants.get(_number(fake))
        if constant is not None:
            return constant.as_strided(fake.shape, fake.stride(), fake.storage_offset())
        buffer = self._record.buffers[_number(fake)]
        start = self._base + buffer.offset
        memory = self._memory[start : start + buffer.size].view(fake.dtype)
        return memory.as_strided(
            fake.shape, fake.stride(), memory.storage_offset() + fake.storage_offset()
        )

    def _prepare(self, step: Launch | _Call) -> tuple[Function, Any]:
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


def _number(tensor: Tensor) -> int:
    """What tells a tensor's storage from all others that are alive."""
    return int(tensor.untyped_storage()._cdata)


class _Recorder(fx.Interpreter):
    """Runs a graph on fake tensors, noting what would be called."""

    def __init__(self, gm: fx.GraphModule, mode: FakeTensorMode, record: _Record) -> None:
        super().__init__(gm)
        self.mode, self.record = mode, record
        self.name = ""

    def run_node(self, n: fx.Node) -> Any:
        self.name = n.name
        return super().run_node(n)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        found = super().get_attr(target, args, kwargs)
        if not isinstance(found, Tensor):
            return found
        fake = self.mode.from_tensor(found)
        self.record.constants[_number(fake)] = found
        self.record.kept.append(fake)
        return fake

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(target, torch._ops.OpOverload) and target.namespace == "ouro":
            found = self._launched(target, args, kwargs)
            if found is not None:
                return found
        outputs = super().call_function(target, args, kwargs)
        inputs = {_number(x) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = [x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor)]
        if all(_number(one) in inputs for one in made):
            return outputs  # views, and what is no tensor
        self._note(_Call(target, (args, kwargs), made), pytree.tree_leaves((args, kwargs, made)))
        return outputs

    def _launched(self, target: torch._ops.OpOverload, args: Any, kwargs: Any) -> Any:
        """The outputs of an op whose kernels were noted; None if it has to be called as it is."""
        found = IMPLEMENTATIONS.get(target._schema.name.removeprefix("ouro::"))
        if found is None or found.refuse(*args, **kwargs) is not None:
            return None
        with record_launches() as recording:
            outputs = found.kernel(*args, **kwargs)
        if recording.copies:
            return None
        try:
            with unset_fake_temporarily():  # a kernel's self-test at its first use runs it
                for launch in recording.launches:
                    load_function(launch.spec)
        except BuildError:
            return None
        for launch in recording.launches:
            self._note(launch, launch.args)
        return outputs

    def _note(self, step: Launch | _Call, named: Any) -> None:
        for one in named:
            if isinstance(one, Tensor):
                self.record.use(one, len(self.record.steps))
        self.record.steps.append(step)
        self.record.names.append(self.name)


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
