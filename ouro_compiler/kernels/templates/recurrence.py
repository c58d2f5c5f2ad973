"""The recurrence of Mamba-1 as every scan kernel computes it, one lane a channel.

The state is a (BLOCK_N, BLOCK_D) tile.
"""

import triton
import triton.language as tl


@triton.jit
def load(pointers, mask, WHOLE: tl.constexpr):
    """fp32 values; a block that is whole needs no mask."""
    if WHOLE:
        values = tl.load(pointers)
    else:
        values = tl.load(pointers, mask=mask, other=0.0)
    return values.to(tl.float32)


@triton.jit
def load_exponents(
    a_ptrs,
    mask_d,
    stride_an,
    STATES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """A times log2(e), (BLOCK_N, BLOCK_D); a_ptrs are those of state 0, by channel."""
    # Row by row: a two-dimensional load would impose its own layout on the state, and which one
    # depends on the version of Triton.
    offs_n = tl.arange(0, BLOCK_N)
    a = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for n in tl.static_range(STATES):
        a_row = load(a_ptrs + n * stride_an, mask_d, WHOLE)
        a = tl.where(offs_n[:, None] == n, a_row[None, :], a)
    return a * 1.4426950408889634  # exp(x) = exp2(x log2(e))


@triton.jit
def advance(h, u, delta, a, b, c):
    """(state, y) after one token: u and delta (BLOCK_D), b and c (BLOCK_N)."""
    h = tl.exp2(delta[None, :] * a) * h + (delta * u)[None, :] * b[:, None]
    return h, tl.sum(h * c[:, None], axis=0)


@triton.jit
def store(pointers, y, mask, WHOLE: tl.constexpr):
    """y in the tensor's dtype."""
    y = y.to(pointers.dtype.element_ty)
    if WHOLE:
        tl.store(pointers, y)
    else:
        tl.store(pointers, y, mask=mask)
