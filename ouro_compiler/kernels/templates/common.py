"""Arithmetic that every kernel shares; matches `ouro_compiler.ops.activations`."""

import triton
import triton.language as tl


@triton.jit
def round_half_even(x):
    """Nearest integer of fp32 |x| < 2**22, ties to even: adding 1.5 * 2**23 drops the fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def softplus(x):
    e = tl.exp(-tl.abs(x))
    # log(1 + e) loses the digits of a small e: the series keeps them.
    log1p = tl.where(e < 0.0078125, e * (1.0 - e * (0.5 - e * 0.33333334)), tl.log(1.0 + e))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def token_offset(token, stride_row, stride_token, MAP_WIDTH: tl.constexpr):
    """Where a token lies: on a map of MAP_WIDTH columns, or with 0 in a row of all tokens."""
    offset = token * stride_token
    if MAP_WIDTH > 0:
        offset = token // MAP_WIDTH * stride_row + token % MAP_WIDTH * stride_token
    return offset


@triton.jit
def to_next_token(count, stride_row, stride_token, MAP_WIDTH: tl.constexpr):
    """How far the token after the first `count` + 1 lies behind the last of them."""
    distance = stride_token
    if MAP_WIDTH > 0:
        to_row = stride_row - (MAP_WIDTH - 1) * stride_token
        distance = tl.where((count + 1) % MAP_WIDTH == 0, to_row, stride_token)
    return distance


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.70710678))


@triton.jit
def gelu_tanh(x):
    return x / (1.0 + tl.exp(-1.5957691 * (x + 0.044715 * x * x * x)))
