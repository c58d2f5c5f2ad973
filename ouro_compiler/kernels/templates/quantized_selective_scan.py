"""`ouro::quantized_selective_scan`: one program walks BLOCK_D channels of one sample through time.

As `selective_scan`: a lane has a channel and all its states, so that the largest state of a channel
is found without shuffles. Fused multiply-add is off, and divisions are `div_rn`.
"""

import triton
import triton.language as tl

from ouro_compiler.kernels.templates.common import round_half_even, silu
from ouro_compiler.kernels.templates.elementary import exp2_exact, log2_exact
from ouro_compiler.kernels.templates.recurrence import load


@triton.jit
def to_grid(x, divisor, low, high):
    """divisor * clamp(round(x / divisor), low, high); not a number stays one."""
    steps = tl.div_rn(x, divisor)
    steps = tl.where(steps < low, low, tl.where(steps > high, high, steps))
    return round_half_even(steps) * divisor


@triton.jit
def quantize_step(
    x,
    listed,
    fresh,
    scale,
    threshold,
    BITS: tl.constexpr,
    OUTLIER_BITS: tl.constexpr,
    THRESHOLD: tl.constexpr,
):
    """(values quantized, listed) of a step: x fp32 (BLOCK_N, BLOCK_D), listed int32 (BLOCK_D)."""
    most: tl.constexpr = 2.0 ** (BITS - 1) - 1.0
    if THRESHOLD:
        peak = tl.max(tl.abs(x), axis=0)
        listed = tl.where(fresh, 0, listed) | (peak >= threshold).to(tl.int32)
        if OUTLIER_BITS == 16:
            found = to_grid(x, scale, -most, most)
            found = tl.where(listed[None, :] > 0, x, found)
        else:
            outlier_most: tl.constexpr = 2.0 ** (OUTLIER_BITS - 1) - 1.0
            dynamic = tl.maximum(tl.div_rn(peak, outlier_most), 1e-8)
            divisor = tl.where(listed > 0, dynamic, scale)[None, :]
            high = tl.where(listed > 0, outlier_most, most)[None, :]
            found = to_grid(x, divisor, -high, high)
    else:
        found = to_grid(x, scale, -most, most)
    return found, listed


@triton.jit(
    do_not_specialize=[
        *("stride_ub", "stride_ud", "stride_ul", "stride_sb", "stride_sd", "stride_sl"),
        *("stride_zb", "stride_zd", "stride_zl", "stride_bb", "stride_bg", "stride_bl"),
        *("stride_cb", "stride_cg", "stride_cl", "stride_yl", "stride_ad", "stride_an"),
    ]
)
def quantized_selective_scan_kernel(
    u_ptr,  # (B, D, L)
    step_ptr,  # (B, D, L)
    a_ptr,  # (D, N)
    b_ptr,  # (B, G, N, L)
    c_ptr,  # (B, G, N, L)
    d_ptr,  # (D,), or None
    z_ptr,  # (B, D, L), or None
    decay_scale_ptr,  # (L,), or None
    input_scale_ptr,  # (L,), or None
    input_threshold_ptr,  # (L,), or None
    state_scale_ptr,  # (L,), or None
    state_threshold_ptr,  # (L,), or None
    factor_ptr,  # (D, N), or None
    y_ptr,  # (B, D, L), memory as (B, L, D)
    decay_offset,  # fp32: r log2(s) of a logarithmic decay
    stride_ad,
    stride_an,
    stride_ub,
    stride_ud,
    stride_ul,
    stride_sb,
    stride_sd,
    stride_sl,
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
    CHANNELS: tl.constexpr,  # of one group
    STATES: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    DECAY: tl.constexpr,  # 0 in floating point, 1 uniform, 2 logarithmic
    DECAY_STEPS: tl.constexpr,
    HAS_INPUT: tl.constexpr,
    HAS_INPUT_THRESHOLD: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_STATE_THRESHOLD: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    BITS: tl.constexpr,
    OUTLIER_BITS: tl.constexpr,
    PERIOD: tl.constexpr,
    BEFORE_ROUNDING: tl.constexpr,
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
    # Row by row, as in selective_scan: the layout of the state follows from it.
    rate = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    factor = tl.zeros((BLOCK_N, BLOCK_D), tl.float32) + 1.0
    for n in tl.static_range(STATES):
        row = load(a_ptr + offs_d * stride_ad + n * stride_an, mask_d, whole_d)
        rate = tl.where(offs_n[:, None] == n, row[None, :], rate)
        if HAS_FACTOR:
            row = load(factor_ptr + offs_d * STATES + n, mask_d, whole_d)
            row = tl.where(mask_d, row, 1.0)
            factor = tl.where(offs_n[:, None] == n, row[None, :], factor)
    rate = rate * 1.4426950408889634
    if HAS_D:
        skip = load(d_ptr + offs_d, mask_d, whole_d)

    first = (LENGTH - 1) * REVERSE
    direction = 1 - 2 * REVERSE
    u_ptrs = u_ptr + sample * stride_ub + first * stride_ul + offs_d * stride_ud
    step_ptrs = step_ptr + sample * stride_sb + first * stride_sl + offs_d * stride_sd
    b_ptrs = b_ptr + sample * stride_bb + group * stride_bg + first * stride_bl + offs_n * stride_bn
    c_ptrs = c_ptr + sample * stride_cb + group * stride_cg + first * stride_cl + offs_n * stride_cn
    y_ptrs = y_ptr + (sample * LENGTH + first) * stride_yl + offs_d
    if HAS_Z:
        z_ptrs = z_ptr + sample * stride_zb + first * stride_zl + offs_d * stride_zd
    h = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    input_listed = tl.zeros((BLOCK_D,), tl.int32)
    state_listed = tl.zeros((BLOCK_D,), tl.int32)
    input_threshold = 0.0
    state_threshold = 0.0
    top: tl.constexpr = 2.0**BITS - 1.0
    for count in range(LENGTH):
        token = first + direction * count
        fresh = count % PERIOD == 0
        u = load(u_ptrs, mask_d, whole_d)
        step = load(step_ptrs, mask_d, whole_d)
        b = load(b_ptrs, mask_n, whole_n)
        c = load(c_ptrs, mask_n, whole_n)
        decay = exp2_exact(step[None, :] * rate)
        if DECAY == 1:
            decay = to_grid(decay, tl.load(decay_scale_ptr + token).to(tl.float32), 0.0, top)
        if DECAY == 2:
            code = decay_offset - log2_exact(1.0 - decay) * DECAY_STEPS
            code = round_half_even(tl.where(code < 0.0, 0.0, tl.where(code > top, top, code)))
            decay = exp2_exact(tl.div_rn(decay_offset - code, DECAY_STEPS * 1.0))
        x = step[None, :] * b[:, None]
        if HAS_INPUT:
            scale = tl.load(input_scale_ptr + token).to(tl.float32)
            if HAS_INPUT_THRESHOLD:
                input_threshold = tl.load(input_threshold_ptr + token).to(tl.float32)
            x, input_listed = quantize_step(
                *(x, input_listed, fresh, scale, input_threshold),
                *(BITS, OUTLIER_BITS, HAS_INPUT_THRESHOLD),
            )
        if DECAY == 2:
            h = (h - decay * h) + x * u[None, :]
        else:
            h = decay * h + x * u[None, :]
        if BEFORE_ROUNDING:
            y = tl.sum(h * c[:, None], axis=0)
        if HAS_STATE:
            scale = tl.load(state_scale_ptr + token).to(tl.float32)
            if HAS_STATE_THRESHOLD:
                state_threshold = tl.load(state_threshold_ptr + token).to(tl.float32)
            if HAS_FACTOR:
                before = h
                h = tl.div_rn(h, factor)
            h, state_listed = quantize_step(
                *(h, state_listed, fresh, scale, state_threshold),
                *(BITS, OUTLIER_BITS, HAS_STATE_THRESHOLD),
            )
            if HAS_FACTOR:
                h = h * factor
                if HAS_STATE_THRESHOLD and OUTLIER_BITS == 16:
                    h = tl.where(state_listed[None, :] > 0, before, h)
        if not BEFORE_ROUNDING:
            y = tl.sum(h * c[:, None], axis=0)
        if HAS_D:
            y += skip * u
        if HAS_Z:
            y *= silu(load(z_ptrs, mask_d, whole_d))
            z_ptrs += direction * stride_zl
        y = y.to(y_ptr.dtype.element_ty)
        if whole_d:
            tl.store(y_ptrs, y)
        else:
            tl.store(y_ptrs, y, mask=mask_d)
        u_ptrs += direction * stride_ul
        step_ptrs += direction * stride_sl
        b_ptrs += direction * stride_bl
        c_ptrs += direction * stride_cl
        y_ptrs += direction * stride_yl
