"""k-scaled steps: the search against brute force, clusters, powers of two (METHODS 8.2, T19)."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ouro_compiler.calibration.search import round_to_half
from ouro_compiler.calibration.similarity import (
    GAMMAS,
    Steps,
    clustered,
    largest_step,
    per_tensor_weight,
    quantized,
    search_linear,
    search_per_row,
    search_steps,
    to_powers_of_two,
)
from tests.helpers import REPEATABLE, assert_close, randn

SIZES = torch.tensor([1.0, 1.1, 0.9, 8.0, 9.0, 30.0, 1.05, 8.5])  # of channels, in three clusters


def channels(rows: int = 40, seed: int = 0) -> Tensor:
    return randn(seed, rows, 8) * SIZES


def started(x: Tensor, clusters: int, bits: int = 8) -> Steps:
    rows = x.abs()
    return clustered(rows.mean(0), rows.amax(0), clusters, bits)


def cosines(made: np.ndarray, wanted: np.ndarray) -> float:
    """Mean over rows, in fp64."""
    dot = (made * wanted).sum(-1)
    norm = np.sqrt(np.square(made).sum(-1) * np.square(wanted).sum(-1))
    return float((dot / np.maximum(norm, 1e-30)).mean())


def rounded(x: np.ndarray, step: np.ndarray, bits: int) -> np.ndarray:
    half = 2 ** (bits - 1)
    return np.clip(np.rint(x / step), -half, half - 1) * step


def test_codes_reach_from_minus_128_to_127() -> None:
    x = torch.tensor([-1000.0, -128.0, -0.4, 126.6, 1000.0])
    assert quantized(x, torch.ones(1), 8).tolist() == [-128, -128, 0, 127, 127]
    weight = per_tensor_weight(torch.tensor([[-1000.0, 3.4], [1000.0, -3.6]]), torch.ones(()), 4)
    assert weight.codes.tolist() == [[-8, 3], [7, -4]]
    assert largest_step(torch.tensor(255.0), 8) == 2.0  # 127.5 steps


def test_clusters_find_channels_of_a_size() -> None:
    found = started(channels(400), 3)
    assert found.ids.tolist() == [0, 0, 0, 1, 1, 2, 0, 1]
    assert found.scale.shape == (8,)
    assert bool((found.steps.diff() > 0).all())


@pytest.mark.parametrize("bits", [4, 8])
def test_one_cluster_is_per_tensor(bits: int) -> None:
    """T19, the step by trying all of them in numpy."""
    x = channels()
    found = search_steps(x, x, started(x, 1, bits), bits)
    values = x.numpy().astype(np.float64)
    steps = [float(round_to_half(largest_step(x.abs().max(), bits) * g)) for g in GAMMAS]
    best = max(cosines(rounded(values, np.array(s), bits), values) for s in steps)
    made = rounded(values, found.scale.numpy().astype(np.float64), bits)
    assert found.steps.shape == (1,)
    assert cosines(made, values) == pytest.approx(best, abs=1e-9)


def test_clusters_are_searched_one_at_a_time() -> None:
    """Sums of the other clusters are reused: the same as cosines of whole rows."""
    x, start = channels(), started(channels(), 3, 4)
    found = search_steps(x, x, start, 4)
    steps = start.steps.double().numpy().copy()
    values, ids = x.numpy().astype(np.float64), start.ids.numpy()
    for cluster in range(3):
        scores = []
        for gamma in GAMMAS:
            tried = steps.copy()
            tried[cluster] = float(round_to_half(start.steps[cluster] * gamma))
            scores.append((cosines(rounded(values, tried[ids], 4), values), tried[cluster]))
        best = max(score for score, _ in scores)
        steps[cluster] = float(found.steps[cluster])  # equally good ones differ in the last bits
        assert cosines(rounded(values, steps[ids], 4), values) == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_cluster_a_channel_is_no_worse_than_per_tensor(bits: int) -> None:
    """T19, before any search."""
    x = channels(200)
    errors = [
        float((quantized(x, started(x, k, bits).scale, bits) - x).square().mean()) for k in (8, 1)
    ]
    assert errors[0] < 0.5 * errors[1]


def test_more_clusters_are_more_similar() -> None:
    x = channels(200)
    scores = []
    for count in (1, 2, 3):
        scale = search_steps(x, x, started(x, count, 4), 4).scale
        scores.append(F.cosine_similarity(quantized(x, scale, 4), x, dim=-1).mean())
    assert scores[0] < scores[1] < scores[2]


@REPEATABLE
@given(st.lists(st.floats(1e-4, 1e3), min_size=1, max_size=6))
def test_ratios_are_powers_of_two(numbers: list[float]) -> None:
    """T19: exact ones, at most half an octave from where they were."""
    steps = round_to_half(torch.tensor(numbers))
    found = to_powers_of_two(steps)
    ratio = torch.log2(found.double() / steps[0].double())
    assert torch.equal(ratio, ratio.round())
    assert bool(((found.double() / steps).log2().abs() <= 0.5 + 1e-6).all())
    assert found[0] == steps[0]


def test_steps_of_tokens() -> None:
    """Tokens of two sizes: one step each, found apart from each other."""
    x = randn(5, 3, 10, 16) * torch.where(torch.arange(10) < 5, 1.0, 20.0)[:, None]
    magnitude = x.abs().transpose(1, 2).flatten(0, 1)
    start = clustered(magnitude.mean(0), magnitude.amax(0), 2, 8, tokens=True)
    assert start.ids.tolist() == [0] * 5 + [1] * 5
    found = search_steps(x, x, start, 8, power_of_two=False)
    assert found.scale.shape == (10, 1)
    small = search_steps(x[:, :5], x[:, :5], dataclasses.replace(start, ids=start.ids[:5]), 8)
    assert small.steps[0] == found.steps[0]


def test_a_step_for_each_row() -> None:
    x = randn(6, 4, 5, 300) * torch.tensor([1.0, 2, 4, 8, 16])[:, None]
    found = search_per_row(x, x.abs().amax((0, 2)), 4)
    for row in range(5):
        one = search_per_row(x[:, row : row + 1], x[:, row].abs().amax().view(1), 4)
        assert torch.equal(one, found[row : row + 1])
    assert bool((found < largest_step(x.abs().amax((0, 2)), 4)).all())  # clipping pays


def linear() -> tuple[Tensor, Tensor, Tensor]:
    weight = randn(8, 12, 16)
    weight[0, 0] = 9.0  # clipping it helps all others
    return randn(7, 4, 20, 16), weight, randn(9, 12)


def searched(rounds: int, bits: int = 4) -> tuple[float, float, Tensor]:
    """(cosine, mean shift of the outputs, corrected bias)."""
    x, weight, bias = linear()
    wanted = F.linear(x, weight, bias)
    start = started(wanted.flatten(0, 1), 1, bits)
    found = search_linear(x, weight, bias, start, bits=bits, weight_bits=bits, rounds=rounds)
    codes, scale = found.weight.codes, found.weight.scale
    assert codes.dtype == torch.int8
    assert len(scale.unique()) == 1
    made = F.linear(x, codes * scale[:, None], bias)
    output = quantized(made, found.output.scale, bits)
    similarity = float(F.cosine_similarity(output, wanted, dim=-1).mean())
    assert found.weight.bias is not None
    shift = (output - wanted).flatten(0, 1).mean(0)
    assert_close(found.weight.bias, bias - shift, 1e-6)
    return similarity, float(shift.abs().mean()), found.weight.bias


def test_the_search_of_a_linear_helps() -> None:
    without, _, _ = searched(0)
    one, _, _ = searched(1)
    three, _, _ = searched(3)
    assert without < one <= three + 1e-6


def test_the_bias_is_corrected() -> None:
    """What is added to the bias undoes the mean shift of the product's rounding."""
    x, weight, bias = linear()
    found = search_linear(
        x,
        weight,
        bias,
        started(F.linear(x, weight, bias).flatten(0, 1), 1),
        bits=8,
        weight_bits=4,
        rounds=2,
    )
    product = found.weight.codes * found.weight.scale[:, None]
    assert found.weight.bias is not None

    def shift(bias: Tensor) -> Tensor:
        made = quantized(F.linear(x, product, bias), found.output.scale, 8)
        return (made - F.linear(x, weight, linear()[2])).flatten(0, 1).mean(0)

    assert shift(found.weight.bias).abs().max() < 0.1 * shift(bias).abs().max()
    plain = search_linear(
        x, weight, None, started(F.linear(x, weight).flatten(0, 1), 1), bits=8, weight_bits=4,
        rounds=1,
    )  # fmt: skip
    assert plain.weight.bias is None
