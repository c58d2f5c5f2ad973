"""`ouro::cross_merge_norm_quantize`: sum of a map's orders, norm and quantizer, a window a program.

A token of the raster is found in its column by index.
"""

import triton
import triton.language as tl

from ouro_compiler.kernels.templates.norm import normalise
from ouro_compiler.kernels.templates.quantizer import encode, list_outliers


@triton.jit
def cross_merge_norm_quantize_kernel(
    rows_ptr,  # (B, L, K), contiguous, as all that follow
    rows_back_ptr,  # (B, L, K), or None
    columns_ptr,  # (B, L, K), column after column
    columns_back_ptr,  # (B, L, K), or None
    weight_ptr,  # (K,)
    bias_ptr,  # (K,), or None
    inlier_scale_ptr,  # (L,)
    threshold_ptr,  # (L,)
    codes_ptr,  # int8 (B, L, K)
    outlier_scale_ptr,  # fp32 (B, L)
    outlier_start_ptr,  # (B, J, K)
    value_ptr,  # (B, L, K) in the orders' dtype, or None
    eps,
    LENGTH: tl.constexpr,
    MAP_WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,  # K
    WINDOW: tl.constexpr,
    INLIER_BITS: tl.constexpr,
    OUTLIER_BITS: tl.constexpr,
    REVERSE: tl.constexpr,
    RMS: tl.constexpr,
    HAS_ROWS_BACK: tl.constexpr,
    HAS_COLUMNS_BACK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EMIT: tl.constexpr,
    NEVER: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    window = tl.program_id(1)
    offs_k = tl.arange(0, BLOCK_K)
    mask = offs_k < COLUMNS
    height: tl.constexpr = LENGTH // MAP_WIDTH
    dtype = rows_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + offs_k, mask=mask, other=0.0).to(tl.float32)
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_k, mask=mask, other=0.0).to(tl.float32)
    start = tl.full((BLOCK_K,), NEVER, tl.int32)
    for position in range(tl.minimum(WINDOW, LENGTH - window * WINDOW)):
        step = window * WINDOW + position
        token = LENGTH - 1 - step if REVERSE else step
        out = sample * LENGTH + token
        offs = out * COLUMNS + offs_k
        turned = token % MAP_WIDTH * height + token // MAP_WIDTH
        across = (sample * LENGTH + turned) * COLUMNS + offs_k
        # Every sum is rounded to the dtype, in the order of the sums that the op replaces.
        total = tl.load(rows_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        if HAS_ROWS_BACK:
            total += tl.load(rows_back_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            total = total.to(dtype).to(tl.float32)
        other = tl.load(columns_ptr + across, mask=mask, other=0.0).to(tl.float32)
        if HAS_COLUMNS_BACK:
            other += tl.load(columns_back_ptr + across, mask=mask, other=0.0).to(tl.float32)
            other = other.to(dtype).to(tl.float32)
        total = (total + other).to(dtype).to(tl.float32)
        y = normalise(total, weight, bias, mask, eps, COLUMNS, RMS)
        y = y.to(dtype)  # what is quantized is what the norm alone would return
        if EMIT:
            tl.store(value_ptr + offs, y, mask=mask)
        y = y.to(tl.float32)
        scale = tl.load(inlier_scale_ptr + token).to(tl.float32)
        threshold = tl.load(threshold_ptr + token).to(tl.float32)
        start = list_outliers(
            y, start, mask, position, scale, 0.0, threshold, INLIER_BITS, False, NEVER
        )
        codes, outlier_scale = encode(
            y, start != NEVER, scale, 0.0, INLIER_BITS, OUTLIER_BITS, False
        )
        tl.store(codes_ptr + offs, codes, mask=mask)
        tl.store(outlier_scale_ptr + out, outlier_scale)
    out = (sample * tl.num_programs(1) + window) * COLUMNS + offs_k
    tl.store(outlier_start_ptr + out, start.to(outlier_start_ptr.dtype.element_ty), mask=mask)
