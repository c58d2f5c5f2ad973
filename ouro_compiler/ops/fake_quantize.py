"""`ouro::fake_quantize`: a uniform quantizer and its inverse in one step (METHODS P2, P3).

What simulated recipes put around an activation: x (..., K) of any floating dtype and x-hat of the
same. scale, and zero_point where the code is asymmetric, broadcast against x. Without a zero point
codes are in [-Q, Q], Q = 2**(bits-1) - 1; with one in [0, 2**bits - 1].
"""

from __future__ import annotations

import torch
from torch import Tensor

from ouro_compiler.ops.library import define_op, reject
from ouro_compiler.ops.quantize import quantize_symmetric

NAME = "fake_quantize"


def fake_quantize_ref(x: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """x-hat in x's shape and dtype, computed in fp32."""
    _check(x, scale, zero_point, bits)
    scale = scale.float()
    if zero_point is None:
        return (quantize_symmetric(x.float(), scale, bits) * scale).to(x.dtype)
    zero = zero_point.float()
    codes = (torch.round(x.float() / scale) + zero).clamp(0, 2**bits - 1)
    return ((codes - zero) * scale).to(x.dtype)


def _check(x: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> None:
    if not 2 <= bits <= 16:
        reject(NAME, f"bits must be 2 to 16, got {bits}")
    for name, value in (("scale", scale), ("zero_point", zero_point)):
        if value is None:
            continue
        try:
            fits = torch.broadcast_shapes(x.shape, value.shape) == x.shape
        except RuntimeError:
            fits = False
        if not fits:
            reject(
                NAME, f"{name} {tuple(value.shape)} does not broadcast against x {tuple(x.shape)}"
            )


def _fake(x: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    del scale, zero_point, bits
    return torch.empty_like(x)


define_op(
    "fake_quantize(Tensor x, Tensor scale, Tensor? zero_point, int bits) -> Tensor",
    implementation=fake_quantize_ref,
    fake=_fake,
)
