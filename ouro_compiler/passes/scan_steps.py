"""One step of a recurrence that export unrolled, as `raise_selective_scan` reads it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from ouro_compiler.graph import aten, is_op, value_of
from ouro_compiler.passes.products import STATE, Factor, Index, factors, parse_einsum

TIME = "l"
_ZEROS = (aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default)


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


def read_output(y: fx.Node) -> Output | None:
    """y = sum of h C over states, by einsum, sum of a product or matmul; `+ D u` may follow."""
    found = _read_einsum(y) or _read_sum(y) or _read_matmul(y)
    if found is not None or not is_op(y, aten.add.Tensor) or len(y.args) != 2 or y.kwargs:
        return found
    for core, skip in (y.args, y.args[::-1]):
        found = read_output(core) if isinstance(core, fx.Node) else None
        if found is not None and not found.skip and isinstance(skip, fx.Node):
            axes = tuple(axis for axis in found.axes if axis != STATE)
            taken = factors(skip, axes) if value_of(skip).dim() == 2 else None
            return None if taken is None else replace(found, skip=taken)
    return None


def _axes(rank: int, state: int) -> tuple[str, ...]:
    """Axes of a state's dimensions: the summed one is the states', the batch comes first."""
    rest = iter("bd")
    return tuple(STATE if dim == state else next(rest) for dim in range(rank))


def _read_einsum(y: fx.Node) -> Output | None:
    parsed = parse_einsum(y)
    if parsed is None or len(parsed.operands) != 2 or len(parsed.summed) != 1:
        return None
    for state, other in ((0, 1), (1, 0)):
        letters = parsed.inputs[state]
        if len(letters) == 3 and parsed.output == letters.replace(parsed.summed, ""):
            axes = _axes(3, letters.index(parsed.summed))
            where = dict(zip(letters, axes, strict=True))
            index = tuple(where[letter] for letter in parsed.inputs[other])
            return _output(parsed.operands[state], axes, parsed.operands[other], index)
    return None


def _read_sum(y: fx.Node) -> Output | None:
    if not is_op(y, aten.sum.dim_IntList) or len(y.args) > 2 or y.kwargs:
        return None
    inner, dims = y.args
    if not is_op(inner, aten.mul.Tensor) or value_of(inner).dim() != 3 or len(dims) != 1:  # type: ignore[arg-type]
        return None
    assert isinstance(inner, fx.Node)
    axes = _axes(3, int(dims[0]) % 3)  # type: ignore[index, arg-type]
    for state, other in (inner.args, inner.args[::-1]):
        if isinstance(state, fx.Node) and isinstance(other, fx.Node) and _is_state(state):
            taken = factors(other, broadcast_index(other, axes))
            if taken is not None and len(taken) == 1:
                return Output(state, axes, taken[0])
    return None


def _read_matmul(y: fx.Node) -> Output | None:
    product: Any = y.args[0] if y.args else None
    squeezed = is_op(y, aten.squeeze.dim) and int(y.args[1]) in (-1, 2)  # type: ignore[arg-type]
    if not squeezed or not is_op(product, aten.matmul.default, aten.bmm.default):
        return None
    state, column = product.args
    if value_of(state).dim() != 3 or value_of(column).dim() != 3:
        return None
    return _output(state, ("b", "d", STATE), column, ("b", STATE, 0))


def _output(
    state: fx.Node, axes: tuple[str, ...], other: fx.Node, index: tuple[Index, ...]
) -> Output | None:
    taken = factors(other, index)
    if taken is None or len(taken) != 1:
        return None
    return Output(state, axes, taken[0])


def broadcast_index(node: fx.Node, axes: tuple[str, ...]) -> tuple[Index, ...]:
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
    return is_op(node, *_ZEROS) if before is None else node is before


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
