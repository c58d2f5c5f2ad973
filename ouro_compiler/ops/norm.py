"""`ouro::add_norm`: residual addition, then RMS or layer normalisation of the last dimension.

    r = x + residual                      (fp32; residual optional)
    y = normalise(r) * weight + bias      (fp32, returned in x's dtype; bias optional)

Returns (y, r). r is fp32 with `residual_fp32`, else in the dtype of residual (of x without one).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ouro_compiler.ops.library import define_op, differentiate_by_reference, reject

NAME = "add_norm"


def add_norm_ref(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    residual_fp32: bool,
) -> tuple[Tensor, Tensor]:
    """The definition. x and residual (..., K); weight and bias (K,)."""
    check(x, residual, weight, bias)
    total = x.float() if residual is None else x.float() + residual.float()
    if rms:
        y = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps) * weight.float()
        y = y if bias is None else y + bias.float()
    else:
        shift = None if bias is None else bias.float()
        y = F.layer_norm(total, total.shape[-1:], weight.float(), shift, eps)
    # An op may not return its input: `.float()` is one when x is fp32 and there is no residual.
    kept = total.to(residual_dtype(x, residual, residual_fp32), copy=residual is None)
    return y.to(x.dtype).contiguous(), kept.contiguous()


def check(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError for operands that do not fit each other."""
    if weight.shape != x.shape[-1:]:
        reject(NAME, f"weight must have shape ({x.shape[-1]},), got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape:
        reject(NAME, f"bias must have shape ({x.shape[-1]},), got {tuple(bias.shape)}")
    if residual is not None and residual.shape != x.shape:
        reject(NAME, f"residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")


def residual_dtype(x: Tensor, residual: Tensor | None, residual_fp32: bool) -> torch.dtype:
    """The dtype of add_norm's second result."""
    if residual_fp32:
        return torch.float32
    return x.dtype if residual is None else residual.dtype


def _fake(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    residual_fp32: bool,
) -> tuple[Tensor, Tensor]:
    dtype = residual_dtype(x, residual, residual_fp32)
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=dtype)


define_op(
    f"{NAME}(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, bool rms, "
    "bool residual_fp32) -> (Tensor, Tensor)",
    implementation=add_norm_ref,
    fake=_fake,
)
differentiate_by_reference(NAME, add_norm_ref)
