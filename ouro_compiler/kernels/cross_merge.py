"""Launch of the merge of a map's orders with its norm and quantizer."""

from __future__ import annotations

from torch import Tensor

from ouro_compiler.kernels.launch import contiguous, launch
from ouro_compiler.kernels.quantize import quantizer_spec, window_grid
from ouro_compiler.kernels.spec import Template
from ouro_compiler.ops.fused import check_cross_merge, empty_quantized
from ouro_compiler.ops.norm import check as check_norm
from ouro_compiler.ops.quantize import check as check_quantize


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
    """`cross_merge_norm_quantize_ref` by kernel; orders are copied unless they are token-major."""
    check_cross_merge(rows, rows_back, columns, columns_back, height, width)
    check_norm(rows.transpose(1, 2), None, weight, bias)
    static = (inlier_bits, outlier_bits, refresh_period)
    vectors = (inlier_scale, threshold)
    check_quantize("cross_merge_norm_quantize", rows.transpose(1, 2), vectors, *static)
    batch, channels, length = rows.shape
    shape = (batch, length, channels)
    codes, scale, start = empty_quantized(rows, shape, refresh_period)
    value = rows.new_empty(shape if emit else 0)
    named = {"rows": rows, "rows_back": rows_back, "columns": columns, "columns_back": columns_back}
    orders = [
        None if order is None else contiguous(order.transpose(1, 2), name)
        for name, order in named.items()
    ]
    spec = quantizer_spec(
        Template.CROSS_MERGE_QUANTIZE,
        start,
        length,
        channels,
        (*static, reverse),
        MAP_WIDTH=width,
        RMS=rms,
        HAS_ROWS_BACK=rows_back is not None,
        HAS_COLUMNS_BACK=columns_back is not None,
        HAS_BIAS=bias is not None,
        EMIT=emit,
    )
    outputs = (codes, scale, start, value if emit else None)
    launch(spec, window_grid(start), *orders, weight, bias, *vectors, *outputs, eps)
    return codes, scale, start, value
