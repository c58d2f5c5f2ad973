"""A selective scan is one ONNX Scan, or one LinearAttention, and computes the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ouro_compiler.errors import ModelError
from ouro_compiler.export.onnx import has_linear_attention
from ouro_compiler.ops.selective_scan import selective_scan_ref
from tests.export.graphs import onnx_of, operators, run
from tests.helpers import assert_close, randn

BATCH, CHANNELS, STATES, LENGTH = 3, 12, 4, 9


class Scan(nn.Module):
    """All of a scan's operands from one input (B, 3 D + 2 G N, L)."""

    def __init__(self, groups: int | None, extras: bool, reverse: bool) -> None:
        super().__init__()
        self.groups, self.extras, self.reverse = groups, extras, reverse
        self.register_buffer("A", -randn(1, CHANNELS, STATES).abs().half())
        self.register_buffer("D", randn(2, CHANNELS).half())
        self.register_buffer("bias", randn(3, CHANNELS))

    def operands(self, x: Tensor) -> tuple[Any, ...]:
        wide = STATES * (self.groups or 1)
        u, delta, z, B, C = x.split([CHANNELS] * 3 + [wide] * 2, dim=1)
        if self.groups is not None:
            B, C = (one.unflatten(1, (self.groups, STATES)) for one in (B, C))
        if not self.extras:
            return u, delta.abs() * 0.1, self.A, B, C, None, None, None, False, self.reverse
        return u, delta, self.A, B, C, self.D, z, self.bias, True, self.reverse

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.ouro.selective_scan(*self.operands(x))


def _input(scan: Scan) -> Tensor:
    return randn(0, BATCH, 3 * CHANNELS + 2 * STATES * (scan.groups or 1), LENGTH)


@pytest.mark.parametrize("groups", [None, 1, 3])
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("form", ["scan", "contrib"])
def test_scans(groups: int | None, extras: bool, reverse: bool, form: str) -> None:
    if form == "contrib" and not has_linear_attention():
        pytest.skip("this onnxruntime has no LinearAttention")
    module = Scan(groups, extras, reverse)
    x = _input(module)
    proto = onnx_of(module, x[:2], scan=form)
    for batch in (x, x[:1]):
        [found] = run(proto, batch)
        assert_close(torch.from_numpy(found), selective_scan_ref(*module.operands(batch)), 1e-5)
    kinds = operators(proto)
    assert kinds.count("Scan" if form == "scan" else "LinearAttention") == 1
    assert not {"Loop", "If"} & set(kinds)
    assert kinds.count("Exp") == (form == "scan")  # not one a step


class ColumnScan(Scan):
    """Scans u as a map of three columns, column after column."""

    def operands(self, x: Tensor) -> tuple[Any, ...]:
        u, *others = super().operands(x)
        return u.unflatten(2, (3, 3)).transpose(2, 3), *others


@pytest.mark.parametrize("form", ["scan", "contrib"])
def test_a_map_read_by_index(form: str) -> None:
    if form == "contrib" and not has_linear_attention():
        pytest.skip("this onnxruntime has no LinearAttention")
    module = ColumnScan(None, True, True)
    x = _input(module)
    [found] = run(onnx_of(module, x[:2], scan=form), x)
    u, *others = module.operands(x)
    row = torch.cat(u.unbind(2), dim=2)
    assert_close(torch.from_numpy(found), selective_scan_ref(row, *others), 1e-5)


class QuantizedScan(Scan):
    """The same on codes of delta, B and C, whose quantizers stand in front of it."""

    def __init__(self, groups: int, outlier_bits: int, reverse: bool) -> None:
        super().__init__(groups, True, reverse)
        self.static = (4, outlier_bits, 4, reverse)
        self.register_buffer("scale", torch.linspace(0.2, 0.3, LENGTH).half())
        self.register_buffer("zero", torch.arange(6, 6 + LENGTH).clamp(max=9).to(torch.uint8))
        self.register_buffer("threshold", torch.linspace(2.4, 2.8, LENGTH).half())

    def forward(self, x: Tensor) -> Tensor:
        u, delta, A, B, C, *rest, _ = self.operands(x)

        def quantized(tokens: Tensor, zero: Tensor | None) -> list[Tensor | None]:
            codes, outlier_scale, start = torch.ops.ouro.quantize_dynamic_outlier(
                tokens, self.scale, zero, self.threshold, *self.static
            )
            kept = tokens if self.static[1] == 16 else None
            return [codes, self.scale, zero, outlier_scale, start, kept]

        step = quantized(delta.transpose(1, 2) * 1.5, self.zero)
        matrices = (quantized(one.flatten(1, 2).transpose(1, 2), None) for one in (B, C))
        op = torch.ops.ouro.selective_scan_dynamic_outlier
        return op(u, step, A, *matrices, *rest, *self.static)


@pytest.mark.parametrize(
    ("groups", "outlier_bits", "reverse"), [(1, 8, False), (3, 16, True), (1, 16, False)]
)
@pytest.mark.parametrize("form", ["scan", "contrib"])
def test_scans_on_codes(groups: int, outlier_bits: int, reverse: bool, form: str) -> None:
    if form == "contrib" and not has_linear_attention():
        pytest.skip("this onnxruntime has no LinearAttention")
    module = QuantizedScan(groups, outlier_bits, reverse)
    x = _input(module)
    proto = onnx_of(module, x[:2], scan=form)
    [found] = run(proto, x)
    assert_close(torch.from_numpy(found), module(x), 1e-5)
    assert operators(proto).count("Scan" if form == "scan" else "LinearAttention") == 1


def test_a_reversed_scan_flips_nothing() -> None:
    module = Scan(None, False, True)
    assert "Slice" not in operators(onnx_of(module, _input(module)[:2]))


def test_doubles_are_refused() -> None:
    module = Scan(None, False, False)
    with pytest.raises(ModelError, match="fp32"):
        onnx_of(module, _input(module)[:2].double())
