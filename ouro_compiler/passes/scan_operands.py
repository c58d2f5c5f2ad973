"""The operands of a scan, gathered from a step of it, and the op written in its place."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

import ouro_compiler.ops  # noqa: F401  (registers torch.ops.ouro)
from ouro_compiler.graph import aten, is_op, replace_node, value_of
from ouro_compiler.passes.editing import call
from ouro_compiler.passes.products import STATE, Factor, factors
from ouro_compiler.passes.scan_steps import TIME, Step, broadcast_index

_SEQUENCE = ("b", "d", TIME)


@dataclass(frozen=True)
class Scan:
    """The operands, elements with time among their axes."""

    u: Factor
    delta: Factor
    A: Factor
    B: Factor
    C: Factor
    D: Factor | None
    reverse: bool


def operands_of(step: Step, reverse: bool) -> Scan | None:
    """The operands, from what every step has; None where they are not those of a selective scan."""
    channels, states = frozenset(_SEQUENCE), frozenset(("b", STATE, TIME))
    if step.decay is None or len(step.decay) != 2:
        return None
    baxes = {factor.axes: factor for factor in step.decay}
    delta, A = baxes.get(channels), baxes.get(frozenset(("d", STATE)))
    matrices = [factor for factor in step.update if factor.axes == states]
    rest = [factor for factor in step.update if factor.axes == channels]
    if delta is None or A is None or len(matrices) != 1 or step.c[0].axes != states:
        return None
    if len(rest) + 1 != len(step.update):
        return None
    u = _without(rest, delta)
    if u is None:
        return None
    D = None
    if step.skip:
        D = _vector_beside(step.skip, u)
        if D is None:
            return None
    return Scan(u, delta, A, matrices[0], step.c[0], D, reverse)


def _without(rest: list[Factor], delta: Factor) -> Factor | None:
    """The other factor of two; of one, which may be `delta * u` of the whole sequence."""
    if len(rest) == 2 and delta in rest:
        return rest[1] if rest[0] == delta else rest[0]
    node = rest[0].node if len(rest) == 1 else None
    if node is None or not is_op(node, aten.mul.Tensor):
        return None
    index = rest[0].index
    operands = [one for one in node.args if isinstance(one, fx.Node)]
    if len(operands) != 2 or any(value_of(one).dim() != len(index) for one in operands):
        return None
    taken = [factors(one, index) for one in operands]
    single = [one[0] for one in taken if one is not None and len(one) == 1]
    return _without(single, delta) if len(single) == 2 else None


def _vector_beside(parts: tuple[Factor, ...], u: Factor) -> Factor | None:
    """D of `D * u`."""
    if Counter(parts)[u] != 1 or len(parts) != 2:
        return None
    other = parts[1] if parts[0] == u else parts[0]
    return other if other.axes == frozenset("d") else None


def write_scan(last: fx.Node, match: Scan, axes: list[str]) -> None:
    """Put the op in the place of `last`, the y of all steps: "b", "d" and TIME in this order.

    A skip and a gate behind it go into the op.
    """
    u = _whole(last, match.u, _SEQUENCE)
    delta, softplus = _whole(last, match.delta, _SEQUENCE), False
    if is_op(match.delta.node, aten.softplus.default) and len(match.delta.node.args) == 1:  # type: ignore[union-attr]
        inner: Any = match.delta.node.args[0]  # type: ignore[union-attr]
        delta, softplus = _whole(last, replace(match.delta, node=inner), _SEQUENCE), True
    A = _whole(last, match.A, ("d", STATE))
    B, C = (_whole(last, one, ("b", STATE, TIME)) for one in (match.B, match.C))
    D = None if match.D is None else _whole(last, match.D, ("d",))
    op = torch.ops.ouro.selective_scan.default
    if D is None:
        last, D = _take_skip(last, match.u, axes)
    last, z = _take_gate(last, axes)
    operands = (u, delta, A, B, C, D, z, None, softplus, match.reverse)
    result = call(last, op, *operands)
    order = [_SEQUENCE.index(axis) for axis in axes]
    if order != [0, 1, 2]:
        result = call(last, aten.permute.default, result, order)
    replace_node(last, result)


def _whole(before: fx.Node, factor: Factor, axes: tuple[str, ...]) -> fx.Node:
    """The tensor of a factor's elements, with these axes in this order."""
    node = factor.node
    assert node is not None
    index = list(factor.index)
    for dim in reversed(range(len(index))):
        if not isinstance(index[dim], str):
            node = call(before, aten.select.int, node, dim, 0)
            del index[dim]
    order = [index.index(axis) for axis in axes]
    if order == list(range(len(order))):
        return node
    return call(before, aten.permute.default, node, order)


def _take_skip(last: fx.Node, u: Factor, axes: list[str]) -> tuple[fx.Node, fx.Node | None]:
    """`last + D * u` behind the stack: (the sum, D), else (last, None)."""
    add = _only_user(last, aten.add.Tensor)
    other = None if add is None else _other_operand(add, last)
    if add is None or other is None or value_of(other).dim() != 3:
        return last, None
    if not is_op(other, aten.mul.Tensor):
        return last, None
    parts: list[Factor] = []
    for one in other.args:
        if isinstance(one, fx.Node):
            parts += factors(one, broadcast_index(one, tuple(axes))) or ()
    D = _vector_beside(tuple(parts), u)
    if D is None or value_of(add).shape != value_of(last).shape:
        return last, None
    return add, _whole(add, D, ("d",))


def _take_gate(last: fx.Node, axes: list[str]) -> tuple[fx.Node, fx.Node | None]:
    """`last * silu(z)` behind the stack: (the product, z (B, D, L)), else (last, None)."""
    product = _only_user(last, aten.mul.Tensor)
    gate = None if product is None else _other_operand(product, last)
    if product is None or not is_op(gate, aten.silu.default):
        return last, None
    assert isinstance(gate, fx.Node)
    z: Any = gate.args[0]
    if value_of(z).shape != value_of(last).shape:
        return last, None
    return product, _whole(product, Factor(z, tuple(axes)), _SEQUENCE)


def _only_user(node: fx.Node, target: Any) -> fx.Node | None:
    user = next(iter(node.users), None)
    return user if len(node.users) == 1 and is_op(user, target) and not user.kwargs else None  # type: ignore[union-attr]


def _other_operand(node: fx.Node, operand: fx.Node) -> fx.Node | None:
    others = [one for one in node.args if one is not operand]
    other = others[0] if len(others) == 1 else None
    return other if isinstance(other, fx.Node) else None
