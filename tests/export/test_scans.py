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


def test_a_reversed_scan_flips_nothing() -> None:
    module = Scan(None, False, True)
    assert "Slice" not in operators(onnx_of(module, _input(module)[:2]))


def test_doubles_are_refused() -> None:
    module = Scan(None, False, False)
    with pytest.raises(ModelError, match="fp32"):
        onnx_of(module, _input(module)[:2].double())
