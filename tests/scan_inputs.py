"""Operands of the quantized scan at which every quantizer and every list matters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.helpers import generator

FORMS = ("none", "uniform", "log2")  # of the decay's quantizer


def quantized_operands(
    shape: tuple[int, int, int],
    states: int,
    *,
    groups: int | None = 1,
    bits: int = 4,
    outlier_bits: int = 8,
    period: int = 10,
    form: str = "uniform",
    reverse: bool = False,
    before: bool = False,
    factor: bool = True,
    outliers: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of `ouro::quantized_selective_scan` by name, (B, D, L) ones laid out (B, L, D).

    Some channels are much larger than others, some thresholds are reached at every step, and B and
    C are slices of one tensor, as a projection leaves them.
    """
    batch, channels, length = shape
    made = generator(seed)

    def tokens(width: int) -> Tensor:
        return torch.randn(batch, length, width, generator=made)

    def scales(size: float) -> Tensor:
        return (size * (0.5 + torch.rand(length, generator=made))).half().float()

    loud = 1 + 8 * (torch.rand(channels, generator=made) < 0.2)
    count = groups or 1
    both = tokens(2 * count * states).transpose(1, 2).unflatten(1, (2, count, states)).to(dtype)
    B, C = both[:, 0], both[:, 1]
    most = 2 ** (bits - 1) - 1
    size = 4.0 / most
    input_scale, state_scale = scales(size * 0.3), scales(size)
    wide = 0.7 + 1.5 * torch.rand(length, generator=made)
    return {
        "u": tokens(channels).transpose(1, 2).to(dtype),
        "step": (tokens(channels).abs() * 0.3 * loud).transpose(1, 2).to(dtype),
        "A": -torch.rand(channels, states, generator=made) * 4,
        "B": B[:, 0] if groups is None else B,
        "C": C[:, 0] if groups is None else C,
        "D": torch.randn(channels, generator=made),
        "z": tokens(channels).transpose(1, 2).to(dtype),
        "decay_scale": scales(1 / (2**bits - 1)) if form == "uniform" else None,
        "input_scale": input_scale,
        "input_threshold": (input_scale * most * wide).half().float() if outliers else None,
        "state_scale": state_scale,
        "state_threshold": (state_scale * most * wide).half().float() if outliers else None,
        "state_factor": 0.5 + torch.rand(channels, states, generator=made) if factor else None,
        "decay_limit": 0.9 if form == "log2" else 0.0,
        "decay_steps": (3 if bits > 4 else 2) if form == "log2" else 0,
        "bits": bits,
        "outlier_bits": outlier_bits,
        "refresh_period": period,
        "output_before_rounding": before,
        "reverse": reverse,
    }


def read_state(given: dict[str, Any], n: int) -> dict[str, Any]:
    """The same scan with y = state n: C is one there, and nothing is added or gated."""
    C = torch.zeros_like(given["C"])
    C[..., n, :] = 1
    return {**given, "C": C, "D": None, "z": None}
