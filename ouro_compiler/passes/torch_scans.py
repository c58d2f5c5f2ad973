"""torch's `scan` and `associative_scan` in a graph: a call with the graph of its step beside it.

    scan(step, init, xs, extra)          (*states, *ys) = step(*states, *xs[t], *extra)
    associative_scan(step, xs, extra)    states = step(*states, *xs[t], *extra), first xs[0]

Time is the first dimension of xs and of what comes out: all ys, or all states of the associative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from ouro_compiler.errors import ModelError
from ouro_compiler.graph import aten, replace_node, value_of
from ouro_compiler.passes.editing import call, new_constant


@dataclass(frozen=True)
class ScanCall:
    """A call, taken apart; init is None for the associative one."""

    gm: fx.GraphModule
    node: fx.Node
    body: fx.GraphModule
    body_name: str
    init: tuple[fx.Node, ...] | None
    xs: tuple[fx.Node, ...]
    extra: tuple[Any, ...]

    @property
    def length(self) -> int:
        """Number of steps; ModelError where it depends on the input."""
        length = value_of(self.xs[0]).shape[0]
        if not isinstance(length, int):
            raise ModelError(
                f"{self.node.name}: a torch scan runs along the batch; scan along another dimension"
            )
        return length

    @property
    def states(self) -> int:
        """Number of tensors that are carried from step to step."""
        return len(self.xs if self.init is None else self.init)

    @property
    def results(self) -> dict[int, fx.Node]:
        """What comes out and is used, by its place."""
        return {int(user.args[1]): user for user in self.node.users if user.users}  # type: ignore[arg-type]


def operator_name(node: fx.Node) -> str | None:
    """The name of the higher-order operator that a node calls, None for any other node."""
    target = node.target
    return target.name() if isinstance(target, torch._ops.HigherOrderOperator) else None


def read_call(gm: fx.GraphModule, node: fx.Node) -> ScanCall:
    """Take a call of `scan` or `associative_scan` apart.

    Raises ModelError for a step with operators or in-place writes inside.
    """
    body_node, *rest = node.args
    init: Any = rest.pop(0) if operator_name(node) == "scan" else None
    xs: Any = rest[0]
    extra: Any = rest[1]
    name = str(body_node.target)  # type: ignore[union-attr]
    body = gm.get_submodule(name)
    assert isinstance(body, fx.GraphModule)
    for one in body.graph.nodes:
        schema = getattr(one.target, "_schema", None)
        if operator_name(one) is not None or (schema is not None and schema.is_mutable):
            raise ModelError(
                f"{node.name}: the step of a torch scan calls {one.target}; write the step with"
                " tensor operators that return new tensors"
            )
    states = None if init is None else tuple(init)
    return ScanCall(gm, node, body, name, states, tuple(xs), tuple(extra))


def copy_step(
    scan: ScanCall,
    states: Sequence[fx.Node],
    items: Sequence[fx.Node],
    emit: Callable[..., fx.Node] | None = None,
) -> list[fx.Node]:
    """Write one step before the call; returns what the step returns.

    emit(target, *args, **kwargs) makes a node; without it every node is copied as it is.
    """
    emit = emit or partial(call, scan.node)
    known: dict[fx.Node, Any] = {}
    given = iter((*states, *items, *scan.extra))
    for node in scan.body.graph.nodes:
        if node.op == "placeholder":
            known[node] = next(given)
        elif node.op == "get_attr":
            value: Any = scan.body
            for part in str(node.target).split("."):
                value = getattr(value, part)
            assert isinstance(value, Tensor)
            name = f"{scan.node.name}.{node.target}"
            known[node] = new_constant(scan.gm, scan.node, name, value)
        elif node.op == "output":
            outputs: Any = fx.node.map_arg(node.args[0], known.__getitem__)
            return list(outputs)
        else:
            args = fx.node.map_arg(node.args, known.__getitem__)
            known[node] = emit(node.target, *args, **fx.node.map_arg(node.kwargs, known.get))
    raise AssertionError("a graph ends with its output")


def write_out(scan: ScanCall) -> None:
    """Put every step into the graph, one after the other, in the place of the call."""
    place = partial(call, scan.node)
    used = scan.results
    steps: list[list[fx.Node]] = []
    states: Sequence[fx.Node] = scan.init or ()
    for time in range(scan.length):
        items = [place(aten.select.int, one, 0, time) for one in scan.xs]
        first = scan.init is None and time == 0
        steps.append(items if first else copy_step(scan, states, items))
        states = steps[-1][: scan.states]
    for index, result in used.items():
        if scan.init is not None and index < scan.states:
            replace_node(result, states[index])
        else:
            replace_node(result, place(aten.stack.default, [step[index] for step in steps], 0))
