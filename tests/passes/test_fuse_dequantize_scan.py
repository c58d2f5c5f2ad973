"""fuse_dequantize_scan: fires, leaves near misses alone, equal bit for bit, ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ouro_compiler.config import W4A4, W8A8
from ouro_compiler.graph import argument
from ouro_compiler.passes.base import PassContext
from ouro_compiler.passes.fuse_dequantize_scan import fuse_dequantize_scan
from tests.helpers import randn
from tests.models import compiled_vim
from tests.passes.graphs import Written, assert_leaves_alone, assert_pass, calls, ouro

LENGTH, CHANNELS, STATES = 13, 8, 4
SCAN, DEQUANTIZE = ouro.selective_scan.default, ouro.dequantize_dynamic_outlier.default
FUSED = ouro.selective_scan_dynamic_outlier.default


def tokens() -> Tensor:
    x = randn(1, 3, LENGTH, CHANNELS + 4 * STATES)
    x[..., 2] *= 9
    return x


def round_trip(
    m: Any, x: Tensor, zero: bool = False, bits: int = 4, wide: int = 8, reverse: bool = False
) -> Tensor:
    static = (bits, wide, 5, reverse)
    point = m.zero if zero else None
    quantized = ouro.quantize_dynamic_outlier(x, m.scale, point, m.threshold, *static)
    codes, outlier_scale, start = quantized
    kept = x if wide == 16 else None
    return ouro.dequantize_dynamic_outlier(
        codes, m.scale, point, outlier_scale, start, kept, *static
    )


def operands(m: Any, x: Tensor, groups: int | None, **options: Any) -> tuple[Tensor, ...]:
    wide = STATES * (groups or 1)
    delta = round_trip(m, x[..., :CHANNELS] * 0.3, True, **options).transpose(1, 2)
    B, C = (
        round_trip(m, x[..., start : start + wide], **options).transpose(1, 2)
        for start in (CHANNELS, CHANNELS + 2 * STATES)
    )
    if groups is not None:
        B, C = (one.unflatten(1, (groups, STATES)) for one in (B, C))
    return delta, B, C


def scan(m: Any, x: Tensor, delta: Tensor, B: Tensor, C: Tensor, reverse: bool = False) -> Tensor:
    u = x[..., :CHANNELS].transpose(1, 2)
    return ouro.selective_scan(u, delta, m.A, B, C, m.D, u, None, True, reverse)


def module(forward: Any) -> Written:
    return Written(
        forward,
        scale=torch.full((LENGTH,), 0.25),
        threshold=torch.full((LENGTH,), 2.0),
        zero=torch.full((LENGTH,), 7.0),
        A=-randn(4, CHANNELS, STATES).abs(),
        D=randn(5, CHANNELS),
    )


@pytest.mark.parametrize(
    ("groups", "wide", "reverse"), [(None, 8, False), (1, 16, True), (2, 8, True)]
)
def test_fires(groups: int | None, wide: int, reverse: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        given = operands(m, x, groups, wide=wide, reverse=reverse)
        return scan(m, x, *given, reverse)

    gm = assert_pass(
        fuse_dequantize_scan,
        module(forward),
        tokens(),
        before={SCAN: 1, DEQUANTIZE: 3},
        after={SCAN: 0, DEQUANTIZE: 0, FUSED: 1},
    )
    (node,) = calls(gm, FUSED)
    assert argument(node, "delta_softplus") is True
    assert argument(node, "outlier_bits") == wide
    assert argument(node, "z") is not None


def test_two_scans_share_operands() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        delta, B, C = operands(m, x, 1)
        return scan(m, x, delta, B, C) + scan(m, x + 1, delta, C, B)

    before, after = {SCAN: 2, DEQUANTIZE: 3}, {SCAN: 0, DEQUANTIZE: 0, FUSED: 2}
    assert_pass(fuse_dequantize_scan, module(forward), tokens(), before=before, after=after)


def read_elsewhere(m: Any, x: Tensor) -> Any:
    delta, B, C = operands(m, x, None)
    return scan(m, x, delta, B, C), B * 2


def read_as_u_too(m: Any, x: Tensor) -> Any:
    delta, B, C = operands(m, x, None)
    return ouro.selective_scan(delta, delta, m.A, B, C, None, None, None, True, False)


def shared_with_a_scan_that_stays(m: Any, x: Tensor) -> Any:
    delta, B, C = operands(m, x, None)
    floating = x[..., -STATES:].transpose(1, 2)
    return scan(m, x, delta, B, C) + scan(m, x, delta, B, floating)


def other_direction(m: Any, x: Tensor) -> Any:
    return scan(m, x, *operands(m, x, None), True)


def other_bits(m: Any, x: Tensor) -> Any:
    delta, B, _ = operands(m, x, None)
    _, _, C = operands(m, x, None, bits=8)
    return scan(m, x, delta, B, C)


@pytest.mark.parametrize(
    "forward",
    [
        read_elsewhere,
        read_as_u_too,
        shared_with_a_scan_that_stays,
        other_direction,
        other_bits,
    ],
)
def test_leaves_alone(forward: Any) -> None:
    assert_leaves_alone(fuse_dequantize_scan, module(forward), tokens())


def test_compiled_models() -> None:
    """Every preset's scans read codes: outliers of 8 bits, and in floating point."""
    for config in (W4A4, W8A8):
        compiled = compiled_vim(config)
        gm = compiled.graph_module
        assert len(calls(gm, FUSED)) == 2
        assert not calls(gm, SCAN)
        assert not calls(gm, DEQUANTIZE)
        assert not fuse_dequantize_scan(gm, PassContext())
        rows = [row for row in compiled.report["layers"]["rows"] if row["kind"] == "scan"]
        assert {row["status"] for row in rows} == {"simulated"}
        assert all("floating-point scan" in row["reason"] for row in rows)
        assert {row["kernel"] for row in rows} == {
            "selective_scan_dynamic_outlier",
            "selective_scan_dynamic_outlier reverse",
        }
