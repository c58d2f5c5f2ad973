"""Scales by the error of a layer's output: one after another, in rounds (METHODS 7.4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ouro_compiler.calibration.search import round_to_half
from ouro_compiler.graph import QWeight, UniformParams
from ouro_compiler.ops.fake_quantize import fake_quantize_ref
from ouro_compiler.ops.quantize import MIN_SCALE, quantize_symmetric

MULTIPLIERS = (1.0, 0.5, 0.6, 0.7, 0.8, 0.9, 1.1, 1.2)  # 1 first: ties leave a scale as it is

Scales = dict[str, Tensor]


def search_scales(
    scales: Mapping[str, Tensor], error: Callable[[Scales], float], rounds: int
) -> Scales:
    """Multiply each of the scales so that the error of all of them together is least.

    Every coordinate is tried at every multiple of what it was at first, the others as they are now.
    The result is never worse than the start, and a round that changes nothing is the last one.
    """
    best = dict(scales)
    least = error(best) if rounds else 0.0
    for _ in range(rounds):
        before = least
        for name, start in scales.items():
            for multiplier in MULTIPLIERS:
                candidate = {**best, name: scaled(start, multiplier)}
                found = error(candidate)
                if found < least:
                    best, least = candidate, found
        if least == before:
            break
    return best


def scaled(scale: Tensor, multiplier: float | Tensor) -> Tensor:
    """A multiple of a scale, as a number that fp16 holds."""
    return round_to_half((scale * multiplier).clamp(min=MIN_SCALE))


def search_linear(
    x: Tensor,
    weight: Tensor,
    activation: UniformParams,
    weight_scale: Tensor,
    *,
    bits: int,
    weight_bits: int,
    rounds: int,
) -> tuple[UniformParams, QWeight]:
    """The input's scale and each output channel's by the squared error of x W^T.

    x is (..., K), weight (O, K), weight_scale (O,); activation has one scale for the whole tensor.
    Output channels do not depend on each other, so each has a search of its own.
    """
    x, weight = x.reshape(-1, x.shape[-1]).float(), weight.float()
    wanted = F.linear(x, weight)
    scale, rows = activation.scale, weight_scale

    def quantized_input(candidate: Tensor) -> Tensor:
        return fake_quantize_ref(x, candidate, activation.zero_point, bits)

    def quantized_weight(candidate: Tensor) -> Tensor:
        return quantize_symmetric(weight, candidate[:, None], weight_bits) * candidate[:, None]

    def errors(scale: Tensor, rows: Tensor) -> Tensor:
        made = F.linear(quantized_input(scale), quantized_weight(rows))
        return (made - wanted).square().mean(0)

    least = errors(scale, rows)
    for _ in range(rounds):
        before = least
        for multiplier in MULTIPLIERS:
            candidate = scaled(activation.scale, multiplier)
            found = errors(candidate, rows)
            if found.sum() < least.sum():
                scale, least = candidate, found
        for multiplier in MULTIPLIERS:
            candidate = scaled(weight_scale, multiplier)
            found = errors(scale, candidate)
            better = found < least
            rows = torch.where(better, candidate, rows)
            least = torch.where(better, found, least)
        if torch.equal(least, before):
            break
    codes = quantize_symmetric(weight, rows[:, None], weight_bits).to(torch.int8)
    searched = UniformParams(
        scale=scale, zero_point=activation.zero_point, smooth=activation.smooth
    )
    return searched, QWeight(codes=codes, scale=rows)
