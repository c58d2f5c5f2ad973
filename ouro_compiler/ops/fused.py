"""Ops that end in the dynamic-outlier quantizer: norm, merge, convolution or gate produce codes.

Each computes its values, rounds them to the input's dtype and quantizes what it rounded, symmetric
and per time step as `quantize_dynamic_outlier` does. Codes and lists come first, then the values
before quantization (with `emit`; an empty tensor without) and what else the unfused op returns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ouro_compiler.ops.activations import silu as silu_ref
from ouro_compiler.ops.causal_conv1d import causal_conv1d_ref
from ouro_compiler.ops.library import define_op, empty_token_major, reject
from ouro_compiler.ops.norm import add_norm_ref, residual_dtype
from ouro_compiler.ops.quantize import quantize_dynamic_outlier_ref, start_dtype, window_length


def add_norm_quantize_ref(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    residual_fp32: bool,
    inlier_scale: Tensor,
    threshold: Tensor,
    inlier_bits: int,
    outlier_bits: int,
    refresh_period: int,
    reverse: bool,
    emit: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(codes, outlier_scale, outlier_start, y, x + residual) of add_norm on x (B, L, K)."""
    y, total = add_norm_ref(x, residual, weight, bias, eps, rms, residual_fp32)
    static = (inlier_bits, outlier_bits, refresh_period, reverse)
    quantized = quantize_dynamic_outlier_ref(y, inlier_scale, None, threshold, *static)
    return (*quantized, y if emit else y.new_empty(0), total)


def causal_conv1d_quantize_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    inlier_scale: Tensor,
    threshold: Tensor,
    inlier_bits: int,
    outlier_bits: int,
    refresh_period: int,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(codes (B, L, K), outlier_scale, outlier_start, y (B, K, L)) of causal_conv1d on x (B, K, L).

    Windows run in the convolution's direction.
    """
    y = causal_conv1d_ref(x, weight, bias, silu, reverse)
    static = (inlier_bits, outlier_bits, refresh_period, reverse)
    codes = quantize_dynamic_outlier_ref(y.transpose(1, 2), inlier_scale, None, threshold, *static)
    return (*codes, y)


def gate_sum_quantize_ref(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(codes, outlier_scale, outlier_start, values (B, L, K)) of (y + other) * silu(z) * factor.

    y, other and z are (B, K, L). Each direction is gated before the sum, as the scans do it.
    """
    check_gate_sum(y, other, z)
    gate = None if z is None else silu_ref(z.float())
    value = y.float() if gate is None else y.float() * gate
    if other is not None:
        value = value + (other.float() if gate is None else other.float() * gate)
    value = (value * factor).to(y.dtype).transpose(1, 2).contiguous()
    static = (inlier_bits, outlier_bits, refresh_period, reverse)
    codes = quantize_dynamic_outlier_ref(value, inlier_scale, None, threshold, *static)
    return (*codes, value if emit else value.new_empty(0))


def cross_merge_norm_quantize_ref(
    rows: Tensor,
    rows_back: Tensor | None,
    columns: Tensor,
    columns_back: Tensor | None,
    height: int,
    width: int,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    inlier_scale: Tensor,
    threshold: Tensor,
    inlier_bits: int,
    outlier_bits: int,
    refresh_period: int,
    reverse: bool,
    emit: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(codes, outlier_scale, outlier_start, y (B, L, K)) of the norm of a map's merged orders.

    All orders are (B, K, L) with L = height * width: rows and rows_back in raster order, columns
    and columns_back column after column. Rows are added, columns are, and then both; every sum is
    rounded to the dtype.
    """
    check_cross_merge(rows, rows_back, columns, columns_back, height, width)
    ahead = rows if rows_back is None else rows + rows_back
    across = columns if columns_back is None else columns + columns_back
    merged = ahead + across.unflatten(2, (width, height)).transpose(2, 3).flatten(2)
    y, _ = add_norm_ref(merged.transpose(1, 2), None, weight, bias, eps, rms, True)
    static = (inlier_bits, outlier_bits, refresh_period, reverse)
    quantized = quantize_dynamic_outlier_ref(y, inlier_scale, None, threshold, *static)
    return (*quantized, y if emit else y.new_empty(0))


def check_cross_merge(
    rows: Tensor,
    rows_back: Tensor | None,
    columns: Tensor,
    columns_back: Tensor | None,
    height: int,
    width: int,
) -> None:
    """Raise ValueError for operands that do not fit each other."""
    name, orders = "cross_merge_norm_quantize", (rows, rows_back, columns, columns_back)
    kinds = {(tuple(order.shape), order.dtype) for order in orders if order is not None}
    if len(kinds) > 1 or rows.dim() != 3:
        reject(name, f"orders must share one shape (B, K, L) and dtype, got {kinds}")
    if height < 1 or width < 1 or rows.shape[2] != height * width:
        reject(name, f"{rows.shape[2]} tokens are no map of {height} x {width}")


def check_gate_sum(y: Tensor, other: Tensor | None, z: Tensor | None) -> None:
    """Raise ValueError for operands that do not fit each other."""
    shapes = {tuple(tensor.shape) for tensor in (y, other, z) if tensor is not None}
    if len(shapes) > 1 or y.dim() != 3:
        reject("gate_sum_quantize", f"y, other and z must share one (B, K, L), got {shapes}")


def empty_quantized(
    like: Tensor, shape: tuple[int, int, int], refresh_period: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised (codes, outlier_scale, outlier_start) for an activation (B, L, K)."""
    batch, length, columns = shape
    window = window_length(refresh_period, length)
    return (
        like.new_empty(shape, dtype=torch.int8),
        like.new_empty(shape[:2], dtype=torch.float32),
        like.new_empty((batch, -(-length // window), columns), dtype=start_dtype(window)),
    )


def _fake_add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    residual_fp32: bool,
    inlier_scale: Tensor,
    threshold: Tensor,
    inlier_bits: int,
    outlier_bits: int,
    refresh_period: int,
    reverse: bool,
    emit: bool,
) -> tuple[Tensor, ...]:
    dtype = residual_dtype(x, residual, residual_fp32)
    return (
        *empty_quantized(x, tuple(x.shape), refresh_period),  # type: ignore[arg-type]
        x.new_empty(x.shape if emit else 0),
        x.new_empty(x.shape, dtype=dtype),
    )


def _fake_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    inlier_scale: Tensor,
    threshold: Tensor,
    inlier_bits: int,
    outlier_bits: int,
    refresh_period: int,
    reverse: bool,
) -> tuple[Tensor, ...]:
    batch, columns, length = x.shape
    return (*empty_quantized(x, (batch, length, columns), refresh_period), empty_token_major(x))


def _fake_gate_sum(
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
    batch, columns, length = y.shape
    shape = (batch, length, columns)
    return (*empty_quantized(y, shape, refresh_period), y.new_empty(shape if emit else 0))


def _fake_cross_merge(
    rows: Tensor,
    rows_back: Tensor | None,
    columns: Tensor,
    columns_back: Tensor | None,
    height: int,
    width: int,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    inlier_scale: Tensor,
    threshold: Tensor,
    inlier_bits: int,
    outlier_bits: int,
    refresh_period: int,
    reverse: bool,
    emit: bool,
) -> tuple[Tensor, ...]:
    batch, channels, length = rows.shape
    shape = (batch, length, channels)
    return (*empty_quantized(rows, shape, refresh_period), rows.new_empty(shape if emit else 0))


_QUANTIZER: str = (
    "Tensor inlier_scale, Tensor threshold, int inlier_bits, int outlier_bits, int refresh_period, "
    "bool reverse"
)
_DEFINITIONS: tuple[tuple[str, Any, Any], ...] = (
    (
        "add_norm_quantize(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, "
        f"bool rms, bool residual_fp32, {_QUANTIZER}, bool emit) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        add_norm_quantize_ref,
        _fake_add_norm,
    ),
    (
        f"causal_conv1d_quantize(Tensor x, Tensor weight, Tensor? bias, bool silu, {_QUANTIZER}) "
        "-> (Tensor, Tensor, Tensor, Tensor)",
        causal_conv1d_quantize_ref,
        _fake_conv,
    ),
    (
        "gate_sum_quantize(Tensor y, Tensor? other, Tensor? z, float factor, "
        f"{_QUANTIZER}, bool emit) -> (Tensor, Tensor, Tensor, Tensor)",
        gate_sum_quantize_ref,
        _fake_gate_sum,
    ),
    (
        "cross_merge_norm_quantize(Tensor rows, Tensor? rows_back, Tensor columns, "
        "Tensor? columns_back, int height, int width, Tensor weight, Tensor? bias, float eps, "
        f"bool rms, {_QUANTIZER}, bool emit) -> (Tensor, Tensor, Tensor, Tensor)",
        cross_merge_norm_quantize_ref,
        _fake_cross_merge,
    ),
)
for _schema, _reference, _fake in _DEFINITIONS:
    define_op(_schema, implementation=_reference, fake=_fake)
