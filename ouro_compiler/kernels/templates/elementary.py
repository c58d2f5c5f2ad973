"""2^x and log2(x) as `ouro_compiler.ops.elementary` defines them, operation for operation.

Correct only where fused multiply-add is off. What the hardware has is approximate, and a value that
is rounded to a code must be the definition's bit for bit.
"""

import triton
import triton.language as tl


@triton.jit
def exp2_exact(x):
    """2^x; 2^-126 below, infinite from 128 on, and not a number stays one."""
    x = tl.where(x < -126.0, -126.0, tl.where(x > 128.0, 128.0, x))
    shifted = x + 12582912.0
    x = x - (shifted - 12582912.0)
    p = x * 1.3264727e-3 + 9.6715126e-3
    p = p * x + 5.5507337e-2
    p = p * x + 2.4022242e-1
    p = p * x + 6.9314698e-1
    p = p * x + 1.0
    bits = p.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def log2_exact(x):
    """log2(x); minus infinity under 2^-126, and where x is not a number."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    rest = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    p = rest * -0.145989046 + 0.236745417
    p = p * rest - 0.24992393
    p = p * rest + 0.286727428
    p = p * rest - 0.360103816
    p = p * rest + 0.480938464
    p = p * rest - 0.72135663
    p = p * rest + 1.44269478
    found = exponent.to(tl.float32) + rest * p
    return tl.where(x >= 1.1754943508222875e-38, found, float("-inf"))
