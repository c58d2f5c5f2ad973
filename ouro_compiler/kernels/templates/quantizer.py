"""The dynamic-outlier quantizer of one token's row, in registers (METHODS 3.3, 3.5).

`start` is int32 (BLOCK_K): the window position at which a channel was listed, NEVER before that.
Divisions are `div_rn`: Triton's `/` is approximate on a GPU, and codes must equal the reference's.
"""

import triton
import triton.language as tl

from ouro_compiler.kernels.templates.common import round_half_even


@triton.jit
def list_outliers(
    x,
    start,
    mask,
    position,
    scale,
    zero_point,
    threshold,
    INLIER_BITS: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    NEVER: tl.constexpr,
):
    """`start` after this token: once an unlisted channel leaves the range, all over threshold."""
    if ASYMMETRIC:
        half_width: tl.constexpr = (2**INLIER_BITS - 1) / 2
        limit = scale * half_width
        magnitude = tl.abs(x - scale * (half_width - zero_point))
    else:
        limit = scale * (2 ** (INLIER_BITS - 1) - 1)
        magnitude = tl.abs(x)
    unlisted = mask & (start == NEVER)
    fires = tl.max((unlisted & (magnitude > limit)).to(tl.int32), axis=0) > 0
    return tl.where(unlisted & (magnitude >= threshold) & fires, position, start)


@triton.jit
def encode(
    x,
    listed,
    scale,
    zero_point,
    INLIER_BITS: tl.constexpr,
    OUTLIER_BITS: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
):
    """(codes int8, outlier scale fp32) of a row fp32 (BLOCK_K)."""
    # Clamping to integers before rounding gives what clamping after it gives.
    if ASYMMETRIC:
        steps = tl.clamp(tl.div_rn(x, scale), -zero_point, (2**INLIER_BITS - 1) - zero_point)
        codes = round_half_even(steps) + (zero_point - 2 ** (INLIER_BITS - 1))
    else:
        inlier_max: tl.constexpr = 2 ** (INLIER_BITS - 1) - 1
        codes = round_half_even(tl.clamp(tl.div_rn(x, scale), -inlier_max, inlier_max))
    if OUTLIER_BITS == 16:  # outliers stay in floating point
        codes = tl.where(listed, 0.0, codes)
        outlier_scale = 1.0
    else:
        outlier_max: tl.constexpr = 2 ** (OUTLIER_BITS - 1) - 1
        peak = tl.max(tl.where(listed, tl.abs(x), 0.0), axis=0)
        dynamic = tl.maximum(tl.div_rn(peak, outlier_max * 1.0), 1e-8)
        outlier_scale = tl.where(tl.max(listed.to(tl.int32), axis=0) > 0, dynamic, 1.0)
        steps = tl.clamp(tl.div_rn(x, outlier_scale), -outlier_max, outlier_max)
        codes = tl.where(listed, round_half_even(steps), codes)
    return codes.to(tl.int32).to(tl.int8), outlier_scale
