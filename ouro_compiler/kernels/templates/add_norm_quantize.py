"""`ouro::add_norm_quantize`: residual addition, norm and quantizer, a window a program."""

import triton
import triton.language as tl

from ouro_compiler.kernels.templates.norm import normalise
from ouro_compiler.kernels.templates.quantizer import encode, list_outliers


@triton.jit
def add_norm_quantize_kernel(
    x_ptr,  # (B, L, K)
    residual_ptr,  # (B, L, K), or None
    weight_ptr,  # (K,)
    bias_ptr,  # (K,), or None
    inlier_scale_ptr,  # (L,)
    threshold_ptr,  # (L,)
    codes_ptr,  # int8 (B, L, K), contiguous, as all that follow
    outlier_scale_ptr,  # fp32 (B, L)
    outlier_start_ptr,  # (B, J, K)
    value_ptr,  # (B, L, K) in x's dtype, or None
    total_ptr,  # (B, L, K): x + residual
    eps,
    stride_xb,
    stride_xl,
    stride_xk,
    stride_rb,
    stride_rl,
    stride_rk,
    LENGTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    WINDOW: tl.constexpr,
    INLIER_BITS: tl.constexpr,
    OUTLIER_BITS: tl.constexpr,
    REVERSE: tl.constexpr,
    RMS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EMIT: tl.constexpr,
    NEVER: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    window = tl.program_id(1)
    offs_k = tl.arange(0, BLOCK_K)
    mask = offs_k < COLUMNS
    weight = tl.load(weight_ptr + offs_k, mask=mask, other=0.0).to(tl.float32)
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_k, mask=mask, other=0.0).to(tl.float32)
    x_ptr += sample * stride_xb
    if HAS_RESIDUAL:
        residual_ptr += sample * stride_rb
    start = tl.full((BLOCK_K,), NEVER, tl.int32)
    for position in range(tl.minimum(WINDOW, LENGTH - window * WINDOW)):
        step = window * WINDOW + position
        token = LENGTH - 1 - step if REVERSE else step
        out = sample * LENGTH + token
        offs = out * COLUMNS + offs_k
        place = token.to(tl.int64)
        ptrs = x_ptr + place * stride_xl + offs_k * stride_xk
        total = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            ptrs = residual_ptr + place * stride_rl + offs_k * stride_rk
            total += tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
        tl.store(total_ptr + offs, total.to(total_ptr.dtype.element_ty), mask=mask)
        y = normalise(total, weight, bias, mask, eps, COLUMNS, RMS)
        y = y.to(x_ptr.dtype.element_ty)  # what is quantized is what the norm alone would return
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
