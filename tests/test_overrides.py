"""Bits of single layers: in the configuration, the graph, the artefact and the report."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

import ouro_compiler as ouro
from ouro_compiler.compiler import prepare
from ouro_compiler.config import LayerBits, QuantConfig
from ouro_compiler.errors import UsageError
from ouro_compiler.frontend.capture import capture
from ouro_compiler.graph import argument, is_op
from ouro_compiler.ops import QUANTIZERS
from tests.models import images, small_vim
from tests.test_quantize_passes import TwoReaders, tokens

LINEAR = torch.ops.ouro.linear_dynamic_outlier.default


def overriding(*bits: LayerBits, config: QuantConfig = ouro.W4A4) -> QuantConfig:
    return dataclasses.replace(config, overrides=bits)


def test_overrides_survive_json() -> None:
    config = overriding(
        LayerBits(pattern="layers.0.*", weights=8, activations=6),
        LayerBits(pattern="*out_proj", weights=4, activations=8),
    )
    again = QuantConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.overrides[1] == LayerBits(pattern="*out_proj", weights=4, activations=8)


def test_the_last_override_that_matches_counts() -> None:
    config = overriding(
        LayerBits(pattern="a.*", weights=8, activations=6),
        LayerBits(pattern="a.b", weights=6, activations=8),
    )
    bits = [
        (one.weights.bits, one.activations.inlier_bits)
        for one in map(config.for_layer, ("a.b", "a.c", "b.a"))
    ]
    assert bits == [(6, 8), (8, 6), (4, 4)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"pattern": "a", "weights": 5, "activations": 4},
        {"pattern": "a", "weights": 4, "activations": 16},
        {"pattern": "", "weights": 4, "activations": 4},
        {"pattern": "a", "weights": 4, "activations": 4, "outliers": 8},
        ["a", 4, 4],
    ],
)
def test_wrong_overrides(wrong: Any) -> None:
    with pytest.raises(UsageError):
        QuantConfig.from_dict({"overrides": [wrong]})


def test_overrides_are_no_text() -> None:
    with pytest.raises(UsageError, match="--replay"):
        ouro.W4A4.with_setting("overrides=layers.0.*")


def test_overrides_reach_the_graph_and_the_report() -> None:
    """Codes, static arguments, rows and bytes, of linears and of a scan."""
    name = "layers.0.mixer"
    config = overriding(
        LayerBits(pattern=f"{name}.out_proj", weights=8, activations=6),
        LayerBits(pattern=f"{name}.selective_scan", weights=6, activations=8),
    )
    plain = ouro.compile(small_vim(), images(2), calibration=images(8))
    model = ouro.compile(small_vim(), images(2), config, calibration=images(8))
    bits = {
        row["name"]: (row["weight_bits"], row["activation_bits"])
        for row in model.report["layers"]["rows"]
        if row["status"] != "skipped"
    }
    expected = {f"{name}.out_proj": (8, 6), f"{name}.selective_scan": (6, 8)}
    assert {row: found for row, found in bits.items() if found != (4, 4)} == expected
    sites = {row["name"]: row["bits"] for row in model.report["sites"]}
    assert {row: found for row, found in sites.items() if found != 4} == {
        f"{name}.out_proj.input": 6,
        f"{name}.selective_scan.delta": 8,
        f"{name}.selective_scan.B": 8,
        f"{name}.selective_scan.C": 8,
    }
    state = model.graph_module.state_dict()
    assert state[f"{name}.out_proj.qweight"].dtype == torch.int8
    assert state[f"{name}.out_proj.qweight"].abs().max() > 31
    assert state[f"{name}.in_proj.qweight"].dtype == torch.uint8
    linears = [node for node in model.graph_module.graph.nodes if is_op(node, LINEAR)]
    assert sorted(argument(node, "inlier_bits") for node in linears) == [4, 4, 4, 4, 4, 6]
    # out_proj is (48, 96), A (96, 16) and D (96,), packed before.
    more = (48 * 96 + 96 * 16 + 96) // 2
    assert model.report["bytes"]["stored"] == plain.report["bytes"]["stored"] + more
    assert model.report["config"] == json.loads(json.dumps(config.for_target("cpu").to_dict()))


def test_readers_with_other_bits_have_their_own_quantizers() -> None:
    gm = capture(TwoReaders(), tokens())
    config = overriding(LayerBits(pattern="b", weights=8, activations=8))
    plan = prepare(gm, config)
    assert [(site.name, site.bits) for site in plan.sites] == [("a.input", 4), ("b.input", 8)]
    model = ouro.compile(TwoReaders(), tokens(), config, calibration=tokens())
    quantizers = [node for node in model.graph_module.graph.nodes if is_op(node, *QUANTIZERS)]
    assert sorted(argument(node, "inlier_bits") for node in quantizers) == [4, 8]
    parts = [
        ouro.compile(TwoReaders(), tokens(), one, calibration=tokens())(tokens(3))
        for one in (ouro.W4A4, overriding(LayerBits(pattern="*", weights=8, activations=8)))
    ]
    expected = torch.cat([parts[0][..., :5], parts[1][..., 5:]], -1)
    assert torch.equal(model(tokens(3)), expected)
