"""Implicit and patched attention against their definitions in loops (METHODS T24, T25)."""

from __future__ import annotations

import pytest
import torch

from ouro_compiler.calibration.synthesis.attention import (
    attention_rows,
    averaging,
    explicit_attention_rows,
    implicit_attention,
    neighbour_weights,
    patch_weights,
    patched_attention,
    patched_outputs,
)
from ouro_compiler.calibration.synthesis.positions import Grid
from tests.helpers import generator
from tests.synthesis.scans import (
    attention_by_products,
    patched_states,
    per_channel,
    random_scan,
    raster,
    states_by_steps,
)

SCANS = [
    pytest.param({"reverse": False}, id="forward"),
    pytest.param({"reverse": True}, id="reverse"),
    pytest.param({"groups": 2, "reverse": True}, id="groups"),
    pytest.param({"states": 1}, id="one_state"),
]


@pytest.mark.parametrize("kind", SCANS)
def test_closed_form_is_the_product_of_decays(kind: dict[str, int]) -> None:
    scan = random_scan(16, **kind)
    torch.testing.assert_close(implicit_attention(scan), attention_by_products(scan))


@pytest.mark.parametrize("kind", SCANS)
def test_attention_gives_the_outputs_of_the_scan(kind: dict[str, int]) -> None:
    scan = random_scan(12, **kind)
    y = torch.einsum("betj,bej->bet", implicit_attention(scan), scan.u)
    expected = torch.ops.ouro.selective_scan(
        scan.u, scan.step, scan.A, scan.B, scan.C, reverse=scan.reverse
    )
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("kind", SCANS)
@pytest.mark.parametrize("patch", [3, 5])
def test_patched_outputs_read_averaged_states(kind: dict[str, int], patch: int) -> None:
    grid = raster(3, 5, class_token=7)
    scan = random_scan(16, **kind)
    h_p = patched_states(scan, grid, patch, scan.step.mean(1))
    C = per_channel(scan.C, 6)[..., grid.steps[0]]
    expected = torch.einsum("bpen,benp->bpe", h_p, C)
    torch.testing.assert_close(patched_outputs(scan, grid, patch, "normalised"), expected)
    alpha_p = patched_attention(scan, grid, patch, "normalised")
    torch.testing.assert_close(torch.einsum("bepj,bej->bpe", alpha_p, scan.u), expected)


def test_uniform_weights_average_plainly() -> None:
    grid, scan = raster(3, 4), random_scan(12)
    h_p = patched_states(scan, grid, 3, torch.ones(2, 12, dtype=torch.float64))
    expected = torch.einsum("bpen,benp->bpe", h_p, per_channel(scan.C, 6))
    torch.testing.assert_close(patched_outputs(scan, grid, 3, "uniform"), expected)


def test_raw_weights_are_delta_itself() -> None:
    grid, scan = raster(3, 4), random_scan(12)
    w = patch_weights(scan.step, "raw")
    rows = neighbour_weights(w, grid.around(3), "raw")
    assert rows.shape == (2, 12, 9)
    torch.testing.assert_close(rows[:, 5].sum(-1), w[:, [0, 1, 2, 4, 5, 6, 8, 9, 10]].sum(-1))


def test_a_neighbourhood_of_one_patch_changes_nothing() -> None:
    grid, scan = raster(3, 4), random_scan(12)
    torch.testing.assert_close(
        patched_attention(scan, grid, 1, "normalised"), implicit_attention(scan)
    )
    expected = torch.einsum(
        "blen,benl->ble", states_by_steps(scan), per_channel(scan.C, scan.u.shape[1])
    )
    torch.testing.assert_close(patched_outputs(scan, grid, 1, "normalised"), expected)


def test_rows_are_means_of_magnitudes_over_channels_of_patches_only() -> None:
    grid, scan = raster(3, 5, class_token=7), random_scan(16, channels=5)
    alpha_p = patched_attention(scan, grid, 3, "normalised")
    expected = alpha_p.abs().mean(1)[..., grid.steps[0]]
    torch.testing.assert_close(attention_rows(scan, grid, 3, "normalised"), expected)


def test_no_gradient_flows_through_the_weights() -> None:
    grid, scan = raster(3, 4), random_scan(12)
    step = scan.step.clone().requires_grad_()
    assert not averaging(patch_weights(step, "normalised"), grid, 3, "normalised").requires_grad


def test_explicit_attention_averages_probabilities_of_heads_and_neighbours() -> None:
    g = generator(0)
    query, key = (torch.randn(2, 3, 13, 4, generator=g) for _ in range(2))
    grid = raster(3, 4, class_token=0)
    rows = explicit_attention_rows(query, key, 0.5, grid, 3)
    probabilities = (0.5 * query @ key.transpose(2, 3)).softmax(-1).mean(1)
    corner = probabilities[:, [1, 2, 5, 6]].mean(1)[:, 1:]
    assert rows.shape == (2, 12, 12)
    torch.testing.assert_close(rows[:, 0], corner)


def test_windows_and_missing_tokens_take_no_part() -> None:
    steps = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 1, -1, 3, 4, -1, 6, 7, -1]])
    grid, scan = Grid(3, 3, steps), random_scan(9, batch=4)
    y = patched_outputs(scan, grid, 3, "normalised")
    assert y.shape == (4, 9, 6)
    assert bool((y[1::2, [2, 5, 8]] == 0).all())
    # The second window's tokens are a map of 3 x 2 with a token between the rows.
    narrow = Grid(3, 2, torch.tensor([[0, 1, 3, 4, 6, 7]]))
    expected = patched_outputs(scan, narrow, 3, "normalised")[1::2]
    torch.testing.assert_close(y[1::2, [0, 1, 3, 4, 6, 7]], expected)
