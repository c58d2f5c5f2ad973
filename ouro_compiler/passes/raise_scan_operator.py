"""raise_scan_operator: torch's `scan` and `associative_scan` become `ouro::selective_scan`.

    h_t = exp(delta_t A) * h_{t-1} + delta_t B_t u_t     scan: h starts as zeros
    y_t = sum over states of h_t C_t [+ D u_t]           in the step, or behind it for all steps

1. One step is written into the graph and read as `raise_selective_scan` reads a loop's; factors may
   be computed for all steps at once or in the step. Elementwise operators on one item of a step,
   such as softplus, are moved before the scan.
2. Operands that are flipped, and whose result is flipped back, give `reverse`.
3. A skip, a gate and softplus around the scan go into the op.

What is anything else is written out, step by step, and noted. ModelError: more than MAX_STEPS of
such steps in a graph, and other higher-order operators.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ouro_compiler.errors import ModelError
from ouro_compiler.graph import aten, constant_names, is_op, replace_node, value_of
from ouro_compiler.passes.base import PassContext
from ouro_compiler.passes.editing import call
from ouro_compiler.passes.products import STATE
from ouro_compiler.passes.remove_noops import remove_noops
from ouro_compiler.passes.scan_operands import operands_of, write_scan
from ouro_compiler.passes.scan_steps import TIME, ZEROS, Output, States, read_output, read_step
from ouro_compiler.passes.torch_scans import (
    ScanCall,
    copy_step,
    operator_name,
    read_call,
    write_out,
)
from ouro_compiler.passes.views import PERMUTATIONS, axes_order

MAX_STEPS = 512


def raise_scan_operator(gm: fx.GraphModule, ctx: PassContext) -> bool:
    """Apply the rules of the module docstring; returns whether there was such an operator."""
    found = [node for node in gm.graph.nodes if operator_name(node) is not None]
    for node in found:
        if operator_name(node) not in ("scan", "associative_scan"):
            raise ModelError(
                f"{node.name}: the model calls torch's higher-order operator"
                f" {operator_name(node)}; write it with tensor operators"
            )
    if not found:
        return False
    remove_noops(gm, ctx)
    _permute_for_movedim(gm)
    gm.graph.eliminate_dead_code()
    written = 0
    bodies: set[str] = set()
    for node in (one for one in found if one.users):
        scan = read_call(gm, node)
        remove_noops(scan.body, ctx)
        bodies.add(scan.body_name)
        raised = _raise(scan)
        gm.graph.eliminate_dead_code()  # what is left would be a second user of operands
        if raised:
            continue
        written += scan.length
        seen = f"{node.name}: a torch scan of {scan.length} steps"
        if written > MAX_STEPS:
            raise ModelError(
                f"{seen} is no selective scan, as far as could be told, and more than {MAX_STEPS}"
                " steps are not written out; write it as h = exp(delta * A) * h + delta * B * u"
                " with y = sum(h * C)"
            )
        ctx.notes.append(
            f"{seen} was seen that is no selective scan, as far as could be told; its steps are"
            " written out"
        )
        write_out(scan)
    gm.graph.eliminate_dead_code()
    for name in bodies - constant_names(gm):
        gm.delete_submodule(name)
    return True


def _permute_for_movedim(gm: fx.GraphModule) -> None:
    for node in gm.graph.find_nodes(op="call_function", target=aten.movedim.int):
        source, start, end = node.args
        order = list(range(value_of(source).dim()))
        order.insert(end % len(order), order.pop(start % len(order)))
        replace_node(node, call(node, aten.permute.default, source, order))


@dataclass(frozen=True)
class _Result:
    """What is used of a call: result `index`, with its dimensions in another order at `last`."""

    index: int
    last: fx.Node
    order: tuple[int, ...]  # of the dimensions of the result; 0 is time
    reverse: bool


def _raise(scan: ScanCall) -> bool:
    """Put the op in the place of what the call computes; False where it computes something else."""
    result = _result(scan)
    if result is None:
        return False
    step = _Step(scan, result.reverse)
    states, produced = step.outputs[: scan.states], step.outputs[result.index]
    found = _read_behind(result, produced) if produced in states else _read_inside(result, produced)
    if found is None or found.output.state not in states:
        return False
    place = states.index(found.output.state)
    if scan.init is not None and not is_op(scan.init[place], *ZEROS):
        return False
    if scan.init is not None and result.index < scan.states:
        return False  # the last state
    read = read_step(found.output, step.before[place], 0)
    if read is None or read.decay is None:
        return False
    if any(one.node in step.own for one in (*read.decay, *read.update, *read.c, *read.skip)):
        return False
    operands = operands_of(read, result.reverse)
    if operands is not None:
        write_scan(found.y, operands, found.axes)
    return operands is not None


def _result(scan: ScanCall) -> _Result | None:
    """The one result that is used, followed through a flip and permutes."""
    used = scan.results
    if len(used) != 1:
        return None
    [(index, last)] = used.items()
    order = list(range(value_of(last).dim()))
    behind = _only_user(last)
    reverse = all(_is_flipped(one) for one in scan.xs) and _is_flipped(behind)
    if reverse:
        assert behind is not None
        last, behind = behind, _only_user(behind)
    while behind is not None and is_op(behind, *PERMUTATIONS):
        order = [order[dim] for dim in axes_order(behind, len(order))]
        last, behind = behind, _only_user(behind)
    return _Result(index, last, tuple(order), reverse)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_flipped(node: fx.Node | None) -> bool:
    """Is it a flip of time?"""
    return is_op(node, aten.flip.default) and list(node.args[1]) == [0]  # type: ignore[union-attr, arg-type]


class _Step:
    """One step, written before the call, with the first items of time.

    before: the states that it starts from; outputs: what it returns; own: the nodes that hold for
    this step alone.
    """

    def __init__(self, scan: ScanCall, reverse: bool) -> None:
        self.call = scan.node
        self.own: set[fx.Node] = set()
        sources: Any = [one.args[0] for one in scan.xs] if reverse else scan.xs
        self.items = [self._write(aten.select.int, one, 0, 0) for one in sources]
        self.own |= set(self.items)
        self.before = [self._write(aten.clone.default, one) for one in (scan.init or self.items)]
        self.own |= set(self.before)
        self.outputs = copy_step(scan, self.before, self.items, self._emit)

    def _write(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = call(self.call, target, *args, **kwargs)
        if any(one in self.own for one in node.all_input_nodes):
            self.own.add(node)
        return node

    def _emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        if target is aten.clone.default:
            return args[0]
        if not self._is_of_items(target, args):
            return self._write(target, *args, **kwargs)
        wholes = [one.args[0] if one in self.items else one for one in args]
        whole = self._write(target, *wholes, **kwargs)
        self.items.append(self._write(aten.select.int, whole, 0, 0))
        self.own.add(self.items[-1])
        return self.items[-1]

    def _is_of_items(self, target: Any, args: tuple[Any, ...]) -> bool:
        """Is it elementwise on items, and so on whole sequences? Products are read as they are."""
        tensors = [one for one in args if isinstance(one, fx.Node)]
        ranks = {value_of(one).dim() for one in tensors if one in self.items}
        if torch.Tag.pointwise not in target.tags or len(ranks) != 1:
            return False
        if target is aten.mul.Tensor and len(tensors) > 1:
            return False
        rest = [one for one in tensors if one not in self.items]
        return all(one not in self.own and value_of(one).dim() <= max(ranks) for one in rest)


@dataclass(frozen=True)
class _Read:
    """The output of a step; y of all steps, and the axes of its dimensions."""

    output: Output
    y: fx.Node
    axes: list[str]


def _read_inside(result: _Result, produced: fx.Node) -> _Read | None:
    """y is computed in the step."""
    output = read_output(produced)
    if output is None:
        return None
    names = (TIME, *(axis for axis in output.axes if axis != STATE))
    return _Read(output, result.last, [names[k] for k in result.order])


def _read_behind(result: _Result, state: fx.Node) -> _Read | None:
    """The states of all steps come out, and y is computed from them."""
    time = result.order.index(0)
    y: fx.Node | None = result.last
    for _ in range(2):
        y = None if y is None else _only_user(y)
        output = None if y is None else read_output(y, States(result.last, time))
        if y is None or output is None:
            continue
        axes = list(output.axes)
        axes.insert(time, TIME)
        named = dict(zip(result.order, axes, strict=True))
        of_state = tuple(named[k] for k in range(1, len(axes)))
        axes.remove(STATE)
        return _Read(replace(output, state=state, axes=of_state), y, axes)
    return None
