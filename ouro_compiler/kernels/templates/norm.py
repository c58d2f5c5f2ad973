"""RMS and layer normalisation of one token's row, in registers (ops/norm.py)."""

import triton
import triton.language as tl


@triton.jit
def normalised(row, mask, eps, COLUMNS: tl.constexpr, RMS: tl.constexpr):
    """A row fp32 (BLOCK_K), 0 beyond its columns, over its deviation; without weight and bias."""
    centered = row
    if not RMS:
        centered = tl.where(mask, row - tl.sum(row, axis=0) / COLUMNS, 0.0)
    variance = tl.sum(centered * centered, axis=0) / COLUMNS
    return centered * tl.rsqrt(variance + eps)
