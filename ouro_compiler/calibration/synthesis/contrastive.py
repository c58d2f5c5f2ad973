"""The patch-level contrastive loss L^C (METHODS 5.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ouro_compiler.calibration.synthesis.positions import Grid


def candidates(present: Tensor, grid: Grid, patch: int) -> Tensor:
    """(B, P, patch^2 - 1) bool: which neighbours of each patch exist."""
    around = _shifted(present.unflatten(1, (grid.height, grid.width))[..., None], patch)
    there = torch.stack([one[..., 0].flatten(1) for one in around], -1)
    return there & present[..., None]


def similarities(features: Tensor, grid: Grid, patch: int) -> Tensor:
    """(B, P, F) -> (B, P, patch^2 - 1): cosines of each patch with those around it."""
    unit = F.normalize(features, dim=-1).unflatten(1, (grid.height, grid.width))
    around = _shifted(unit, patch)
    return torch.stack([(unit * one).sum(-1).flatten(1) for one in around], -1)


def _shifted(maps: Tensor, patch: int) -> list[Tensor]:
    """Maps (B, H, W, F) as seen from each cell: the neighbours in one direction, 0 outside."""
    reach, (height, width) = patch // 2, maps.shape[1:3]
    padded = F.pad(maps, (0, 0, reach, reach, reach, reach))
    return [
        padded[:, y : y + height, x : x + width]
        for y in range(patch)
        for x in range(patch)
        if (y, x) != (reach, reach)
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
