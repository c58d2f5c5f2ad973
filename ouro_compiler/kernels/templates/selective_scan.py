"""`ouro::selective_scan`: one program walks BLOCK_D channels of one sample through time.

Strides are not specialised: with an unknown channel stride a lane gets one channel and all its
states, and the sum over states needs no shuffles.
"""

import triton
import triton.language as tl

from ouro_compiler.kernels.templates.common import silu, softplus, to_next_token, token_offset
from ouro_compiler.kernels.templates.recurrence import advance, load, load_exponents, store


@triton.jit(
    do_not_specialize=[
        *("stride_ub", "stride_ud", "stride_uh", "stride_ul"),
        *("stride_db", "stride_dd", "stride_dl"),
        *("stride_zb", "stride_zd", "stride_zl", "stride_bb", "stride_bg"),
        *("stride_bl", "stride_cb", "stride_cg", "stride_cl", "stride_yl"),
        *("stride_ad", "stride_an"),
    ]
)
def selective_scan_kernel(
    u_ptr,  # (B, D, L), or (B, D, H, W)
    delta_ptr,  # (B, D, L)
    a_ptr,  # (D, N)
    b_ptr,  # (B, G, N, L)
    c_ptr,  # (B, G, N, L)
    d_ptr,  # (D,), or None
    z_ptr,  # (B, D, L), or None
    delta_bias_ptr,  # (D,), or None
    y_ptr,  # (B, D, L), memory as (B, L, D)
    stride_ad,
    stride_an,
    stride_ub,
    stride_ud,
    stride_uh,  # None without a map
    stride_ul,
    stride_db,
    stride_dd,
    stride_dl,
    stride_zb,
    stride_zd,
    stride_zl,
    stride_bb,
    stride_bg,
    stride_bn,
    stride_bl,
    stride_cb,
    stride_cg,
    stride_cn,
    stride_cl,
    stride_yl,
    LENGTH: tl.constexpr,
    MAP_WIDTH: tl.constexpr,  # W, or 0 where u is (B, D, L)
    CHANNELS: tl.constexpr,  # of one group
    STATES: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_DELTA_BIAS: tl.constexpr,
    DELTA_SOFTPLUS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    in_group = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = in_group < CHANNELS
    offs_d = group * CHANNELS + in_group
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < STATES
    whole_d: tl.constexpr = CHANNELS % BLOCK_D == 0
    whole_n: tl.constexpr = STATES == BLOCK_N
    a_ptrs = a_ptr + offs_d * stride_ad
    a = load_exponents(a_ptrs, mask_d, stride_an, STATES, BLOCK_N, BLOCK_D, whole_d)
    if HAS_D:
        skip = load(d_ptr + offs_d, mask_d, whole_d)
    if HAS_DELTA_BIAS:
        bias = load(delta_bias_ptr + offs_d, mask_d, whole_d)

    first = (LENGTH - 1) * REVERSE
    place = token_offset(first, stride_uh, stride_ul, MAP_WIDTH)
    u_ptrs = u_ptr + sample * stride_ub + place + offs_d * stride_ud
    delta_ptrs = delta_ptr + sample * stride_db + first * stride_dl + offs_d * stride_dd
    b_ptrs = b_ptr + sample * stride_bb + group * stride_bg + first * stride_bl + offs_n * stride_bn
    c_ptrs = c_ptr + sample * stride_cb + group * stride_cg + first * stride_cl + offs_n * stride_cn
    y_ptrs = y_ptr + (sample * LENGTH + first) * stride_yl + offs_d
    if HAS_Z:
        z_ptrs = z_ptr + sample * stride_zb + first * stride_zl + offs_d * stride_zd
    direction = 1 - 2 * REVERSE
    h = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for count in range(LENGTH):
        u = load(u_ptrs, mask_d, whole_d)
        delta = load(delta_ptrs, mask_d, whole_d)
        b = load(b_ptrs, mask_n, whole_n)
        c = load(c_ptrs, mask_n, whole_n)
        if HAS_DELTA_BIAS:
            delta += bias
        if DELTA_SOFTPLUS:
            delta = softplus(delta)
        h, y = advance(h, u, delta, a, b, c)
        if HAS_D:
            y += skip * u
        if HAS_Z:
            y *= silu(load(z_ptrs, mask_d, whole_d))
            z_ptrs += direction * stride_zl
        store(y_ptrs, y, mask_d, whole_d)
        u_ptrs += direction * to_next_token(count, stride_uh, stride_ul, MAP_WIDTH)
        delta_ptrs += direction * stride_dl
        b_ptrs += direction * stride_bl
        c_ptrs += direction * stride_cl
        y_ptrs += direction * stride_yl
