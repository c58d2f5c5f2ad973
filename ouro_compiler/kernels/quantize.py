"""Launches of the quantizers: plain, and behind norm, convolution or gate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ouro_compiler.kernels.blocks import next_power_of_2, quantizer_warps
from ouro_compiler.kernels.launch import contiguous, launch, places, row_strides
from ouro_compiler.kernels.spec import KernelSpec, Template, make_spec
from ouro_compiler.ops.causal_conv1d import check as check_conv
from ouro_compiler.ops.fused import check_gate_sum, empty_quantized
from ouro_compiler.ops.library import empty_token_major
from ouro_compiler.ops.maps import tokens_shape
from ouro_compiler.ops.norm import check as check_norm
from ouro_compiler.ops.norm import residual_dtype
from ouro_compiler.ops.quantize import check as check_quantize
from ouro_compiler.ops.quantize import check_dequantize, window_length

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_MAX_COLUMNS = 8192  # a row lives in registers


def refuse_row(x: Tensor, columns: int) -> str | None:
    """Why no kernel quantizes rows of x; None if one does."""
    if x.dtype not in FLOATS:
        return f"its input is {x.dtype}: kernels take fp16, bf16 and fp32"
    if columns > _MAX_COLUMNS:
        return f"a row of {columns} channels does not fit a program's registers"
    return None


def quantizer_spec(
    template: Template,
    start: Tensor,
    length: int,
    columns: int,
    static: tuple[int, int, int, bool],
    **constants: int,
) -> KernelSpec:
    """The spec of a kernel that ends in the quantizer: `constants` are its own."""
    inlier_bits, outlier_bits, refresh_period, reverse = static
    return make_spec(
        template,
        {
            "LENGTH": length,
            "COLUMNS": columns,
            "WINDOW": window_length(refresh_period, length),
            "INLIER_BITS": inlier_bits,
            "OUTLIER_BITS": outlier_bits,
            "REVERSE": reverse,
            "NEVER": torch.iinfo(start.dtype).max,
            "BLOCK_K": next_power_of_2(columns),
            **constants,
        },
        num_warps=quantizer_warps(columns),
        num_stages=1,
    )


def _check_vectors(name: str, x: Tensor, inlier_scale: Tensor, threshold: Tensor) -> None:
    check_quantize(name, x, (inlier_scale, threshold), 8, 8, 1)


def window_grid(start: Tensor) -> tuple[int, int, int]:
    """A program a window of a sample, of outlier_start (B, J, K)."""
    return (start.shape[0], start.shape[1], 1)


def quantize_dynamic_outlier(
    x: Tensor,
    inlier_scale: Tensor,
    zero_point: Tensor | None,
    threshold: Tensor,
    *static: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize_dynamic_outlier_ref` by kernel; x (B, L, K) or (B, H, W, K), of any strides."""
    vectors = (inlier_scale, zero_point, threshold)
    check_quantize("quantize_dynamic_outlier", x, vectors, *static[:3], maps=True)
    shape = tokens_shape(x)
    assert shape is not None  # checked
    codes, scale, start = empty_quantized(x, shape, static[2])
    at = places(x)
    constants = {"ASYMMETRIC": zero_point is not None, "MAP_WIDTH": at.width}
    spec = quantizer_spec(Template.QUANTIZE, start, *shape[1:], static, **constants)
    strides = (at.sample, at.row, at.token, at.channel)
    launch(spec, window_grid(start), x, *vectors, codes, scale, start, *strides)
    return codes, scale, start


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
    """`dequantize_dynamic_outlier_ref` by kernel; x (B, L, K) may have any strides."""
    check_dequantize(codes, (inlier_scale, zero_point), x, outlier_bits)
    batch, length, columns = codes.shape
    y = codes.new_empty(codes.shape, dtype=torch.float32)
    block_k = min(256, next_power_of_2(columns))
    block_m = max(1, 2048 // block_k)
    constants = {
        "LENGTH": length,
        "COLUMNS": columns,
        "WINDOW": window_length(refresh_period, length),
        "INLIER_BITS": inlier_bits,
        "OUTLIER_BITS": outlier_bits,
        "ASYMMETRIC": zero_point is not None,
        "REVERSE": reverse,
        "BLOCK_M": block_m,
        "BLOCK_K": block_k,
    }
    spec = make_spec(Template.DEQUANTIZE, constants)
    grid = dequantize_grid(batch * length, constants)
    quantized = (contiguous(codes, "codes"), inlier_scale, zero_point, outlier_scale)
    start = contiguous(outlier_start, "outlier_start")
    strides = (0, 0, 0) if x is None else x.stride()
    launch(spec, grid, *quantized, start, x, y, batch * length, *strides)
    return y


def dequantize_grid(rows: int, constants: Mapping[str, int]) -> tuple[int, int, int]:
    """Programs of a dequantizer of B * L rows with these constants."""
    tiles = -(-constants["COLUMNS"] // constants["BLOCK_K"])
    return (-(-rows // constants["BLOCK_M"]), tiles, 1)


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
    """`add_norm_quantize_ref` by kernel; x and residual (B, L, K) may have any strides."""
    check_norm(x, residual, weight, bias)
    _check_vectors("add_norm_quantize", x, inlier_scale, threshold)
    _, length, columns = x.shape
    codes, scale, start = empty_quantized(x, tuple(x.shape), refresh_period)  # type: ignore[arg-type]
    value = x.new_empty(x.shape if emit else 0)
    total = x.new_empty(x.shape, dtype=residual_dtype(x, residual, residual_fp32))
    spec = quantizer_spec(
        Template.ADD_NORM_QUANTIZE,
        start,
        length,
        columns,
        (inlier_bits, outlier_bits, refresh_period, reverse),
        RMS=rms,
        HAS_RESIDUAL=residual is not None,
        HAS_BIAS=bias is not None,
        EMIT=emit,
    )
    inputs = (x, residual, weight, bias, inlier_scale, threshold)
    outputs = (codes, scale, start, value if emit else None, total)
    launch(spec, window_grid(start), *inputs, *outputs, eps, *x.stride(), *row_strides(residual))
    return codes, scale, start, value, total


def causal_conv1d_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    inlier_scale: Tensor,
    threshold: Tensor,
    *static: Any,
) -> tuple[Tensor, ...]:
    """`causal_conv1d_quantize_ref` by kernel; x (B, K, L) may have any strides."""
    check_conv(x, weight, bias)
    _check_vectors("causal_conv1d_quantize", x.transpose(1, 2), inlier_scale, threshold)
    batch, columns, length = x.shape
    codes, scale, start = empty_quantized(x, (batch, length, columns), static[2])
    value = empty_token_major(x)
    spec = quantizer_spec(
        Template.CONV_QUANTIZE,
        start,
        length,
        columns,
        static,
        TAPS=weight.shape[1],
        HAS_BIAS=bias is not None,
        SILU=silu,
    )
    inputs = (x, contiguous(weight, "weight"), bias, inlier_scale, threshold)
    launch(spec, window_grid(start), *inputs, codes, scale, start, value, *x.stride())
    return codes, scale, start, value


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
    """`gate_sum_quantize_ref` by kernel; y, other and z (B, K, L) may have any strides."""
    check_gate_sum(y, other, z)
    _check_vectors("gate_sum_quantize", y.transpose(1, 2), inlier_scale, threshold)
    batch, columns, length = y.shape
    codes, scale, start = empty_quantized(y, (batch, length, columns), refresh_period)
    value = y.new_empty((batch, length, columns) if emit else 0)
    spec = quantizer_spec(
        Template.GATE_SUM_QUANTIZE,
        start,
        length,
        columns,
        (inlier_bits, outlier_bits, refresh_period, reverse),
        HAS_OTHER=other is not None,
        HAS_Z=z is not None,
        EMIT=emit,
    )
    strides = [
        stride
        for tensor in (y, other, z)
        for stride in ((0, 0, 0) if tensor is None else tensor.stride())
    ]
    outputs = (codes, scale, start, value if emit else None)
    vectors = (inlier_scale, threshold)
    launch(spec, window_grid(start), y, other, z, *vectors, *outputs, float(factor), *strides)
    return codes, scale, start, value
