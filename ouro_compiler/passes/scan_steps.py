"""One step of a recurrence, as `raise_selective_scan` and `raise_scan_operator` read it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from ouro_compiler.graph import aten, is_op, value_of
from ouro_compiler.passes.products import STATE, Factor, Index, factors, parse_einsum

TIME = "l"
ZEROS = (aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default)


@dataclass(frozen=True)
class States:
    """A tensor of four dimensions: the states of all steps, with time at dimension `time`."""

    node: fx.Node
    time: int


@dataclass(frozen=True)
class Output:
    """y of a step: its state, the axes of the state's dimensions, C's element, the skip's."""

    state: fx.Node
    axes: tuple[str, ...]
    c: Factor
    skip: tuple[Factor, ...] = ()


@dataclass(frozen=True)
class Step:
    """What must be the same in every step, with time for its place."""

    decay: tuple[Factor, ...] | None  # the exponent's factors; None where there is no decay
    update: tuple[Factor, ...]
    c: tuple[Factor, ...]
    skip: tuple[Factor, ...]
    y_axes: tuple[str, ...]


def read_output(y: fx.Node, states: States | None = None) -> Output | None:
    """y = sum of h C over states, by einsum, sum of a product or matmul; `+ D u` may follow.

    With `states` y is that of all steps, and what is read is the step at place 0 of time; `state`
    is then the node of all states. No skip is read.
    """
    found = _read_einsum(y, states) or _read_sum(y, states) or _read_matmul(y, states)
    if found is not None or states is not None:
        return found
    if not is_op(y, aten.add.Tensor) or len(y.args) != 2 or y.kwargs:
        return None
    for core, skip in (y.args, y.args[::-1]):
        found = read_output(core) if isinstance(core, fx.Node) else None
        if found is not None and not found.skip and isinstance(skip, fx.Node):
            axes = tuple(axis for axis in found.axes if axis != STATE)
            taken = factors(skip, axes) if value_of(skip).dim() == 2 else None
            return None if taken is None else replace(found, skip=taken)
    return None


def _index(summed: int, states: States | None) -> tuple[Index, ...] | None:
    """The index of a state: its axes, and place 0 of time; the batch comes first."""
    time = None if states is None else states.time
    if summed == time:
        return None
    rest = iter("bd")
    rank = _rank(states)
    return tuple(STATE if k == summed else 0 if k == time else next(rest) for k in range(rank))


def _rank(states: States | None) -> int:
    return 3 if states is None else 4


def _read_einsum(y: fx.Node, states: States | None) -> Output | None:
    parsed = parse_einsum(y)
    if parsed is None or len(parsed.operands) != 2 or len(parsed.summed) != 1:
        return None
    for state, other in ((0, 1), (1, 0)):
        letters = parsed.inputs[state]
        if parsed.summed not in letters or len(letters) != _rank(states):
            continue
        index = _index(letters.index(parsed.summed), states)
        if index is not None and parsed.output == letters.replace(parsed.summed, ""):
            where = dict(zip(letters, index, strict=True))
            beside = tuple(where[letter] for letter in parsed.inputs[other])
            found = _output(parsed.operands[state], index, parsed.operands[other], beside, states)
            if found is not None:
                return found
    return None


def _read_sum(y: fx.Node, states: States | None) -> Output | None:
    if not is_op(y, aten.sum.dim_IntList) or len(y.args) > 2 or y.kwargs:
        return None
    inner: Any = y.args[0]
    dims: Any = y.args[1]
    rank = _rank(states)
    if not is_op(inner, aten.mul.Tensor) or value_of(inner).dim() != rank or len(dims) != 1:
        return None
    index = _index(dims[0] % rank, states)
    for state, other in (inner.args, inner.args[::-1]):
        if index is None or not isinstance(state, fx.Node) or not isinstance(other, fx.Node):
            continue
        if states is not None or _is_state(state):
            found = _output(state, index, other, broadcast_index(other, index), states)
            if found is not None:
                return found
    return None


def _read_matmul(y: fx.Node, states: States | None) -> Output | None:
    product: Any = y.args[0] if y.args else None
    rank = _rank(states)
    squeezed = is_op(y, aten.squeeze.dim) and int(y.args[1]) in (-1, rank - 1)  # type: ignore[arg-type]
    if not squeezed or not is_op(product, aten.matmul.default, aten.bmm.default):
        return None
    state, column = product.args
    index = _index(rank - 1, states)
    if index is None or any(value_of(one).dim() != rank for one in (state, column)):
        return None
    return _output(state, index, column, (*index[:-2], STATE, 0), states)


def _output(
    state: fx.Node,
    index: tuple[Index, ...],
    other: fx.Node,
    beside: tuple[Index, ...],
    states: States | None,
) -> Output | None:
    """The output of `state` at an index and of one factor, the element of `other`."""
    if states is not None and state is not states.node:
        return None
    taken = factors(other, beside)
    if taken is None or len(taken) != 1:
        return None
    axes = tuple(one for one in index if isinstance(one, str))
    return Output(state, axes, taken[0])


def broadcast_index(node: fx.Node, axes: tuple[Index, ...]) -> tuple[Index, ...]:
    """The index of an operand that broadcasts against a result with these axes."""
    shape = value_of(node).shape
    kept = axes[len(axes) - len(shape) :]
    return tuple(0 if size == 1 else axis for axis, size in zip(kept, shape, strict=True))


def _is_state(node: fx.Node) -> bool:
    return is_op(node, aten.add.Tensor, aten.mul.Tensor) and value_of(node).dim() == 3


def read_step(output: Output, before: fx.Node | None, place: int) -> Step | None:
    """The step at `place` of time, whose state follows `before` (None: the first)."""
    decay, update = _recurrence(output.state, before)
    if update is None:
        return None
    added = factors(update, output.axes)
    exponent: tuple[Factor, ...] | None = None
    if decay is not None:
        taken = factors(decay, output.axes)
        if taken is None or len(taken) != 1 or taken[0].node is not None:
            return None
        exponent = taken[0].exponent
    timed = [_timed(part, place) for part in (exponent, added, (output.c,), output.skip)]
    if timed[1] is None or timed[2] is None or timed[3] is None:
        return None
    if (exponent is None) != (timed[0] is None):
        return None
    y_axes = tuple(axis for axis in output.axes if axis != STATE)
    return Step(timed[0], timed[1], timed[2], timed[3], y_axes)


def _recurrence(state: fx.Node, before: fx.Node | None) -> tuple[fx.Node | None, fx.Node | None]:
    """(decay, update) of `decay * before + update`; (None, update) without a state before."""
    if is_op(state, aten.add.Tensor) and len(state.args) == 2 and not state.kwargs:
        for carried, update in (state.args, state.args[::-1]):
            if not is_op(carried, aten.mul.Tensor) or not isinstance(update, fx.Node):
                continue
            for decay, last in (carried.args, carried.args[::-1]):  # type: ignore[union-attr]
                if isinstance(decay, fx.Node) and _continues(last, before):
                    return decay, update
    return None, state if before is None else None


def _continues(node: Any, before: fx.Node | None) -> bool:
    return is_op(node, *ZEROS) if before is None else node is before


def _timed(parts: tuple[Factor, ...] | None, place: int) -> tuple[Factor, ...] | None:
    """Factors with time for `place`; None if one is read at another place, or at several."""
    if parts is None:
        return None
    found = []
    for factor in parts:
        places = factor.places
        if factor.node is None or places not in ((), (place,)):
            return None
        sizes = value_of(factor.node).shape
        index = tuple(
            TIME if isinstance(one, int) and size != 1 else one
            for one, size in zip(factor.index, sizes, strict=True)
        )
        found.append(replace(factor, index=index))
    return tuple(sorted(found, key=lambda one: (one.node.name if one.node else "", str(one.index))))
