"""fuse_direction_flips: flip -> conv, scan and what is between -> flip becomes `reverse=True`.

1. From every flip along one axis, "this is the flip of a tensor we have" is followed forward:
   through views that keep the axis whole, splits, slices and concatenations along other axes,
   linears, norms over the last dimension, pointwise ops whose other operands are flipped too or do
   not vary along the axis, `ouro.causal_conv1d` and `ouro.selective_scan` along time;
2. a flip of that axis gives back the tensor itself;
3. where every path from a flip ends so, the flips are dropped and convs and scans change `reverse`.

A flip with any path that ends otherwise stays, with all flips that meet it on the way: at the
graph's output, at an operand that is not flipped, at an op that is not listed (a sum over time is
the same for flipped input, but rounds otherwise), at an in-place write, at a flip of several axes.
Half a region cannot be rewritten: some reader would see time run the wrong way.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

import ouro_compiler.ops  # noqa: F401  (registers torch.ops.ouro)
from ouro_compiler.graph import all_arguments, argument, aten, is_op, replace_node, value_of
from ouro_compiler.passes.base import PassContext
from ouro_compiler.passes.editing import written_in_place
from ouro_compiler.passes.views import VIEWS, follow_view, fresh_view, same_size

_CONV = torch.ops.ouro.causal_conv1d.default
_SCAN = torch.ops.ouro.selective_scan.default
_CANCELLED = -1  # the axis of a flip that undoes another
_SPLITS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)
_POINTWISE = frozenset(
    {
        aten.silu.default,
        aten.gelu.default,
        aten.relu.default,
        aten.sigmoid.default,
        aten.softplus.default,
        aten.tanh.default,
        aten.exp.default,
        aten.neg.default,
        aten.to.dtype,
        aten._to_copy.default,
        aten.dropout.default,
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.mul.Tensor,
        aten.div.Tensor,
    }
)

Axes = dict[fx.Node, int]


@dataclass
class _Region:
    """What follows from taking `seeds`, flips of tensors that are not flipped, as removable."""

    axes: Axes  # the axis along which a tensor is flipped, or _CANCELLED
    origins: dict[fx.Node, frozenset[fx.Node]]
    refused: set[fx.Node]  # seeds with a path that ends in something else than a flip


def fuse_direction_flips(gm: fx.GraphModule, ctx: PassContext) -> bool:
    """Apply the rules of the module docstring; returns whether any flip was dropped."""
    del ctx
    refused: set[fx.Node] = set()
    written = written_in_place(gm.graph)
    while True:
        region = _follow(gm.graph, refused, written)
        if not region.refused:
            break
        refused |= region.refused
    for node in list(region.axes):
        if is_op(node, aten.flip.default):
            replace_node(node, node.args[0])  # type: ignore[arg-type]
        elif is_op(node, _CONV, _SCAN):
            *arguments, reverse = all_arguments(node)
            node.args, node.kwargs = (*arguments, not reverse), {}
    return bool(region.axes)


def _follow(graph: fx.Graph, refused: set[fx.Node], written: set[fx.Node]) -> _Region:
    """One walk forward from every flip that is not refused."""
    region = _Region({}, {}, set())
    for node in graph.nodes:
        flipped = {n: region.axes[n] for n in node.all_input_nodes if _axis(region, n) is not None}
        if not flipped:
            if _is_flip(node) and node not in refused and node not in written:
                region.axes[node] = _flip_axis(node)
                region.origins[node] = frozenset((node,))
            continue
        if is_op(node, aten.sym_size.int):
            continue  # sizes are the same
        origins = frozenset().union(*(region.origins[n] for n in flipped))
        axis = None if node in written else _axis_after(node, flipped)
        if axis is None:
            region.refused |= origins
        else:
            region.axes[node], region.origins[node] = axis, origins
    return region


def _axis(region: _Region, node: fx.Node) -> int | None:
    axis = region.axes.get(node)
    return None if axis == _CANCELLED else axis


def _is_flip(node: fx.Node) -> bool:
    return is_op(node, aten.flip.default) and len(argument(node, "dims")) == 1


def _flip_axis(node: fx.Node) -> int:
    rank: int = value_of(node).dim()
    return int(argument(node, "dims")[0]) % rank


def _axis_after(node: fx.Node, flipped: Axes) -> int | None:
    """The axis along which the result is flipped, given that of its inputs; None: it is not."""
    if node.op != "call_function":
        return None
    if _is_flip(node):
        return _CANCELLED if [_flip_axis(node)] == list(flipped.values()) else None
    if node.target in VIEWS:
        return _after_view(node, flipped)
    if node.target in _POINTWISE:
        return _after_pointwise(node, flipped)
    rule = _RULES.get(node.target)
    return None if rule is None else rule(node, flipped)


def _after_view(node: fx.Node, flipped: Axes) -> int | None:
    (source, axis), *others = flipped.items()
    before = fresh_view(source)
    if before is None or others or not before.dims[axis]:
        return None
    after = follow_view(before, node)
    if after is None or before.dims[axis] not in after.dims:
        return None
    return after.dims.index(before.dims[axis])


def _after_pointwise(node: fx.Node, flipped: Axes) -> int | None:
    """Operands align at the last dimension."""
    result = value_of(node)
    from_end = {axis - value_of(n).dim() for n, axis in flipped.items()}
    if len(from_end) != 1:
        return None
    (axis,) = from_end
    for operand in node.all_input_nodes:
        value = value_of(operand)
        if operand in flipped or not isinstance(value, Tensor) or value.dim() < -axis:
            continue
        if not same_size(value.shape[axis], 1):
            return None
    return int(axis + result.dim())


def _only_first(node: fx.Node, flipped: Axes) -> int | None:
    """The axis of the first argument, if it alone is flipped."""
    (source, axis), *others = flipped.items()
    return axis if source is node.args[0] and not others else None


def _after_split(node: fx.Node, flipped: Axes) -> int | None:
    return _unless_along(node, flipped, argument(node, "dim"))


def _after_select(node: fx.Node, flipped: Axes) -> int | None:
    axis = _unless_along(node, flipped, argument(node, "dim"))
    dropped = argument(node, "dim") % (value_of(node).dim() + 1)
    return None if axis is None else axis - int(dropped < axis)


def _unless_along(node: fx.Node, flipped: Axes, dim: int) -> int | None:
    axis = _only_first(node, flipped)
    if axis is None:
        return None
    rank: int = value_of(next(iter(flipped))).dim()
    return None if axis == dim % rank else axis


def _after_cat(node: fx.Node, flipped: Axes) -> int | None:
    tensors: Iterable[Any] = node.args[0]  # type: ignore[assignment]
    axes = {flipped.get(one) for one in tensors}
    if len(axes) != 1:
        return None
    axis = axes.pop()
    return None if axis == argument(node, "dim") % value_of(node).dim() else axis


def _after_last_dimension(node: fx.Node, flipped: Axes) -> int | None:
    """Linear: everything happens inside one token."""
    return _unless_along(node, flipped, -1)


def _after_layer_norm(node: fx.Node, flipped: Axes) -> int | None:
    shape = argument(node, "normalized_shape")
    return _unless_along(node, flipped, -1) if len(shape) == 1 else None


def _after_add_norm(node: fx.Node, flipped: Axes) -> int | None:
    x, residual, *parameters = all_arguments(node)
    streams = [one for one in (x, residual) if one is not None]
    axes = {flipped.get(one) for one in streams}
    if len(axes) != 1 or any(one in flipped for one in parameters if isinstance(one, fx.Node)):
        return None
    axis = axes.pop()
    return None if axis == value_of(x).dim() - 1 else axis


def _after_conv(node: fx.Node, flipped: Axes) -> int | None:
    return 2 if _only_first(node, flipped) == 2 else None


def _after_scan(node: fx.Node, flipped: Axes) -> int | None:
    u, delta, A, B, C, D, z, delta_bias, *_ = all_arguments(node)
    along_time = [one for one in (u, delta, B, C, z) if one is not None]
    if any(flipped.get(one) != value_of(one).dim() - 1 for one in along_time):
        return None
    return None if any(one in flipped for one in (A, D, delta_bias) if one is not None) else 2


_RULES: dict[object, Callable[[fx.Node, Axes], int | None]] = {
    operator.getitem: _only_first,
    **dict.fromkeys(_SPLITS, _after_split),
    aten.slice.Tensor: _after_split,
    aten.narrow.default: _after_split,
    aten.select.int: _after_select,
    aten.cat.default: _after_cat,
    aten.linear.default: _after_last_dimension,
    aten.layer_norm.default: _after_layer_norm,
    torch.ops.ouro.add_norm.default: _after_add_norm,
    _CONV: _after_conv,
    _SCAN: _after_scan,
}
