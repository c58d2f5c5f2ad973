"""insert_fake_quantize: fires, leaves alone, equals the computation by hand, ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import ouro_compiler as ouro
from ouro_compiler.calibration.hadamard import hadamard
from ouro_compiler.calibration.search import quantize_weight
from ouro_compiler.graph import (
    OUTPUT,
    Calibration,
    QParams,
    QWeight,
    Site,
    UniformParams,
    constant_names,
)
from ouro_compiler.passes import NORMALIZE
from ouro_compiler.passes.base import PassContext, run_passes
from ouro_compiler.passes.insert_fake_quantize import insert_fake_quantize
from tests.helpers import randn
from tests.passes.graphs import Written, assert_leaves_alone, calls, capture_small, count

aten, ops = torch.ops.aten, torch.ops.ouro
FAKE, WEIGHT = ops.fake_quantize.default, ops.dequantize_weight.default
LENGTH, WIDTH, OUT = 7, 8, 5


def _scan_arguments(m: nn.Module, x: Tensor) -> tuple[Tensor | None, ...]:
    u = x.transpose(1, 2)
    return u, 0.1 * u, -m.decay.exp(), u[:, :3], u[:, 3:6], m.skip


def _scanned(m: nn.Module, x: Tensor) -> Tensor:
    return ops.selective_scan(*_scan_arguments(m, x), None, None, True, False)


def tokens(batch: int = 2) -> Tensor:
    return randn(batch, batch, LENGTH, WIDTH)


def linear(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(WIDTH, OUT)


def prepared(module: nn.Module) -> fx.GraphModule:
    gm = capture_small(module, tokens())
    run_passes(gm, NORMALIZE, PassContext())
    return gm


def site(node: fx.Node, index: int = 0, *, name: str = "input", transpose: bool = False) -> Site:
    kind = "linear" if not transpose else "ssm"
    return Site(
        name=f"layer.{name}",
        node=node,
        index=index,
        bits=4,
        kind=kind,
        layer="layer",
        transpose=transpose,
    )


def inserted(
    gm: fx.GraphModule,
    sites: list[Site],
    params: Mapping[str, UniformParams | QParams] | UniformParams,
    weights: Mapping[str, QWeight] | None = None,
) -> PassContext:
    """Run the pass; it must change the graph, and a second run must not."""
    table = {one.name: params for one in sites} if isinstance(params, UniformParams) else params
    ctx = PassContext(
        config=ouro.W4A4, sites=sites, calibration=Calibration(sites=table, weights=weights or {})
    )
    assert run_passes(gm, (insert_fake_quantize,), ctx) == ["insert_fake_quantize"]
    assert insert_fake_quantize(gm, ctx) is False
    return ctx


def rounded(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """P2 and P3 at 4 bits, in terms of PyTorch."""
    if zero is None:
        return (x / scale).round().clamp(-7, 7) * scale
    return (((x / scale).round() + zero).clamp(0, 15) - zero) * scale


def rounded_weight(weight: Tensor) -> Tensor:
    codes, scale = quantize_weight(weight, 4)
    return codes * scale[:, None]


PARAMETERS = {
    "tensor": UniformParams(scale=torch.tensor([0.25])),
    "token": UniformParams(scale=torch.linspace(0.2, 0.5, LENGTH)[:, None]),
    "asymmetric token": UniformParams(
        scale=torch.linspace(0.2, 0.5, LENGTH)[:, None],
        zero_point=torch.arange(LENGTH).float()[:, None] + 3,
    ),
    "channel": UniformParams(scale=torch.linspace(0.2, 0.5, WIDTH)),
    "smoothed": UniformParams(scale=torch.tensor([0.25]), smooth=torch.linspace(0.5, 2.0, WIDTH)),
    "rotated": UniformParams(scale=torch.tensor([0.25]), rotation=hadamard(WIDTH)),
}


@pytest.mark.parametrize("kind", PARAMETERS)
def test_one_linear(kind: str) -> None:
    layer, params, x = linear(), PARAMETERS[kind], tokens(3)
    gm = prepared(Written(lambda m, t: m.layer(t), layer=layer))
    (node,) = calls(gm, aten.linear.default)
    inserted(gm, [site(node)], params)
    assert count(gm, FAKE) == count(gm, WEIGHT) == 1
    assert "layer.weight" not in constant_names(gm)
    seen = x if params.smooth is None else x / params.smooth
    seen = seen if params.rotation is None else seen @ params.rotation.t()
    seen = rounded(seen, params.scale, params.zero_point)
    expected = F.linear(seen, rounded_weight(layer.weight), layer.bias)
    torch.testing.assert_close(gm(x), expected, rtol=1e-6, atol=1e-6)
    assert node.meta["ouro_layer"] == "layer"


def test_a_weight_of_the_calibration_is_taken_as_it_is() -> None:
    layer, x = linear(), tokens(3)
    gm = prepared(Written(lambda m, t: m.layer(t), layer=layer))
    weight = QWeight(codes=torch.randint(-7, 8, (OUT, WIDTH)).to(torch.int8), scale=torch.ones(1))
    params = PARAMETERS["tensor"]
    inserted(gm, [site(calls(gm, aten.linear.default)[0])], params, {"layer": weight})
    expected = F.linear(rounded(x, params.scale), weight.codes.float(), layer.bias)
    torch.testing.assert_close(gm(x), expected, rtol=1e-6, atol=1e-6)


def test_readers_of_one_site_share_its_quantizer() -> None:
    first, second, x = linear(0), linear(1), tokens(3)
    gm = prepared(Written(lambda m, t: m.first(t) + m.second(t), first=first, second=second))
    nodes = calls(gm, aten.linear.default)
    sites = [site(nodes[0]), dataclasses.replace(site(nodes[1]), layer="other")]
    params = PARAMETERS["tensor"]
    inserted(gm, sites, params)
    assert (count(gm, FAKE), count(gm, WEIGHT)) == (1, 2)
    seen = rounded(x, params.scale)
    expected = sum(F.linear(seen, rounded_weight(m.weight), m.bias) for m in (first, second))
    torch.testing.assert_close(gm(x), expected, rtol=1e-6, atol=1e-6)


def test_sites_that_share_a_rotation_store_it_once() -> None:
    gm = prepared(
        Written(lambda m, t: m.first(t) + m.second(t.exp()), first=linear(0), second=linear(1))
    )
    nodes = calls(gm, aten.linear.default)
    sites = [
        dataclasses.replace(site(node, name=name), layer=name)
        for node, name in zip(nodes, ("first", "second"), strict=True)
    ]
    inserted(gm, sites, PARAMETERS["rotated"])
    assert sum(name.endswith("rotation") for name in constant_names(gm)) == 1
    assert count(gm, FAKE) == 2


def test_an_output_site_quantizes_what_every_reader_gets() -> None:
    """The result itself too, where it is the model's."""
    layer, x = linear(), tokens(3)
    gm = prepared(Written(lambda m, t: (F.silu(m.layer(t)), m.layer(t).exp()), layer=layer))
    results = calls(gm, aten.silu.default)
    params = UniformParams(scale=torch.linspace(0.05, 0.1, OUT))
    inserted(gm, [site(results[0], OUTPUT)], params)
    assert (count(gm, FAKE), count(gm, WEIGHT)) == (1, 0)
    found = gm(x)
    torch.testing.assert_close(found[0], rounded(F.silu(layer(x)), params.scale))
    assert torch.equal(found[1], layer(x).exp())


def test_input_and_output_sites_of_one_linear() -> None:
    layer, x = linear(), tokens(3)
    gm = prepared(Written(lambda m, t: F.relu(m.layer(t)), layer=layer))
    (node,) = calls(gm, aten.linear.default)
    table = {"layer.input": PARAMETERS["token"], "layer.output": PARAMETERS["tensor"]}
    inserted(gm, [site(node), site(node, OUTPUT, name="output")], table)
    assert (count(gm, FAKE), count(gm, WEIGHT)) == (2, 1)
    seen = rounded(x, PARAMETERS["token"].scale)
    inner = F.linear(seen, rounded_weight(layer.weight), layer.bias)
    expected = F.relu(rounded(inner, PARAMETERS["tensor"].scale))
    torch.testing.assert_close(gm(x), expected, rtol=1e-6, atol=1e-6)


def _scan_module() -> Written:
    return Written(_scanned, decay=0.3 * randn(5, WIDTH, 3), skip=randn(6, WIDTH))


@pytest.mark.parametrize("weights", [False, True])
def test_operands_of_a_scan(weights: bool) -> None:
    """Channels-first operands are quantized as tokens; A and D where there are codes for them."""
    module, x = _scan_module(), tokens(3)
    gm = prepared(module)
    (node,) = calls(gm, ops.selective_scan.default)
    names = {0: "u", 1: "delta", 3: "B", 4: "C"}
    token = UniformParams(scale=torch.linspace(0.2, 0.5, LENGTH)[:, None])
    codes: dict[str, QWeight] = {}
    u, delta, A, B, C, D = _scan_arguments(module, x)
    if weights:
        log_codes = (torch.log(-A) / 0.25).round().clamp(-7, 7)
        codes["layer.A"] = QWeight(codes=log_codes.to(torch.int8), scale=torch.tensor([0.25]))
        skip = (D / 0.5).round().clamp(-7, 7)[None]
        codes["layer.D"] = QWeight(codes=skip.to(torch.int8), scale=torch.tensor([0.5]))
        A, D = -torch.exp(log_codes * 0.25), skip[0] * 0.5
    sites = [site(node, index, name=name, transpose=True) for index, name in names.items()]
    inserted(gm, sites, {one.name: token for one in sites}, codes)
    assert count(gm, WEIGHT) == 2 * weights
    u, delta, B, C = (
        rounded(t.transpose(1, 2), token.scale).transpose(1, 2) for t in (u, delta, B, C)
    )
    expected = ops.selective_scan(u, delta, A, B, C, D, None, None, True, False)
    torch.testing.assert_close(gm(x), expected, rtol=1e-5, atol=1e-5)


def test_the_output_of_a_scan() -> None:
    """OUTPUT and transpose together: the chain of views in between is not its own reader."""
    module, x = _scan_module(), tokens(3)
    gm = prepared(module)
    (node,) = calls(gm, ops.selective_scan.default)
    params = UniformParams(scale=torch.linspace(0.2, 0.5, WIDTH))
    inserted(gm, [site(node, OUTPUT, transpose=True)], params)
    expected = rounded(_scanned(module, x).transpose(1, 2), params.scale).transpose(1, 2)
    torch.testing.assert_close(gm(x), expected)


def test_operands_given_by_name() -> None:
    """`z=...`: the call has fewer positional arguments than the site's index."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return ops.selective_scan(*_scan_arguments(m, x)[:5], z=x.transpose(1, 2))

    module, x = Written(forward, decay=torch.zeros(WIDTH, 3), skip=randn(6, WIDTH)), tokens(3)
    gm = prepared(module)
    (node,) = calls(gm, ops.selective_scan.default)
    inserted(gm, [site(node, 6, name="z", transpose=True)], PARAMETERS["tensor"])
    z = rounded(x, PARAMETERS["tensor"].scale).transpose(1, 2)
    expected = ops.selective_scan(*_scan_arguments(module, x)[:5], z=z)
    torch.testing.assert_close(gm(x), expected, rtol=1e-5, atol=1e-5)


def test_weights_of_convolutions_only_where_there_are_codes() -> None:
    kernel = randn(1, WIDTH, 3)
    module = Written(
        lambda m, t: ops.causal_conv1d(t.transpose(1, 2), m.kernel, None, True, False),
        kernel=kernel,
    )
    x, params = tokens(3), PARAMETERS["tensor"]
    seen = rounded(x, params.scale).transpose(1, 2)
    for weights in ({}, {"layer": QWeight(codes=torch.ones(WIDTH, 3).char(), scale=torch.ones(1))}):
        gm = prepared(module)
        (node,) = calls(gm, ops.causal_conv1d.default)
        inserted(gm, [site(node, transpose=True)], params, weights)
        used = torch.ones(WIDTH, 3) if weights else kernel
        expected = ops.causal_conv1d(seen, used, None, True, False)
        torch.testing.assert_close(gm(x), expected, rtol=1e-5, atol=1e-5)


def test_leaves_alone_what_has_no_site_or_is_the_other_passes() -> None:
    module = Written(lambda m, t: m.layer(t), layer=linear())
    assert_leaves_alone(insert_fake_quantize, module, tokens())
    gm = prepared(module)
    before = [node.format_node() for node in gm.graph.nodes]
    one = site(calls(gm, aten.linear.default)[0])
    params = QParams(scale=torch.ones(LENGTH), threshold=torch.ones(LENGTH))
    table = Calibration(sites={one.name: params})
    ctx = PassContext(config=ouro.W4A4, sites=[one], calibration=table)
    assert insert_fake_quantize(gm, ctx) is False
    assert [node.format_node() for node in gm.graph.nodes] == before
