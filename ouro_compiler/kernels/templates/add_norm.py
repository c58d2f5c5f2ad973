"""`ouro::add_norm`: residual addition and norm, BLOCK_M rows a program."""

import triton
import triton.language as tl

from ouro_compiler.kernels.templates.norm import normalise


@triton.jit(do_not_specialize=["rows"])
def add_norm_kernel(
    x_ptr,  # (B, L, K)
    residual_ptr,  # (B, L, K), or None
    weight_ptr,  # (K,)
    bias_ptr,  # (K,), or None
    y_ptr,  # (B, L, K), contiguous
    total_ptr,  # (B, L, K), contiguous: x + residual
    eps,
    rows,  # B * L
    stride_xb,
    stride_xl,
    stride_xk,
    stride_rb,
    stride_rl,
    stride_rk,
    LENGTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    RMS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k < COLUMNS
    mask = (row < rows)[:, None] & mask_k[None, :]
    sample = row // LENGTH
    token = row % LENGTH
    x_rows = x_ptr + sample * stride_xb + token * stride_xl
    ptrs = x_rows[:, None] + (offs_k * stride_xk)[None, :]
    total = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual_rows = residual_ptr + sample * stride_rb + token * stride_rl
        ptrs = residual_rows[:, None] + (offs_k * stride_rk)[None, :]
        total += tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    out = row[:, None] * COLUMNS + offs_k[None, :]
    tl.store(total_ptr + out, total.to(total_ptr.dtype.element_ty), mask=mask)
    weight = tl.load(weight_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)[None, :]
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)[None, :]
    y = normalise(total, weight, bias, mask, eps, COLUMNS, RMS)
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=mask)
