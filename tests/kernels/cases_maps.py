"""Kernels that read maps by index, against their references on tokens in a row."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ouro_compiler.kernels.blocks import scan_blocks
from ouro_compiler.kernels.quantize import quantize_dynamic_outlier
from ouro_compiler.kernels.scan import selective_scan
from ouro_compiler.kernels.scan_dynamic_outlier import selective_scan_dynamic_outlier
from ouro_compiler.ops.quantize import quantize_dynamic_outlier_ref
from ouro_compiler.ops.scan_dynamic_outlier import selective_scan_dynamic_outlier_ref
from ouro_compiler.ops.selective_scan import selective_scan_ref
from tests.helpers import assert_close, assert_token_major, randn
from tests.kernels.inputs import assert_equal, on
from tests.maps import LAYOUTS, columns, in_order, map_in
from tests.scan_dynamic_outlier_inputs import dynamic_outlier_operands

pytestmark = pytest.mark.usefixtures("poisoned")
# (layout, (batch, channels, height, width)): channels last, first, between; single rows, columns.
CASES: list[tuple[tuple[int, ...], tuple[int, int, int, int]]] = [
    ((1, 2, 0), (2, 40, 3, 5)),
    ((0, 1, 2), (1, 33, 4, 2)),
    (LAYOUTS[3], (1, 16, 1, 7)),
    (LAYOUTS[4], (2, 24, 5, 1)),
]


@pytest.mark.parametrize("index", range(len(CASES)))
def test_quantize_maps(index: int, device: str) -> None:
    x = columns(map_in(*CASES[index])) * 2
    tokens = in_order(x).transpose(1, 2)
    scale = torch.linspace(0.2, 0.3, tokens.shape[1])
    zero = torch.full(scale.shape, 7, dtype=torch.uint8) if index % 2 else None
    args = (scale, zero, scale * 9, 4, 8, 4, index % 3 == 0)
    found = quantize_dynamic_outlier(x.to(device).movedim(1, -1), *on(device, *args))
    assert_equal(found, quantize_dynamic_outlier_ref(tokens, *args))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("index", range(len(CASES)))
def test_scan_of_maps(index: int, reverse: bool, device: str) -> None:
    u = columns(map_in(*CASES[index]))
    row = in_order(u)
    batch, channels, length = row.shape
    delta, z = (randn(seed, batch, channels, length) for seed in (1, 2))
    B, C = (randn(seed, batch, 2, length) for seed in (3, 4))
    vectors = (randn(5, channels), z, randn(6, channels), True, reverse)
    args = (delta.abs() * 0.3, -randn(7, channels, 2).abs(), B, C, *vectors)
    found = selective_scan(u.to(device), *on(device, *args))
    assert_token_major(found)
    assert_close(found.cpu(), selective_scan_ref(row, *args), 1e-5)


@pytest.mark.parametrize(
    ("reverse", "multiprocessors"), [(False, 1), (True, 132)], ids=["busy", "idle, reverse"]
)
def test_scan_of_maps_in_chunks(reverse: bool, multiprocessors: int, device: str) -> None:
    """A chunk starts in the middle of a column; the bits are those of the tokens in a row."""
    u = columns(map_in((1, 2, 0), (1, 8, 14, 20)))
    row = in_order(u)
    form = scan_blocks(8, 1, 280, 1, multiprocessors)
    assert form["CHUNK"] < 280
    assert form["CHUNK"] % 14
    assert form["SPLIT"] == (multiprocessors > 1)
    delta, (B, C) = randn(1, *row.shape).abs() * 0.3, (randn(seed, 1, 1, 280) for seed in (3, 4))
    args = (delta, -randn(7, 8, 1).abs(), B, C, randn(5, 8), None, None, True, reverse)
    given = on(device, *args)
    found = selective_scan(u.to(device), *given, form=form)
    assert torch.equal(found, selective_scan(row.to(device), *given, form=form))
    assert_close(found.cpu(), selective_scan_ref(row, *args), 1e-5)


def test_scan_on_codes_of_maps_in_chunks(device: str) -> None:
    operands = dynamic_outlier_operands((1, 8, 280), 1, period=10, reverse=True)
    u = columns(map_in((1, 2, 0), (1, 8, 14, 20)))
    form = scan_blocks(8, 1, 280, 1, 132)

    def moved(value: Any) -> Any:
        return on(device, *value) if isinstance(value, list) else on(device, value)[0]

    rows, maps = (
        selective_scan_dynamic_outlier(
            *(moved(value) for value in {**operands, "u": one}.values()), form=form
        )
        for one in (in_order(u), u)
    )
    assert torch.equal(rows, maps)


@pytest.mark.parametrize("reverse", [False, True])
def test_scan_on_codes_of_maps(reverse: bool, device: str) -> None:
    given = dynamic_outlier_operands((2, 24, 15), 1, period=4, reverse=reverse)
    u = columns(map_in((1, 2, 0), (2, 24, 5, 3)))
    expected = selective_scan_dynamic_outlier_ref(*{**given, "u": in_order(u)}.values())

    def moved(value: Any) -> Any:
        return on(device, *value) if isinstance(value, list) else on(device, value)[0]

    args = [moved(value) for value in {**given, "u": u}.values()]
    found = selective_scan_dynamic_outlier(*args)
    assert_close(found.cpu(), expected, 1e-5)
