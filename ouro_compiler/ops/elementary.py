"""2^x and log2(x) in fp32, defined by the operations they are made of.

Codes inside a recurrence feed back into it, so a kernel has to compute the very value that is
rounded to a code. These are sums, products and shifts of bits, each rounded once, in an order that
every kernel repeats; no library's own functions, which differ by an ulp or two from each other.
Both are differentiable.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# Highest power first; the generated kernels (templates/elementary.*) carry the same numbers.
EXP2 = (1.3264727e-3, 9.6715126e-3, 5.5507337e-2, 2.4022242e-1, 6.9314698e-1, 1.0)
LOG2 = (
    *(-0.145989046, 0.236745417, -0.24992393, 0.286727428),
    *(-0.360103816, 0.480938464, -0.72135663, 1.44269478),
)
LOG2E = 1.4426950408889634
LEAST = 2.0**-126  # the smallest normal number
_MAGIC = 12582912.0  # 1.5 * 2**23: adding it leaves a number rounded to an integer in the low bits
_ROOT_HALF = 0x3F3504F3  # the bits of sqrt(0.5)


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    total = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * x + coefficient
    return total


def _exp2(x: Tensor) -> Tensor:
    x = x.clamp(-126.0, 128.0)
    shifted = x + _MAGIC
    power = _polynomial(x - (shifted - _MAGIC), EXP2)
    return (power.view(torch.int32) + (shifted.view(torch.int32) << 23)).view(torch.float32)


def _log2(x: Tensor) -> Tensor:
    bits = x.contiguous().view(torch.int32)
    exponent = (bits - _ROOT_HALF) >> 23
    rest = (bits - (exponent << 23)).view(torch.float32) - 1.0
    found = exponent.float() + rest * _polynomial(rest, LOG2)
    return torch.where(x >= LEAST, found, -math.inf)


class _Exp2(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = _exp2(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return grad * y * math.log(2)


class _Log2(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _log2(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad / (x.clamp(min=LEAST) * math.log(2))


def exp2(x: Tensor) -> Tensor:
    """2^x of fp32 x, to 2e-7 of its value; 2^-126 below, infinite from 128 on; NaN stays."""
    return _Exp2.apply(x)


def log2(x: Tensor) -> Tensor:
    """log2(x) of fp32 x, to 1e-7 plus its own rounding; minus infinity under 2^-126 and for NaN."""
    return _Log2.apply(x)
