"""Random scans on grids, and the definitions of METHODS 5.2 written out in loops."""

from __future__ import annotations

import torch
from torch import Tensor

from ouro_compiler.calibration.synthesis.attention import ScanOperands
from ouro_compiler.calibration.synthesis.positions import Grid
from tests.helpers import generator


def raster(height: int, width: int, class_token: int | None = None) -> Grid:
    """The grid of a row-major sequence, with a class token at a step."""
    steps = torch.arange(height * width)
    if class_token is not None:
        steps = steps + (steps >= class_token)
    return Grid(height, width, steps[None])


def random_scan(
    length: int,
    *,
    batch: int = 2,
    channels: int = 6,
    states: int = 3,
    groups: int = 1,
    reverse: bool = False,
) -> ScanOperands:
    """A scan in double precision, the same for the same arguments."""
    g = generator(length + channels)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=g, dtype=torch.float64)

    return ScanOperands(
        u=rand(batch, channels, length) - 0.5,
        step=0.3 * rand(batch, channels, length) + 0.01,
        A=-2 * rand(channels, states) - 0.1,
        B=rand(batch, groups, states, length) - 0.5,
        C=rand(batch, groups, states, length) - 0.5,
        reverse=reverse,
    )


def per_channel(matrix: Tensor, channels: int) -> Tensor:
    """(B, G, N, L) -> (B, E, N, L)."""
    return matrix.repeat_interleave(channels // matrix.shape[1], dim=1)


def states_by_steps(scan: ScanOperands) -> Tensor:
    """h (B, L, E, N), one step of time after another."""
    batch, channels, length = scan.u.shape
    B = per_channel(scan.B, channels)
    h = scan.u.new_zeros(batch, channels, scan.A.shape[1])
    found = scan.u.new_zeros(batch, length, channels, scan.A.shape[1])
    for t in reversed(range(length)) if scan.reverse else range(length):
        step = scan.step[:, :, t, None]
        h = (step * scan.A).exp() * h + step * B[..., t] * scan.u[:, :, t, None]
        found[:, t] = h
    return found


def attention_by_products(scan: ScanOperands) -> Tensor:
    """alpha (B, E, L, L) as the product of the decays between two steps."""
    batch, channels, length = scan.u.shape
    B, C = per_channel(scan.B, channels), per_channel(scan.C, channels)
    order = list(reversed(range(length))) if scan.reverse else list(range(length))
    alpha = scan.u.new_zeros(batch, channels, length, length)
    for place, j in enumerate(order):
        response = scan.step[:, :, j, None] * B[..., j]
        for t in order[place:]:
            if t != j:
                response = response * (scan.step[:, :, t, None] * scan.A).exp()
            alpha[:, :, t, j] = (C[..., t] * response).sum(-1)
    return alpha


def patched_states(scan: ScanOperands, grid: Grid, patch: int, weights: Tensor) -> Tensor:
    """h_p (B, P, E, N), neighbour by neighbour; weights (B, L), made to sum to 1 around a patch."""
    h = states_by_steps(scan)
    reach = patch // 2
    rows = []
    for y in range(grid.height):
        for x in range(grid.width):
            around = [
                int(grid.steps[0, v * grid.width + w])
                for v in range(max(0, y - reach), min(grid.height, y + reach + 1))
                for w in range(max(0, x - reach), min(grid.width, x + reach + 1))
            ]
            w_k = weights[:, around]
            w_k = w_k / w_k.sum(1, keepdim=True)
            rows.append((h[:, around] * w_k[..., None, None]).sum(1))
    return torch.stack(rows, 1)
