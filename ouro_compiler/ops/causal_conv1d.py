"""`ouro::causal_conv1d`: depthwise causal convolution along time, optionally followed by SiLU.

x is (B, D, L), weight (D, W), bias (D,); y_t = sum_i weight[:, i] x_{t - (W-1) + i}, zero before
the start. With `reverse` time runs from the last token to the first (y_t reads x_t .. x_{t+W-1}).
The result has x's dtype and memory laid out as (B, L, D).
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ouro_compiler.ops import activations
from ouro_compiler.ops.library import (
    as_token_major,
    define_op,
    differentiate_by_reference,
    empty_token_major,
    reject,
)

NAME = "causal_conv1d"


def causal_conv1d_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, silu: bool = False, reverse: bool = False
) -> Tensor:
    """The definition. Shapes as in the module docstring."""
    check(x, weight, bias)
    width = weight.shape[1]
    # A reversed causal convolution looks ahead: pad on the right and mirror the taps.
    padding = (0, width - 1) if reverse else (width - 1, 0)
    taps = weight.flip(-1) if reverse else weight
    shift = None if bias is None else bias.to(x.dtype)
    y = F.conv1d(F.pad(x, padding), taps[:, None].to(x.dtype), shift, groups=x.shape[1])
    return as_token_major(activations.silu(y) if silu else y)


def check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError for operands that do not fit each other."""
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[0] != x.shape[1]:
        reject(NAME, f"needs x (B, D, L) and weight (D, W), got {x.shape} and {weight.shape}")
    if bias is not None and bias.shape != x.shape[1:2]:
        reject(NAME, f"bias must have shape (D,), got {tuple(bias.shape)}")


def _fake(x: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    return empty_token_major(x)


define_op(
    f"{NAME}(Tensor x, Tensor weight, Tensor? bias=None, bool silu=False, bool reverse=False)"
    " -> Tensor",
    implementation=causal_conv1d_ref,
    fake=_fake,
)
differentiate_by_reference(NAME, causal_conv1d_ref)
