"""A graph at one batch size as a list of kernel launches, as few as kernels allow.

A quantizer of few columns and the product behind it become one (chains.py), and then independent
launches of one template.

Running it allocates what the graph would and computes the same, with fewer launches. It starts
no work but its launches and the calls that have no kernel, and asks for memory in the same order
every time, so that a CUDA graph can capture it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ouro_compiler.kernels.cuda import IMPLEMENTATIONS
from ouro_compiler.kernels.grouping import Access, group_steps, join, joinable, written
from ouro_compiler.kernels.launch import Launch, start
from ouro_compiler.runtime.chains import chain_launches
from ouro_compiler.runtime.record import Call, Step, record_graph, storage_number, tensors_of


def _ignore(index: int, launch: Launch) -> None:
    """Nobody looks at the steps."""


class Schedule:
    """Runs a graph of one input at one batch size, where its constants are.

    steps: what is launched and called, in order. names: of the nodes behind each step. group: False
    leaves every launch by itself.
    """

    def __init__(self, gm: fx.GraphModule, images: Tensor, *, group: bool = True) -> None:
        like = torch.empty_like(images, memory_format=torch.contiguous_format)
        self._record = record_graph(gm, like, IMPLEMENTATIONS)
        steps, names = self._record.steps, self._record.names
        if group:
            steps, names = chain_launches(self._record)
        accesses = [self._access(step) for step in steps]
        self._check_reads(accesses, names)
        order = group_steps(accesses) if group else [[number] for number in range(len(steps))]
        self.steps: list[Step] = []
        for members in order:
            launches = [one for number in members if isinstance(one := steps[number], Launch)]
            self.steps.append(join(launches) if launches else steps[members[0]])
        self.names = [" + ".join(names[number] for number in members) for members in order]
        self._unused_after = self._last_uses()

    def __call__(self, images: Tensor, observe: Callable[[int, Launch], Any] = _ignore) -> Any:
        """The graph's outputs for images of the shape it was made for.

        observe: called with a step's number and its launch on real memory, before that.
        """
        expected = tuple(self._record.images.shape)
        if tuple(images.shape) != expected:
            raise ValueError(f"this schedule is of images {expected}, got {tuple(images.shape)}")
        memory = {
            number: constant.untyped_storage()
            for number, constant in self._record.constants.items()
        }
        whole = images.is_contiguous() and not images.storage_offset()
        images = images if whole else images.clone(memory_format=torch.contiguous_format)
        memory[storage_number(self._record.images)] = images.untyped_storage()
        with torch.no_grad():
            pairs = zip(self.steps, self._unused_after, strict=True)
            for index, (step, unused) in enumerate(pairs):
                self._run(index, step, memory, observe)
                for number in unused:
                    del memory[number]
            return pytree.tree_map_only(
                Tensor, lambda one: _real(one, memory), self._record.outputs
            )

    def _run(
        self,
        index: int,
        step: Step,
        memory: dict[int, torch.UntypedStorage],
        observe: Callable[[int, Launch], Any],
    ) -> None:
        if isinstance(step, Launch):
            args = pytree.tree_map_only(Tensor, lambda one: _real(one, memory), step.args)
            found = Launch(spec=step.spec, grid=step.grid, args=args)
            observe(index, found)
            start(found)
            return
        args, kwargs = pytree.tree_map_only(Tensor, lambda one: _real(one, memory), step.args)
        made = [x for x in pytree.tree_leaves(step.function(*args, **kwargs)) if _is_tensor(x)]
        for fake, value in zip(step.results, made, strict=True):
            if (value.stride(), value.storage_offset()) == (fake.stride(), fake.storage_offset()):
                memory[storage_number(fake)] = value.untyped_storage()
            else:
                _real(fake, memory).copy_(value)

    def _access(self, step: Step) -> Access:
        if isinstance(step, Call):
            leaves = [one for one in pytree.tree_leaves(step.args) if _is_tensor(one)]
            return Access(reads=_numbers(leaves), writes=_numbers(step.results))
        pairs = [
            (one, is_written)
            for one, is_written in zip(step.args, written(step), strict=True)
            if isinstance(one, Tensor)
        ]
        return Access(
            reads=_numbers([one for one, is_written in pairs if not is_written]),
            writes=_numbers([one for one, is_written in pairs if is_written]),
            key=joinable(step),
        )

    def _check_reads(self, accesses: list[Access], names: list[str]) -> None:
        """A kernel's host side that computed something beside launching would go unnoticed."""
        known = {*self._record.constants, storage_number(self._record.images)}
        for name, access in zip(names, accesses, strict=True):
            if not access.reads <= known:
                raise RuntimeError(f"{name} reads memory that no step before it writes")
            known |= access.writes

    def _last_uses(self) -> list[list[int]]:
        """For each step the storages that nothing needs after it."""
        needed = _numbers(
            [one for one in pytree.tree_leaves(self._record.outputs) if _is_tensor(one)]
        )
        last: dict[int, int] = {}
        for index, step in enumerate(self.steps):
            last.update(dict.fromkeys(_numbers(tensors_of(step)), index))
        found: list[list[int]] = [[] for _ in self.steps]
        for number, index in last.items():
            if number not in needed:
                found[index].append(number)
        return found


def _real(fake: Tensor, memory: dict[int, torch.UntypedStorage]) -> Tensor:
    """The tensor that a fake one stands for; its memory is allocated when it is first asked for."""
    number = storage_number(fake)
    if number not in memory:
        size = fake.untyped_storage().nbytes()
        memory[number] = torch.empty(size, dtype=torch.uint8, device=fake.device).untyped_storage()
    found = torch.empty(0, dtype=fake.dtype, device=fake.device)
    return found.set_(memory[number], fake.storage_offset(), fake.shape, fake.stride())


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _numbers(tensors: list[Tensor]) -> frozenset[int]:
    return frozenset(map(storage_number, tensors))
