"""The recurrence of Mamba-1 as every scan kernel computes it.

The states of BLOCK_D channels are a tuple of tiles (LANES, BLOCK_D): tile k has the states from
k * LANES on. A channel's lanes are SHARE, 1 or LANES: with 1 a lane has all states of a channel,
else every lane one row of each tile. What a channel has once, u for one, is (SHARE, BLOCK_D).
Bits depend on neither: every multiply-add is written out (kernels are compiled without fusion), and
the sum over states has one order.
"""

import triton
import triton.language as tl

from ouro_compiler.kernels.templates.common import silu, softplus


@triton.jit
def load(pointers, mask, WHOLE: tl.constexpr):
    """fp32 values; a block that is whole needs no mask."""
    if WHOLE:
        values = tl.load(pointers)
    else:
        values = tl.load(pointers, mask=mask, other=0.0)
    return values.to(tl.float32)


@triton.jit
def fetch(pointers, mask, WHOLE: tl.constexpr):
    """Values as they are stored. To convert them is to wait for them: that is left for later."""
    if WHOLE:
        values = tl.load(pointers)
    else:
        values = tl.load(pointers, mask=mask)
    return values


@triton.jit
def load_exponents(
    a_ptrs,
    mask_d,
    stride_an,
    STATES: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """A times log2(e), a tuple of tiles; a_ptrs (SHARE, BLOCK_D) are those of state 0."""
    # Row by row: a load of a tile would impose its own layout on the state, and which one depends
    # on the version of Triton.
    row = tl.arange(0, LANES)[:, None]
    tiles = ()
    for k in tl.static_range((STATES + LANES - 1) // LANES):
        a = tl.zeros((LANES, BLOCK_D), tl.float32)
        for j in tl.static_range(LANES):
            if k * LANES + j < STATES:
                a_row = load(a_ptrs + (k * LANES + j) * stride_an, mask_d, WHOLE)
                a = tl.where(row == j, a_row, a)
        tiles = tiles + (a * 1.4426950408889634,)  # exp(x) = exp2(x log2(e))
    return tiles


@triton.jit
def fetch_states(pointers, step, STATES: tl.constexpr, LANES: tl.constexpr):
    """A column of B or C: a tuple of tiles, `step` elements apart; pointers are of tile 0."""
    row = tl.arange(0, LANES)[:, None]
    tiles = ()
    for k in tl.static_range((STATES + LANES - 1) // LANES):
        if (k + 1) * LANES <= STATES:
            tile = tl.load(pointers + k * step)
        else:
            tile = tl.load(pointers + k * step, mask=k * LANES + row < STATES, other=0.0)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def no_states(STATES: tl.constexpr, LANES: tl.constexpr, BLOCK_D: tl.constexpr):
    """The state before the first token."""
    tiles = ()
    for _ in tl.static_range((STATES + LANES - 1) // LANES):
        tiles = tiles + (tl.zeros((LANES, BLOCK_D), tl.float32),)
    return tiles


@triton.jit
def step_of(delta, bias, DELTA_SOFTPLUS: tl.constexpr):
    """delta in fp32, with its bias, or None for none, and through softplus."""
    delta = delta.to(tl.float32)
    if bias is not None:
        delta += bias
    if DELTA_SOFTPLUS:
        delta = softplus(delta)
    return delta


@triton.jit
def advance(
    h,
    u,
    delta,
    a,
    b,
    c,
    STATES: tl.constexpr,
    LANES: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(states, C . states) after one token: u and delta fp32 (SHARE, BLOCK_D)."""
    x = delta * u
    states = ()
    for k in tl.static_range((STATES + LANES - 1) // LANES):
        state = tl.fma(tl.exp2(delta * a[k]), h[k], x * b[k].to(tl.float32))
        states = states + (state,)
        weight = c[k].to(tl.float32)
        if k == 0:
            y = state * weight
        else:
            y = tl.fma(state, weight, y)
    # Sums of two, which come out alike within a lane and between lanes.
    if LANES == 4:
        y = tl.sum(tl.reshape(y, (2, 2, BLOCK_D)), axis=0)
    return states, tl.broadcast_to(tl.sum(y, axis=0)[None, :], (SHARE, BLOCK_D))


@triton.jit
def gather(state, elapsed, u, delta, a, b):
    """(state, sum of delta) of a chunk after one more token; the state is of one tile."""
    x = delta * u
    return tl.fma(tl.exp2(delta * a[0]), state, x * b[0].to(tl.float32)), elapsed + delta


@triton.jit
def carry(state, elapsed, before, a):
    """The state behind a chunk that started from `before`: one tile."""
    return tl.fma(tl.exp2(elapsed * a[0]), before, state)


@triton.jit
def state_before(
    chunk,
    elapsed_ptrs,
    state_ptrs,
    columns,
    mask_d,
    a,
    STATES: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The state that a chunk starts from, one tile: pointers to what the first one gathered."""
    before = tl.zeros((LANES, BLOCK_D), tl.float32)
    row = tl.arange(0, LANES)[:, None] + tl.zeros((LANES, BLOCK_D), tl.int32)
    for _ in range(chunk):
        elapsed = load(elapsed_ptrs, mask_d, WHOLE)
        state = load(state_ptrs, mask_d & (row < STATES), WHOLE and STATES == LANES)
        before = carry(state, elapsed, before, a)
        elapsed_ptrs += columns
        state_ptrs += columns * STATES
    return before


@triton.jit
def finish(y, u, skip, z, HAS_Z: tl.constexpr):
    """y with D u and the gate; skip is D, or None."""
    if skip is not None:
        y = tl.fma(skip, u, y)
    if HAS_Z:
        y *= silu(z.to(tl.float32))
    return y


@triton.jit
def store(pointers, y, mask, WHOLE: tl.constexpr):
    """y in the tensor's dtype."""
    y = y.to(pointers.dtype.element_ty)
    if WHOLE:
        tl.store(pointers, y)
    else:
        tl.store(pointers, y, mask=mask)
