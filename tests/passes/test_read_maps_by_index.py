"""read_maps_by_index: a column-major order of a map is read through strides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ouro_compiler.graph import value_of
from ouro_compiler.passes.read_maps_by_index import read_maps_by_index
from tests.helpers import randn
from tests.passes.graphs import Written, assert_leaves_alone, assert_pass, aten, calls, ouro

CHANNELS, HEIGHT, WIDTH = 6, 3, 5
LENGTH = HEIGHT * WIDTH
X = randn(0, 2, CHANNELS, HEIGHT, WIDTH).contiguous(memory_format=torch.channels_last) * 3
QUANTIZE, SCAN = ouro.quantize_dynamic_outlier.default, ouro.selective_scan.default


def module(forward: Callable[[Any, Tensor], Any]) -> Written:
    return Written(
        forward,
        scale=torch.linspace(0.2, 0.3, LENGTH),
        threshold=torch.linspace(2.0, 3.0, LENGTH),
        A=-randn(1, CHANNELS, 2).abs(),
        B=randn(2, 1, 2, LENGTH),
    )


def quantize(m: Any, x: Tensor, reverse: bool = False) -> Any:
    return ouro.quantize_dynamic_outlier(x, m.scale, None, m.threshold, 4, 8, 4, reverse)


def scan(m: Any, u: Tensor, like: Tensor, reverse: bool = False) -> Tensor:
    """u (B, D, L) behind the map; delta, B and C are of the raster, which nothing copies."""
    delta = like.flatten(2).abs()
    B = m.B.expand(like.shape[0], -1, -1)
    return ouro.selective_scan(u, delta, m.A, B, B, None, None, None, False, reverse)


def both_orders(m: Any, x: Tensor) -> Any:
    """A VMamba block's readers: four quantizers and four scans."""
    columns = x.transpose(2, 3).flatten(2)
    tokens = x.permute(0, 3, 2, 1).reshape(-1, LENGTH, CHANNELS)
    rows = x.flatten(2)
    found = [quantize(m, one, back)[0] for one in (rows.mT, tokens) for back in (False, True)]
    return *found, *(scan(m, one, x, back) for one in (rows, columns) for back in (False, True))


def test_both_orders_of_a_block() -> None:
    gm = assert_pass(
        read_maps_by_index, module(both_orders), X, before={QUANTIZE: 4, SCAN: 4}, after={}
    )
    for target in (QUANTIZE, SCAN):
        ranks = [value_of(node.args[0]).dim() for node in calls(gm, target)]
        assert ranks == [3, 3, 4, 4]  # the raster is a view already
    for node in calls(gm, aten.flatten.using_ints):
        assert value_of(node).stride() == value_of(node.args[0]).flatten(2).stride()
    shapes = [tuple(value_of(node.args[0]).shape[1:]) for node in calls(gm, SCAN)[2:]]
    assert shapes == [(CHANNELS, WIDTH, HEIGHT)] * 2


def test_a_copy_of_the_raster() -> None:
    """Where channels lie outside, tokens in raster order are a copy of theirs too."""

    def forward(m: Any, x: Tensor) -> Any:
        pixels = (x + 1).contiguous().permute(0, 2, 3, 1).contiguous()
        return quantize(m, pixels.transpose(1, 2).flatten(1, 2))

    gm = assert_pass(read_maps_by_index, module(forward), X, before={}, after={})
    (node,) = calls(gm, QUANTIZE)
    assert value_of(node.args[0]).shape[1:] == (WIDTH, HEIGHT, CHANNELS)


def test_the_map_of_tokens() -> None:
    """The source may be tokens (B, L, K): their axis is split, which copies nothing."""

    def forward(m: Any, x: Tensor) -> Any:
        tokens = x.flatten(2).mT + 1
        return quantize(m, tokens.unflatten(1, (HEIGHT, WIDTH)).transpose(1, 2).flatten(1, 2))

    gm = assert_pass(read_maps_by_index, module(forward), X, before={}, after={})
    (node,) = calls(gm, QUANTIZE)
    assert value_of(node.args[0]).shape[1:] == (WIDTH, HEIGHT, CHANNELS)


# --- leaves alone


def raster(m: Any, x: Tensor) -> Any:
    return *quantize(m, x.flatten(2).mT), scan(m, x.flatten(2), x)


def read_elsewhere(m: Any, x: Tensor) -> Any:
    columns = x.transpose(2, 3).flatten(2)
    return *quantize(m, columns.mT), columns * 2


def returned(m: Any, x: Tensor) -> Any:
    columns = x.transpose(2, 3).flatten(2)
    return *quantize(m, columns.mT), columns


def read_as_another_operand(m: Any, x: Tensor) -> Any:
    columns = x.transpose(2, 3).flatten(2)
    return ouro.selective_scan(columns, columns, m.A, *([m.B.expand(x.shape[0], -1, -1)] * 2))


def outliers_in_floating_point(m: Any, x: Tensor) -> Any:
    """The dequantizer, like a product, reads the listed channels of x."""
    tokens = x.transpose(2, 3).flatten(2).mT
    static = (4, 16, 4, False)
    codes, scale, start = ouro.quantize_dynamic_outlier(tokens, m.scale, None, m.threshold, *static)
    return ouro.dequantize_dynamic_outlier(codes, m.scale, None, scale, start, tokens, *static)


def windows(m: Any, x: Tensor) -> Any:
    """Time is two axes, but the batch is merged with a third, as where attention has windows."""
    parts = torch.cat([x, x * 2], dim=3).unflatten(3, (2, WIDTH)).permute(0, 3, 2, 4, 1)
    return quantize(m, parts.reshape(-1, LENGTH, CHANNELS))


def written_in_place(m: Any, x: Tensor) -> Any:
    y = x + 1
    columns = y.transpose(2, 3).flatten(2)
    y.mul_(2)
    return quantize(m, columns.mT)


@pytest.mark.parametrize(
    "forward",
    [
        raster,
        read_elsewhere,
        returned,
        read_as_another_operand,
        outliers_in_floating_point,
        windows,
        written_in_place,
    ],
)
def test_leaves_alone(forward: Callable[[Any, Tensor], Any]) -> None:
    assert_leaves_alone(read_maps_by_index, module(forward), X)


def test_scans_read_maps_where_the_quantizers_copy_stays() -> None:
    """One order copied twice: the copy that the dequantizer needs stays, the scans' goes."""

    def forward(m: Any, x: Tensor) -> Any:
        kept = outliers_in_floating_point(m, x)
        return kept, scan(m, x.transpose(2, 3).flatten(2), x)

    gm = assert_pass(read_maps_by_index, module(forward), X, before={SCAN: 1}, after={})
    assert [value_of(node.args[0]).dim() for node in calls(gm, SCAN)] == [4]
    assert [value_of(node.args[0]).dim() for node in calls(gm, QUANTIZE)] == [3]
