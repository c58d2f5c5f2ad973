"""insert_quantized_scan: fires, leaves alone, equals, ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ouro_compiler.graph import Calibration, ScanParams, UniformParams, argument, is_op
from ouro_compiler.ops.fake_quantize import fake_quantize_ref
from ouro_compiler.passes.base import PassContext, run_passes
from ouro_compiler.passes.insert_quantized_scan import insert_quantized_scan
from tests.helpers import assert_close, randn
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


def run(gm: fx.GraphModule, params: ScanParams | None) -> tuple[bool, PassContext]:
    """Whether the pass changed the graph, under the name `block.selective_scan`."""
    scan = next(node for node in gm.graph.nodes if is_op(node, SCAN))
    name = "block.selective_scan"
    context = PassContext(
        layers={name: scan},
        calibration=Calibration(scans={} if params is None else {name: params}),
    )
    return bool(run_passes(gm, (insert_quantized_scan,), context)), context


def quantized_node(gm: fx.GraphModule) -> fx.Node:
    (found,) = [node for node in gm.graph.nodes if is_op(node, QUANTIZED)]
    return found


def steps(length: int = LENGTH) -> Tensor:
    return torch.linspace(0.01, 0.03, length)


def uniform(scale: Tensor, smooth: Tensor | None = None) -> UniformParams:
    return UniformParams(scale=scale, zero_point=torch.tensor([128.0]), smooth=smooth)


@pytest.mark.parametrize("function", [forward, without_gate])
def test_without_quantizers_it_computes_the_same(function: Any) -> None:
    gm = captured(function)
    before = gm(tokens(3))
    modified, _ = run(gm, ScanParams(bits=8))
    assert modified
    assert not any(is_op(node, SCAN) for node in gm.graph.nodes)
    assert quantized_node(gm).meta["ouro_layer"] == "block.selective_scan"
    assert_close(gm(tokens(3)), before, 1e-5)


def test_its_operands_are_those_of_calibration() -> None:
    gm = captured()
    params = ScanParams(
        bits=4,
        decay_limit=0.9,
        decay_steps=3,
        input_scale=steps(),
        input_threshold=10 * steps(),
        state_scale=steps() * 2,
        state_threshold=20 * steps(),
        state_factor=torch.rand(CHANNELS, STATES) + 0.5,
        outlier_bits=16,
        refresh_period=4,
        output_before_rounding=True,
    )
    run(gm, params)
    x = tokens(3)
    u = x.transpose(1, 2)
    B, C = F.linear(x, gm.both.weight, gm.both.bias).transpose(1, 2).chunk(2, 1)
    step = F.softplus(u + 1 + gm.bias[:, None])
    expected = OURO.quantized_selective_scan(
        *(u, step, gm.A, B, C, gm.D, u, None, params.input_scale, params.input_threshold),
        *(params.state_scale, params.state_threshold, params.state_factor),
        *(0.9, 3, 4, 16, 4, True, True),
    )
    assert torch.equal(gm(x), expected)
    assert not torch.equal(gm(x), captured()(x))


def test_quantizers_around_it() -> None:
    """Delta behind softplus; y before D u, divided by channel and multiplied back; silu(z)."""
    gm = captured()
    smooth = torch.linspace(0.5, 2, CHANNELS)[:, None]
    params = ScanParams(
        bits=8,
        step=uniform(torch.linspace(0.01, 0.02, CHANNELS)[:, None]),
        output=uniform(steps().view(1, -1), smooth),
        gate=uniform(torch.linspace(0.02, 0.01, CHANNELS)[:, None]),
    )
    run(gm, params)
    node = quantized_node(gm)
    assert (argument(node, "D"), argument(node, "z")) == (None, None)
    x = tokens(3)
    u = x.transpose(1, 2)
    B, C = F.linear(x, gm.both.weight, gm.both.bias).transpose(1, 2).chunk(2, 1)

    def rounded(value: Tensor, by: UniformParams | None) -> Tensor:
        assert by is not None
        return fake_quantize_ref(value, by.scale, by.zero_point, 8)

    step = rounded(F.softplus(u + 1 + gm.bias[:, None]), params.step)
    y = OURO.selective_scan(u, step, gm.A, B, C, None, None, None, False, True)
    y = rounded(y / smooth, params.output) * smooth + u * gm.D[:, None]
    expected = y * rounded(F.silu(u), params.gate)
    found = gm(x)
    # A y close to the edge of a code may fall on either side of it: one step of it at most.
    assert (found - expected).abs().max() <= 0.03 * 2 * u.abs().max()
    assert ((found - expected).abs() < 1e-5).double().mean() > 0.98


def test_a_gate_that_is_not_there_is_not_made() -> None:
    gm = captured(without_gate)
    run(gm, ScanParams(bits=8, output=uniform(steps().view(1, -1))))
    targets = [node.target for node in gm.graph.nodes if node.op == "call_function"]
    aten = torch.ops.aten
    assert not {aten.silu.default, aten.softplus.default, aten.mul.Tensor} & set(targets)


def test_scans_without_parameters_stay() -> None:
    gm = captured()
    modified, _ = run(gm, None)
    assert not modified
    assert any(is_op(node, SCAN) for node in gm.graph.nodes)


def test_it_ends() -> None:
    gm = captured()
    _, context = run(gm, ScanParams(bits=8, state_scale=steps()))
    assert insert_quantized_scan(gm, context) is False
