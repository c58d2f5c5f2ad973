"""`ouro::depthwise_conv`: a filter of its own for every channel, around each token or pixel.

x is (B, C, L) or (B, C, H, W), weight (C, 1, W) or (C, 1, KH, KW), bias (C,); zeros around x, as
many as keep its size ("same": an even filter has one more after than before). Computed in fp32 (or
double), optionally followed by SiLU; the result has x's dtype and memory laid out as (B, L, C) or
(B, H, W, C), whatever x's is.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ouro_compiler.ops import activations
from ouro_compiler.ops.library import (
    as_token_major,
    computing_dtype,
    define_op,
    differentiate_by_reference,
    empty_channels_last,
    reject,
)

NAME = "depthwise_conv"


def depthwise_conv_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, silu: bool = False
) -> Tensor:
    """The definition. Shapes as in the module docstring."""
    check(x, weight, bias)
    dtype = computing_dtype(x)
    convolve = F.conv1d if x.dim() == 3 else F.conv2d
    shift = None if bias is None else bias.to(dtype)
    # One memory format for all: another, or another batch, may mean other last bits.
    padded = F.pad(x.to(dtype).contiguous(), _padding(weight))
    y = convolve(padded, weight.to(dtype), shift, groups=x.shape[1])
    return as_token_major((activations.silu(y) if silu else y).to(x.dtype))


def _padding(weight: Tensor) -> list[int]:
    """Zeros before and after, last dimension first, as F.pad takes them."""
    sides = [((size - 1) // 2, size // 2) for size in reversed(weight.shape[2:])]
    return [one for pair in sides for one in pair]


def check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError for operands that do not fit each other."""
    if x.dim() not in (3, 4) or weight.dim() != x.dim() or weight.shape[:2] != (x.shape[1], 1):
        needs = "x (B, C, L) and weight (C, 1, W), or x (B, C, H, W) and weight (C, 1, KH, KW)"
        reject(NAME, f"needs {needs}, got {tuple(x.shape)} and {tuple(weight.shape)}")
    if bias is not None and bias.shape != x.shape[1:2]:
        reject(NAME, f"bias must have shape ({x.shape[1]},), got {tuple(bias.shape)}")


def _fake(x: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    return empty_channels_last(x)


define_op(
    f"{NAME}(Tensor x, Tensor weight, Tensor? bias=None, bool silu=False) -> Tensor",
    implementation=depthwise_conv_ref,
    fake=_fake,
)
differentiate_by_reference(NAME, depthwise_conv_ref)
