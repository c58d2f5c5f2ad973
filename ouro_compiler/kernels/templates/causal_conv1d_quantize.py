"""`ouro::causal_conv1d_quantize`: convolution, SiLU and quantizer, a window a program."""

import triton
import triton.language as tl

from ouro_compiler.kernels.templates.common import silu
from ouro_compiler.kernels.templates.quantizer import encode, list_outliers


@triton.jit
def causal_conv1d_quantize_kernel(
    x_ptr,  # (B, K, L)
    weight_ptr,  # (K, TAPS), contiguous
    bias_ptr,  # (K,), or None
    inlier_scale_ptr,  # (L,)
    threshold_ptr,  # (L,)
    codes_ptr,  # int8 (B, L, K), contiguous
    outlier_scale_ptr,  # fp32 (B, L)
    outlier_start_ptr,  # (B, J, K)
    value_ptr,  # (B, K, L) in x's dtype, memory as (B, L, K)
    stride_xb,
    stride_xk,
    stride_xl,
    LENGTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    WINDOW: tl.constexpr,
    TAPS: tl.constexpr,
    INLIER_BITS: tl.constexpr,
    OUTLIER_BITS: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    NEVER: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    window = tl.program_id(1)
    offs_k = tl.arange(0, BLOCK_K)
    mask = offs_k < COLUMNS
    start = tl.full((BLOCK_K,), NEVER, tl.int32)
    for position in range(tl.minimum(WINDOW, LENGTH - window * WINDOW)):
        step = window * WINDOW + position
        token = LENGTH - 1 - step if REVERSE else step
        y = tl.zeros((BLOCK_K,), tl.float32)
        if HAS_BIAS:
            y += tl.load(bias_ptr + offs_k, mask=mask, other=0.0).to(tl.float32)
        for tap in tl.static_range(TAPS):
            # y_t reads x_{t - (TAPS-1) + tap} through weight[tap]; reversed, x_{t + (TAPS-1) - tap}
            source = token + (TAPS - 1 - tap) if REVERSE else token - (TAPS - 1 - tap)
            inside = mask & (source >= 0) & (source < LENGTH)
            row = sample * stride_xb + source.to(tl.int64) * stride_xl
            x = tl.load(x_ptr + row + offs_k * stride_xk, mask=inside, other=0.0).to(tl.float32)
            y += x * tl.load(weight_ptr + offs_k * TAPS + tap, mask=mask, other=0.0).to(tl.float32)
        if SILU:
            y = silu(y)
        y = y.to(x_ptr.dtype.element_ty)
        out = sample * LENGTH + token
        offs = out * COLUMNS + offs_k
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
