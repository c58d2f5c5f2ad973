"""Parts of tensors: what selections, slices and items of splits take, as ranges of an axis."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import fx

from ouro_compiler.graph import argument, aten, is_op, value_of

SPLITS = (
    aten.chunk.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unbind.int,
)
SLICES = (aten.slice.Tensor, aten.narrow.default)


@dataclass(frozen=True)
class Part:
    """Entries start to stop of a tensor along an axis, which is not negative."""

    node: fx.Node
    axis: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        """How many entries it has."""
        return self.stop - self.start


def part_of(node: fx.Node) -> Part | None:
    """What a select, a slice or an item of a split takes of its source; None for other nodes."""
    if is_op(node, operator.getitem):
        split, index = node.args
        return _part_of_split(split, index) if is_op(split, *SPLITS) else None  # type: ignore[arg-type]
    if not is_op(node, aten.select.int, *SLICES):
        return None
    source = node.args[0]
    assert isinstance(source, fx.Node)
    axis = argument(node, "dim") % value_of(source).dim()
    size = value_of(source).shape[axis]
    if not isinstance(size, int):
        return None
    start = argument(node, "index" if is_op(node, aten.select.int) else "start") or 0
    length = 1 if is_op(node, aten.select.int) else value_of(node).shape[axis]
    if type(start) is not int or type(length) is not int:
        return None
    if is_op(node, aten.slice.Tensor) and argument(node, "step") != 1:
        return None
    first = min(size, max(0, start + size if start < 0 else start))
    return Part(source, axis, first, first + length)


def _part_of_split(split: fx.Node, index: int) -> Part | None:
    source = split.args[0]
    assert isinstance(source, fx.Node)
    axis = argument(split, "dim") % value_of(source).dim()
    if is_op(split, aten.unbind.int):
        return Part(source, axis, index, index + 1)
    sizes = [piece.shape[axis] for piece in value_of(split)]
    if any(type(size) is not int for size in sizes):
        return None
    start = sum(sizes[:index])
    return Part(source, axis, start, start + sizes[index])


def is_unbound(node: fx.Node) -> bool:
    """Is this an item of an unbind, which has lost the axis?"""
    return is_op(node, operator.getitem) and is_op(node.args[0], aten.unbind.int)
