"""Maps of many memory layouts, and what they are in a row."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from tests.helpers import randn

LAYOUTS = tuple(itertools.permutations(range(3)))  # which of C, H and W lies outermost in memory


def map_in(layout: tuple[int, ...], shape: tuple[int, int, int, int], seed: int = 0) -> Tensor:
    """(B, C, H, W) of normal values in this layout, a part of a larger tensor in memory."""
    batch, *sizes = shape
    whole = randn(seed, batch, *(sizes[axis] + 1 for axis in layout))
    part = whole[:, 1:, : sizes[layout[1]], 1:]
    back = [1 + layout.index(axis) for axis in range(3)]
    found = part.permute(0, *back)
    assert found.shape == shape
    return found


def columns(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, W, H), as strides: its rows are the map's columns."""
    return x.transpose(2, 3)


def in_order(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, L), pixel after pixel: an oracle without views."""
    return torch.stack([row for line in x.unbind(2) for row in line.unbind(2)], dim=2)
