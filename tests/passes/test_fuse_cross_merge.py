"""fuse_cross_merge: fires on the merge of four or fewer orders, leaves near misses alone, equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ouro_compiler.graph import all_arguments, argument
from ouro_compiler.passes.fuse_cross_merge import fuse_cross_merge
from tests.helpers import randn
from tests.passes.graphs import Written, assert_leaves_alone, assert_pass, aten, calls, ouro

CHANNELS, HEIGHT, WIDTH = 6, 3, 5
LENGTH = HEIGHT * WIDTH
X = randn(0, 2, LENGTH, CHANNELS) * 3
NORM, FUSED = ouro.add_norm_quantize.default, ouro.cross_merge_norm_quantize.default
FIRES = {NORM: 0, FUSED: 1, aten.add.Tensor: 0}


def module(forward: Callable[[Any, Tensor], Any]) -> Written:
    return Written(
        forward,
        scale=torch.linspace(0.2, 0.3, LENGTH),
        threshold=torch.linspace(1.6, 2.4, LENGTH),
        weight=randn(1, CHANNELS),
        bias=randn(2, CHANNELS),
        A=-randn(3, CHANNELS, 1).abs(),
    )


def orders(m: Any, x: Tensor) -> list[Tensor]:
    """Four scans (B, K, L), token-major: what a block merges."""
    u = x.transpose(1, 2)
    B = u[:, :1]
    options = (None, None, None, True)
    return [ouro.selective_scan(u * (k + 1), u, m.A, B, B, *options, k >= 2) for k in range(4)]


def raster(columns: Tensor) -> Tensor:
    return columns.unflatten(2, (WIDTH, HEIGHT)).transpose(2, 3).flatten(2)


def norm(m: Any, x: Tensor, residual: Tensor | None = None, emit: bool = False) -> Any:
    """x (B, K, L)."""
    return ouro.add_norm_quantize(
        *(x.transpose(1, 2), residual, m.weight, m.bias, 1e-5, False, True),
        *(m.scale, m.threshold, 4, 8, 4, False, emit),
    )


def models_form(m: Any, x: Tensor) -> Any:
    y = orders(m, x)
    return norm(m, y[0] + y[2] + raster(y[1] + y[3]))[:3]


def public_form(m: Any, x: Tensor) -> Any:
    """Sums the other way round, columns transposed one by one, tokens before the sum."""
    y = orders(m, x)
    across = y[3].reshape(-1, CHANNELS, WIDTH, HEIGHT).transpose(2, 3).contiguous()
    columns = across.view(-1, CHANNELS, LENGTH) + raster(y[1])
    return norm(m, (columns.mT + (y[2] + y[0]).mT).mT)[:3]


def emitting(m: Any, x: Tensor) -> Any:
    y = orders(m, x)
    codes, scale, start, values, _ = norm(m, y[0] + raster(y[1] + y[3]), emit=True)
    return codes, scale, start, values * 2


def one_each(m: Any, x: Tensor) -> Any:
    y = orders(m, x)
    return norm(m, raster(y[1]) + y[0])[:3]


@pytest.mark.parametrize(
    ("forward", "back"),
    [
        (models_form, (True, True)),
        (public_form, (True, True)),
        (emitting, (False, True)),
        (one_each, (False, False)),
    ],
)
def test_fires(forward: Callable[[Any, Tensor], Any], back: tuple[bool, bool]) -> None:
    gm = assert_pass(fuse_cross_merge, module(forward), X, before={NORM: 1}, after=FIRES)
    (fused,) = calls(gm, FUSED)
    operands = all_arguments(fused)[:4]
    scans = calls(gm, ouro.selective_scan.default)
    assert {one for one in operands if one is not None} <= set(scans)
    assert tuple(one is not None for one in operands[1::2]) == back
    assert [argument(fused, name) for name in ("height", "width")] == [HEIGHT, WIDTH]
    assert argument(fused, "emit") is (forward is emitting)


def test_an_inner_sum_that_something_else_reads_is_one_order() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = orders(m, x)
        both = y[1] + y[3]
        return norm(m, y[0] + raster(both))[0], both

    gm = assert_pass(
        fuse_cross_merge,
        module(forward),
        X,
        before={NORM: 1, aten.add.Tensor: 2},
        after={**FIRES, aten.add.Tensor: 1},
    )
    (fused,) = calls(gm, FUSED)
    assert argument(fused, "columns") is calls(gm, aten.add.Tensor)[0]


# --- leaves alone


def residual(m: Any, x: Tensor) -> Any:
    y = orders(m, x)
    return norm(m, y[0] + raster(y[1]), x)[:3]


def total_read(m: Any, x: Tensor) -> Any:
    y = orders(m, x)
    codes, *_, total = norm(m, y[0] + raster(y[1]))
    return codes, total


def sum_read(m: Any, x: Tensor) -> Any:
    y = orders(m, x)
    merged = y[0] + raster(y[1])
    return norm(m, merged)[0], merged


def other_order_of_additions(m: Any, x: Tensor) -> Any:
    y = orders(m, x)
    return norm(m, (y[0] + y[2] + raster(y[1])) + raster(y[3]))[:3]


def mixed_sum(m: Any, x: Tensor) -> Any:
    y = orders(m, x)
    return norm(m, (y[0] + raster(y[1])) + (y[2] + raster(y[3])))[:3]


def rows_alone(m: Any, x: Tensor) -> Any:
    y = orders(m, x)
    return norm(m, y[0] + y[2])[:3]


def other_sides(m: Any, x: Tensor) -> Any:
    y = orders(m, x)
    turned = y[3].unflatten(2, (HEIGHT, WIDTH)).transpose(2, 3).flatten(2)
    return norm(m, y[0] + (raster(y[1]) + turned))[:3]


def weighted(m: Any, x: Tensor) -> Any:
    y = orders(m, x)
    return norm(m, torch.add(y[0], raster(y[1]), alpha=2))[:3]


def written_in_place(m: Any, x: Tensor) -> Any:
    y = orders(m, x)
    columns = y[1] + 0.5
    merged = y[0] + raster(columns)
    columns.mul_(2)
    return norm(m, merged)[:3]


@pytest.mark.parametrize(
    "forward",
    [
        residual,
        total_read,
        sum_read,
        other_order_of_additions,
        mixed_sum,
        rows_alone,
        other_sides,
        weighted,
        written_in_place,
    ],
)
def test_leaves_alone(forward: Callable[[Any, Tensor], Any]) -> None:
    assert_leaves_alone(fuse_cross_merge, module(forward), X)
