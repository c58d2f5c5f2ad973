"""Dynamic-outlier codes back to floats (ops/quantize.py): the arithmetic of every kernel."""

import triton
import triton.language as tl

from ouro_compiler.kernels.templates.recurrence import load


@triton.jit
def dequantize(
    codes,
    listed,
    outliers,
    scale,
    zero_point,
    INLIER_BITS: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
):
    """fp32 values of codes in fp32; zero_point is read where ASYMMETRIC."""
    inliers = codes
    if ASYMMETRIC:
        inliers = codes + (2 ** (INLIER_BITS - 1) - zero_point)
    return tl.where(listed, outliers, inliers * scale)


@triton.jit
def dequantize_token(
    codes_ptrs,
    start,
    x_ptrs,
    scale_ptr,
    zero_point_ptr,
    outlier_scale_ptr,
    position,
    mask,
    INLIER_BITS: tl.constexpr,
    OUTLIER_BITS: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Values of one token at `position` in its window; `start` is int32, where that lists them."""
    codes = load(codes_ptrs, mask, WHOLE)
    listed = mask & (start <= position)
    if OUTLIER_BITS == 16:
        outliers = tl.load(x_ptrs, mask=listed, other=0.0).to(tl.float32)
    else:
        outliers = codes * tl.load(outlier_scale_ptr)
    scale = tl.load(scale_ptr).to(tl.float32)
    zero_point = 0.0
    if ASYMMETRIC:
        zero_point = tl.load(zero_point_ptr).to(tl.float32)
    return dequantize(codes, listed, outliers, scale, zero_point, INLIER_BITS, ASYMMETRIC)
