"""Clipping search (METHODS P4): the scale, out of 100, with the least mean |error|^2.4.

Scales are rounded to values that fp16 holds, so that the search, the simulation and the stored
artefact use one number.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ouro_compiler.ops.quantize import MIN_SCALE, quantize_symmetric, symmetric_max

CANDIDATES = 100
NORM = 2.4
BINS = 2048
_ASYMMETRIC_CANDIDATES = 50  # fractions of the range cut off at either end: 0 .. 0.49
LOGARITHMIC_SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
LOGARITHMIC_STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
_HALF_MIN, _HALF_MAX = 2.0**-14, 65504.0
_ROWS_AT_ONCE = 1 << 20


def round_to_half(values: Tensor) -> Tensor:
    """fp32 values rounded to fp16 where fp16 has full precision; left alone elsewhere."""
    normal = (values.abs() >= _HALF_MIN) & (values.abs() <= _HALF_MAX)
    return torch.where(normal, values.half().float(), values)


def weight_scale(weight: Tensor, bits: int) -> Tensor:
    """One scale (O,) an output channel of weight (O, K), symmetric (P5)."""
    rows = max(1, _ROWS_AT_ONCE // weight.shape[1])
    return torch.cat([_row_scales(chunk.float(), bits) for chunk in weight.split(rows)])


def _row_scales(rows: Tensor, bits: int) -> Tensor:
    peak = rows.abs().amax(1, keepdim=True)
    best_error = torch.full_like(peak, float("inf"))
    best_scale = torch.ones_like(peak)
    for candidate in range(CANDIDATES, 0, -1):
        clip = peak * (candidate / CANDIDATES)
        if candidate % 5 == 0:
            # Clipping alone costs this much, and costs more for every smaller candidate.
            floor = (rows.abs() - clip).clamp(min=0).pow(NORM).mean(1, keepdim=True)
            if bool((floor > best_error).all()):
                break
        scale = round_to_half((clip / symmetric_max(bits)).clamp(min=MIN_SCALE))
        error = (quantize_symmetric(rows, scale, bits) * scale - rows).abs()
        error = error.pow(NORM).mean(1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    return best_scale.squeeze(1)


@lru_cache(maxsize=8)
def _symmetric_errors(bits: int) -> Tensor:
    """Error (CANDIDATES, BINS) of each clip for the middle of each bin of [0, 1]."""
    middles = ((torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS)[None]
    clips = torch.arange(1, CANDIDATES + 1, dtype=torch.float64)[:, None] / CANDIDATES
    scales = clips / symmetric_max(bits)
    return (quantize_symmetric(middles, scales, bits) * scales - middles).abs().pow(NORM)


def symmetric_from_histogram(histogram: Tensor, peak: Tensor, bits: int) -> Tensor:
    """Scales (L,) from histograms (L, BINS) of |x| over [0, peak] at each time step, peak (L,).

    Errors scale with the peak, so one table of errors serves every time step.
    """
    cost = histogram.double() @ _symmetric_errors(bits).t()
    # Prefer the widest of equal candidates: an empty histogram keeps its whole range.
    best = CANDIDATES - cost.flip(1).argmin(1)
    scale = peak * (best.float() / CANDIDATES) / symmetric_max(bits)
    return round_to_half(scale.clamp(min=MIN_SCALE))


def unsigned_scale(histogram: Tensor, peak: Tensor, bits: int) -> Tensor:
    """The same for codes 0 .. 2^bits - 1 of numbers in [0, peak]: symmetric ones of a bit more."""
    return symmetric_from_histogram(histogram, peak, bits + 1)


def logarithmic_from_histogram(counts: Tensor, values: Tensor, bits: int) -> tuple[float, int]:
    """(s, r) of codes q for s 2^(-q/r) with the least squared error (METHODS 7.2).

    counts and values (K,): how often positive numbers occur. s is a fraction of the largest one.
    """
    largest = float(values[counts > 0].max())
    best_cost, best = float("inf"), (largest, 1)
    for share in LOGARITHMIC_SHARES:
        for steps in LOGARITHMIC_STEPS:
            codes = torch.round(-steps * torch.log2(values / (largest * share)))
            rebuilt = largest * share * torch.exp2(-codes.clamp(0, 2**bits - 1) / steps)
            cost = float((counts * (rebuilt - values).square()).sum())
            if cost < best_cost:
                best_cost, best = cost, (largest * share, steps)
    return best


def asymmetric_from_histogram(
    histogram: Tensor, low: Tensor, high: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """(scale, zero point), both (L,), from histograms (L, BINS) of x over [low, high] (P3, P4)."""
    middles = (torch.arange(BINS, dtype=torch.float32) + 0.5) / BINS
    best_cost = torch.full_like(low, float("inf"))
    best_scale, best_zero = torch.ones_like(low), torch.zeros_like(low)
    values = low[:, None] + middles * (high - low)[:, None]
    for candidate in range(_ASYMMETRIC_CANDIDATES):
        cut = (high - low) * (candidate / 100)
        scale, zero = asymmetric_parameters(low + cut, high - cut, bits)
        codes = torch.round(values / scale[:, None]) + zero[:, None]
        rebuilt = (codes.clamp(0, 2**bits - 1) - zero[:, None]) * scale[:, None]
        cost = (histogram * (rebuilt - values).abs().pow(NORM)).sum(1)
        better = cost < best_cost
        best_cost = torch.where(better, cost, best_cost)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def asymmetric_parameters(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """P3: (scale, zero point) of intervals, widened to hold 0."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = round_to_half(((high - low) / (2**bits - 1)).clamp(min=MIN_SCALE))
    return scale, torch.round(-low / scale).clamp(0, 2**bits - 1)


def quantize_weight(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(int8 codes (O, K), scales (O,)) of a weight."""
    scale = weight_scale(weight, bits)
    return quantize_symmetric(weight.float(), scale[:, None], bits).to(torch.int8), scale


def quantize_rows_asymmetric(rows: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """(int8 codes, scale, zero point) by each row's extremes; codes are minus 2^(bits-1)."""
    scale, zero = asymmetric_parameters(rows.amin(1), rows.amax(1), bits)
    codes = (torch.round(rows / scale[:, None]) + zero[:, None]).clamp(0, 2**bits - 1)
    return (codes - 2 ** (bits - 1)).to(torch.int8), scale, zero
