"""`ouro::selective_scan_dynamic_outlier`: `selective_scan` with delta read as codes.

B and C come dequantized: here every lane would do that again for all states of every token, which
is twice the instructions. Windows run in the scan's direction: the outer loop is over them.
Strides are not specialised, as in `selective_scan`.
"""

import triton
import triton.language as tl

from ouro_compiler.kernels.templates.common import silu, softplus, to_next_token, token_offset
from ouro_compiler.kernels.templates.dequantizer import dequantize_token
from ouro_compiler.kernels.templates.recurrence import advance, load, load_exponents, store


@triton.jit(
    do_not_specialize=[
        *("stride_ub", "stride_ud", "stride_uh", "stride_ul"),
        *("stride_xb", "stride_xl", "stride_xd"),
        *("stride_zb", "stride_zd", "stride_zl", "stride_bb", "stride_bg"),
        *("stride_bl", "stride_cb", "stride_cg", "stride_cl", "stride_yl"),
        *("stride_ad", "stride_an"),
    ]
)
def selective_scan_dynamic_outlier_kernel(
    u_ptr,  # (B, D, L), or (B, D, H, W)
    codes_ptr,  # of delta, int8 (B, L, D), contiguous
    inlier_scale_ptr,  # (L,)
    zero_point_ptr,  # (L,), or None
    outlier_scale_ptr,  # fp32 (B, L)
    outlier_start_ptr,  # (B, J, D)
    x_ptr,  # (B, L, D) where OUTLIER_BITS is 16, else None
    a_ptr,  # (D, N)
    b_ptr,  # fp32 (B, G, N, L)
    c_ptr,  # fp32 (B, G, N, L)
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
    stride_xb,
    stride_xl,
    stride_xd,
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
    GROUPS: tl.constexpr,
    STATES: tl.constexpr,
    WINDOW: tl.constexpr,
    INLIER_BITS: tl.constexpr,
    OUTLIER_BITS: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
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
    columns: tl.constexpr = CHANNELS * GROUPS
    windows: tl.constexpr = (LENGTH + WINDOW - 1) // WINDOW
    a_ptrs = a_ptr + offs_d * stride_ad
    a = load_exponents(a_ptrs, mask_d, stride_an, STATES, BLOCK_N, BLOCK_D, whole_d)
    if HAS_D:
        skip = load(d_ptr + offs_d, mask_d, whole_d)
    if HAS_DELTA_BIAS:
        bias = load(delta_bias_ptr + offs_d, mask_d, whole_d)

    first = (LENGTH - 1) * REVERSE
    place = token_offset(first, stride_uh, stride_ul, MAP_WIDTH)
    u_ptrs = u_ptr + sample * stride_ub + place + offs_d * stride_ud
    codes_ptrs = codes_ptr + (sample * LENGTH + first) * columns + offs_d
    start_ptrs = outlier_start_ptr + sample * windows * columns + offs_d
    x_ptrs = x_ptr
    if OUTLIER_BITS == 16:
        x_ptrs = x_ptr + sample * stride_xb + first * stride_xl + offs_d * stride_xd
    b_ptr += sample * stride_bb + group * stride_bg + first * stride_bl
    c_ptr += sample * stride_cb + group * stride_cg + first * stride_cl
    y_ptrs = y_ptr + (sample * LENGTH + first) * stride_yl + offs_d
    if HAS_Z:
        z_ptrs = z_ptr + sample * stride_zb + first * stride_zl + offs_d * stride_zd
    scale_ptrs = inlier_scale_ptr + first
    outlier_scale_ptrs = outlier_scale_ptr + sample * LENGTH + first
    zero_point_ptrs = zero_point_ptr
    if ASYMMETRIC:
        zero_point_ptrs = zero_point_ptr + first
    direction = 1 - 2 * REVERSE
    h = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for window in range(windows):
        start = tl.load(start_ptrs, mask=mask_d, other=0).to(tl.int32)
        start_ptrs += columns
        for position in range(tl.minimum(WINDOW, LENGTH - window * WINDOW)):
            u = load(u_ptrs, mask_d, whole_d)
            delta = dequantize_token(
                codes_ptrs,
                start,
                x_ptrs,
                scale_ptrs,
                zero_point_ptrs,
                outlier_scale_ptrs,
                position,
                mask_d,
                INLIER_BITS,
                OUTLIER_BITS,
                ASYMMETRIC,
                whole_d,
            )
            # Scalars advance: blocks of pointers would, behind two loops, go through shared memory.
            b = load(b_ptr + offs_n * stride_bn, mask_n, whole_n)
            c = load(c_ptr + offs_n * stride_cn, mask_n, whole_n)
            b_ptr += direction * stride_bl
            c_ptr += direction * stride_cl
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
            u_ptrs += direction * to_next_token(
                window * WINDOW + position, stride_uh, stride_ul, MAP_WIDTH
            )
            codes_ptrs += direction * columns
            if OUTLIER_BITS == 16:
                x_ptrs += direction * stride_xl
            y_ptrs += direction * stride_yl
            scale_ptrs += direction
            outlier_scale_ptrs += direction
            if ASYMMETRIC:
                zero_point_ptrs += direction
