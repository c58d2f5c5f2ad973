"""cancel_slices: a part of a concatenation becomes the tensor that was concatenated.

1. For what selects, slices or splits along an axis, the part it takes is followed back: through
   views that keep the part in one piece, flips, selections and splits along other axes, slices
   along the same one and sums, up to a concatenation or stack, or `ouro::cross_scan`;
2. where one concatenated tensor holds all of the part, that tensor takes its place, and the steps
   on the way are made again for it alone;
3. one order of `ouro::cross_scan` is the map's rows or columns, flipped for the orders 2 and 3;
4. `ouro::cross_merge` of four tensors that can be found so is their sum, orders 2 and 3 flipped.

No value is computed otherwise: results are equal bit for bit. Flips that appear are left to
fuse_direction_flips. Left alone: parts that end at anything else or that span two of the
concatenated tensors; steps other than 1; sizes that depend on the batch; tensors that an op writes
to in place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import fx

import ouro_compiler.ops  # noqa: F401  (registers torch.ops.ouro)
from ouro_compiler.graph import argument, aten, is_op, replace_node, value_of
from ouro_compiler.passes.base import PassContext
from ouro_compiler.passes.editing import call, written_in_place
from ouro_compiler.passes.normalize_linear import arrange_views
from ouro_compiler.passes.parts import SLICES, SPLITS, Part, is_unbound, part_of
from ouro_compiler.passes.views import (
    VIEWS,
    Atom,
    Dim,
    View,
    follow_view,
    fresh_view,
    plan_view,
    same_shape,
    write_view,
)

_CROSS_SCAN = torch.ops.ouro.cross_scan.default
_CROSS_MERGE = torch.ops.ouro.cross_merge.default


def cancel_slices(gm: fx.GraphModule, ctx: PassContext) -> bool:
    """Apply the rules of the module docstring; returns whether any did."""
    del ctx
    modified = False
    while _cancel(gm):  # what was made for a part may itself take a part
        arrange_views(gm)
        modified = True
    return modified


def _cancel(gm: fx.GraphModule) -> bool:
    finder = _Finder(written_in_place(gm.graph))
    modified = False
    for node in list(gm.graph.nodes):
        new = finder.merged(node) if is_op(node, _CROSS_MERGE) else finder.taken(node)
        if new is not None:
            replace_node(node, new)
            modified = True
    gm.graph.eliminate_dead_code()  # also of what was made for parts that were not found in the end
    return modified


@dataclass
class _Finder:
    """Follows parts back; what it makes stands right behind what it is made of, once a part."""

    written: set[fx.Node]
    made: dict[Part, fx.Node | None] = field(default_factory=dict)

    def taken(self, node: fx.Node) -> fx.Node | None:
        """A node equal to `node`, which takes a part, without taking it; None if there is none."""
        part = part_of(node)
        if part is None or node in self.written:
            return None
        found = self.find(part)
        if found is None:
            return None
        drops_axis = is_op(node, aten.select.int) or is_unbound(node)
        return call(node, aten.squeeze.dim, found, part.axis) if drops_axis else found

    def merged(self, node: fx.Node) -> fx.Node | None:
        """Rule 4."""
        y, height, width = node.args
        assert isinstance(y, fx.Node)
        found = [self.find(Part(y, 1, order, order + 1)) for order in range(4)]
        if node in self.written or any(one is None for one in found):
            return None
        orders = [call(node, aten.squeeze.dim, one, 1) for one in found]
        for order in (2, 3):
            orders[order] = call(node, aten.flip.default, orders[order], [-1])
        rows = call(node, aten.add.Tensor, orders[0], orders[2])
        columns = call(node, aten.add.Tensor, orders[1], orders[3])
        turned = call(node, aten.unflatten.int, columns, -1, [width, height])
        turned = call(node, aten.transpose.int, turned, 2, 3)
        return call(node, aten.add.Tensor, rows, call(node, aten.flatten.using_ints, turned, 2))

    def find(self, part: Part) -> fx.Node | None:
        """A node equal to a part that is not cut out of a larger tensor."""
        node = part.node
        size = value_of(node).shape[part.axis]
        if not isinstance(size, int) or node.op != "call_function" or node in self.written:
            return None
        if part not in self.made:
            self.made[part] = self._find(part)
        return self.made[part]

    def _rest(self, part: Part) -> fx.Node | None:
        """A part of a concatenated tensor: the tensor itself where the part is all of it."""
        if part.start == 0 and part.stop == value_of(part.node).shape[part.axis]:
            return part.node
        return self.find(part)

    def _find(self, part: Part) -> fx.Node | None:
        node = part.node
        if node.target in VIEWS:
            return self._through_view(part)
        if is_op(node, operator.getitem) and is_op(node.args[0], *SPLITS):
            return self._through_split(part)
        rule = _RULES.get(node.target)
        return None if rule is None else rule(self, part)

    def _through_view(self, part: Part) -> fx.Node | None:
        """The part must be the outermost atoms of its axis, and of an axis of the source."""
        source = part.node.args[0]
        before = fresh_view(source) if isinstance(source, fx.Node) else None
        view = None if before is None else follow_view(before, part.node)
        if view is None or not view.dims[part.axis]:
            return None
        lead, *inner = view.dims[part.axis]
        axes = [axis for axis, dim in enumerate(view.source_dims) if dim and dim[0] is lead]
        grain = _static_size(tuple(inner))
        if not axes or not grain or part.start % grain or part.stop % grain:
            return None
        scale = _static_size(view.source_dims[axes[0]][1:])
        if not scale:
            return None
        start, stop = part.start // grain, part.stop // grain
        piece = () if stop - start == 1 else (Atom(stop - start),)
        dims = _exchanged(view.dims, lead, piece)
        source_dims = _exchanged(view.source_dims, lead, piece)
        if plan_view(View(view.source, source_dims, dims)) is None:
            return None
        found = self._rest(Part(view.source, axes[0], start * scale, stop * scale))
        return found and write_view(View(found, source_dims, dims), part.node.next)

    def _through_split(self, part: Part) -> fx.Node | None:
        split, index = part.node.args
        assert isinstance(split, fx.Node)
        taken = part_of(part.node)
        if taken is None:
            return None
        axis = part.axis + (is_unbound(part.node) and part.axis >= taken.axis)
        if axis == taken.axis:
            start = taken.start + part.start
            return self._rest(Part(taken.node, axis, start, start + part.length))
        whole = replace(part, node=split, axis=axis)
        if whole not in self.made:
            found = self._rest(replace(whole, node=taken.node))
            again = found and call(split.next, split.target, found, *split.args[1:])
            self.made[whole] = again
        parts = self.made[whole]
        return parts and call(part.node.next, operator.getitem, parts, index)

    def _through_slice(self, part: Part) -> fx.Node | None:
        taken, node = part_of(part.node), part.node
        if taken is None:
            return None
        if part.axis == taken.axis:
            start = taken.start + part.start
            return self._rest(replace(part, node=taken.node, start=start, stop=start + part.length))
        found = self._rest(replace(part, node=taken.node))
        return found and call(node.next, node.target, found, *node.args[1:])

    def _through_select(self, part: Part) -> fx.Node | None:
        taken, node = part_of(part.node), part.node
        if taken is None:
            return None
        axis = part.axis + (part.axis >= taken.axis)
        found = self._rest(replace(part, node=taken.node, axis=axis))
        return found and call(node.next, node.target, found, taken.axis, taken.start)

    def _through_flip(self, part: Part) -> fx.Node | None:
        node = part.node
        rank = value_of(node).dim()
        if part.axis in [dim % rank for dim in argument(node, "dims")]:
            return None
        source = node.args[0]
        assert isinstance(source, fx.Node)
        found = self._rest(replace(part, node=source))
        return found and call(node.next, aten.flip.default, found, *node.args[1:])

    def _through_sum(self, part: Part) -> fx.Node | None:
        """A sum of two tensors of one shape, both of which must be found."""
        node = part.node
        a, b = node.args
        tensors = isinstance(a, fx.Node) and isinstance(b, fx.Node) and not node.kwargs
        if not tensors or not same_shape(value_of(a), value_of(b)):  # type: ignore[arg-type]
            return None
        found = [self._rest(replace(part, node=one)) for one in (a, b)]  # type: ignore[arg-type]
        return None if None in found else call(node.next, aten.add.Tensor, *found)

    def _from_cat(self, part: Part) -> fx.Node | None:
        first = 0
        for one in self._joined(part):
            size = value_of(one).shape[part.axis]
            if first <= part.start and part.stop <= first + size:
                return self._rest(Part(one, part.axis, part.start - first, part.stop - first))
            first += size
        return None

    def _from_stack(self, part: Part) -> fx.Node | None:
        tensors = self._joined(part)
        if part.length != 1 or not tensors:
            return None
        return call(part.node.next, aten.unsqueeze.default, tensors[part.start], part.axis)

    def _joined(self, part: Part) -> list[fx.Node]:
        """The tensors of a cat or stack along the part's axis; none where it also converts."""
        tensors, result = list(part.node.args[0]), value_of(part.node)  # type: ignore[arg-type]
        rank = result.dim() - is_op(part.node, aten.stack.default)
        along = argument(part.node, "dim") % result.dim() == part.axis
        plain = all(
            one.dim() == rank and one.dtype == result.dtype for one in map(value_of, tensors)
        )
        return tensors if along and plain else []

    def _from_cross_scan(self, part: Part) -> fx.Node | None:
        """Rule 3."""
        if part.axis != 1 or part.length != 1:
            return None
        before, x = part.node.next, part.node.args[0]
        if part.start % 2:
            x = call(before, aten.transpose.int, x, 2, 3)
        tokens = call(before, aten.flatten.using_ints, x, 2)
        if part.start >= 2:
            tokens = call(before, aten.flip.default, tokens, [-1])
        return call(before, aten.unsqueeze.default, tokens, 1)


def _static_size(dim: Dim) -> int | None:
    size = 1
    for atom in dim:
        if not isinstance(atom.size, int):
            return None
        size *= atom.size
    return size


def _exchanged(dims: tuple[Dim, ...], atom: Atom, by: Dim) -> tuple[Dim, ...]:
    return tuple(tuple(p for one in dim for p in (by if one is atom else (one,))) for dim in dims)


_RULES: dict[object, Callable[[_Finder, Part], fx.Node | None]] = {
    aten.cat.default: _Finder._from_cat,
    aten.stack.default: _Finder._from_stack,
    _CROSS_SCAN: _Finder._from_cross_scan,
    aten.flip.default: _Finder._through_flip,
    aten.add.Tensor: _Finder._through_sum,
    aten.select.int: _Finder._through_select,
    **dict.fromkeys(SLICES, _Finder._through_slice),
}
