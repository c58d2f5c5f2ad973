"""`ouro::causal_conv1d`: depthwise causal convolution along time, optionally followed by SiLU.

x is (B, D, L), weight (D, W), bias (D,); y_t = sum_i weight[:, i] x_{t - (W-1) + i}, zero before
the start. With `reverse` time runs from the last token to the first (y_t reads x_t .. x_{t+W-1}).
The result has x's dtype and memory laid out as (B, L, D).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ouro_compiler.ops import activations
from ouro_compiler.ops.library import (
    LIBRARY,
    as_token_major,
    computing_dtype,
    define_op,
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


def causal_conv1d_backward_ref(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (B, D, L), weight (D, W) and bias (D,), empty without one, in fp32 or double.

    grad is (B, D, L). The gradient of x is the convolution in the other direction of time.
    """
    check(x, weight, bias)
    dtype = computing_dtype(x)
    wide, taps = x.to(dtype), weight.to(dtype)
    grad_y = grad.to(dtype)
    if silu:
        y = causal_conv1d_ref(wide, taps, bias, False, reverse)
        sigmoid = torch.sigmoid(y)
        grad_y = grad_y * sigmoid * (1 + y * (1 - sigmoid))
    length, last = x.shape[2], weight.shape[1] - 1
    padded = F.pad(wide, (0, last) if reverse else (last, 0))
    starts = [last - i if reverse else i for i in range(last + 1)]
    grad_weight = torch.stack(
        [(grad_y * padded[..., start : start + length]).sum((0, 2)) for start in starts], 1
    )
    return (
        causal_conv1d_ref(grad_y, taps, None, False, not reverse).to(x.dtype),
        grad_weight.to(weight.dtype),
        grad.new_empty(0) if bias is None else grad_y.sum((0, 2)).to(bias.dtype),
    )


def _fake(x: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    return empty_token_major(x)


def empty_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs of the backward, uninitialised; that of an absent bias has no elements."""
    del silu, reverse
    return (
        empty_token_major(x),
        weight.new_empty(weight.shape),
        grad.new_empty(0) if bias is None else bias.new_empty(bias.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs[:3])
    ctx.flags = inputs[3:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.ouro.causal_conv1d_backward(grad, *ctx.saved_tensors, *ctx.flags)
    found = [g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=False)]
    return (*found, None, None)


define_op(
    f"{NAME}(Tensor x, Tensor weight, Tensor? bias=None, bool silu=False, bool reverse=False)"
    " -> Tensor",
    implementation=causal_conv1d_ref,
    fake=_fake,
)
define_op(
    f"{NAME}_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, bool silu, bool reverse)"
    " -> (Tensor, Tensor, Tensor)",
    implementation=causal_conv1d_backward_ref,
    fake=empty_gradients,
)
torch.library.register_autograd(
    f"ouro::{NAME}", _backward, setup_context=_setup_context, lib=LIBRARY
)
