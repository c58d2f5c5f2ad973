"""`ouro::selective_scan`: one program walks BLOCK_D channels of one sample through time.

Strides are not specialised: with an unknown channel stride a lane gets one channel, or one row of
its states (`recurrence.py`). The operands of STEPS tokens are held: those of a token are read when
those of the one STEPS before it are used up, before its y is stored, since no load passes a store.

Where CHUNK is not LENGTH, a chunk starts from a state that is made of what the chunks before it end
with when they start from none (at most four states, one tile). Either the program gathers that
beside its own state, or (SPLIT) it has one chunk and `selective_scan_chunks` gathered it before.
"""

import triton
import triton.language as tl

from ouro_compiler.kernels.templates.common import to_next_token, token_offset
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
    mask_d,
    b_step,
    c_step,
    HAS_Z: tl.constexpr,
    MAP_WIDTH: tl.constexpr,
    STATES: tl.constexpr,
    LANES: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """((u, delta, z, b, c) of one token as stored, pointers of the next); z is u where none is.

    The last of the pointers is the token's number, in the scan's direction. row_stride: of u's map.
    """
    u = fetch(pointers[0], mask_d, WHOLE)
    delta = fetch(pointers[1], mask_d, WHOLE)
    z = u
    if HAS_Z:
        z = fetch(pointers[2], mask_d, WHOLE)
    b = fetch_states(pointers[3], b_step, STATES, LANES)
    c = fetch_states(pointers[4], c_step, STATES, LANES)
    following = (pointers[0] + to_next_token(pointers[5], row_stride, strides[0], MAP_WIDTH),)
    for i in tl.static_range(1, 6):
        following = following + (pointers[i] + strides[i],)
    return (u, delta, z, b, c), following


@triton.jit(
    do_not_specialize=[
        *("stride_ub", "stride_ud", "stride_uh", "stride_ul"),
        *("stride_db", "stride_dd", "stride_dl"),
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
def selective_scan_kernel(
    u_ptr,  # (B, D, L), or (B, D, H, W)
    delta_ptr,  # (B, D, L)
    a_ptr,  # (D, N)
    b_ptr,  # (B, G, N, L)
    c_ptr,  # (B, G, N, L)
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
    stride_db,
    stride_dd,
    stride_dl,
    stride_zb,
    stride_zd,
    stride_zl,
    stride_bb,  # those of B and C but for N's in UNITs
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
    delta_ptrs = delta_ptr + sample * stride_db + first * stride_dl + offs_d * stride_dd
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
    number = tl.full((), 0, tl.int32) + chunk * CHUNK
    pointers = (u_ptrs, delta_ptrs, z_ptrs, b_ptrs, c_ptrs, number)
    strides = (
        direction * stride_ul,
        direction * stride_dl,
        direction * stride_zl,
        direction * stride_bl * UNIT,
        direction * stride_cl * UNIT,
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
        columns: tl.constexpr = CHANNELS * GROUPS
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
            *(pointers, strides, row_stride, mask_d, b_step, c_step),
            *(HAS_Z, MAP_WIDTH, STATES, LANES, whole_d),
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
            delta = step_of(delta, bias, DELTA_SOFTPLUS)
            if gathers:
                state, elapsed = gather(state, elapsed, u, delta, a, b)
            h, y = advance(h, u, delta, a, b, c, STATES, LANES, SHARE, BLOCK_D)
            token, pointers = read_token(
                *(pointers, strides, row_stride, mask_d, b_step, c_step),
                *(HAS_Z, MAP_WIDTH, STATES, LANES, whole_d),
            )
            tokens = tokens + (token,)
            store(y_ptrs, finish(y, u, skip, z, HAS_Z), mask_d, whole_d)
            y_ptrs += y_stride
    if gathers and STEPS == CHUNK:  # else the last block is in the middle of a chunk
        h = (carry(state, elapsed, before, a),)
    for _ in tl.static_range(tokens_here % STEPS):
        token, pointers = read_token(
            *(pointers, strides, row_stride, mask_d, b_step, c_step),
            *(HAS_Z, MAP_WIDTH, STATES, LANES, whole_d),
        )
        tokens = tokens + (token,)
    for i in tl.static_range(STEPS + tokens_here % STEPS):
        u, delta, z, b, c = tokens[i]
        u = u.to(tl.float32)
        delta = step_of(delta, bias, DELTA_SOFTPLUS)
        h, y = advance(h, u, delta, a, b, c, STATES, LANES, SHARE, BLOCK_D)
        store(y_ptrs, finish(y, u, skip, z, HAS_Z), mask_d, whole_d)
        y_ptrs += y_stride
