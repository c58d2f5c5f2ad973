"""The quantizers in C++: their arguments. Codes, lists and scales are the references' bit for bit.

x is (B, L, K) as tokens; outputs are `empty_quantized`'s (codes, outlier_scale, outlier_start).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ouro_compiler.kernels.cpp.launch import (
    DTYPES,
    dtype_code,
    launch,
    refuse_dtypes,
    spec_of,
    strides,
)
from ouro_compiler.kernels.cpp.scan import token_major
from ouro_compiler.kernels.launch import contiguous, current_recording, note_copy
from ouro_compiler.kernels.spec import Template
from ouro_compiler.ops.fused import check_gate_sum, empty_quantized
from ouro_compiler.ops.library import reject
from ouro_compiler.ops.linear import check_weight
from ouro_compiler.ops.maps import tokens_shape
from ouro_compiler.ops.quantize import (
    KEEP_FLOAT_BITS,
    check_dequantize,
    start_dtype,
    window_length,
)
from ouro_compiler.ops.quantize import check as check_quantize

_ZERO_POINTS = {**DTYPES, torch.uint8: 3, torch.int32: 4}  # templates/memory.h has the same
Static = tuple[int, int, int, bool]  # inlier_bits, outlier_bits, refresh_period, reverse


def refuse_zero_point(zero_point: Tensor | None, *floats: Tensor | None) -> str | None:
    """Why no kernel takes this zero point and these floating-point tensors; None if one does."""
    if zero_point is not None and zero_point.dtype not in _ZERO_POINTS:
        return f"kernels take zero points in uint8, int32 or floating point, got {zero_point.dtype}"
    return refuse_dtypes(*floats)


def refuse_quantize(
    x: Tensor, inlier_scale: Tensor, zero_point: Tensor | None, threshold: Tensor, *_: Any
) -> str | None:
    """Why no kernel quantizes x; None if one does."""
    return refuse_zero_point(zero_point, x, inlier_scale, threshold)


def refuse_static(
    x: Tensor, inlier_scale: Tensor, zero_point: Tensor | None, *_: Any
) -> str | None:
    """Why no kernel quantizes x with a fixed list; None if one does."""
    return refuse_zero_point(zero_point, x, inlier_scale)


def refuse_dequantize(
    codes: Tensor,
    inlier_scale: Tensor,
    zero_point: Tensor | None,
    outlier_scale: Tensor,
    outlier_start: Tensor,
    x: Tensor | None,
    *_: Any,
) -> str | None:
    """Why no kernel dequantizes these codes; None if one does."""
    if codes.dtype != torch.int8 or outlier_scale.dtype != torch.float32:
        return f"kernels take int8 codes and fp32 outlier scales, got {codes.dtype}"
    if outlier_start.dtype not in (torch.uint8, torch.int32):
        return f"kernels take outlier starts in uint8 or int32, got {outlier_start.dtype}"
    return refuse_zero_point(zero_point, inlier_scale, x)


def refuse_gate_sum(
    y: Tensor,
    other: Tensor | None,
    z: Tensor | None,
    factor: float,
    inlier_scale: Tensor,
    threshold: Tensor,
    *_: Any,
) -> str | None:
    """Why no kernel gates and quantizes these; None if one does."""
    if any(tensor is not None and tensor.dtype != y.dtype for tensor in (other, z)):
        return "y, other and z must share a dtype"
    return refuse_dtypes(y, inlier_scale, threshold)


def refuse_weight(
    qweight: Tensor, weight_scale: Tensor, zero_point: Tensor | None, *_: Any
) -> str | None:
    """Why no kernel dequantizes this weight; None if one does."""
    if qweight.dtype not in (torch.int8, torch.uint8):
        return f"kernels take int8 codes, or packed ones in uint8, got {qweight.dtype}"
    return refuse_zero_point(zero_point, weight_scale)


def rows(x: Tensor, name: str) -> Tensor:
    """x (B, L, K) or (B, H, W, K) with the channels of a token next to each other.

    A copy is recorded.
    """
    if x.stride(-1) == 1 or x.shape[-1] == 1:
        return x
    note_copy(name, "its channels are not next to each other in memory")
    return x.contiguous()


def vector(tensor: Tensor | None, name: str) -> tuple[Tensor | None, int]:
    """A parameter and the code of its dtype, as kernels read it."""
    if tensor is None:
        return None, 0
    return contiguous(tensor, name), _ZERO_POINTS[tensor.dtype]


def quantizer(quantized: tuple[Tensor, Tensor, Tensor], static: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments that end every quantizing kernel."""
    codes, _, start = quantized
    inlier_bits, outlier_bits, refresh_period, reverse = static
    batch, length, columns = codes.shape
    window = window_length(refresh_period, length)
    sizes = (start.dtype == torch.int32, batch, length, columns, window)
    return (*quantized, *sizes, inlier_bits, outlier_bits, reverse)


def quantize_dynamic_outlier(
    x: Tensor,
    inlier_scale: Tensor,
    zero_point: Tensor | None,
    threshold: Tensor,
    *static: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize_dynamic_outlier_ref` in C++; shapes as there."""
    vectors = (inlier_scale, zero_point, threshold)
    check_quantize("quantize_dynamic_outlier", x, vectors, *static[:3], maps=True)
    shape = tokens_shape(x)
    assert shape is not None  # checked
    x = rows(x, "x")
    quantized = empty_quantized(x, shape, static[2])
    launch(
        spec_of(Template.QUANTIZE, DTYPE=dtype_code(x)),
        *(x, *strides(x)),
        *vector(inlier_scale, "inlier_scale"),
        *vector(zero_point, "zero_point"),
        *vector(threshold, "threshold"),
        *quantizer(quantized, static),
    )
    return quantized


def quantize_static_outlier(
    x: Tensor,
    inlier_scale: Tensor,
    zero_point: Tensor | None,
    channels: Tensor,
    *static: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize_static_outlier_ref` in C++; shapes as there."""
    vectors = (inlier_scale, zero_point)
    check_quantize("quantize_static_outlier", x, vectors, *static[:3])
    x = rows(x, "x")
    if channels.dtype != torch.int64:
        note_copy("channels", f"its dtype is {channels.dtype}")
    channels = contiguous(channels.long(), "channels")
    if current_recording() is None:  # what is recorded has no values, and ran before
        _check_channels(channels, x.shape[2])
    quantized = empty_quantized(x, tuple(x.shape), static[2])  # type: ignore[arg-type]
    # The kernel writes the list too: what the host writes is not repeated by a tape.
    launch(
        spec_of(Template.QUANTIZE_STATIC, DTYPE=dtype_code(x)),
        *(x, x.stride(0), x.stride(1)),
        *vector(inlier_scale, "inlier_scale"),
        *vector(zero_point, "zero_point"),
        *(channels, channels.numel()),
        *quantizer(quantized, static),
    )
    return quantized


def _check_channels(channels: Tensor, columns: int) -> None:
    if bool(((channels < -columns) | (channels >= columns)).any()):
        raise IndexError(f"a channel of {channels.tolist()} is not among {columns} channels")


def dequantize_dynamic_outlier(
    codes: Tensor,
    inlier_scale: Tensor,
    zero_point: Tensor | None,
    outlier_scale: Tensor,
    outlier_start: Tensor,
    x: Tensor | None,
    inlier_bits: int,
    outlier_bits: int,
    refresh_period: int,
    reverse: bool,
) -> Tensor:
    """`dequantize_dynamic_outlier_ref` in C++; shapes as there."""
    check_dequantize(codes, (inlier_scale, zero_point), x, outlier_bits)
    batch, length, columns = codes.shape
    window = window_length(refresh_period, length)
    _check_list(codes, outlier_scale, outlier_start, window)
    # Without 16 bits outliers are codes, whatever x is.
    x = x if outlier_bits == KEEP_FLOAT_BITS else None
    y = codes.new_empty(codes.shape, dtype=torch.float32)
    launch(
        spec_of(Template.DEQUANTIZE, DTYPE=dtype_code(x)),
        *dequantizer(codes, inlier_scale, zero_point, outlier_scale, outlier_start, x),
        *(y, batch, length, columns, window, inlier_bits, reverse),
        outlier_start.dtype == torch.int32,
    )
    return y


def dequantizer(
    codes: Tensor,
    inlier_scale: Tensor,
    zero_point: Tensor | None,
    outlier_scale: Tensor,
    outlier_start: Tensor,
    x: Tensor | None,
    name: str = "",
) -> tuple[Any, ...]:
    """The arguments that every kernel takes for codes to dequantize; `name` is their operand's."""
    x = None if x is None else rows(x, f"{name}x")
    return (
        contiguous(codes, f"{name}codes"),
        *vector(inlier_scale, f"{name}inlier_scale"),
        *vector(zero_point, f"{name}zero_point"),
        contiguous(outlier_scale, f"{name}outlier_scale"),
        contiguous(outlier_start, f"{name}outlier_start"),
        *((None, 0, 0) if x is None else (x, x.stride(0), x.stride(1))),
    )


def _check_list(codes: Tensor, scale: Tensor, start: Tensor, window: int) -> None:
    """Raise ValueError for an outlier list that is not of these codes."""
    batch, length, columns = codes.shape
    shape = (batch, -(-length // window), columns)
    if start.shape != shape or start.dtype != start_dtype(window):
        reject(
            "dequantize_dynamic_outlier",
            f"outlier_start must be {shape} in {start_dtype(window)}, got {tuple(start.shape)} in "
            f"{start.dtype}",
        )
    if scale.shape != codes.shape[:2]:
        reject("dequantize_dynamic_outlier", f"outlier_scale must be {(batch, length)}")


def gate_sum_quantize(
    y: Tensor,
    other: Tensor | None,
    z: Tensor | None,
    factor: float,
    inlier_scale: Tensor,
    threshold: Tensor,
    inlier_bits: int,
    outlier_bits: int,
    refresh_period: int,
    reverse: bool,
    emit: bool,
) -> tuple[Tensor, ...]:
    """`gate_sum_quantize_ref` in C++; y, other and z are (B, K, L)."""
    check_gate_sum(y, other, z)
    tokens = rows(y.transpose(1, 2), "y")
    bits = (inlier_bits, outlier_bits, refresh_period)
    check_quantize("gate_sum_quantize", tokens, (inlier_scale, threshold), *bits)
    quantized = empty_quantized(y, tuple(tokens.shape), refresh_period)  # type: ignore[arg-type]
    values = y.new_empty(tokens.shape if emit else 0)
    matrices: list[Any] = [tokens, tokens.stride(0), tokens.stride(1)]
    for tensor, name in ((other, "other"), (z, "z")):
        part = None if tensor is None else token_major(tensor, name)
        matrices += (None, 0, 0) if part is None else (part, part.stride(0), part.stride(2))
    launch(
        spec_of(Template.GATE_SUM_QUANTIZE, DTYPE=dtype_code(y)),
        *(*matrices, factor, values if emit else None),
        *vector(inlier_scale, "inlier_scale"),
        *vector(threshold, "threshold"),
        *quantizer(quantized, (*bits, reverse)),
    )
    return (*quantized, values)


def dequantize_weight(
    qweight: Tensor, weight_scale: Tensor, zero_point: Tensor | None, bits: int, columns: int
) -> Tensor:
    """`dequantize_weight_ref` in C++; shapes as there."""
    check_weight(qweight, weight_scale, zero_point, columns)
    y = qweight.new_empty((qweight.shape[0], columns), dtype=torch.float32)
    one_zero = zero_point is not None and zero_point.shape[0] == 1
    launch(
        spec_of(Template.DEQUANTIZE_WEIGHT),
        *(contiguous(qweight, "qweight"), qweight.dtype == torch.uint8),
        *(*vector(weight_scale, "weight_scale"), weight_scale.shape[0] == 1),
        *(*vector(zero_point, "zero_point"), one_zero),
        *(bits, y, qweight.shape[0], columns),
    )
    return y
