"""The contrastive loss against a loop over anchors (METHODS 5.2, T26, T27)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ouro_compiler.calibration.synthesis.contrastive import (
    candidates,
    contrastive_loss,
    similarities,
)
from ouro_compiler.calibration.synthesis.positions import Grid
from tests.helpers import generator
from tests.synthesis.scans import raster


def loss_by_loops(features: Tensor, grid: Grid, patch: int, positives: int, T: float) -> float:
    """L^C of one image."""
    reach, terms = patch // 2, []
    for y in range(grid.height):
        for x in range(grid.width):
            anchor = features[y * grid.width + x]
            found = [
                float(torch.cosine_similarity(anchor, features[v * grid.width + w], dim=0))
                for v in range(max(0, y - reach), min(grid.height, y + reach + 1))
                for w in range(max(0, x - reach), min(grid.width, x + reach + 1))
                if (v, w) != (y, x)
            ]
            found.sort(reverse=True)
            count = min(positives, len(found) // 2)
            against = sum(math.exp(s / T) for s in found[count:])
            each = [-math.log(math.exp(s / T) / (math.exp(s / T) + against)) for s in found[:count]]
            terms.append(sum(each) / count)
    return sum(terms) / len(terms)


@pytest.mark.parametrize(("patch", "positives"), [(3, 4), (5, 12), (5, 3)])
def test_loss_is_its_definition(patch: int, positives: int) -> None:
    grid = raster(5, 6)
    features = torch.randn(3, 30, 8, generator=generator(1), dtype=torch.float64)
    found = contrastive_loss(features, grid, patch=patch, positives=positives, temperature=0.1)
    expected = [loss_by_loops(one, grid, patch, positives, 0.1) for one in features]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("patch", [3, 5])
def test_corners_have_fewer_candidates(patch: int) -> None:
    grid = raster(7, 7)
    there = candidates(grid.present(1), grid, patch)[0].sum(-1).unflatten(0, (7, 7))
    assert int(there[3, 3]) == patch**2 - 1
    assert int(there[0, 0]) == math.ceil(patch / 2) ** 2 - 1


def test_a_class_token_is_in_no_neighbourhood() -> None:
    grid = raster(7, 7, class_token=24)
    assert not bool((grid.around(5) == 24).any())
    assert sorted(set(grid.around(5).flatten().tolist())) == [-1, *range(24), *range(25, 50)]


def test_an_image_does_not_depend_on_its_batch() -> None:
    grid = raster(7, 7)
    features = torch.randn(8, 49, 16, generator=generator(2))
    options = {"patch": 5, "positives": 12, "temperature": 0.1}
    together = contrastive_loss(features, grid, **options)
    alone = torch.cat([contrastive_loss(one[None], grid, **options) for one in features])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)
    assert bool(torch.isfinite(alone).all())


def test_gradients_reach_the_features_and_zero_features_are_finite() -> None:
    grid = raster(3, 3)
    features = torch.randn(1, 9, 4, generator=generator(3))
    features[0, 4] = 0
    features.requires_grad_()
    contrastive_loss(features, grid, patch=3, positives=4, temperature=0.1).sum().backward()
    assert features.grad is not None
    assert bool(torch.isfinite(features.grad).all())
    assert float(features.grad.abs().max()) > 0


def test_gradients_of_similarities_are_right() -> None:
    grid = raster(3, 4)
    features = torch.randn(2, 12, 3, generator=generator(5), dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: similarities(x, grid, 3), features.requires_grad_(), atol=1e-7
    )


def test_windows_are_averaged_an_image() -> None:
    steps = torch.arange(9).repeat(2, 1)
    features = torch.randn(4, 9, 5, generator=generator(4))
    options = {"patch": 3, "positives": 4, "temperature": 0.1}
    found = contrastive_loss(features, Grid(3, 3, steps), **options)
    each = contrastive_loss(features, Grid(3, 3, steps[:1]), **options)
    torch.testing.assert_close(found, each.view(2, 2).mean(1))
