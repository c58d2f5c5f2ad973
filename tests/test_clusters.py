"""Contiguous groups, and exact k-means against every partition there is."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ouro_compiler.calibration.clusters import contiguous_groups, group_peaks, kmeans
from tests.helpers import REPEATABLE, randn


def spread(values: Tensor, ids: Tensor) -> float:
    """Sum of squared distances to the clusters' means."""
    parts = [values[ids == cluster] for cluster in ids.unique()]
    return sum(float((part - part.mean()).square().sum()) for part in parts)


def least_spread(values: Tensor, count: int) -> float:
    """Over every way to give each value one of `count` labels."""
    labels = itertools.product(range(count), repeat=len(values))
    return min(spread(values, torch.tensor(one)) for one in labels)


@settings(REPEATABLE, max_examples=25)
@given(
    st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=1, max_size=5),
    st.integers(1, 3),
)
def test_kmeans_is_the_best_partition(numbers: list[float], count: int) -> None:
    values = torch.tensor(numbers, dtype=torch.float64)
    ids = kmeans(values, count)
    assert spread(values, ids) <= least_spread(values, count) + 1e-9


@REPEATABLE
@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40), st.integers(1, 8))
def test_clusters_are_intervals_from_small_to_large(numbers: list[float], count: int) -> None:
    values = torch.tensor(numbers)
    ids = kmeans(values, count)
    assert ids.unique().tolist() == list(range(min(count, len(values.unique()))))
    ordered = ids[values.argsort()]
    assert bool((ordered.diff() >= 0).all())
    for value in values.unique():
        assert len(ids[values == value].unique()) == 1


def test_far_groups_of_large_numbers_are_found() -> None:
    """Sums of squares of numbers around 1e6 would lose a spread of 1e-2."""
    centres = torch.tensor([1e6, 1e6 + 1, 1e6 + 2], dtype=torch.float64)
    values = (centres[:, None] + 0.01 * randn(0, 3, 20).double()).flatten()
    assert torch.equal(kmeans(values, 3), torch.arange(3).repeat_interleave(20))


def test_contiguous_groups_of_vim() -> None:
    sizes = contiguous_groups(197, 8).bincount().tolist()
    assert sizes == [25, 25, 25, 25, 25, 24, 24, 24]
    assert contiguous_groups(3, 8).tolist() == [0, 1, 2]


@pytest.mark.parametrize("grouping", ["contiguous", "kmeans"])
@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_group_scales_bound_their_steps(grouping: str, count: int) -> None:
    """T16: no group's largest value exceeds the global one, and all values are covered."""
    peak = randn(1, 16).abs()
    ids = contiguous_groups(16, count) if grouping == "contiguous" else kmeans(peak.log(), count)
    found = group_peaks(peak, ids)
    assert bool((found <= peak.max()).all())
    assert bool((found[ids] >= peak).all())
    if count == 1:
        assert found.tolist() == [peak.max()]
    if count == 16:
        assert torch.equal(found[ids], peak)  # T16: G = L is a scale a step


@REPEATABLE
@given(st.integers(0, 2**16), st.integers(2, 12))
def test_refining_groups_never_raises_a_scale(seed: int, length: int) -> None:
    """T16, with groups split in two at random."""
    peak = randn(seed, length).abs()
    coarse = contiguous_groups(length, 2)
    split = (randn(seed + 1, length) > 0).long()
    fine = (2 * coarse + split).unique(return_inverse=True)[1]
    assert bool((group_peaks(peak, fine)[fine] <= group_peaks(peak, coarse)[coarse]).all())
