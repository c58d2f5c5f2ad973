"""`ouro::quantize_dynamic_outlier`: a (window, sample) a program."""

import triton
import triton.language as tl

from ouro_compiler.kernels.templates.common import token_offset
from ouro_compiler.kernels.templates.quantizer import encode, list_outliers


@triton.jit
def quantize_dynamic_outlier_kernel(
    x_ptr,  # (B, L, K), or (B, H, W, K)
    inlier_scale_ptr,  # (L,)
    zero_point_ptr,  # (L,), or None
    threshold_ptr,  # (L,)
    codes_ptr,  # int8 (B, L, K), contiguous
    outlier_scale_ptr,  # fp32 (B, L)
    outlier_start_ptr,  # (B, J, K)
    stride_xb,
    stride_xh,  # None without a map
    stride_xl,
    stride_xk,
    LENGTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    MAP_WIDTH: tl.constexpr,  # W, or 0 where x is (B, L, K)
    WINDOW: tl.constexpr,
    INLIER_BITS: tl.constexpr,
    OUTLIER_BITS: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    REVERSE: tl.constexpr,
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
        place = token_offset(token.to(tl.int64), stride_xh, stride_xl, MAP_WIDTH)
        row = sample * stride_xb + place
        x = tl.load(x_ptr + row + offs_k * stride_xk, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(inlier_scale_ptr + token).to(tl.float32)
        threshold = tl.load(threshold_ptr + token).to(tl.float32)
        zero_point = 0.0
        if ASYMMETRIC:
            zero_point = tl.load(zero_point_ptr + token).to(tl.float32)
        start = list_outliers(
            x, start, mask, position, scale, zero_point, threshold, INLIER_BITS, ASYMMETRIC, NEVER
        )
        codes, outlier_scale = encode(
            x, start != NEVER, scale, zero_point, INLIER_BITS, OUTLIER_BITS, ASYMMETRIC
        )
        out = sample * LENGTH + token
        tl.store(codes_ptr + out * COLUMNS + offs_k, codes, mask=mask)
        tl.store(outlier_scale_ptr + out, outlier_scale)
    out = (sample * tl.num_programs(1) + window) * COLUMNS + offs_k
    tl.store(outlier_start_ptr + out, start.to(outlier_start_ptr.dtype.element_ty), mask=mask)
