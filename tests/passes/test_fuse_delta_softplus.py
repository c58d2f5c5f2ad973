"""fuse_delta_softplus: fires, leaves near misses alone, equal bit for bit, ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ouro_compiler.graph import argument
from ouro_compiler.passes.fuse_delta_softplus import fuse_delta_softplus
from tests.helpers import randn
from tests.models import compiled_vim
from tests.passes.graphs import Written, assert_leaves_alone, assert_pass, calls, ouro

LENGTH, CHANNELS, STATES, RANK = 13, 8, 4, 6
SCAN, LINEAR = ouro.selective_scan.default, ouro.linear_dynamic_outlier.default
X = randn(1, 3, LENGTH, RANK)


def product(m: Any, x: Tensor, activation: str = "none", residual: Tensor | None = None) -> Tensor:
    static = (4, 8, 5, False)
    quantized = ouro.quantize_dynamic_outlier(x, m.scale, None, m.threshold, *static)
    codes, outlier_scale, start = quantized
    weight = m.codes.to(torch.int8)
    operands = (weight, m.weight_scale, m.bias, residual, activation)
    return ouro.linear_dynamic_outlier(
        codes, m.scale, outlier_scale, start, None, *operands, *static
    )


def scan(m: Any, x: Tensor, delta: Tensor, bias: Tensor | None = None, soft: bool = True) -> Tensor:
    u = torch.cat([x, x[..., :2]], dim=-1).transpose(1, 2)
    B = x[..., :STATES].transpose(1, 2)
    return ouro.selective_scan(u, delta.transpose(1, 2), m.A, B, B, m.D, None, bias, soft, False)


def module(forward: Any) -> Written:
    return Written(
        forward,
        scale=torch.full((LENGTH,), 0.25),
        threshold=torch.full((LENGTH,), 2.0),
        codes=randn(2, CHANNELS, RANK).mul(3).round(),
        weight_scale=torch.full((CHANNELS,), 0.1),
        bias=randn(3, CHANNELS),
        A=-randn(4, CHANNELS, STATES).abs(),
        D=randn(5, CHANNELS),
    )


def test_fires() -> None:
    gm = assert_pass(
        fuse_delta_softplus,
        module(lambda m, x: scan(m, x, product(m, x)) + scan(m, x, product(m, x * 2))),
        X,
        before={SCAN: 2, LINEAR: 2},
        after={SCAN: 2, LINEAR: 2},
    )
    assert [argument(one, "activation") for one in calls(gm, LINEAR)] == ["softplus"] * 2
    assert not any(argument(one, "delta_softplus") for one in calls(gm, SCAN))


def read_elsewhere(m: Any, x: Tensor) -> Any:
    delta = product(m, x)
    return scan(m, x, delta), delta * 2


def by_two_scans(m: Any, x: Tensor) -> Any:
    delta = product(m, x)
    return scan(m, x, delta) + scan(m, x, delta, soft=False)


@pytest.mark.parametrize(
    "forward",
    [
        read_elsewhere,
        by_two_scans,
        lambda m, x: scan(m, x, product(m, x), m.bias),
        lambda m, x: scan(m, x, product(m, x), soft=False),
        lambda m, x: scan(m, x, product(m, x, "silu")),
        lambda m, x: scan(m, x, product(m, x, residual=torch.cat([x, x[..., :2]], dim=-1))),
        lambda m, x: scan(m, x, torch.cat([x, x[..., :2]], dim=-1)),
    ],
)
def test_leaves_alone(forward: Any) -> None:
    assert_leaves_alone(fuse_delta_softplus, module(forward), X)


def test_compiled_models() -> None:
    """Where delta is not quantized, its product has the softplus; codes of delta are before it."""
    import ouro_compiler as ouro_api

    floating = compiled_vim(ouro_api.W4A4.with_setting("ssm=none")).graph_module
    assert len(calls(floating, SCAN)) == 2
    assert not any(argument(one, "delta_softplus") for one in calls(floating, SCAN))
    quantized = compiled_vim().graph_module
    assert "softplus" not in [argument(one, "activation") for one in calls(quantized, LINEAR)]
