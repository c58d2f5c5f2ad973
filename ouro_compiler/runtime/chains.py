"""Recorded launches of which the first makes what the second alone reads, as one launch."""

from __future__ import annotations

from collections import Counter

from torch import Tensor
from torch.utils import _pytree as pytree

from ouro_compiler.kernels.launch import Launch
from ouro_compiler.kernels.quantizing_linear import quantizing_linear
from ouro_compiler.runtime.record import Record, Step, storage_number, tensors_of


def chain_launches(record: Record) -> tuple[list[Step], list[str]]:
    """The steps of a record, chained where a kernel does both, and the names of their nodes.

    A chain stands where its second launch stood: all that it reads is there by then.
    """
    steps: list[Step | None] = list(record.steps)
    names = list(record.names)
    outputs = [one for one in pytree.tree_leaves(record.outputs) if isinstance(one, Tensor)]
    named = Counter(storage_number(one) for one in outputs)
    for step in record.steps:
        named.update({storage_number(one) for one in tensors_of(step)})
    makers: dict[int, int] = {}  # the last step that names a storage, by the storage's number
    for index, step in enumerate(record.steps):
        if isinstance(step, Launch) and step.args:
            first = makers.get(storage_number(step.args[0]))
            maker = None if first is None else steps[first]
            if isinstance(maker, Launch):
                chained = quantizing_linear(maker, step, _same)
                if chained is not None and _private(maker, chained, named):
                    steps[first], steps[index] = None, chained  # type: ignore[index]
                    names[index] = f"{names[first]} + {names[index]}"  # type: ignore[index]
        makers.update({storage_number(one): index for one in tensors_of(step)})
    kept = [(step, name) for step, name in zip(steps, names, strict=True) if step is not None]
    return [step for step, _ in kept], [name for _, name in kept]


def _private(maker: Launch, chained: Launch, named: Counter[int]) -> bool:
    """Does nothing but the two steps name what the first one makes and the chain leaves out?"""
    kept = {storage_number(one) for one in tensors_of(chained)}
    given = {storage_number(one) for one in tensors_of(maker)}
    return all(named[one] == 2 for one in given - kept)


def _same(one: Tensor, other: Tensor) -> bool:
    """Are they one piece of memory, seen alike?"""
    return storage_number(one) == storage_number(other) and (
        (one.dtype, one.shape, one.stride(), one.storage_offset())
        == (other.dtype, other.shape, other.stride(), other.storage_offset())
    )
