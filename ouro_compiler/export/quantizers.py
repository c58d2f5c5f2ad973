"""Translations of the quantizers: codes bit for bit those of ops/quantize.py (METHODS 1, 3.5).

In place of `outlier_start` the third value of a quantizer is the list itself, bool (B, L, K). It is
the prefix-OR, inside windows in scan order, of "at or over the threshold": the gate needs no nodes
where thresholds lie above the inlier range, which is checked here. Codes are uint8 with 128 added
(zero point 128), as the integer product of ONNX Runtime wants them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    x, shape = emit.real(node.args[0]), value_of(node)[0].shape
    if value_of(node.args[0]).dim() == 4:  # type: ignore[arg-type]
        x = emit.op("Reshape", x, emit.integers(0, int(shape[1]), int(shape[2])))
    return quantize(emit, node, x, shape)


def quantize(emit: Emitter, node: fx.Node, x: str, shape: torch.Size) -> tuple[str, ...]:
    """(codes, outlier_scale, listed) of x fp32 (B, L, K), with the parameters of a quantizer."""
    scale, zero = emit.column(argument(node, "inlier_scale")), _zero_point(emit, node)
    magnitude = emit.op("Abs", x)
    if node.target is _OURO.quantize_static_outlier.default:
        listed = _fixed_list(emit, node, x, int(shape[2]))
    else:
        listed = _dynamic_list(emit, node, x, magnitude, scale, zero, shape)
    bits, outlier_bits = (argument(node, f"{one}lier_bits") for one in ("in", "out"))
    if listed is None or outlier_bits == KEEP_FLOAT_BITS:
        codes = _inliers(emit, emit.op("Round", emit.op("Div", x, scale)), zero, bits)
        if listed is not None:
            codes = emit.op("Where", listed, emit.number(0.0), codes)
        ones = emit.op("Expand", emit.number(1.0), emit.op("Shape", x, start=0, end=2))
        return _stored(emit, codes), ones, listed or _nothing(emit, x)
    # Magnitudes are positive: -1 says that no channel is listed.
    peak = emit.op("Where", listed, magnitude, emit.number(-1.0))
    peak = emit.op("ReduceMax", peak, emit.integers(-1))
    dynamic = emit.op("Div", peak, emit.number(float(symmetric_max(outlier_bits))))
    dynamic = emit.op("Max", dynamic, emit.number(MIN_SCALE))
    none = emit.op("Less", peak, emit.number(0.0))
    outlier_scale = emit.op("Where", none, emit.number(1.0), dynamic)
    # One division for both; no listed code leaves its range, since the peak sets the scale.
    step = emit.op("Where", listed, outlier_scale, scale)
    steps = emit.op("Round", emit.op("Div", x, step))
    codes = emit.op("Where", listed, steps, _inliers(emit, steps, zero, bits))
    return _stored(emit, codes), emit.op("Squeeze", outlier_scale, emit.integers(-1)), listed


def _zero_point(emit: Emitter, node: fx.Node) -> str | None:
    """The zero points fp32 (L, 1) of a quantizer that has some."""
    if "zero_point" not in _arguments(node) or argument(node, "zero_point") is None:
        return None
    return emit.column(argument(node, "zero_point"))


def _arguments(node: fx.Node) -> set[str]:
    return {one.name for one in node.target._schema.arguments}  # type: ignore[union-attr]


def _inliers(emit: Emitter, steps: str, zero: str | None, bits: int) -> str:
    """Codes as fp32 of rounded steps: P2, or P3 shifted into int8."""
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
        raise ModelError(
            f"{node.name}: ONNX export needs the list of static outliers as a constant"
        )
    if channels.numel() == 0:
        return None
    mask = torch.zeros(columns, dtype=torch.bool)
    mask[channels] = True
    return emit.op("Expand", emit.constant(mask), emit.op("Shape", x))


def _dynamic_list(
    emit: Emitter,
    node: fx.Node,
    x: str,
    magnitude: str,
    scale: str,
    zero: str | None,
    shape: torch.Size,
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
        magnitude = emit.op("Abs", emit.op("Sub", x, middle))
    joins = emit.op("GreaterOrEqual", magnitude, emit.column(argument(node, "threshold")))
    period, reverse = argument(node, "refresh_period"), argument(node, "reverse")
    return windowed_or(emit, joins, int(shape[1]), period, reverse)


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


def windowed_or(emit: Emitter, mask: str, length: int, period: int, reverse: bool) -> str:
    """Or of a bool mask (B, L, K) from the start of each window, in scan order, to each token.

    Counts from the sequence's start, less those before the window's start: sizes stay as they are,
    where windows that are padded and viewed would hide the batch from shape inference.
    """
    window = window_length(period, length)
    if window == 1:
        return mask
    here = emit.cast(mask, torch.int32)
    axis = emit.number(1, torch.int64)
    seen = emit.op("CumSum", here, axis, reverse=int(reverse))
    if window == length:
        return emit.cast(seen, torch.bool)
    step = torch.arange(length)
    first = step // window * window
    first = (length - 1 - first).flip(0) if reverse else first
    before = emit.op("Gather", emit.op("Sub", seen, here), emit.constant(first), axis=1)
    return emit.op("Greater", seen, before)


@translates(_OURO.dequantize_dynamic_outlier.default)
def _dequantize(emit: Emitter, node: fx.Node) -> str:
    names = ("codes", "inlier_scale", "zero_point", "outlier_scale", "outlier_start", "x")
    return dequantize(emit, node, [argument(node, name) for name in names])


def dequantize(emit: Emitter, node: fx.Node, operand: Sequence[Any]) -> str:
    """fp32 (B, L, K) of `dequantize_dynamic_outlier`'s six tensors, with the bits of a node."""
    stored, inlier_scale, zero_point, outlier_scale, start, x = operand
    codes = plain_codes(emit, emit.get(stored))
    inliers = codes
    if zero_point is not None:
        half = emit.number(float(2 ** (argument(node, "inlier_bits") - 1)))
        inliers = emit.op("Add", codes, emit.op("Sub", half, emit.column(zero_point)))
    inliers = emit.op("Mul", inliers, emit.column(inlier_scale))
    listed = emit.get(start)
    if listed in emit.empty_lists:
        return inliers
    if argument(node, "outlier_bits") == KEEP_FLOAT_BITS:
        return emit.op("Where", listed, emit.real(x), inliers)
    return emit.op("Where", listed, emit.op("Mul", codes, emit.column(outlier_scale)), inliers)


def plain_codes(emit: Emitter, stored: str) -> str:
    """Stored codes as fp32, without what is added to them."""
    return emit.op("Sub", emit.cast(stored, torch.float32), emit.number(float(CODE_ZERO)))


@translates(_OURO.fake_quantize.default)
def _fake_quantize(emit: Emitter, node: fx.Node) -> str:
    x, scale = emit.real(node.args[0]), emit.real(node.args[1])
    zero, bits = argument(node, "zero_point"), argument(node, "bits")
    steps = emit.op("Round", emit.op("Div", x, scale))
    if zero is None:
        codes = _inliers(emit, steps, None, bits)
    else:
        point = emit.real(zero)
        top = emit.number(float(2**bits - 1))
        codes = emit.op("Clip", emit.op("Add", steps, point), emit.number(0.0), top)
        codes = emit.op("Sub", codes, point)
    y, dtype = emit.op("Mul", codes, scale), value_of(node).dtype
    return y if dtype == torch.float32 else emit.cast(y, dtype)
