"""quantize_recurrence around scans: Delta after softplus, y before D u, and the gate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

import ouro_compiler as ouro
from ouro_compiler.graph import (
    GATE,
    READOUT,
    STEP,
    Calibration,
    Site,
    SiteParams,
    UniformParams,
    argument,
    is_op,
)
from ouro_compiler.ops.fake_quantize import fake_quantize_ref
from ouro_compiler.passes.base import PassContext, run_passes
from ouro_compiler.passes.insert_fake_quantize import insert_fake_quantize
from ouro_compiler.passes.quantize_recurrence import quantize_recurrence
from tests.helpers import randn
from tests.passes.graphs import Written, capture_small

OURO = torch.ops.ouro
SCAN, QUANTIZED = OURO.selective_scan.default, OURO.quantized_selective_scan.default
CHANNELS, STATES, LENGTH = 6, 4, 9


def forward(module: Any, x: Tensor) -> Tensor:
    """x (B, L, 6) is u, delta and z at once."""
    u = x.transpose(1, 2)
    B, C = module.both(x).transpose(1, 2).chunk(2, 1)
    skip, bias = module.D, module.bias
    return OURO.selective_scan(u, u + 1, module.A, B, C, skip, u, bias, True, True)


def without_gate(module: Any, x: Tensor) -> Tensor:
    u = x.transpose(1, 2)
    B, C = module.both(x).transpose(1, 2).chunk(2, 1)
    return OURO.selective_scan(u, u.abs(), module.A, B, C)


def tokens(batch: int = 2) -> Tensor:
    return randn(batch, batch, LENGTH, CHANNELS)


def captured(function: Any = forward) -> fx.GraphModule:
    torch.manual_seed(0)
    module = Written(
        function,
        A=-0.2 - torch.rand(CHANNELS, STATES),
        D=torch.randn(CHANNELS),
        bias=torch.randn(CHANNELS),
        both=torch.nn.Linear(CHANNELS, 2 * STATES),
    )
    return capture_small(module, tokens())


def run(gm: fx.GraphModule, params: Mapping[int, SiteParams]) -> tuple[bool, PassContext]:
    """Whether the pass changed the graph, with sites of these indices at its scan."""
    scan = next(node for node in gm.graph.nodes if is_op(node, SCAN))
    layer = "block.selective_scan"
    sites = [
        Site(name=f"{layer}.at{-index}", node=scan, index=index, bits=8, kind="ssm", layer=layer)
        for index in params
    ]
    table = {site.name: params[site.index] for site in sites}
    context = PassContext(config=ouro.W4A8, sites=sites, calibration=Calibration(sites=table))
    return bool(run_passes(gm, (quantize_recurrence,), context)), context


def quantized_node(gm: fx.GraphModule) -> fx.Node:
    (found,) = [node for node in gm.graph.nodes if is_op(node, QUANTIZED)]
    return found


def steps() -> Tensor:
    return torch.linspace(0.01, 0.03, LENGTH)


def uniform(scale: Tensor, smooth: Tensor | None = None) -> UniformParams:
    return UniformParams(scale=scale, zero_point=torch.tensor([128.0]), smooth=smooth)


@pytest.mark.parametrize("function", [forward, without_gate])
def test_steps_that_are_fine_change_little(function: Any) -> None:
    """D u and the gate have moved behind the scan, and nothing is lost on the way."""
    gm = captured(function)
    before = gm(tokens(3))
    modified, _ = run(gm, {READOUT: UniformParams(scale=torch.tensor([0.2]))})
    assert modified
    assert not any(is_op(node, SCAN) for node in gm.graph.nodes)
    assert quantized_node(gm).meta["ouro_layer"] == "block.selective_scan"
    gate = F.silu(tokens(3).transpose(1, 2)) if function is forward else torch.ones(1)
    assert bool(((gm(tokens(3)) - before).abs() <= 0.1001 * gate.abs() + 1e-5).all())


def test_quantizers_around_it() -> None:
    """Delta behind softplus; y before D u, divided by channel and multiplied back; silu(z)."""
    gm = captured()
    smooth = torch.linspace(0.5, 2, CHANNELS)[:, None]
    params = {
        STEP: uniform(torch.linspace(0.01, 0.02, CHANNELS)[:, None]),
        READOUT: uniform(steps().view(1, -1), smooth),
        GATE: uniform(torch.linspace(0.02, 0.01, CHANNELS)[:, None]),
    }
    run(gm, params)
    node = quantized_node(gm)
    assert (argument(node, "D"), argument(node, "z")) == (None, None)
    x = tokens(3)
    u = x.transpose(1, 2)
    B, C = F.linear(x, gm.both.weight, gm.both.bias).transpose(1, 2).chunk(2, 1)

    def rounded(value: Tensor, by: UniformParams) -> Tensor:
        return fake_quantize_ref(value, by.scale, by.zero_point, 8)

    step = rounded(F.softplus(u + 1 + gm.bias[:, None]), params[STEP])
    y = OURO.selective_scan(u, step, gm.A, B, C, None, None, None, False, True)
    y = rounded(y / smooth, params[READOUT]) * smooth + u * gm.D[:, None]
    expected = y * rounded(F.silu(u), params[GATE])
    found = gm(x)
    # A y close to the edge of a code may fall on either side of it: one step of it at most.
    assert (found - expected).abs().max() <= 0.03 * 2 * u.abs().max()
    assert ((found - expected).abs() < 1e-5).double().mean() > 0.98


def test_a_gate_that_is_not_there_is_not_made() -> None:
    gm = captured(without_gate)
    run(gm, {READOUT: uniform(steps().view(1, -1))})
    targets = [node.target for node in gm.graph.nodes if node.op == "call_function"]
    aten = torch.ops.aten
    assert not {aten.silu.default, aten.log1p.default, aten.mul.Tensor} & set(targets)


def test_they_are_no_business_of_the_other_pass() -> None:
    gm = captured()
    scan = next(node for node in gm.graph.nodes if is_op(node, SCAN))
    site = Site(name="step", node=scan, index=STEP, bits=8, kind="ssm", layer="scan")
    table = {"step": uniform(torch.ones(1))}
    context = PassContext(sites=[site], calibration=Calibration(sites=table))
    assert insert_fake_quantize(gm, context) is False


def test_it_ends() -> None:
    gm = captured()
    _, context = run(gm, {STEP: uniform(torch.ones(1)), READOUT: uniform(torch.ones(1))})
    assert quantize_recurrence(gm, context) is False
