"""Translations of the quantizers: codes bit for bit those of ops/quantize.py (METHODS 1, 3.5).

In place of `outlier_start` the third value of a quantizer is the list itself, bool (B, L, K). It is
the prefix-OR, inside windows in scan order, of "at or over the threshold": the gate needs no nodes
where thresholds lie above the inlier range, which is checked here. Codes are uint8 with 128 added
(zero point 128), as the integer product of ONNX Runtime wants them.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ouro_compiler.errors import ModelError
from ouro_compiler.export.emitter import Emitter, translates
from ouro_compiler.graph import argument, value_of
from ouro_compiler.ops.quantize import (
    KEEP_FLOAT_BITS,
    MIN_SCALE,
    inlier_interval,
    symmetric_max,
    window_length,
)

CODE_ZERO = 128  # what is added to codes
_OURO = torch.ops.ouro


@translates(_OURO.quantize_dynamic_outlier.default, _OURO.quantize_static_outlier.default)
def _quantize(emit: Emitter, node: fx.Node) -> tuple[str, ...]:
    return quantize(emit, node, emit.real(node.args[0]), value_of(node)[0].shape)


def quantize(emit: Emitter, node: fx.Node, x: str, shape: torch.Size) -> tuple[str, ...]:
    """(codes, outlier_scale, listed) of x fp32 (B, L, K), with the parameters of a quantizer."""
    scale = _column(emit, emit.real(argument(node, "inlier_scale")))
    zero = None
    if "zero_point" in _arguments(node) and argument(node, "zero_point") is not None:
        zero = _column(emit, emit.real(argument(node, "zero_point")))
    if node.target is _OURO.quantize_static_outlier.default:
        listed = _fixed_list(emit, node, x, int(shape[2]))
    else:
        listed = _dynamic_list(emit, node, x, scale, zero, shape)
    inliers = _codes(emit, x, scale, zero, argument(node, "inlier_bits"))
    bits = argument(node, "outlier_bits")
    if listed is None:  # nothing can be an outlier
        ones = emit.op("Expand", emit.number(1.0), _rows(emit, x))
        return _stored(emit, inliers), ones, _nothing(emit, x)
    if bits == KEEP_FLOAT_BITS:
        codes = emit.op("Where", listed, emit.number(0.0), inliers)
        return _stored(emit, codes), emit.op("Expand", emit.number(1.0), _rows(emit, x)), listed
    kept = emit.op("Where", listed, emit.op("Abs", x), emit.number(0.0))
    peak = emit.op("ReduceMax", kept, emit.integers(-1))
    dynamic = emit.op("Div", peak, emit.number(float(symmetric_max(bits))))
    dynamic = emit.op("Max", dynamic, emit.number(MIN_SCALE))
    count = emit.op("ReduceMax", emit.cast(listed, torch.float32), emit.integers(-1))
    some = emit.cast(count, torch.bool)
    outlier_scale = emit.op("Where", some, dynamic, emit.number(1.0))
    outliers = _codes(emit, x, outlier_scale, None, bits)
    codes = emit.op("Where", listed, outliers, inliers)
    return _stored(emit, codes), emit.op("Squeeze", outlier_scale, emit.integers(-1)), listed


def _arguments(node: fx.Node) -> set[str]:
    return {one.name for one in node.target._schema.arguments}  # type: ignore[union-attr]


def _column(emit: Emitter, vector: str) -> str:
    """(L,) -> (L, 1)."""
    return emit.op("Unsqueeze", vector, emit.integers(-1))


def _rows(emit: Emitter, x: str) -> str:
    """The shape (B, L) of x (B, L, K)."""
    return emit.op("Shape", x, start=0, end=2)


def _codes(emit: Emitter, x: str, scale: str, zero: str | None, bits: int) -> str:
    """Codes as fp32: P2, or P3 shifted into int8."""
    steps = emit.op("Round", emit.op("Div", x, scale))
    if zero is None:
        limit = float(symmetric_max(bits))
        return emit.op("Clip", steps, emit.number(-limit), emit.number(limit))
    shifted = emit.op("Add", steps, zero)
    inside = emit.op("Clip", shifted, emit.number(0.0), emit.number(float(2**bits - 1)))
    return emit.op("Sub", inside, emit.number(float(2 ** (bits - 1))))


def _stored(emit: Emitter, codes: str) -> str:
    return emit.cast(emit.op("Add", codes, emit.number(float(CODE_ZERO))), torch.uint8)


def _nothing(emit: Emitter, x: str) -> str:
    """An empty list, bool (B, L, K)."""
    listed = emit.op("Expand", emit.constant(torch.tensor(False)), emit.op("Shape", x))
    emit.empty_lists.add(listed)
    return listed


def _fixed_list(emit: Emitter, node: fx.Node, x: str, columns: int) -> str | None:
    channels = emit.known(argument(node, "channels"))
    if channels is None:
        raise ModelError(f"{node.name}: ONNX export needs the list of static outliers as a constant")
    if channels.numel() == 0:
        return None
    mask = torch.zeros(columns, dtype=torch.bool)
    mask[channels] = True
    return emit.op("Expand", emit.constant(mask), emit.op("Shape", x))


def _dynamic_list(
    emit: Emitter, node: fx.Node, x: str, scale: str, zero: str | None, shape: torch.Size
) -> str | None:
    threshold = emit.known(argument(node, "threshold"))
    _check_gate(emit, node, threshold)
    assert threshold is not None  # checked
    if bool(torch.isinf(threshold).all()):
        return None
    bits = argument(node, "inlier_bits")
    if zero is not None:
        top = (2**bits - 1) / 2
        middle = emit.op("Mul", scale, emit.op("Sub", emit.number(top), zero))
        x = emit.op("Sub", x, middle)
    limit = _column(emit, emit.real(argument(node, "threshold")))
    joins = emit.op("GreaterOrEqual", emit.op("Abs", x), limit)
    _, length, columns = shape
    period, reverse = argument(node, "refresh_period"), argument(node, "reverse")
    return windowed_or(emit, joins, int(length), int(columns), period, reverse)


def _check_gate(emit: Emitter, node: fx.Node, threshold: Tensor | None) -> None:
    """The theorem of METHODS 3.5 must hold: thresholds above what inlier codes represent."""
    scale = emit.known(argument(node, "inlier_scale"))
    zero = argument(node, "zero_point") if "zero_point" in _arguments(node) else None
    point = None if zero is None else emit.known(zero)
    if scale is None or threshold is None or (zero is not None and point is None):
        raise ModelError(f"{node.name}: ONNX export needs scales and thresholds as constants")
    point = None if point is None else point.float()
    _, limit = inlier_interval(scale.float(), point, argument(node, "inlier_bits"))
    if not bool((threshold.float() > limit).all()):
        raise ModelError(
            f"{node.name}: a threshold lies inside the range of the inliers, where lists depend on "
            "the gate, which ONNX export does not have: compile the model again"
        )


def windowed_or(
    emit: Emitter, mask: str, length: int, columns: int, period: int, reverse: bool
) -> str:
    """Or of a bool mask (B, L, K) from the start of each window, in scan order, to each token."""
    window = window_length(period, length)
    count = -(-length // window)
    if window == 1:
        return mask
    y = emit.cast(mask, torch.int32)
    padding = count * window - length
    if padding:  # the window that is short is the last in scan order
        ends = (padding, 0) if reverse else (0, padding)
        none = emit.number(0, torch.int32)
        y = emit.op("Pad", y, emit.integers(*ends), none, emit.integers(1))
    if count > 1:
        y = emit.op("Reshape", y, emit.integers(-1, count, window, columns))
    axis = emit.number(2 if count > 1 else 1, torch.int64)
    y = emit.op("CumSum", y, axis, reverse=int(reverse))
    if count > 1:
        y = emit.op("Reshape", y, emit.integers(-1, count * window, columns))
    if padding:
        first = padding if reverse else 0
        ends = (first, first + length)
        y = emit.op("Slice", y, *map(emit.integers, ends), emit.integers(1))
    return emit.cast(y, torch.bool)


@translates(_OURO.dequantize_dynamic_outlier.default)
def _dequantize(emit: Emitter, node: fx.Node) -> str:
    codes = plain_codes(emit, emit.get(argument(node, "codes")))
    scale = _column(emit, emit.real(argument(node, "inlier_scale")))
    zero, bits = argument(node, "zero_point"), argument(node, "inlier_bits")
    inliers = codes
    if zero is not None:
        middle = emit.number(float(2 ** (bits - 1)))
        shift = emit.op("Sub", middle, _column(emit, emit.real(zero)))
        inliers = emit.op("Add", codes, shift)
    inliers = emit.op("Mul", inliers, scale)
    listed = emit.get(argument(node, "outlier_start"))
    if listed in emit.empty_lists:
        return inliers
    if argument(node, "outlier_bits") == KEEP_FLOAT_BITS:
        return emit.op("Where", listed, emit.real(argument(node, "x")), inliers)
    outlier_scale = _column(emit, emit.get(argument(node, "outlier_scale")))
    return emit.op("Where", listed, emit.op("Mul", codes, outlier_scale), inliers)


def plain_codes(emit: Emitter, stored: str) -> str:
    """Stored codes as fp32, without what is added to them."""
    return emit.op("Sub", emit.cast(stored, torch.float32), emit.number(float(CODE_ZERO)))


@translates(_OURO.fake_quantize.default)
def _fake_quantize(emit: Emitter, node: fx.Node) -> str:
    x, scale = emit.real(node.args[0]), emit.real(node.args[1])
    zero, bits = argument(node, "zero_point"), argument(node, "bits")
    if zero is None:
        y = emit.op("Mul", _codes(emit, x, scale, None, bits), scale)
    else:
        point = emit.real(zero)
        shifted = emit.op("Add", emit.op("Round", emit.op("Div", x, scale)), point)
        codes = emit.op("Clip", shifted, emit.number(0.0), emit.number(float(2**bits - 1)))
        y = emit.op("Mul", emit.op("Sub", codes, point), scale)
    dtype = value_of(node).dtype
    return y if dtype == torch.float32 else emit.cast(y, dtype)
