"""Clipping searches against brute force, and the properties of what they return."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ouro_compiler.calibration.search import (
    BINS,
    asymmetric_from_histogram,
    asymmetric_parameters,
    quantize_rows_asymmetric,
    quantize_weight,
    round_to_half,
    symmetric_from_histogram,
    weight_scale,
)


def best_scale_brute_force(row: torch.Tensor, bits: int) -> float:
    limit = 2 ** (bits - 1) - 1
    peak = row.abs().max().item()
    found = []
    for candidate in range(1, 101):
        scale = torch.tensor(max(candidate / 100 * peak / limit, 1e-8)).half().float().item()
        rebuilt = (row / scale).round().clamp(-limit, limit) * scale
        found.append((((rebuilt - row).abs() ** 2.4).mean().item(), scale))
    return min(found)[1]


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("tail", [1.0, 3.0])
def test_weight_scale_is_the_best_of_the_hundred(bits: int, tail: float) -> None:
    torch.manual_seed(bits)
    weight = torch.randn(5, 96).abs().pow(tail) * torch.randn(5, 96).sign()
    scales = weight_scale(weight, bits)
    for row, scale in zip(weight, scales, strict=True):
        expected = best_scale_brute_force(row, bits)

        def error(value: float, row: torch.Tensor = row) -> float:
            limit = 2 ** (bits - 1) - 1
            rebuilt = (row / value).round().clamp(-limit, limit) * value
            return (rebuilt - row).abs().pow(2.4).mean().item()

        assert error(scale.item()) == pytest.approx(error(expected), rel=1e-4)


def test_zero_weights_have_zero_codes() -> None:
    codes, scale = quantize_weight(torch.zeros(3, 8), 4)
    assert not codes.any()
    assert (scale > 0).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_histogram_search_equals_the_search_on_values(bits: int) -> None:
    torch.manual_seed(0)
    values = torch.distributions.Laplace(0, 1).sample((3, 20_000))
    peak = values.abs().amax(1)
    index = (values.abs() / peak[:, None] * BINS).long().clamp(max=BINS - 1)
    histogram = torch.stack([torch.bincount(row, minlength=BINS) for row in index]).float()
    found = symmetric_from_histogram(histogram, peak, bits)
    expected = weight_scale(values, bits)
    # Neighbouring candidates can tie within the width of a bin.
    assert ((found - expected).abs() <= 0.0101 * peak / (2 ** (bits - 1) - 1)).all()


def test_empty_histogram_keeps_the_whole_range() -> None:
    scale = symmetric_from_histogram(torch.zeros(2, BINS), torch.tensor([7.0, 0.0]), 4)
    assert scale[0] == 1.0
    assert scale[1] > 0


def test_asymmetric_search_keeps_zero_representable_and_beats_min_max() -> None:
    torch.manual_seed(0)
    values = torch.cat([torch.randn(20_000) - 4, torch.tensor([9.0])])
    low, high = values.min()[None], values.max()[None]
    index = ((values - low) / (high - low) * BINS).long().clamp(0, BINS - 1)
    histogram = torch.bincount(index, minlength=BINS).float()[None]

    def error(scale: torch.Tensor, zero: torch.Tensor) -> float:
        codes = ((values / scale).round() + zero).clamp(0, 15)
        return ((codes - zero) * scale - values).abs().pow(2.4).mean().item()

    searched = asymmetric_from_histogram(histogram, low, high, 4)
    assert error(*searched) < error(*asymmetric_parameters(low, high, 4))
    assert 0 <= searched[1].item() <= 15
    assert searched[1].item() == round(searched[1].item())


def test_rows_asymmetric_reach_both_ends() -> None:
    rows = torch.arange(1, 17).float().log().expand(4, -1) * torch.tensor([[1.0], [0.5], [2], [1]])
    codes, scale, zero = quantize_rows_asymmetric(rows, 4)
    rebuilt = (codes.float() + 8 - zero[:, None]) * scale[:, None]
    assert codes.min() == -8
    assert codes.max() == 7
    assert ((rebuilt - rows).abs() <= scale[:, None] * 0.51).all()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=20))
def test_round_to_half_is_lossless_in_half_or_leaves_alone(values: list[float]) -> None:
    before = torch.tensor(values)
    after = round_to_half(before)
    normal = (before >= 2.0**-14) & (before <= 65504)
    assert torch.equal(after[normal].half().float(), after[normal])
    assert torch.equal(after[~normal], before[~normal])
    assert ((after - before).abs() <= before * 2.0**-11).all()
