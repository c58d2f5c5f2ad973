"""`selective_scan_chunks` with delta read as codes."""

import triton
import triton.language as tl

from ouro_compiler.kernels.templates.common import to_next_token, token_offset
from ouro_compiler.kernels.templates.dequantizer import dequantize_token, fetch_token
from ouro_compiler.kernels.templates.recurrence import (
    fetch,
    fetch_states,
    gather,
    load,
    load_exponents,
    step_of,
)


@triton.jit(
    do_not_specialize=[
        *(
            "stride_ub",
            "stride_ud",
            "stride_uh",
            "stride_ul",
            "stride_xb",
            "stride_xl",
            "stride_xd",
        ),
        *("stride_bb", "stride_bg", "stride_bn", "stride_bl", "stride_ad", "stride_an"),
    ]
)
def selective_scan_dynamic_outlier_chunks_kernel(
    u_ptr,  # (B, D, L), or (B, D, H, W)
    codes_ptr,  # of delta, int8 (B, L, D), contiguous
    inlier_scale_ptr,  # (L,)
    zero_point_ptr,  # (L,), or None
    outlier_scale_ptr,  # fp32 (B, L)
    outlier_start_ptr,  # (B, J, D)
    x_ptr,  # (B, L, D) where OUTLIER_BITS is 16, else None
    a_ptr,  # (D, N)
    b_ptr,  # fp32 (B, G, N, L)
    delta_bias_ptr,  # (D,), or None
    elapsed_ptr,  # fp32 (B, L / CHUNK, D): sums of delta
    state_ptr,  # fp32 (B, L / CHUNK, D, N)
    stride_ad,
    stride_an,
    stride_ub,
    stride_ud,
    stride_uh,  # None without a map
    stride_ul,
    stride_xb,
    stride_xl,
    stride_xd,
    stride_bb,
    stride_bg,
    stride_bn,
    stride_bl,
    LENGTH: tl.constexpr,
    MAP_WIDTH: tl.constexpr,  # W, or 0 where u is (B, D, L)
    CHANNELS: tl.constexpr,  # of one group
    GROUPS: tl.constexpr,
    CHUNK: tl.constexpr,
    STATES: tl.constexpr,
    WINDOW: tl.constexpr,
    INLIER_BITS: tl.constexpr,
    OUTLIER_BITS: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_DELTA_BIAS: tl.constexpr,
    DELTA_SOFTPLUS: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    blocks: tl.constexpr = (CHANNELS + BLOCK_D - 1) // BLOCK_D
    chunk = tl.program_id(2) // blocks
    in_group = tl.program_id(2) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    mask_d = in_group < CHANNELS
    offs_d = group * CHANNELS + in_group
    whole_d: tl.constexpr = CHANNELS % BLOCK_D == 0
    columns: tl.constexpr = CHANNELS * GROUPS
    windows: tl.constexpr = (LENGTH + WINDOW - 1) // WINDOW
    a_ptrs = a_ptr + offs_d * stride_ad
    a = load_exponents(a_ptrs, mask_d, stride_an, STATES, LANES, BLOCK_D, whole_d)
    bias = None
    if HAS_DELTA_BIAS:
        bias = load(delta_bias_ptr + offs_d, mask_d, whole_d)

    direction = 1 - 2 * REVERSE
    first = (LENGTH - 1) * REVERSE + direction * chunk * CHUNK
    row = tl.arange(0, LANES)[:, None] + tl.zeros((LANES, BLOCK_D), tl.int32)
    at = token_offset(first, stride_uh, stride_ul, MAP_WIDTH)
    u_ptrs = u_ptr + sample * stride_ub + at + offs_d * stride_ud
    codes_ptrs = codes_ptr + (sample * LENGTH + first) * columns + offs_d
    start_ptrs = outlier_start_ptr + sample * windows * columns + offs_d
    if OUTLIER_BITS == 16:
        outlier_ptrs = x_ptr + sample * stride_xb + first * stride_xl + offs_d * stride_xd
        outlier_stride = direction * stride_xl
    else:
        outlier_ptrs = outlier_scale_ptr + sample * LENGTH + first
        outlier_stride = direction
    scale_ptrs = inlier_scale_ptr + first
    zero_point_ptrs = scale_ptrs
    if ASYMMETRIC:
        zero_point_ptrs = zero_point_ptr + first
    b_ptrs = b_ptr + sample * stride_bb + group * stride_bg + first * stride_bl + row * stride_bn
    state = tl.zeros((LANES, BLOCK_D), tl.float32)
    elapsed = tl.zeros((1, BLOCK_D), tl.float32)
    for block in range(CHUNK // STEPS):
        tokens = ()
        for i in tl.static_range(STEPS):
            u = fetch(u_ptrs, mask_d, whole_d)
            t = chunk * CHUNK + block * STEPS + i
            delta = fetch_token(
                codes_ptrs,
                start_ptrs + t // WINDOW * columns,
                outlier_ptrs,
                scale_ptrs,
                zero_point_ptrs,
                t % WINDOW,
                mask_d,
                OUTLIER_BITS,
                whole_d,
            )
            tokens = tokens + ((u, delta, fetch_states(b_ptrs, 0, STATES, LANES)),)
            u_ptrs += direction * to_next_token(t, stride_uh, stride_ul, MAP_WIDTH)
            codes_ptrs += direction * columns
            outlier_ptrs += outlier_stride
            scale_ptrs += direction
            zero_point_ptrs += direction
            b_ptrs += direction * stride_bl
        for i in tl.static_range(STEPS):
            u, delta, b = tokens[i]
            delta = dequantize_token(delta, INLIER_BITS, OUTLIER_BITS, ASYMMETRIC)
            delta = step_of(delta, bias, DELTA_SOFTPLUS)
            state, elapsed = gather(state, elapsed, u.to(tl.float32), delta, a, b)
    place = sample * (LENGTH // CHUNK) + chunk
    tl.store(elapsed_ptr + place * columns + offs_d, elapsed, mask=mask_d)
    state_ptrs = state_ptr + (place * columns + offs_d) * STATES + row
    tl.store(state_ptrs, state, mask=mask_d & (row < STATES))
