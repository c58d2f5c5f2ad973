"""The gradients of the causal convolution in C++: their arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from ouro_compiler.kernels.cpp.launch import dtype_code, launch, refuse_dtypes, spec_of
from ouro_compiler.kernels.cpp.scan import token_major
from ouro_compiler.kernels.spec import Template
from ouro_compiler.ops.causal_conv1d import check, empty_gradients

_MAX_TAPS = 16  # a filter and two windows of its length are unrolled


def refuse_conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool
) -> str | None:
    """Why no kernel computes these gradients; None if one does."""
    del silu, reverse
    if not 0 < weight.shape[-1] <= _MAX_TAPS:
        return f"kernels take filters of 1 to {_MAX_TAPS} taps, got {weight.shape[-1]}"
    if grad.dtype != x.dtype:
        return "the output's gradient and x must share a dtype"
    return refuse_dtypes(x, weight, bias)


def causal_conv1d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`causal_conv1d_backward_ref` in C++; shapes as there."""
    check(x, weight, bias)
    batch, channels, length = x.shape
    gradients = empty_gradients(grad, x, weight, bias, silu, reverse)
    grad, x = token_major(grad, "grad"), token_major(x, "x")
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    taps = weight.shape[1]
    spec = spec_of(
        Template.CONV_BACKWARD, WIDTH=taps, SILU=silu, REVERSE=reverse, DTYPE=dtype_code(x)
    )
    launch(
        spec,
        *(grad, grad.stride(0), grad.stride(2)),
        *(x, x.stride(0), x.stride(2)),
        *(weight, dtype_code(weight)),
        *(bias, dtype_code(bias)),
        *gradients,
        x.new_empty((batch, channels, taps + 1), dtype=torch.float32),
        *(batch, channels, length),
    )
    return gradients
