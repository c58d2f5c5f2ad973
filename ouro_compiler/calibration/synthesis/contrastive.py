"""The patch-level contrastive loss L^C (METHODS 5.2)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ouro_compiler.calibration.synthesis.positions import Grid


def candidates(present: Tensor, grid: Grid, patch: int) -> Tensor:
    """(B, P, patch^2 - 1) bool: which neighbours of each patch exist."""
    padded = _padded(present.unflatten(1, (grid.height, grid.width))[..., None], patch)
    around = [padded[window][..., 0].flatten(1) for window in _windows(grid, patch)]
    return torch.stack(around, -1) & present[..., None]


def similarities(features: Tensor, grid: Grid, patch: int) -> Tensor:
    """(B, P, F) -> (B, P, patch^2 - 1): cosines of each patch with those around it."""
    unit = F.normalize(features, dim=-1).unflatten(1, (grid.height, grid.width))
    found: Tensor = _ProductsAround.apply(unit, grid, patch)
    return found.flatten(1, 2)


class _ProductsAround(torch.autograd.Function):
    """(B, H, W, F) -> (B, H, W, K): products with the neighbours in each direction.

    By itself autograd would fill a map of zeros for every direction.
    """

    @staticmethod
    def forward(ctx: Any, unit: Tensor, grid: Grid, patch: int) -> Tensor:
        ctx.save_for_backward(unit)
        ctx.windows, ctx.patch = _windows(grid, patch), patch
        padded = _padded(unit, patch)
        return torch.stack([(unit * padded[window]).sum(-1) for window in ctx.windows], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (unit,) = ctx.saved_tensors
        padded, reach = _padded(unit, ctx.patch), ctx.patch // 2
        total = torch.zeros_like(padded)
        inside = total[:, reach : reach + unit.shape[1], reach : reach + unit.shape[2]]
        for window, part in zip(ctx.windows, grad.unbind(-1), strict=True):
            total[window].addcmul_(part[..., None], unit)
            inside.addcmul_(part[..., None], padded[window])
        return inside, None, None


def _padded(maps: Tensor, patch: int) -> Tensor:
    """Maps (B, H, W, F) with the zeros around them that neighbourhoods reach into."""
    reach = patch // 2
    return F.pad(maps, (0, 0, reach, reach, reach, reach))


def _windows(grid: Grid, patch: int) -> list[tuple[slice, slice, slice]]:
    """Where the neighbours in each direction lie in padded maps."""
    return [
        (slice(None), slice(y, y + grid.height), slice(x, x + grid.width))
        for y in range(patch)
        for x in range(patch)
        if (y, x) != (patch // 2, patch // 2)
    ]


def contrastive_loss(
    features: Tensor, grid: Grid, *, patch: int, positives: int, temperature: float
) -> Tensor:
    """L^C of each image: features (B * windows, P, F) -> (B,).

    Of the patches around an anchor the most similar ones (`positives` of them, at most half) are
    its positives, the others negatives; gradients flow through similarities, not the choice.
    """
    images = features.shape[0] // grid.windows
    there = candidates(grid.present(images).to(features.device), grid, patch)
    similar = similarities(features, grid, patch) / temperature
    wanted = (there.sum(-1) // 2).clamp(max=positives)
    ranked = similar.detach().masked_fill(~there, float("-inf")).argsort(-1, descending=True)
    rank = ranked.argsort(-1)
    positive = rank < wanted[..., None]
    negative = there & ~positive
    against = similar.masked_fill(~negative, -1e4).logsumexp(-1, keepdim=True)
    # -log(e^s / (e^s + sum of negatives))
    each = F.softplus(against - similar) * positive
    anchors = wanted > 0
    loss = (each.sum(-1) / wanted.clamp(min=1)) * anchors
    loss = loss.view(images, -1).sum(1)
    return loss / anchors.view(images, -1).sum(1).clamp(min=1)
