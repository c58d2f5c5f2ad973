"""raise_selective_scan: a recurrence that export unrolled becomes one `ouro::selective_scan`.

    h_t = exp(delta_t A) * h_{t-1} + delta_t B_t u_t     h starts as zeros, or with the second term
    y_t = sum over states of h_t C_t [+ D u_t]           stack or cat of all y_t along time

1. Factors may be computed for all steps at once or step by step, by einsum, broadcasting or matmul:
   `products` follows single elements through them. Time may run either way.
2. `y + D * u` and `y * silu(z)` of the whole sequence behind it, and delta = softplus(x) before it,
   go into the op.

Left alone, with a note of the steps that were seen: anything else, such as a state that has no
exponential decay, or a step that differs from the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

import ouro_compiler.ops  # noqa: F401  (registers torch.ops.ouro)
from ouro_compiler.graph import aten, insert_call, is_op, replace_node, value_of
from ouro_compiler.passes.base import PassContext
from ouro_compiler.passes.products import STATE, Factor, factors
from ouro_compiler.passes.scan_steps import (
    TIME,
    Step,
    broadcast_index,
    read_output,
    read_step,
)

_SEQUENCE = ("b", "d", TIME)


def raise_selective_scan(gm: fx.GraphModule, ctx: PassContext) -> bool:
    """Apply the rules of the module docstring; returns whether any recurrence was raised."""
    modified = False
    for node in list(gm.graph.nodes):
        steps = _stacked(node)
        if steps is None or len(steps) < 2:
            continue
        match = _match(steps)
        if match is not None:
            _write(node, match)
            modified = True
        elif _recurrent(steps):
            ctx.notes.append(
                f"{node.name}: a loop of {len(steps)} steps was seen that is no selective scan, as "
                "far as could be told; it stays as it is"
            )
    if modified:
        gm.graph.eliminate_dead_code()
    return modified


def _stacked(node: fx.Node) -> list[fx.Node] | None:
    """The tensors of two dimensions that a stack, or a cat of them unsqueezed, is made of."""
    if not is_op(node, aten.stack.default, aten.cat.default) or value_of(node).dim() != 3:
        return None
    parts: Any = node.args[0]
    if is_op(node, aten.stack.default):
        return list(parts)
    inner = [
        part.args[0]
        for part in parts
        if is_op(part, aten.unsqueeze.default) and part.args[1] % 3 == _time_dimension(node)
    ]
    return inner if len(inner) == len(parts) else None


def _time_dimension(stack: fx.Node) -> int:
    return int(stack.args[1]) % 3 if len(stack.args) > 1 else 0  # type: ignore[arg-type]


# All steps


@dataclass(frozen=True)
class _Scan:
    """The operands, elements with time among their axes."""

    u: Factor
    delta: Factor
    A: Factor
    B: Factor
    C: Factor
    D: Factor | None
    y_axes: tuple[str, ...]
    reverse: bool


def _match(steps: Sequence[fx.Node]) -> _Scan | None:
    outputs = [read_output(step) for step in steps]
    found = [one for one in outputs if one is not None]
    if len(found) < len(outputs):
        return None
    states = [one.state for one in found]
    reverse = states[1] in states[0].all_input_nodes or _carries(states[0], states[1])
    order = range(len(states))[::-1] if reverse else range(len(states))
    read = []
    before: fx.Node | None = None
    for place in order:
        step = read_step(found[place], before, place)
        if step is None:
            return None
        read.append(step)
        before = states[place]
    # The first step may start without a decay; all that any step has must be the same.
    if len(set(read[1:])) != 1 or replace(read[0], decay=read[1].decay) != read[1]:
        return None
    return _operands(read[1], reverse)


def _carries(state: fx.Node, earlier: fx.Node) -> bool:
    """Is `earlier` in a product that `state` adds up?"""
    return any(earlier in one.all_input_nodes for one in state.all_input_nodes)


def _operands(step: Step, reverse: bool) -> _Scan | None:
    channels, states = frozenset(_SEQUENCE), frozenset(("b", STATE, TIME))
    if step.decay is None or len(step.decay) != 2:
        return None
    by_axes = {factor.axes: factor for factor in step.decay}
    delta, A = by_axes.get(channels), by_axes.get(frozenset(("d", STATE)))
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
    return _Scan(u, delta, A, matrices[0], step.c[0], D, step.y_axes, reverse)


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


def _recurrent(steps: Sequence[fx.Node]) -> bool:
    """Does a step share with the next one what it does not share with all of them: a state?"""

    def near(node: fx.Node) -> set[fx.Node]:
        found = {node}
        for _ in range(5):
            found |= {one for inner in found for one in inner.all_input_nodes}
        return found

    if len(steps) < 4:
        return False
    first, second, third, *_, last = map(near, steps)
    return bool((first & second) - last) and bool((second & third) - last)


# Writing


def _write(stack: fx.Node, match: _Scan) -> None:
    u = _whole(stack, match.u, _SEQUENCE)
    delta, softplus = _whole(stack, match.delta, _SEQUENCE), False
    if is_op(match.delta.node, aten.softplus.default) and len(match.delta.node.args) == 1:  # type: ignore[union-attr]
        inner: Any = match.delta.node.args[0]  # type: ignore[union-attr]
        delta, softplus = _whole(stack, replace(match.delta, node=inner), _SEQUENCE), True
    A = _whole(stack, match.A, ("d", STATE))
    B, C = (_whole(stack, one, ("b", STATE, TIME)) for one in (match.B, match.C))
    D = None if match.D is None else _whole(stack, match.D, ("d",))
    op = torch.ops.ouro.selective_scan.default
    y_axes = list(match.y_axes)
    y_axes.insert(_time_dimension(stack), TIME)
    last, z = stack, None
    if D is None:
        last, D = _take_skip(last, match.u, y_axes)
    last, z = _take_gate(last, y_axes)
    operands = (u, delta, A, B, C, D, z, None, softplus, match.reverse)
    result = insert_call(stack.graph, last, op, *operands)
    order = [_SEQUENCE.index(axis) for axis in y_axes]
    if order != [0, 1, 2]:
        result = insert_call(stack.graph, last, aten.permute.default, result, order)
    replace_node(last, result)


def _whole(before: fx.Node, factor: Factor, axes: tuple[str, ...]) -> fx.Node:
    """The tensor of a factor's elements, with these axes in this order."""
    node = factor.node
    assert node is not None
    index = list(factor.index)
    for dim in reversed(range(len(index))):
        if not isinstance(index[dim], str):
            node = insert_call(before.graph, before, aten.select.int, node, dim, 0)
            del index[dim]
    order = [index.index(axis) for axis in axes]
    if order == list(range(len(order))):
        return node
    return insert_call(before.graph, before, aten.permute.default, node, order)


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
