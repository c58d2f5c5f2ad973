"""read_maps_by_index: a map in another order is read through strides instead of being copied.

    map (B, C, H, W) -> transpose -> flatten (a copy) -> quantizer or scan

Quantizers and scans take a map where they take tokens (ops/maps.py): they get the transposed view,
and the copy goes. VMamba's column-major order is the case. Applied where the time of the operand is
two axes of one tensor, views alone give them back, and nothing but such readers needs the copy.

Left alone: an order that is a view already; a copy that something else reads, as the product does
where outliers stay in floating point; axes that are merged with others (windows are in the batch);
tensors that an op writes to in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ouro_compiler.graph import is_op, value_of
from ouro_compiler.passes.base import PassContext
from ouro_compiler.passes.editing import written_in_place
from ouro_compiler.passes.views import VIEWS, View, follow_view, fresh_view, plan_view, write_view

_OURO = torch.ops.ouro
# Which dimension of their first argument, (B, L, K) or (B, D, L), is time.
_TIME = {
    _OURO.quantize_dynamic_outlier.default: 1,
    _OURO.selective_scan.default: 2,
    _OURO.selective_scan_dynamic_outlier.default: 2,
}


@dataclass(frozen=True)
class _Reading:
    """A reader, the copy in front of it, and its operand as a map of the copied tensor."""

    reader: fx.Node
    copy: fx.Node
    map: View


def read_maps_by_index(gm: fx.GraphModule, ctx: PassContext) -> bool:
    """Apply the rule of the module docstring; returns whether it did anywhere."""
    del ctx
    written = written_in_place(gm.graph)
    found = {node: one for node in gm.graph.nodes if (one := _reading(node, written)) is not None}
    readings = [one for one in found.values() if _read_by(one.copy, found)]
    maps: dict[fx.Node, fx.Node] = {}
    for one in readings:
        operand = one.reader.args[0]
        assert isinstance(operand, fx.Node)
        if operand not in maps:
            made = write_view(one.map, one.reader)
            assert made is not None  # planned
            maps[operand] = made
        one.reader.update_arg(0, maps[operand])
    if readings:
        gm.graph.eliminate_dead_code()
    return bool(readings)


def _reading(node: fx.Node, written: set[fx.Node]) -> _Reading | None:
    """How a node could read a map without its copy; None where it has none, or could not."""
    if not is_op(node, *_TIME) or not node.args:
        return None
    source = node.args[0]
    chain: list[fx.Node] = []
    while isinstance(source, fx.Node) and is_op(source, *VIEWS):
        chain.insert(0, source)
        source = source.args[0]
    assert isinstance(source, fx.Node)
    view = fresh_view(source)
    for one in chain:
        view = None if view is None else follow_view(view, one)
    copy = next((one for one in chain if not _share_memory(value_of(one), value_of(source))), None)
    if view is None or copy is None or len(view.dims) != 3 or {source, *chain} & written:
        return None
    axis = _TIME[node.target]  # type: ignore[index]
    time = view.dims[axis]
    if len(time) != 2 or not all(isinstance(atom.size, int) for atom in time):
        return None
    split = view.with_dims((*view.dims[:axis], time[:1], time[1:], *view.dims[axis + 1 :]))
    steps = plan_view(split)
    return None if steps is None or steps.merge is not None else _Reading(node, copy, split)


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)


def _read_by(copy: fx.Node, readings: dict[fx.Node, _Reading]) -> bool:
    """Do only these readers, as their first argument, need a copy?"""
    waiting = [copy]
    while waiting:
        node = waiting.pop()
        for user in node.users:
            if is_op(user, *VIEWS):
                waiting.append(user)
            elif user not in readings or any(one is node for one in _others(user)):
                return False
    return True


def _others(reader: fx.Node) -> list[Any]:
    """All arguments but the first, those in lists too."""
    return pytree.tree_leaves((reader.args[1:], reader.kwargs))
