"""`ouro::selective_scan_dynamic_outlier`: `selective_scan` with delta read as codes.

B and C come dequantized: here every lane would do that again for all states of every token, which
is twice the instructions. Windows run in the scan's direction. Strides, operands read ahead and
chunks are those of `selective_scan`; `selective_scan_dynamic_outlier_chunks` gathers.
"""

import triton
import triton.language as tl

from ouro_compiler.kernels.templates.common import to_next_token, token_offset
from ouro_compiler.kernels.templates.dequantizer import dequantize_token, fetch_token
from ouro_compiler.kernels.templates.recurrence import (
    advance,
    carry,
    fetch,
    fetch_states,
    finish,
    gather,
    load,
    load_exponents,
    no_states,
    state_before,
    step_of,
    store,
)


@triton.jit
def read_token(
    pointers,
    strides,
    row_stride,
    start_ptrs,
    columns,
    mask_d,
    b_step,
    c_step,
    HAS_Z: tl.constexpr,
    MAP_WIDTH: tl.constexpr,
    WINDOW: tl.constexpr,
    OUTLIER_BITS: tl.constexpr,
    STATES: tl.constexpr,
    LANES: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """((u, delta's parts, z, b, c) of one token as stored, pointers of the next); z may be u.

    The last of the pointers is the token's number, in the scan's direction. row_stride: of u's map.
    """
    t = pointers[8]
    u = fetch(pointers[0], mask_d, WHOLE)
    window = t // WINDOW
    delta = fetch_token(
        pointers[4],
        start_ptrs + window * columns,
        pointers[5],
        pointers[6],
        pointers[7],
        t - window * WINDOW,
        mask_d,
        OUTLIER_BITS,
        WHOLE,
    )
    z = u
    if HAS_Z:
        z = fetch(pointers[1], mask_d, WHOLE)
    b = fetch_states(pointers[2], b_step, STATES, LANES)
    c = fetch_states(pointers[3], c_step, STATES, LANES)
    following = (pointers[0] + to_next_token(t, row_stride, strides[0], MAP_WIDTH),)
    for i in tl.static_range(1, 9):
        following = following + (pointers[i] + strides[i],)
    return (u, delta, z, b, c), following


@triton.jit(
    do_not_specialize=[
        *("stride_ub", "stride_ud", "stride_uh", "stride_ul"),
        *("stride_xb", "stride_xl", "stride_xd"),
        *("stride_zb", "stride_zd", "stride_zl", "stride_bb", "stride_bg"),
        *(
            "stride_bn",
            "stride_cn",
            "stride_bl",
            "stride_cb",
            "stride_cg",
            "stride_cl",
            "stride_yl",
        ),
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
    elapsed_ptr,  # fp32 (B, L / CHUNK, D) where SPLIT, else None: sums of delta
    state_ptr,  # fp32 (B, L / CHUNK, D, N) where SPLIT, else None
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
    CHUNK: tl.constexpr,
    SPLIT: tl.constexpr,
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
    LANES: tl.constexpr,
    SHARE: tl.constexpr,
    UNIT: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    blocks: tl.constexpr = (CHANNELS + BLOCK_D - 1) // BLOCK_D
    chunk = 0
    if SPLIT:
        chunk = tl.program_id(2) // blocks
    in_group = tl.program_id(2) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    in_group += tl.zeros((SHARE, BLOCK_D), tl.int32)
    mask_d = in_group < CHANNELS
    offs_d = group * CHANNELS + in_group
    whole_d: tl.constexpr = CHANNELS % BLOCK_D == 0
    columns: tl.constexpr = CHANNELS * GROUPS
    windows: tl.constexpr = (LENGTH + WINDOW - 1) // WINDOW
    a_ptrs = a_ptr + offs_d * stride_ad
    a = load_exponents(a_ptrs, mask_d, stride_an, STATES, LANES, BLOCK_D, whole_d)
    skip = None
    if HAS_D:
        skip = load(d_ptr + offs_d, mask_d, whole_d)
    bias = None
    if HAS_DELTA_BIAS:
        bias = load(delta_bias_ptr + offs_d, mask_d, whole_d)

    direction = 1 - 2 * REVERSE
    first = (LENGTH - 1) * REVERSE + direction * chunk * CHUNK
    place = token_offset(first, stride_uh, stride_ul, MAP_WIDTH)
    u_ptrs = u_ptr + sample * stride_ub + place + offs_d * stride_ud
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
    z_ptrs = u_ptrs
    if HAS_Z:
        z_ptrs = z_ptr + sample * stride_zb + first * stride_zl + offs_d * stride_zd
    y_ptrs = y_ptr + (sample * LENGTH + first) * stride_yl + offs_d
    row = tl.arange(0, LANES)[:, None] + tl.zeros((LANES, BLOCK_D), tl.int32)
    b_ptr += (sample * stride_bb + group * stride_bg + first * stride_bl) * UNIT
    c_ptr += (sample * stride_cb + group * stride_cg + first * stride_cl) * UNIT
    b_step = LANES * stride_bn
    c_step = LANES * stride_cn
    if UNIT > 1:  # states are contiguous
        b_step = LANES
        c_step = LANES
    if UNIT > 1 and SHARE == 1:
        b_ptrs = b_ptr + row
        c_ptrs = c_ptr + row
    else:
        b_ptrs = b_ptr + row * stride_bn
        c_ptrs = c_ptr + row * stride_cn
    pointers = (
        u_ptrs,
        z_ptrs,
        b_ptrs,
        c_ptrs,
        codes_ptrs,
        outlier_ptrs,
        scale_ptrs,
        zero_point_ptrs,
        tl.full((), 0, tl.int32) + chunk * CHUNK,
    )
    strides = (
        direction * stride_ul,
        direction * stride_zl,
        direction * stride_bl * UNIT,
        direction * stride_cl * UNIT,
        direction * columns,
        outlier_stride,
        direction,
        direction,
        1,
    )
    row_stride = 0
    if MAP_WIDTH > 0:
        row_stride = direction * stride_uh
    y_stride = direction * stride_yl
    h = no_states(STATES, LANES, BLOCK_D)
    before = tl.zeros((LANES, BLOCK_D), tl.float32)
    state = tl.zeros((LANES, BLOCK_D), tl.float32)
    elapsed = tl.zeros((SHARE, BLOCK_D), tl.float32)
    if SPLIT:
        chunks: tl.constexpr = LENGTH // CHUNK
        before = state_before(
            chunk,
            elapsed_ptr + sample * chunks * columns + offs_d,
            state_ptr + (sample * chunks * columns + offs_d) * STATES + row,
            columns,
            mask_d,
            a,
            STATES,
            LANES,
            BLOCK_D,
            whole_d,
        )
        h = (before,)
    gathers: tl.constexpr = CHUNK < LENGTH and not SPLIT
    tokens_here: tl.constexpr = CHUNK if SPLIT else LENGTH
    tokens = ()
    for _ in tl.static_range(STEPS):
        token, pointers = read_token(
            *(pointers, strides, row_stride, start_ptrs, columns, mask_d, b_step, c_step),
            *(HAS_Z, MAP_WIDTH, WINDOW, OUTLIER_BITS, STATES, LANES, whole_d),
        )
        tokens = tokens + (token,)
    for block in range(tokens_here // STEPS - 1):
        held = tokens
        tokens = ()
        if gathers:  # noqa: SIM102 (this is known when compiling, the next is not)
            if block * STEPS % CHUNK == 0:
                before = carry(state, elapsed, before, a)
                h = (before,)
                state = tl.zeros((LANES, BLOCK_D), tl.float32)
                elapsed = tl.zeros((SHARE, BLOCK_D), tl.float32)
        for i in tl.static_range(STEPS):
            u, delta, z, b, c = held[i]
            u = u.to(tl.float32)
            delta = dequantize_token(delta, INLIER_BITS, OUTLIER_BITS, ASYMMETRIC)
            delta = step_of(delta, bias, DELTA_SOFTPLUS)
            if gathers:
                state, elapsed = gather(state, elapsed, u, delta, a, b)
            h, y = advance(h, u, delta, a, b, c, STATES, LANES, SHARE, BLOCK_D)
            token, pointers = read_token(
                *(pointers, strides, row_stride, start_ptrs, columns, mask_d, b_step, c_step),
                *(HAS_Z, MAP_WIDTH, WINDOW, OUTLIER_BITS, STATES, LANES, whole_d),
            )
            tokens = tokens + (token,)
            store(y_ptrs, finish(y, u, skip, z, HAS_Z), mask_d, whole_d)
            y_ptrs += y_stride
    if gathers and STEPS == CHUNK:  # else the last block is in the middle of a chunk
        h = (carry(state, elapsed, before, a),)
    for _ in tl.static_range(tokens_here % STEPS):
        token, pointers = read_token(
            *(pointers, strides, row_stride, start_ptrs, columns, mask_d, b_step, c_step),
            *(HAS_Z, MAP_WIDTH, WINDOW, OUTLIER_BITS, STATES, LANES, whole_d),
        )
        tokens = tokens + (token,)
    for i in tl.static_range(STEPS + tokens_here % STEPS):
        u, delta, z, b, c = tokens[i]
        u = u.to(tl.float32)
        delta = dequantize_token(delta, INLIER_BITS, OUTLIER_BITS, ASYMMETRIC)
        delta = step_of(delta, bias, DELTA_SOFTPLUS)
        h, y = advance(h, u, delta, a, b, c, STATES, LANES, SHARE, BLOCK_D)
        store(y_ptrs, finish(y, u, skip, z, HAS_Z), mask_d, whole_d)
        y_ptrs += y_stride
