"""Dynamic-outlier codes back to floats (ops/quantize.py): the arithmetic of every kernel."""

import triton
import triton.language as tl

from ouro_compiler.kernels.templates.recurrence import fetch


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
def fetch_token(
    codes_ptrs,
    start_ptrs,
    outlier_ptrs,
    scale_ptr,
    zero_point_ptr,
    position,
    mask,
    OUTLIER_BITS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """What `dequantize_token` takes of one token at `position` in its window, as it is stored.

    outlier_ptrs: of values, where OUTLIER_BITS is 16, else of one outlier scale.
    """
    start = fetch(start_ptrs, mask, WHOLE)
    if OUTLIER_BITS == 16:
        outliers = tl.load(outlier_ptrs, mask=mask & (start.to(tl.int32) <= position), other=0.0)
    else:
        outliers = tl.load(outlier_ptrs)
    codes = fetch(codes_ptrs, mask, WHOLE)
    return codes, start, outliers, tl.load(scale_ptr), tl.load(zero_point_ptr), position


@triton.jit
def dequantize_token(
    token, INLIER_BITS: tl.constexpr, OUTLIER_BITS: tl.constexpr, ASYMMETRIC: tl.constexpr
):
    """fp32 values of one token."""
    codes, start, outliers, scale, zero_point, position = token
    codes = codes.to(tl.float32)
    outliers = outliers.to(tl.float32)
    if OUTLIER_BITS != 16:
        outliers = codes * outliers
    listed = start.to(tl.int32) <= position
    scale = scale.to(tl.float32)
    return dequantize(
        codes, listed, outliers, scale, zero_point.to(tl.float32), INLIER_BITS, ASYMMETRIC
    )
