"""A quantizer and the two-scale product behind it in one kernel, for few columns.

Computes what `quantize_dynamic_outlier` and then `linear_dynamic_outlier` do, symmetric and with
outliers as codes: a program takes whole windows of one sample (TILE steps in scan order), quantizes
their rows in registers and multiplies. Codes are never stored. Programs of other outputs quantize
the same rows again, and write the same list.
"""

import triton
import triton.language as tl

from ouro_compiler.kernels.templates.common import (  # noqa: F401  (epilogue)
    round_half_even,
    silu,
    softplus,
)


@triton.jit(do_not_specialize=["stride_xb", "stride_xl"])
def quantizing_linear_kernel(
    x_ptr,  # (B, L, K)
    inlier_scale_ptr,  # (L,)
    threshold_ptr,  # (L,)
    outlier_start_ptr,  # (B, J, K): made here
    qweight_ptr,  # int8 (O, K), or packed uint8 (O, ceil(K / 2))
    weight_scale_ptr,  # (O,), or (1,)
    bias_ptr,  # (O,), or None
    residual_ptr,  # (B, L, O), contiguous, or None
    y_ptr,  # (B, L, O), contiguous
    stride_xb,
    stride_xl,
    stride_xk,
    LENGTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    WINDOW: tl.constexpr,
    REVERSE: tl.constexpr,
    INLIER_BITS: tl.constexpr,
    OUTLIER_BITS: tl.constexpr,
    PACKED: tl.constexpr,
    SCALE_PER_OUTPUT: tl.constexpr,
    NEVER: tl.constexpr,
    TILE: tl.constexpr,  # steps of a program: whole windows, at most BLOCK_M
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # all columns
    BLOCK_W: tl.constexpr,  # all windows of a tile
):
    tiles_n: tl.constexpr = (OUTPUTS + BLOCK_N - 1) // BLOCK_N
    tiles_m: tl.constexpr = (LENGTH + TILE - 1) // TILE
    windows: tl.constexpr = (LENGTH + WINDOW - 1) // WINDOW
    half: tl.constexpr = (COLUMNS + 1) // 2 if PACKED else COLUMNS  # bytes of one weight row
    inlier_max: tl.constexpr = 2 ** (INLIER_BITS - 1) - 1
    outlier_max: tl.constexpr = 2 ** (OUTLIER_BITS - 1) - 1
    tile = tl.program_id(0) // tiles_n
    offs_n = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    out = tl.minimum(offs_n, OUTPUTS - 1)
    sample = (tile // tiles_m).to(tl.int64)
    first_step = (tile % tiles_m) * TILE
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = (offs_k < COLUMNS)[None, :]
    column_ptrs = x_ptr + sample * stride_xb + (offs_k * stride_xk)[None, :]

    # The lists of all windows of the tile, a position of each at a time.
    offs_w = tl.arange(0, BLOCK_W)
    first_steps = first_step + offs_w * WINDOW
    mask_w = (offs_w * WINDOW < TILE) & (first_steps < LENGTH)
    start = tl.full((BLOCK_W, BLOCK_K), NEVER, tl.int32)
    for position in range(WINDOW):
        step = tl.minimum(first_steps + position, LENGTH - 1)
        token = LENGTH - 1 - step if REVERSE else step
        mask = (mask_w & (first_steps + position < LENGTH))[:, None] & mask_k
        x = tl.load(column_ptrs + token[:, None] * stride_xl, mask=mask, other=0.0).to(tl.float32)
        limit = tl.load(inlier_scale_ptr + token).to(tl.float32) * inlier_max
        threshold = tl.load(threshold_ptr + token).to(tl.float32)
        unlisted = mask & (start == NEVER)
        fires = tl.max((unlisted & (tl.abs(x) > limit[:, None])).to(tl.int32), axis=1) > 0
        joins = unlisted & (tl.abs(x) >= threshold[:, None]) & fires[:, None]
        start = tl.where(joins, position, start)
    outlier_start_ptr += (sample * windows + first_step // WINDOW) * COLUMNS
    start_ptrs = outlier_start_ptr + (offs_w[:, None] * COLUMNS + offs_k[None, :])
    start = start.to(outlier_start_ptr.dtype.element_ty)
    tl.store(start_ptrs, start, mask=mask_w[:, None] & mask_k)
    tl.debug_barrier()  # what one thread stored, others load

    offs_m = tl.arange(0, BLOCK_M)
    valid = (offs_m < TILE) & (first_step + offs_m < LENGTH)
    row = tl.minimum(offs_m, tl.minimum(TILE, LENGTH - first_step) - 1)
    step = first_step + row
    token = LENGTH - 1 - step if REVERSE else step
    x = tl.load(column_ptrs + token[:, None] * stride_xl, mask=mask_k, other=0.0).to(tl.float32)
    start_ptrs = outlier_start_ptr + ((row // WINDOW)[:, None] * COLUMNS + offs_k[None, :])
    start = tl.load(start_ptrs, mask=mask_k, other=NEVER).to(tl.int32)
    listed = mask_k & (start <= (row % WINDOW)[:, None])
    inlier_scale = tl.load(inlier_scale_ptr + token).to(tl.float32)[:, None]
    peak = tl.max(tl.where(listed, tl.abs(x), 0.0), axis=1)
    dynamic = tl.maximum(tl.div_rn(peak, outlier_max * 1.0), 1e-8)
    outlier_scale = tl.where(tl.max(listed.to(tl.int32), axis=1) > 0, dynamic, 1.0)[:, None]
    # Scales as large as x: div_rn does not broadcast in every version.
    inlier_steps = tl.div_rn(x, tl.broadcast_to(inlier_scale, x.shape))
    outlier_steps = tl.div_rn(x, tl.broadcast_to(outlier_scale, x.shape))
    inliers = round_half_even(tl.clamp(inlier_steps, -inlier_max, inlier_max))
    outliers = round_half_even(tl.clamp(outlier_steps, -outlier_max, outlier_max))
    inliers = tl.where(listed, 0.0, inliers).to(tl.int32).to(tl.int8)
    outliers = tl.where(listed, outliers, 0.0).to(tl.int32).to(tl.int8)

    if PACKED:
        byte = tl.where(offs_k < half, offs_k, offs_k - half)
        weight_ptrs = qweight_ptr + (out[None, :] * half + byte[:, None])
        packed = tl.load(weight_ptrs, mask=(offs_k < COLUMNS)[:, None], other=0)
        shift = tl.where(offs_k < half, 4, 0).to(tl.uint8)
        weight = ((packed << shift[:, None]) & 0xF0).to(tl.int8, bitcast=True) >> 4
    else:
        weight_ptrs = qweight_ptr + (out[None, :] * half + offs_k[:, None])
        weight = tl.load(weight_ptrs, mask=(offs_k < COLUMNS)[:, None], other=0)
    acc = tl.dot(inliers, weight, out_dtype=tl.int32)
    acc_o = tl.dot(outliers, weight, out_dtype=tl.int32)
    y = acc.to(tl.float32) * inlier_scale + acc_o.to(tl.float32) * outlier_scale
    if SCALE_PER_OUTPUT:
        y *= tl.load(weight_scale_ptr + out).to(tl.float32)[None, :]
    else:
        y *= tl.load(weight_scale_ptr).to(tl.float32)
    first_row = sample * LENGTH
    mask = valid[:, None] & (offs_n < OUTPUTS)[None, :]
    offs = token[:, None] * OUTPUTS + out[None, :]
    # <epilogue>
    # </epilogue>
    tl.store(y_ptr + first_row * OUTPUTS + offs, y.to(y_ptr.dtype.element_ty), mask=mask)
