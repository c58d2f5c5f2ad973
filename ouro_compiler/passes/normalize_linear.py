"""normalize_linear: every linear layer is `aten.linear` on (B, L, K), with a parameter (O, K).

1. Products with a constant matrix become linears: matmul, mm, addmm, from either side.
2. So do convolutions over one position (1x1 conv2d; conv1d of kernel 1, in groups or not) and
   einsums that contract one axis of a constant, with or without a group axis: one linear a group.
   A group may have one input channel (VMamba's dt_proj of rank 1) if it has several results.
3. A linear on any flattening or reordering of (B, ..., K) is computed on (B, L, K), which is a
   permutation of the flattening's source, and the rearrangement moves behind it. B is the one
   dynamic axis: samples, or windows of samples.
4. So are what stands between two such linears: splits of channels, and pointwise ops.
5. A chain of views becomes the shortest chain that computes the same from the same source: a pure
   permutation becomes one permute, and a chain that does nothing disappears.
6. `view` becomes `reshape`: layouts are the passes' own business, and `view` fails on some.

Axes are followed symbolically (views.py). New parameters are called after the one they come from:
`x_proj.weight_0` is the first group's part of `x_proj.weight`.

Left alone: depthwise convolutions (a group is one channel in and out); products of two activations
or two parameters; linears on (B, K), such as a head; linears on three dimensions whose first
contains the batch; whatever cannot be proven for every batch; tensors that an op writes to in
place.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
from torch import fx

from ouro_compiler.graph import aten, delete_unused_constants, is_op, replace_node, value_of
from ouro_compiler.passes.base import PassContext
from ouro_compiler.passes.editing import call, written_in_place
from ouro_compiler.passes.linear_forms import as_linear
from ouro_compiler.passes.views import (
    VIEWS,
    Atom,
    Dim,
    View,
    follow_view,
    fresh_view,
    plan_view,
    same_size,
    write_view,
)

_SPLITS = (aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default)
_SLICES = (aten.slice.Tensor, aten.narrow.default)
_POINTWISE = (
    aten.silu.default,
    aten.gelu.default,
    aten.relu.default,
    aten.sigmoid.default,
    aten.softplus.default,
    aten.tanh.default,
    aten.exp.default,
    aten.neg.default,
)


def normalize_linear(gm: fx.GraphModule, ctx: PassContext) -> bool:
    """Apply the rules of the module docstring; returns whether any did."""
    del ctx
    modified = _write_as_linears(gm)
    modified = arrange_views(gm) or modified
    if modified:
        gm.graph.eliminate_dead_code()
        delete_unused_constants(gm)
    return modified


def arrange_views(gm: fx.GraphModule) -> bool:
    """Apply rules 3 to 5 alone, for passes that leave views behind; returns whether any did."""
    return _Arranger(gm).run()


def _write_as_linears(gm: fx.GraphModule) -> bool:
    written = written_in_place(gm.graph)
    modified = False
    for node in list(gm.graph.nodes):
        if node in written or any(one in written for one in node.all_input_nodes):
            continue
        if is_op(node, aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
            modified = True
        replacement = as_linear(gm, node)
        if replacement is not None:
            replace_node(node, replacement)
            modified = True
    return modified


@dataclass
class _Arranger:
    """Rules 3 to 5, in one walk in topological order.

    views holds what is known of a tensor, depth the number of views between it and its source.
    """

    gm: fx.GraphModule
    views: dict[fx.Node, View] = field(default_factory=dict)
    depth: dict[fx.Node, int] = field(default_factory=dict)
    modified: bool = False

    def run(self) -> bool:
        written = written_in_place(self.gm.graph)
        for node in list(self.gm.graph.nodes):
            if node.op != "call_function" or not node.users:
                continue
            if node in written or any(one in written for one in node.all_input_nodes):
                continue
            if node.target in VIEWS:
                self._shorten(node)
            elif is_op(node, aten.linear.default):
                self._move_behind_linear(node)
            elif is_op(node, *_SPLITS):
                self._move_behind_split(node)
            elif is_op(node, *_SLICES):
                self._move_behind_slice(node)
            elif is_op(node, *_POINTWISE):
                self._move_behind_pointwise(node)
        return self.modified

    def _view_of(self, node: object) -> View | None:
        if not isinstance(node, fx.Node) or node.op == "get_attr":
            return None
        if node not in self.views:
            view = fresh_view(node)
            if view is None:
                return None
            self.views[node], self.depth[node] = view, 0
        return self.views[node]

    def _shorten(self, node: fx.Node) -> None:
        source = node.args[0]
        view = self._view_of(source)
        found = None if view is None else follow_view(view, node)
        if found is None:
            return
        assert isinstance(source, fx.Node)
        self.views[node], self.depth[node] = found, self.depth[source] + 1
        steps = plan_view(found)
        if steps is not None and steps.count < self.depth[node]:
            self._replace(node, found)

    def _replace(self, node: fx.Node, view: View) -> None:
        """Let `view`, which is writable, take the place of a node."""
        steps, new = plan_view(view), write_view(view, node)
        assert steps is not None
        assert new is not None
        replace_node(node, new)
        if new is not view.source:
            self.views[new], self.depth[new] = view, steps.count
        self.modified = True

    def _move_behind_linear(self, node: fx.Node) -> None:
        x, *parameters = node.args
        view = self._view_of(x)
        if view is None or len(view.dims) < 2:
            return
        tokens = tuple(atom for dim in view.dims[:-1] for atom in dim)
        samples = [atom for atom in tokens if isinstance(atom.size, torch.SymInt)]
        if len(samples) != 1 or len(tokens) < 2:
            return
        first = view.dims[0][:1]
        if len(view.dims) == 3 and first and first[0] is samples[0]:
            return
        positions = tuple(atom for atom in tokens if atom is not samples[0])
        by_token = view.with_dims(((samples[0],), positions, view.dims[-1]))
        features = _new_dim(value_of(node).shape[-1])
        after = (*view.dims[:-1], features)
        result_dims = ((samples[0],), positions, features)
        new_x = write_view(by_token, node)
        new = call(node, aten.linear.default, new_x, *parameters)
        self._replace(node, View(new, result_dims, after))

    def _move_behind_split(self, node: fx.Node) -> None:
        found = self._whole_axis(node, 2)
        parts = list(node.users)
        if found is None or any(not is_op(part, operator.getitem) for part in parts):
            return
        view, axis, at = found
        split = call(node, node.target, view.source, node.args[1], at)
        for part in parts:
            self._take(part, call(node, operator.getitem, split, part.args[1]), view, axis, at)

    def _move_behind_slice(self, node: fx.Node) -> None:
        found = self._whole_axis(node, 1)
        if found is not None:
            view, axis, at = found
            new = call(node, node.target, view.source, at, *node.args[2:])
            self._take(node, new, view, axis, at)

    def _whole_axis(self, node: fx.Node, position: int) -> tuple[View, int, int] | None:
        """(input's view, the axis node cuts, that axis in the source), for flattened inputs."""
        view = self._view_of(node.args[0])
        if view is None or not _is_flattened(view):
            return None
        axis = node.args[position] if len(node.args) > position else 0
        axis %= len(view.dims)  # type: ignore[operator]
        dim = view.dims[axis]  # type: ignore[index]
        if not dim or dim not in view.source_dims:
            return None
        return view, axis, view.source_dims.index(dim)  # type: ignore[return-value]

    def _take(self, node: fx.Node, new: fx.Node, view: View, axis: int, at: int) -> None:
        """Replace a part of a view by the same view of `new`, that part of the source."""
        piece = _new_dim(value_of(new).shape[at])
        source_dims, dims = list(view.source_dims), list(view.dims)
        source_dims[at] = dims[axis] = piece
        self._replace(node, View(new, tuple(source_dims), tuple(dims)))

    def _move_behind_pointwise(self, node: fx.Node) -> None:
        view = self._view_of(node.args[0])
        if view is None or not _is_flattened(view):
            return
        new = call(node, node.target, view.source, *node.args[1:])
        self._replace(node, View(new, view.source_dims, view.dims))


def _is_flattened(view: View) -> bool:
    """Does a dimension hold the batch, the one dynamic axis, together with something else?"""
    dynamic = [dim for dim in view.dims for atom in dim if isinstance(atom.size, torch.SymInt)]
    return len(dynamic) == 1 and len(dynamic[0]) > 1


def _new_dim(size: int | torch.SymInt) -> Dim:
    return () if same_size(size, 1) else (Atom(size),)
