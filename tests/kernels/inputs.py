"""Inputs of kernel cases, made on the CPU and moved: the references run on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.helpers import generator

# (batch, length, channels, outliers): each value with several of the others.
SHAPES = [
    (1, 1, 96, 0),
    (3, 1, 192, 1),
    (1, 1, 130, "all"),
    (3, 9, 130, 2),
    (1, 9, 192, "all"),
    (3, 9, 96, 0),
    (1, 10, 192, 1),
    (3, 10, 130, 0),
    (1, 10, 96, "all"),
    (3, 10, 96, 2),
    (3, 50, 96, 1),
    (1, 50, 192, 2),
    (1, 50, 130, 0),
    (1, 50, 96, "all"),
    (1, 197, 130, 2),
    (1, 197, 192, 0),
    (3, 197, 96, 1),
    (1, 197, 96, "all"),
]
LIMIT = {4: 7, 6: 31, 8: 127}


def activation(
    seed: int, shape: tuple[int, int, int], outliers: int | str, bits: int = 4
) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, L, K), inlier scale and threshold (L,), with 0, 1, 2 or all channels listed.

    Outlier channels are far from all others and enter at different tokens; some values lie between
    the inlier range and the threshold, and some exactly on it.
    """
    batch, length, channels = shape
    made = generator(seed)
    x = torch.randn(shape, generator=made).clamp(-3, 3)
    scale = (0.5 + torch.rand(length, generator=made)).div(LIMIT[bits]).mul(3).half().float()
    threshold = scale * LIMIT[bits] * 1.25 + 3
    if outliers == "all":
        scale, threshold = scale * 1e-3, torch.full((length,), 1e-6)
        x = torch.where(x == 0, 1.0, x)
    else:
        for index in range(int(outliers)):
            channel = (7 + 31 * index) % channels
            first = min(index * 3, length - 1)
            x[:, first:, channel] *= 40
            x[:, first, channel] = 100.0 + 10 * torch.arange(batch)
        if int(outliers) == 2:
            x[0, -1, 5] = threshold[-1]  # exactly on the threshold
    return x, scale, threshold


def on(device: str, *values: Any) -> list[Any]:
    """Tensors moved to a device, everything else as it is."""
    return [value.to(device) if isinstance(value, Tensor) else value for value in values]


def assert_equal(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Bit for bit, dtype and shape included."""
    assert len(actual) == len(expected)
    for index, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert ours.dtype == theirs.dtype, f"output {index}"
        assert torch.equal(ours.cpu(), theirs), f"output {index} differs"
