"""fuse_cross_merge: the sum of a map's orders joins the norm and the quantizer behind it.

    (rows [+ rows]) + transposed (columns [+ columns]) -> add_norm_quantize

becomes one `ouro::cross_merge_norm_quantize`, which reads columns by index: VMamba's merge of four
scans took three sums and a copy. Views may stand anywhere between; sums keep their order, so that
nothing is rounded otherwise.
Left alone: norms with a residual, or whose sum something else reads; sums of other orders, or in
another order of additions; norms without a quantizer, as where a gate follows.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ouro_compiler.graph import all_arguments, aten, insert_call, is_op, replace_node, value_of
from ouro_compiler.passes.base import PassContext
from ouro_compiler.passes.editing import written_in_place
from ouro_compiler.passes.views import (
    VIEWS,
    View,
    follow_view,
    fresh_view,
    plan_view,
    same_shape,
    write_view,
)

_NORM = torch.ops.ouro.add_norm_quantize.default
_FUSED = torch.ops.ouro.cross_merge_norm_quantize.default
_SUM = 4  # the output of add_norm_quantize that is what it normalises


@dataclass(frozen=True)
class _Term:
    """A summand, and the views between it and the norm, its own first."""

    node: fx.Node
    views: tuple[fx.Node, ...]


@dataclass(frozen=True)
class _Order:
    """A summand as (B, K, L); its (height, width) where it runs column after column."""

    view: View
    sides: tuple[int, int] | None


def fuse_cross_merge(gm: fx.GraphModule, ctx: PassContext) -> bool:
    """Fuse every match of the module docstring's pattern."""
    del ctx
    written = written_in_place(gm.graph)
    modified = False
    for node in list(gm.graph.nodes):
        orders = _match(node, written) if is_op(node, _NORM) else None
        if orders is not None:
            _fuse(node, *orders)
            modified = True
    if modified:
        gm.graph.eliminate_dead_code()
    return modified


def _match(norm: fx.Node, written: set[fx.Node]) -> tuple[list[_Order], list[_Order]] | None:
    """(rows, columns), one or two each, that a norm adds up; None where it adds something else."""
    x, residual, *_ = all_arguments(norm)
    if residual is not None or any(one.args[1] == _SUM and one.users for one in norm.users):
        return None
    both = _summands(_Term(x, ()), written)
    if both is None:
        return None
    found = []
    for term in both:
        orders = [_order(one, written) for one in _summands(term, written) or (term,)]
        known = [one for one in orders if one is not None]
        if len(known) < len(orders) or len({one.sides for one in known}) > 1:
            return None
        found.append(known)
    rows, columns = sorted(found, key=lambda orders: orders[0].sides is not None)
    dtypes = {value_of(one.view.source).dtype for one in (*rows, *columns)}
    if rows[0].sides is not None or columns[0].sides is None or len(dtypes) > 1:
        return None
    return rows, columns


def _summands(term: _Term, written: set[fx.Node]) -> tuple[_Term, _Term] | None:
    """Both sides of the sum that a term is, through views, where nothing else reads it."""
    node, views = term.node, list(term.views)
    while is_op(node, *VIEWS) and len(node.users) == 1 and node not in written:
        views.insert(0, node)
        node = node.args[0]  # type: ignore[assignment]
    if not is_op(node, aten.add.Tensor) or len(node.users) > 1 or node in written or node.kwargs:
        return None
    a, b = node.args
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return None
    if not same_shape(value_of(a), value_of(b)):
        return None
    return _Term(a, tuple(views)), _Term(b, tuple(views))


def _order(term: _Term, written: set[fx.Node]) -> _Order | None:
    """A term's source as (B, K, L), by views alone; None where it is no order of a map."""
    source, views = term.node, list(term.views)
    while is_op(source, *VIEWS):
        views.insert(0, source)
        source = source.args[0]  # type: ignore[assignment]
    view = None if {source, *views} & written else fresh_view(source)
    for one in views:
        view = None if view is None else follow_view(view, one)
    if view is None or len(view.dims) != 3:
        return None
    batch, time, channels = view.dims  # of what the norm reads: (B, L, K)
    sides = None
    if len(time) == 2:  # of the raster, where the source has them the other way round
        height, width = (atom.size for atom in time)
        if not isinstance(height, int) or not isinstance(width, int):
            return None
        sides = height, width
    turned = view.with_dims((batch, channels, time[::-1]))
    steps = plan_view(turned)
    if len(time) > 2 or steps is None or steps.merge is not None:
        return None
    return _Order(turned, sides)


def _fuse(norm: fx.Node, rows: list[_Order], columns: list[_Order]) -> None:
    _, _, weight, bias, eps, rms, _, *quantizer = all_arguments(norm)
    operands: list[Any] = []
    for pair in (rows, columns):
        operands += [write_view(one.view, norm) for one in pair] + [None] * (2 - len(pair))
    fused = insert_call(
        norm.graph, norm, _FUSED, *operands, *(columns[0].sides or ()), weight, bias, eps, rms,
        *quantizer,
    )  # fmt: skip
    fused.meta.update({key: norm.meta[key] for key in norm.meta if key != "val"})
    for item in list(norm.users):
        if item.args[1] != _SUM:
            new = insert_call(norm.graph, norm, operator.getitem, fused, item.args[1])
            replace_node(item, new)
