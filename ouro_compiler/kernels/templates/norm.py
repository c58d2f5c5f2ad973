"""RMS and layer normalisation of rows in registers, as `ouro_compiler.ops.norm` defines them."""

import triton
import triton.language as tl


@triton.jit
def normalise(total, weight, bias, mask, eps, COLUMNS: tl.constexpr, RMS: tl.constexpr):
    """weight * the normalised rows + bias; the last dimension of fp32 `total` holds a row."""
    centered = total
    if not RMS:
        mean = tl.sum(total, axis=-1, keep_dims=True) / COLUMNS
        centered = tl.where(mask, total - mean, 0.0)
    variance = tl.sum(centered * centered, axis=-1, keep_dims=True) / COLUMNS
    return centered * tl.rsqrt(variance + eps) * weight + bias
