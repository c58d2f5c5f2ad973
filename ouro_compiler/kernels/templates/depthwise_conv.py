"""`ouro::depthwise_conv`: a (BLOCK_L, BLOCK_C) tile of one sample's pixels a program."""

import triton
import triton.language as tl

from ouro_compiler.kernels.templates.common import silu


@triton.jit
def depthwise_conv_kernel(
    x_ptr,  # (B, H, W, C)
    weight_ptr,  # (C, TAPS_H, TAPS_W), contiguous
    bias_ptr,  # (C,), or None
    y_ptr,  # (B, H, W, C), contiguous
    stride_xb,
    stride_xh,
    stride_xw,
    stride_xc,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    offs_l = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    offs_c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < CHANNELS
    mask_l = offs_l < HEIGHT * WIDTH
    row = offs_l // WIDTH
    column = offs_l % WIDTH
    x_ptr += sample * stride_xb
    weight_ptr += offs_c * (TAPS_H * TAPS_W)
    y = tl.zeros((BLOCK_L, BLOCK_C), tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    for tap_h in tl.static_range(TAPS_H):
        for tap_w in tl.static_range(TAPS_W):
            h = row + (tap_h - (TAPS_H - 1) // 2)
            w = column + (tap_w - (TAPS_W - 1) // 2)
            inside = mask_l & (h >= 0) & (h < HEIGHT) & (w >= 0) & (w < WIDTH)
            rows = x_ptr + h.to(tl.int64) * stride_xh + w.to(tl.int64) * stride_xw
            mask = inside[:, None] & mask_c[None, :]
            x = tl.load(rows[:, None] + (offs_c * stride_xc)[None, :], mask=mask, other=0.0)
            weight = tl.load(weight_ptr + (tap_h * TAPS_W + tap_w), mask=mask_c, other=0.0)
            y += x.to(tl.float32) * weight.to(tl.float32)[None, :]
    if SILU:
        y = silu(y)
    offs = (sample * (HEIGHT * WIDTH) + offs_l)[:, None] * CHANNELS + offs_c[None, :]
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask_l[:, None] & mask_c[None, :])
