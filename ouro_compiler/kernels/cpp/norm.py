"""Residual addition and normalisation in C++, alone and before a quantizer: their arguments."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ouro_compiler.kernels.cpp.launch import dtype_code, launch, refuse_dtypes, spec_of
from ouro_compiler.kernels.cpp.quantize import quantizer, vector
from ouro_compiler.kernels.launch import as_tokens, contiguous, row_strides
from ouro_compiler.kernels.spec import KernelSpec, Template
from ouro_compiler.ops.fused import check_cross_merge, empty_quantized
from ouro_compiler.ops.norm import check as check_norm
from ouro_compiler.ops.norm import residual_dtype
from ouro_compiler.ops.quantize import check as check_quantize


def refuse_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    residual_fp32: bool,
    inlier_scale: Tensor | None = None,
    threshold: Tensor | None = None,
    *_: Any,
) -> str | None:
    """Why no kernel normalises x; None if one does."""
    return refuse_dtypes(x, residual, weight, bias, inlier_scale, threshold)


def _inputs(
    template: Template,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    residual_fp32: bool,
) -> tuple[KernelSpec, Tensor, tuple[Any, ...]]:
    """The kernel, an empty x + residual, and the arguments before the outputs."""
    total = x.new_empty(x.shape, dtype=residual_dtype(x, residual, residual_fp32))
    spec = spec_of(
        template,
        DTYPE=dtype_code(x),
        # Without a residual any dtype will do: that of a kernel which others use too.
        DTYPE_RESIDUAL=dtype_code(total if residual is None else residual),
        DTYPE_TOTAL=dtype_code(total),
    )
    x = as_tokens(x, "x")
    residual = None if residual is None else as_tokens(residual, "residual", x)
    operands = (
        *(x, *x.stride(), residual, *row_strides(residual)),
        *vector(weight, "weight"),
        *vector(bias, "bias"),
    )
    return spec, total, (*operands, eps, rms)


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    residual_fp32: bool,
) -> tuple[Tensor, Tensor]:
    """`add_norm_ref` in C++; x and residual (..., K) may have any strides."""
    check_norm(x, residual, weight, bias)
    front = (x, residual, weight, bias, eps, rms, residual_fp32)
    spec, total, inputs = _inputs(Template.ADD_NORM, *front)
    y = x.new_empty(x.shape)
    batch, length, columns = inputs[0].shape
    launch(spec, *inputs, y, total, batch, length, columns)
    return y, total


def add_norm_quantize(
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
    """`add_norm_quantize_ref` in C++; x and residual (B, L, K) may have any strides."""
    check_norm(x, residual, weight, bias)
    bits = (inlier_bits, outlier_bits, refresh_period)
    check_quantize("add_norm_quantize", x, (inlier_scale, threshold), *bits)
    front = (x, residual, weight, bias, eps, rms, residual_fp32)
    spec, total, inputs = _inputs(Template.ADD_NORM_QUANTIZE, *front)
    quantized = empty_quantized(x, tuple(x.shape), refresh_period)  # type: ignore[arg-type]
    value = x.new_empty(x.shape if emit else 0)
    launch(
        spec,
        *(*inputs, value if emit else None, total),
        *vector(inlier_scale, "inlier_scale"),
        *vector(threshold, "threshold"),
        *quantizer(quantized, (*bits, reverse)),
    )
    return (*quantized, value, total)


def refuse_cross_merge(
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
    *_: Any,
) -> str | None:
    """Why no kernel merges and normalises these orders; None if one does."""
    return refuse_dtypes(rows, weight, bias, inlier_scale, threshold)


def cross_merge_norm_quantize(
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
    """`cross_merge_norm_quantize_ref` in C++; orders are copied unless they are token-major."""
    check_cross_merge(rows, rows_back, columns, columns_back, height, width)
    check_norm(rows.transpose(1, 2), None, weight, bias)
    bits = (inlier_bits, outlier_bits, refresh_period)
    vectors = (inlier_scale, threshold)
    check_quantize("cross_merge_norm_quantize", rows.transpose(1, 2), vectors, *bits)
    batch, channels, length = rows.shape
    shape = (batch, length, channels)
    quantized = empty_quantized(rows, shape, refresh_period)
    value = rows.new_empty(shape if emit else 0)
    named = {"rows": rows, "rows_back": rows_back, "columns": columns, "columns_back": columns_back}
    dtype = dtype_code(rows)
    launch(
        spec_of(
            Template.CROSS_MERGE_QUANTIZE, DTYPE=dtype, DTYPE_RESIDUAL=dtype, DTYPE_TOTAL=dtype
        ),
        *(
            None if order is None else contiguous(order.transpose(1, 2), name)
            for name, order in named.items()
        ),
        *(width, *vector(weight, "weight"), *vector(bias, "bias"), eps, rms),
        value if emit else None,
        *vector(inlier_scale, "inlier_scale"),
        *vector(threshold, "threshold"),
        *quantizer(quantized, (*bits, reverse)),
    )
    return (*quantized, value)
