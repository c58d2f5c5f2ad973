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

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from ouro_compiler.graph import aten, is_op, value_of
from ouro_compiler.passes.base import PassContext
from ouro_compiler.passes.scan_operands import Scan, operands_of, write_scan
from ouro_compiler.passes.scan_steps import TIME, read_output, read_step


def raise_selective_scan(gm: fx.GraphModule, ctx: PassContext) -> bool:
    """Apply the rules of the module docstring; returns whether any recurrence was raised."""
    modified = False
    for node in list(gm.graph.nodes):
        steps = _stacked(node)
        if steps is None or len(steps) < 2:
            continue
        match = _match(steps)
        if match is not None:
            scan, y_axes = match
            axes = list(y_axes)
            axes.insert(_time_dimension(node), TIME)
            write_scan(node, scan, axes)
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


def _match(steps: Sequence[fx.Node]) -> tuple[Scan, tuple[str, ...]] | None:
    """The operands, and the axes of a step's output."""
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
    scan = operands_of(read[1], reverse)
    return None if scan is None else (scan, read[1].y_axes)


def _carries(state: fx.Node, earlier: fx.Node) -> bool:
    """Is `earlier` in a product that `state` adds up?"""
    return any(earlier in one.all_input_nodes for one in state.all_input_nodes)


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
