"""Elements of a tensor as products of elements of others: `delta[b, d, 3] * A[d, n]`.

Loops written by hand spell one product in many ways: einsum, broadcasting, transposes, slices, all
at once or a step at a time. Followed element by element, they become the same product.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from ouro_compiler.graph import argument, aten, is_op, value_of

Index = str | int  # an axis of the product, or one place
STATE = "n"
_VIEWS = frozenset(
    {
        aten.select.int,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.transpose.int,
        aten.permute.default,
        aten.expand.default,
        aten.slice.Tensor,
    }
)


@dataclass(frozen=True)
class Factor:
    """One element of `node`, or with `exponent` exp of a product of elements (node is None)."""

    node: fx.Node | None
    index: tuple[Index, ...]
    exponent: tuple[Factor, ...] = ()

    @property
    def axes(self) -> frozenset[str]:
        """The axes it varies along."""
        return frozenset(one for one in self.index if isinstance(one, str))

    @property
    def places(self) -> tuple[int, ...]:
        """The single places it is read at; where a dimension has one element, that is no place."""
        sizes = () if self.node is None else value_of(self.node).shape
        return tuple(
            one
            for one, size in zip(self.index, sizes, strict=False)
            if isinstance(one, int) and size != 1
        )


def factors(node: fx.Node, index: tuple[Index, ...]) -> tuple[Factor, ...] | None:
    """The element of `node` at `index` as a product; None if it is scaled by a number.

    Products are taken apart only where they vary along the state and something else, or where no
    place is left in them: `delta * u` of whole sequences stays one factor.
    """
    if is_op(node, *_VIEWS):
        below = _through_view(node, index)
        return (Factor(node, index),) if below is None else factors(*below)
    axes = {one for one in index if isinstance(one, str)}
    sizes = value_of(node).shape
    placed = any(isinstance(one, int) and size != 1 for one, size in zip(index, sizes, strict=True))
    mixed = STATE in axes and (len(axes) > 2 or placed or "b" in axes)
    if mixed or not (placed or axes <= {"d", STATE}):
        taken = _taken_apart(node, index)
        if taken is not None:
            return taken
    return (Factor(node, index),)


def _taken_apart(node: fx.Node, index: tuple[Index, ...]) -> tuple[Factor, ...] | None:
    if is_op(node, aten.mul.Tensor) and all(isinstance(one, fx.Node) for one in node.args):
        return product(*(_broadcast(one, index) for one in node.args))
    if is_op(node, aten.exp.default):
        inner = factors(node.args[0], index)  # type: ignore[arg-type]
        return None if inner is None else (Factor(None, (), tuple(sorted(inner, key=_order))),)
    if is_op(node, aten.einsum.default):
        parsed = parse_einsum(node)
        if parsed is not None and not parsed.summed:
            where = dict(zip(parsed.output, index, strict=True))
            return product(*parsed.operands_at(where))
    return None


def product(*parts: tuple[fx.Node, tuple[Index, ...]]) -> tuple[Factor, ...] | None:
    """The product of elements of several nodes."""
    found: list[Factor] = []
    for node, index in parts:
        one = factors(node, index)
        if one is None:
            return None
        found += one
    return tuple(found)


def _broadcast(node: Any, index: tuple[Index, ...]) -> tuple[fx.Node, tuple[Index, ...]]:
    """The element that an operand of an elementwise op gives to the result's element."""
    shape = value_of(node).shape
    kept = index[len(index) - len(shape) :]
    return node, tuple(0 if size == 1 else one for one, size in zip(kept, shape, strict=True))


def _through_view(
    node: fx.Node, index: tuple[Index, ...]
) -> tuple[fx.Node, tuple[Index, ...]] | None:
    """The same element in the tensor under a view; None for a slice that moves an axis."""
    source: Any = node.args[0]
    rank = value_of(source).dim()
    places = list(index)
    if is_op(node, aten.select.int):
        size = value_of(source).shape[node.args[1]]
        place = int(node.args[2])  # type: ignore[arg-type]
        if place < 0:
            place += size
        places.insert(int(node.args[1]) % rank, place)  # type: ignore[arg-type]
    elif is_op(node, aten.unsqueeze.default):
        del places[int(node.args[1]) % (rank + 1)]  # type: ignore[arg-type]
    elif is_op(node, aten.squeeze.dim):
        if len(places) < rank:
            places.insert(int(node.args[1]) % rank, 0)  # type: ignore[arg-type]
    elif is_op(node, aten.transpose.int):
        first, second = (int(dim) % rank for dim in node.args[1:3])  # type: ignore[arg-type]
        places[first], places[second] = places[second], places[first]
    elif is_op(node, aten.permute.default):
        order = [int(dim) % rank for dim in node.args[1]]  # type: ignore[arg-type, union-attr]
        places = [index[order.index(dim)] for dim in range(rank)]
    elif is_op(node, aten.expand.default):
        return _broadcast(source, index)
    elif not _slice(node, places):
        return None
    return source, tuple(places)


def _slice(node: fx.Node, places: list[Index]) -> bool:
    """Undo a slice in `places`; only a single place can be moved."""
    dim, start, step = (argument(node, name) for name in ("dim", "start", "step"))
    size = value_of(node.args[0]).shape[dim]  # type: ignore[arg-type]
    place = places[dim % len(places)]
    if value_of(node).shape[dim] == 1:
        place = 0
    if step != 1 or not isinstance(place, int) or not isinstance(size, int):
        return False
    first = int(start or 0)
    places[dim % len(places)] = place + (first + size if first < 0 else first)
    return True


@dataclass(frozen=True)
class Einsum:
    """An einsum of nodes, by its letters."""

    operands: tuple[fx.Node, ...]
    inputs: tuple[str, ...]
    output: str

    @property
    def summed(self) -> str:
        """Letters that are summed over."""
        return "".join(sorted(set("".join(self.inputs)) - set(self.output)))

    def operands_at(self, where: Mapping[str, Index]) -> list[tuple[fx.Node, tuple[Index, ...]]]:
        """Each operand with its index, given each letter's."""
        return [
            (node, tuple(where[letter] for letter in letters))
            for node, letters in zip(self.operands, self.inputs, strict=True)
        ]


def parse_einsum(node: fx.Node) -> Einsum | None:
    """None for what is no plain einsum: repeated letters in an operand, an ellipsis."""
    if not is_op(node, aten.einsum.default):
        return None
    equation = str(node.args[0]).replace(" ", "")
    left, arrow, output = equation.partition("->")
    inputs = tuple(left.split(","))
    repeated = any(len(set(letters)) < len(letters) for letters in inputs)
    if not arrow or "." in equation or repeated:
        return None
    return Einsum(tuple(node.args[1]), inputs, output)  # type: ignore[arg-type]


def _order(factor: Factor) -> tuple[str, str]:
    return (factor.node.name if factor.node is not None else "", str(factor.index))
