"""`ouro::gate_sum_quantize`: gate, sum of directions and quantizer, a window a program."""

import triton
import triton.language as tl

from ouro_compiler.kernels.templates.common import silu
from ouro_compiler.kernels.templates.quantizer import encode, list_outliers


@triton.jit
def gate_sum_quantize_kernel(
    y_ptr,  # (B, K, L)
    other_ptr,  # (B, K, L), or None
    z_ptr,  # (B, K, L), or None
    inlier_scale_ptr,  # (L,)
    threshold_ptr,  # (L,)
    codes_ptr,  # int8 (B, L, K), contiguous
    outlier_scale_ptr,  # fp32 (B, L)
    outlier_start_ptr,  # (B, J, K)
    value_ptr,  # (B, L, K) in y's dtype, or None
    factor,
    stride_yb,
    stride_yk,
    stride_yl,
    stride_ob,
    stride_ok,
    stride_ol,
    stride_zb,
    stride_zk,
    stride_zl,
    LENGTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    WINDOW: tl.constexpr,
    INLIER_BITS: tl.constexpr,
    OUTLIER_BITS: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_OTHER: tl.constexpr,
    HAS_Z: tl.constexpr,
    EMIT: tl.constexpr,
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
        token = (LENGTH - 1 - step if REVERSE else step).to(tl.int64)
        offs = sample * stride_yb + token * stride_yl + offs_k * stride_yk
        y = tl.load(y_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        gate = 1.0
        if HAS_Z:
            offs = sample * stride_zb + token * stride_zl + offs_k * stride_zk
            gate = silu(tl.load(z_ptr + offs, mask=mask, other=0.0).to(tl.float32))
        y = y * gate
        if HAS_OTHER:
            offs = sample * stride_ob + token * stride_ol + offs_k * stride_ok
            y += tl.load(other_ptr + offs, mask=mask, other=0.0).to(tl.float32) * gate
        y = (y * factor).to(y_ptr.dtype.element_ty)
        out = sample * LENGTH + token
        offs = out * COLUMNS + offs_k
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
