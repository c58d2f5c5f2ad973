"""`ouro::dequantize_dynamic_outlier`: a (BLOCK_M, BLOCK_K) tile of rows a program."""

import triton
import triton.language as tl

from ouro_compiler.kernels.templates.dequantizer import dequantize


@triton.jit(do_not_specialize=["rows"])
def dequantize_dynamic_outlier_kernel(
    codes_ptr,  # int8 (B, L, K), contiguous
    inlier_scale_ptr,  # (L,)
    zero_point_ptr,  # (L,), or None
    outlier_scale_ptr,  # fp32 (B, L)
    outlier_start_ptr,  # (B, J, K)
    x_ptr,  # (B, L, K) where OUTLIER_BITS is 16, else None
    y_ptr,  # fp32 (B, L, K), contiguous
    rows,  # B * L
    stride_xb,
    stride_xl,
    stride_xk,
    LENGTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    WINDOW: tl.constexpr,
    INLIER_BITS: tl.constexpr,
    OUTLIER_BITS: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_m = row < rows
    mask = mask_m[:, None] & (offs_k < COLUMNS)[None, :]
    sample = row // LENGTH
    token = row % LENGTH
    step = LENGTH - 1 - token if REVERSE else token
    windows: tl.constexpr = (LENGTH + WINDOW - 1) // WINDOW
    window = sample * windows + step // WINDOW
    offs = row[:, None] * COLUMNS + offs_k[None, :]
    codes = tl.load(codes_ptr + offs, mask=mask, other=0).to(tl.float32)
    start = tl.load(
        outlier_start_ptr + window[:, None] * COLUMNS + offs_k[None, :], mask=mask, other=0
    )
    listed = start.to(tl.int32) <= (step % WINDOW).to(tl.int32)[:, None]
    scale = tl.load(inlier_scale_ptr + token).to(tl.float32)[:, None]
    zero_point = 0.0
    if ASYMMETRIC:
        zero_point = tl.load(zero_point_ptr + token).to(tl.float32)[:, None]
    if OUTLIER_BITS == 16:
        place = sample * stride_xb + token * stride_xl
        outliers = tl.load(
            x_ptr + place[:, None] + (offs_k * stride_xk)[None, :], mask=mask & listed, other=0.0
        ).to(tl.float32)
    else:
        outlier_scale = tl.load(outlier_scale_ptr + row, mask=mask_m, other=0.0)
        outliers = codes * outlier_scale[:, None]
    values = dequantize(codes, listed, outliers, scale, zero_point, INLIER_BITS, ASYMMETRIC)
    tl.store(y_ptr + offs, values, mask=mask)
