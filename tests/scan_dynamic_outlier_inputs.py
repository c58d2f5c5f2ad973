"""Quantized operands of a scan, codes and lists from the reference quantizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ouro_compiler.ops.quantize import quantize_dynamic_outlier_ref
from tests.helpers import generator

OPERANDS = ("delta", "B", "C")


def dynamic_outlier_operands(
    shape: tuple[int, int, int],
    states: int,
    *,
    groups: int = 1,
    bits: int = 4,
    outlier_bits: int = 8,
    period: int = 10,
    asymmetric: bool = True,
    reverse: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of `ouro::selective_scan_dynamic_outlier` by name; shape is (batch, D, L).

    delta has zero points where `asymmetric`; channels are listed at different tokens, and B and C
    are quantized from slices of one tensor, as a projection leaves them.
    """
    batch, channels, length = shape
    made = generator(seed)
    static = (bits, outlier_bits, period, reverse)

    def tokens(width: int) -> Tensor:
        return torch.randn(batch, length, width, generator=made)

    def quantized(x: Tensor, zero: bool) -> list[Tensor | None]:
        x = x.clone()
        x[:, ::3, x.shape[2] // 2] *= 9
        x[0, length // 2 :, 0] *= 7
        most = 2 ** (bits - 1) - 1
        scale = (1 + torch.rand(length, generator=made)).div(most).half()
        point = None
        if zero:
            ends = (2 ** (bits - 1) - 1, 2 ** (bits - 1) + 3)
            point = torch.randint(*ends, (length,), generator=made).to(torch.uint8)
        threshold = (scale.float() * most * 1.4 + 1).half()
        codes, outlier_scale, start = quantize_dynamic_outlier_ref(
            x, scale, point, threshold, *static
        )
        kept = x if outlier_bits == 16 else None
        return [codes, scale, point, outlier_scale, start, kept]

    both = tokens(2 * groups * states + 3)[..., 3:]
    return {
        "u": tokens(channels).to(dtype).transpose(1, 2),
        "delta": quantized(tokens(channels) - 1, asymmetric),
        "A": -torch.rand(channels, states, generator=made) * 4,
        "B": quantized(both[..., : groups * states], False),
        "C": quantized(both[..., groups * states :], False),
        "D": torch.randn(channels, generator=made).half(),
        "z": tokens(channels).to(dtype).transpose(1, 2),
        "delta_bias": None,
        "delta_softplus": True,
        "inlier_bits": bits,
        "outlier_bits": outlier_bits,
        "refresh_period": period,
        "reverse": reverse,
    }


def in_turn(
    op: Callable[..., Tensor], given: dict[str, Any]
) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The op as a function of its tensors that have a batch, and these tensors."""
    batched = [("u", None), ("z", None)]
    batched += [(name, index) for name in OPERANDS for index in (0, 3, 4, 5)]  # type: ignore[misc]
    found = [given[name] if index is None else given[name][index] for name, index in batched]
    places = [place for place, one in zip(batched, found, strict=True) if one is not None]

    def run(*tensors: Tensor) -> Tensor:
        args = {**given, **{name: list(given[name]) for name in OPERANDS}}
        for (name, index), tensor in zip(places, tensors, strict=True):
            if index is None:
                args[name] = tensor
            else:
                args[name][index] = tensor
        return op(*args.values())

    return run, [one for one in found if one is not None]
