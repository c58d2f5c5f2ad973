"""SiLU, softplus and GELU whose bits do not depend on where an element lies in its tensor.

ATen's own round differently in the vectorised part of a tensor and in its tail, so that a sample's
values would depend on the batch it is in (METHODS P7). These differ from ATen's by an ulp or two.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x)."""
    return x / (1 + torch.exp(-x))


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), without overflow."""
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


def gelu(x: Tensor) -> Tensor:
    """x times the normal distribution's function at x."""
    return 0.5 * x * (1 + torch.erf(x * math.sqrt(0.5)))


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU's approximation by a tanh."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
