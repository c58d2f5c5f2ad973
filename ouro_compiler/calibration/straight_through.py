"""Quantizers with gradients for their scales (METHODS P6): the values are those of the ops.

Backward is LSQ's: rounding passes a gradient as it is, clipping only inside the range, and with q
the code less its zero point d(x-hat)/d(scale) is q - x / scale inside and q outside. Listed
outliers have a dynamic scale, which is no parameter: their gradients pass to x alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ouro_compiler.ops.quantize import listed_mask, symmetric_max

_OURO = torch.ops.ouro


class UniformQuantizer(torch.autograd.Function):
    """`ouro::fake_quantize`; apply(x, scale, zero_point, bits)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.bits = bits
        return _OURO.fake_quantize(x, scale, zero_point, bits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        inside, slope = _slopes(x, scale, zero_point, ctx.bits)
        grad_x = torch.where(inside, grad, 0.0) if ctx.needs_input_grad[0] else None
        return grad_x, (grad * slope).sum_to_size(scale.shape), None, None


class OutlierQuantizer(torch.autograd.Function):
    """Quantize and dequantize with outlier lists, dynamic or static (`ops.quantize`).

    apply(x (B, L, K), scale (L,), zero_point (L,) or None, rule, is_static, static): rule is the
    threshold (L,) or, where is_static, the channels; static the ops' four last arguments.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        rule: Tensor,
        is_static: bool,
        static: tuple[int, int, int, bool],
    ) -> Tensor:
        quantize = _OURO.quantize_static_outlier if is_static else _OURO.quantize_dynamic_outlier
        codes, outlier_scale, start = quantize(x, scale, zero_point, rule, *static)
        ctx.save_for_backward(x, scale, zero_point, start)
        ctx.static = static
        return _OURO.dequantize_dynamic_outlier(
            codes, scale, zero_point, outlier_scale, start, x, *static
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point, start = ctx.saved_tensors
        bits, _, period, reverse = ctx.static
        zero = None if zero_point is None else zero_point.float()[:, None]
        inside, slope = _slopes(x, scale[:, None], zero, bits)
        listed = listed_mask(start, x.shape[1], period, reverse)
        grad_x = torch.where(inside | listed, grad, 0.0) if ctx.needs_input_grad[0] else None
        grad_scale = torch.where(listed, 0.0, grad * slope).sum((0, 2))
        return grad_x, grad_scale, None, None, None, None


def _slopes(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int
) -> tuple[Tensor, Tensor]:
    """(is x inside the range, d(x-hat)/d(scale)), both in x's shape."""
    ratio = x.float() / scale
    rounded = torch.round(ratio)
    if zero_point is None:
        low, high = torch.tensor((-1.0, 1.0), device=x.device) * symmetric_max(bits)
    else:
        low, high = -zero_point, 2**bits - 1 - zero_point
    clipped = rounded.clamp(low, high)
    inside = clipped == rounded
    return inside, torch.where(inside, rounded - ratio, clipped)
