"""SiLU and softplus whose bits do not depend on where an element lies in its tensor.

ATen's own round differently in the vectorised part of a tensor and in its tail, so that a sample's
values would depend on the batch it is in (METHODS P7). These differ from ATen's by an ulp or two.
"""

from __future__ import annotations

import torch
from torch import Tensor


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x)."""
    return x / (1 + torch.exp(-x))


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), without overflow."""
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))
