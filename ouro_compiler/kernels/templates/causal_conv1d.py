"""`ouro::causal_conv1d`: a (BLOCK_L, BLOCK_D) tile of one sample a program."""

import triton
import triton.language as tl

from ouro_compiler.kernels.templates.common import silu


@triton.jit
def causal_conv1d_kernel(
    x_ptr,  # (B, D, L)
    weight_ptr,  # (D, TAPS), contiguous
    bias_ptr,  # (D,), or None
    y_ptr,  # (B, D, L), memory as (B, L, D)
    stride_xb,
    stride_xd,
    stride_xl,
    LENGTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    offs_l = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    offs_d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < CHANNELS
    y = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(TAPS):
        # y_t reads x_{t - (TAPS-1) + tap} through weight[tap]; reversed, x_{t + (TAPS-1) - tap}
        source = offs_l + (TAPS - 1 - tap) if REVERSE else offs_l - (TAPS - 1 - tap)
        inside = ((source >= 0) & (source < LENGTH))[:, None] & mask_d[None, :]
        row = sample * stride_xb + source.to(tl.int64) * stride_xl
        offs = row[:, None] + (offs_d * stride_xd)[None, :]
        x = tl.load(x_ptr + offs, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + offs_d * TAPS + tap, mask=mask_d, other=0.0).to(tl.float32)
        y += x * weight[None, :]
    if SILU:
        y = silu(y)
    offs = (sample * LENGTH + offs_l)[:, None] * CHANNELS + offs_d[None, :]
    mask = (offs_l < LENGTH)[:, None] & mask_d[None, :]
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)
