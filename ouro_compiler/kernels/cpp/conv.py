"""The causal convolution in C++, alone and before a quantizer: its arguments."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ouro_compiler.kernels.cpp.launch import dtype_code, launch, refuse_dtypes, spec_of
from ouro_compiler.kernels.cpp.quantize import quantizer, rows, vector
from ouro_compiler.kernels.spec import Template
from ouro_compiler.ops.causal_conv1d import check as check_conv
from ouro_compiler.ops.fused import empty_quantized
from ouro_compiler.ops.library import empty_token_major
from ouro_compiler.ops.quantize import check as check_quantize

_MAX_TAPS = 16  # a channel's taps and inputs live in registers


def refuse_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    silu: bool = False,
    inlier_scale: Tensor | bool | None = None,
    threshold: Tensor | None = None,
    *_: Any,
) -> str | None:
    """Why no kernel runs this convolution, quantized or not; None if one does."""
    if weight.dim() == 2 and not 1 <= weight.shape[1] <= _MAX_TAPS:
        return f"kernels take 1 to {_MAX_TAPS} taps, got {weight.shape[1]}"
    # Without a quantizer the fifth argument is the direction.
    scale = inlier_scale if isinstance(inlier_scale, Tensor) else None
    return refuse_dtypes(x, weight, bias, scale, threshold)


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, silu: bool = False, reverse: bool = False
) -> Tensor:
    """`causal_conv1d_ref` in C++; x (B, D, L)."""
    check_conv(x, weight, bias)
    batch, columns, length = x.shape
    y = empty_token_major(x)
    tokens = rows(x.transpose(1, 2), "x")
    launch(
        spec_of(Template.CONV, DTYPE=dtype_code(x), TAPS=weight.shape[1]),
        *(tokens, tokens.stride(0), tokens.stride(1)),
        *(*vector(weight, "weight"), *vector(bias, "bias")),
        *(silu, y, batch, length, columns, reverse),
    )
    return y


def causal_conv1d_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    inlier_scale: Tensor,
    threshold: Tensor,
    *static: Any,
) -> tuple[Tensor, ...]:
    """`causal_conv1d_quantize_ref` in C++; x (B, K, L)."""
    check_conv(x, weight, bias)
    tokens = rows(x.transpose(1, 2), "x")
    check_quantize("causal_conv1d_quantize", tokens, (inlier_scale, threshold), *static[:3])
    quantized = empty_quantized(x, tuple(tokens.shape), static[2])  # type: ignore[arg-type]
    y = empty_token_major(x)
    launch(
        spec_of(Template.CONV_QUANTIZE, DTYPE=dtype_code(x), TAPS=weight.shape[1]),
        *(tokens, tokens.stride(0), tokens.stride(1)),
        *(*vector(weight, "weight"), *vector(bias, "bias"), silu, y),
        *(*vector(inlier_scale, "inlier_scale"), *vector(threshold, "threshold")),
        *quantizer(quantized, static),
    )
    return (*quantized, y)
