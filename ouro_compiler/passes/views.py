"""Views tracked symbolically: which axes of a source tensor each dimension of a view is made of.

A source's dimensions are ordered tuples of atoms, and so are those of every view of it. Reshapes
merge atoms and split them, permutations reorder tuples, dimensions of size 1 are empty tuples.
Sizes come from meta["val"] and are equal only where that is provable, so nothing here adds a guard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ouro_compiler.graph import argument, aten, get_constant, is_op
from ouro_compiler.passes.editing import call

Size = int | torch.SymInt

_RESHAPES = frozenset(
    {
        aten.reshape.default,
        aten.view.default,
        aten._unsafe_view.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unsqueeze.default,
        aten.contiguous.default,
        aten.clone.default,
    }
)
_TRANSPOSES = frozenset({aten.transpose.int, aten.swapaxes.default})
_REVERSALS = frozenset({aten.t.default, aten.numpy_T.default})
PERMUTATIONS = _TRANSPOSES | _REVERSALS | {aten.mT.default, aten.permute.default}
VIEWS = _RESHAPES | PERMUTATIONS
# Of a parameter also parts: VMamba keeps the weights of several directions in one.
_CONSTANT_VIEWS = VIEWS | {aten.slice.Tensor, aten.select.int}


@dataclass(frozen=True, eq=False)
class Atom:
    """An indivisible piece of an axis; two atoms are the same piece only if they are one object."""

    size: Size


Dim = tuple[Atom, ...]
Dims = tuple[Dim, ...]


@dataclass(frozen=True)
class View:
    """A tensor as a rearrangement of `source`, whose own dimensions are `source_dims`."""

    source: fx.Node
    source_dims: Dims
    dims: Dims

    def substitute(self, atom: Atom, pieces: Dim) -> View:
        """The same view with one atom split into pieces."""

        def split(dims: Dims) -> Dims:
            return tuple(
                tuple(p for one in dim for p in (pieces if one is atom else (one,))) for dim in dims
            )

        return View(self.source, split(self.source_dims), split(self.dims))

    def with_dims(self, dims: Dims) -> View:
        """The same source, arranged otherwise."""
        return View(self.source, self.source_dims, dims)


# --- sizes


def same_size(a: Size, b: Size) -> bool:
    """Are two sizes equal for every batch?"""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(statically_known_true(a == b))


def same_shape(a: Tensor, b: Tensor) -> bool:
    """Do two tensors have the same shape for every batch?"""
    return a.dim() == b.dim() and all(map(same_size, a.shape, b.shape))


def _quotient(a: Any, b: Any) -> Size | None:
    """a / b where b provably divides a."""
    if not statically_known_true(a % b == 0):
        return None
    quotient: Any = a // b
    static = quotient if isinstance(quotient, int) else quotient.node.maybe_as_int()
    return quotient if static is None else int(static)


def _product(dim: Dim) -> Size:
    size: Size = 1
    for atom in dim:
        size = size * atom.size
    return size


# --- following views


def fresh_view(node: fx.Node) -> View | None:
    """A tensor as its own source; None where it has no known shape or may be empty."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or any(same_size(size, 0) for size in value.shape):
        return None
    dims = tuple(() if same_size(size, 1) else (Atom(size),) for size in value.shape)
    return View(node, dims, dims)


def follow_view(view: View, node: fx.Node) -> View | None:
    """The view that `node`, an op of VIEWS, makes of its input's view; None where unprovable."""
    if node.target in PERMUTATIONS:
        return view.with_dims(tuple(view.dims[axis] for axis in axes_order(node, len(view.dims))))
    found = _reshaped(view, node.meta["val"].shape)
    return None if found is None else _coarsened(found)


def axes_order(node: fx.Node, rank: int) -> list[int]:
    """For each dimension of an op of PERMUTATIONS, the one of its input that it is."""
    order = list(range(rank))
    if node.target is aten.permute.default:
        return [axis % rank for axis in argument(node, "dims")]
    if node.target in _REVERSALS:
        return order[::-1]
    a: Any = -2
    b: Any = -1
    if node.target in _TRANSPOSES:
        _, a, b = node.args
    order[a], order[b] = order[b], order[a]
    return order


def _reshaped(view: View, shape: Sequence[Size]) -> View | None:
    """Row-major regrouping of a view's atoms into `shape`, splitting atoms where needed."""
    pending = [atom for dim in view.dims for atom in dim]
    dims: list[Dim] = []
    for size in shape:
        need, taken = size, []
        while not same_size(need, 1):
            if not pending:
                return None
            atom = pending.pop(0)
            rest = _quotient(need, atom.size)
            if rest is None:
                inner = _quotient(atom.size, need)
                if inner is None:
                    return None
                pieces = (Atom(need), Atom(inner))
                view = view.substitute(atom, pieces)
                dims = [_replaced(dim, atom, pieces) for dim in dims]
                pending.insert(0, pieces[1])
                atom, rest = pieces[0], 1
            taken.append(atom)
            need = rest
        dims.append(tuple(taken))
    return None if pending else view.with_dims(tuple(dims))


def _coarsened(view: View) -> View:
    """Pieces that are together again are one atom, which the next reshape may split elsewhere."""
    whole = {id(unit[0]): _joined(unit) for unit in _units(view)}

    def join(dims: Dims) -> Dims:
        return tuple(tuple(whole[id(a)] for a in dim if id(a) in whole) for dim in dims)

    return View(view.source, join(view.source_dims), join(view.dims))


def _joined(unit: Dim) -> Atom:
    return unit[0] if len(unit) == 1 else Atom(_product(unit))


def _replaced(dim: Dim, atom: Atom, pieces: Dim) -> Dim:
    return tuple(p for one in dim for p in (pieces if one is atom else (one,)))


# --- writing views


@dataclass(frozen=True)
class Steps:
    """The shortest spelling of a view: reshape, permute, reshape, each None where not needed."""

    split: list[int] | None
    order: list[int] | None
    merge: list[int] | None

    @property
    def count(self) -> int:
        """Number of ops."""
        return sum(step is not None for step in (self.split, self.order, self.merge))


def plan_view(view: View) -> Steps | None:
    """How to write a view; None where a reshape would need two dynamic sizes."""
    if view.dims == view.source_dims:
        return Steps(None, None, None)
    units = _units(view)
    before = [unit for dim in view.source_dims for unit in _in_units(dim, units)]
    after = [unit for dim in view.dims for unit in _in_units(dim, units)]
    split: list[int] | None = None
    order: list[int] | None = None
    merge: list[int] | None = None
    if len(before) != len(view.source_dims) or () in view.source_dims:
        split = _shape(before)
        if split is None:
            return None
    position = {id(unit[0]): index for index, unit in enumerate(before)}
    found = [position[id(unit[0])] for unit in after]
    if found != sorted(found):
        order = found
    if tuple(after) != view.dims:
        merge = _shape(view.dims)
        if merge is None:
            return None
    if order is None and split is not None:  # one reshape does both
        split, merge = None, _shape(view.dims)
        if merge is None:
            return None
    return Steps(split, order, merge)


def write_view(view: View, before: fx.Node) -> fx.Node | None:
    """Nodes that compute a view from its source, placed before a node; None where unwritable."""
    steps = plan_view(view)
    if steps is None:
        return None
    node = view.source
    for target, sizes in (
        (aten.reshape.default, steps.split),
        (aten.permute.default, steps.order),
        (aten.reshape.default, steps.merge),
    ):
        if sizes is not None:
            node = call(before, target, node, sizes)
    return node


def _units(view: View) -> list[Dim]:
    """The longest runs of atoms that stay together in the source and in the view."""
    follower = {id(a): b for dim in view.dims for a, b in pairwise(dim)}
    units: list[Dim] = []
    for dim in view.source_dims:
        run: list[Atom] = []
        for atom in dim:
            if run and follower.get(id(run[-1])) is not atom:
                units.append(tuple(run))
                run = []
            run.append(atom)
        if run:
            units.append(tuple(run))
    return units


def _in_units(dim: Dim, units: list[Dim]) -> list[Dim]:
    first = {id(unit[0]): unit for unit in units}
    return [first[id(atom)] for atom in dim if id(atom) in first]


def _shape(dims: Sequence[Dim]) -> list[int] | None:
    """Sizes for a reshape, -1 for the dynamic one; None if there are two."""
    sizes = [_product(dim) for dim in dims]
    if sum(not isinstance(size, int) for size in sizes) > 1:
        return None
    return [size if isinstance(size, int) else -1 for size in sizes]


# --- parameters


def evaluate_constant(gm: fx.GraphModule, node: Any) -> tuple[fx.Node, Tensor] | None:
    """(get_attr node, value) of an expression of views and parts of one parameter, else None."""
    value = get_constant(gm, node)
    if value is not None:
        return node, value.detach()
    if not is_op(node, *_CONSTANT_VIEWS):
        return None
    found = evaluate_constant(gm, node.args[0])
    if found is None or any(isinstance(arg, fx.Node) for arg in node.all_input_nodes[1:]):
        return None
    base, value = found
    with torch.no_grad():
        return base, node.target(value, *node.args[1:], **node.kwargs)
