"""k-scaled quantization end to end (METHODS 8)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import fx

import ouro_compiler as ouro
from ouro_compiler.config import QuantConfig
from ouro_compiler.graph import StepParams, UniformParams, argument, aten, get_constant, is_op
from ouro_compiler.runtime.compiled_model import CompiledModel
from tests.command_line import Cli, cli  # noqa: F401  (a fixture)
from tests.models import compiled_vim, images
from tests.recipe_checks import (
    assert_batch_invariant_model,
    assert_close_to_floating_point,
    assert_survives_a_file,
    calibrated,
    compiled_vmamba,
    digits,
    planned,
)

OURO = torch.ops.ouro
SCAN, ROUND = OURO.quantized_selective_scan.default, OURO.fake_quantize.default


def config(preset: QuantConfig = ouro.W8A8, *settings: str) -> QuantConfig:
    found = dataclasses.replace(preset, recipe="ksq")
    for setting in settings:
        found = found.with_setting(setting)
    return found


def nodes(model: CompiledModel, *targets: object) -> list[fx.Node]:
    return [node for node in model.graph_module.graph.nodes if is_op(node, *targets)]


def scales_behind(model: CompiledModel, target: object) -> list[torch.Tensor]:
    """Of the quantizers that read a node of this op directly."""
    found = []
    for node in nodes(model, target):
        readers = [user for user in node.users if is_op(user, ROUND)]
        assert len(readers) == 1, node
        assert len(node.users) == 1, "something reads the result before it is rounded"
        scale = get_constant(model.graph_module, _constant(argument(readers[0], "scale")))
        zero = get_constant(model.graph_module, _constant(argument(readers[0], "zero_point")))
        assert scale is not None
        assert zero is not None
        assert zero.tolist() == [2 ** (argument(readers[0], "bits") - 1)]
        found.append(scale.float())
    return found


def _constant(node: fx.Node) -> fx.Node:
    """Behind the cast to fp32 of a constant that is stored as fp16."""
    return node.args[0] if is_op(node, aten.to.dtype) else node  # type: ignore[return-value]


def test_outputs_of_linears() -> None:
    """One step a tensor, but clusters of tokens, in powers of two, where the scans are read."""
    model = compiled_vim(config())
    scales = scales_behind(model, aten.linear.default)
    assert [tuple(scale.shape) for scale in scales] == [
        *[(1,)] * 5,  # in_proj, and x_proj and dt_proj of both directions
        (50, 1),  # out_proj
        (1,),  # head
    ]
    tokens = scales[5].unique()
    assert 1 <= len(tokens) <= 4
    ratios = torch.log2(tokens / tokens[0])
    assert torch.equal(ratios, ratios.round())


def test_outputs_of_convolutions_and_norms() -> None:
    model = compiled_vim(config())
    (patch,) = scales_behind(model, aten.conv2d.default)
    assert patch.shape == (1,)
    for scale in scales_behind(model, OURO.causal_conv1d.default):
        assert scale.shape == (96, 1)
        assert len(scale.unique()) <= 4
    names = {row["name"] for row in model.report["sites"]}
    assert {"layers.0.norm.output", "norm_f.output", "patch_embed.proj.output"} <= names


def test_scans() -> None:
    """The state on its factor, y from the unrounded one, D u and the gate behind it."""
    model = compiled_vim(config())
    for node in nodes(model, SCAN):
        assert argument(node, "output_before_rounding")
        assert argument(node, "state_factor") is not None
        assert all(argument(node, name) is None for name in ("D", "z", "decay_scale"))
        assert argument(node, "decay_steps") == 0
    assert len(nodes(model, SCAN)) == 2
    gates = scales_behind(model, aten.silu.default)
    assert [tuple(one.shape) for one in gates] == [(96, 1)] * 2
    for node in nodes(model, SCAN):
        assert is_op(argument(node, "step"), ROUND)
    rows = {row["name"]: row for row in model.report["layers"]["rows"]}
    assert rows["layers.0.mixer.selective_scan"]["status"] == "simulated"
    assert "recurrence" in rows["layers.0.mixer.selective_scan"]["reason"]
    assert not [row for row in rows.values() if row["status"] == "skipped"]


def test_weights_have_one_scale() -> None:
    """Convolutions included; codes of the patch embedding are its kernels, flattened."""
    model = compiled_vim(config())
    found = nodes(model, OURO.dequantize_weight.default)
    assert len(found) == 7 + 2 + 1
    for node in found:
        scale = get_constant(model.graph_module, argument(node, "weight_scale"))
        assert scale is not None
        assert len(scale.unique()) == 1
    assert model.report["bytes"]["by_part"]["activation scales"]["stored"] > 0
    size = model.report["bytes"]["by_part"]["convolutions"]
    assert size["stored"] < 0.6 * size["fp16"]


def test_scans_stay_without_ssm() -> None:
    plan, found = calibrated(config(ouro.W8A8, "ssm=none", "ksq.search_rounds=0"))
    rows = {row.name: row for row in plan.rows}
    assert "ssm = none" in str(rows["layers.0.mixer.selective_scan"].reason)
    assert not any("scan" in name for name in found.sites)


def test_without_reparameterization() -> None:
    made = config(ouro.W8A8, "ksq.reparameterize=false", "ksq.search_rounds=0")
    found = calibrated(made)[1].sites
    states = [one for one in found.values() if isinstance(one, StepParams)]
    assert len(states) == 2
    assert all(one.factor is None for one in states)
    for name, params in found.items():
        assert isinstance(params, StepParams) or params.smooth is None, name


def test_one_cluster_is_per_tensor() -> None:
    """T19."""
    _, found = calibrated(config(ouro.W8A8, "ksq.clusters=1", "ksq.search_rounds=0"))
    tensors = [one for one in found.sites.values() if isinstance(one, UniformParams)]
    assert len(tensors) == 7 + 3 + 2 + 2 * 3  # linears, convolutions, norms, around scans
    assert all(len(params.scale.unique()) == 1 for params in tensors)


def test_other_bits_are_an_extrapolation() -> None:
    plan, _ = calibrated(config(ouro.W4A8, "ksq.search_rounds=0"))
    assert any("4 and 8 bits are an extrapolation" in note for note in plan.notes)
    assert not any("extrapolation" in note for note in compiled_vim(config()).report["notes"])


def test_bits_reach_every_quantizer() -> None:
    plan, found = calibrated(config(ouro.W4A4, "ksq.search_rounds=0"))
    assert all(site.bits == 4 for site in plan.sites)
    tensors = [one for one in found.sites.values() if isinstance(one, UniformParams)]
    assert all(_only(one.zero_point) == 8 for one in tensors)
    for weight in found.weights.values():
        assert -8 <= weight.codes.min() < weight.codes.max() <= 7


def _only(value: torch.Tensor | None) -> float:
    assert value is not None
    return float(value)


def test_a_file_computes_the_same(tmp_path: Path) -> None:
    assert_survives_a_file(compiled_vim(config()), tmp_path)


def test_batch_invariance() -> None:
    assert_batch_invariant_model(compiled_vim(config()))


@pytest.mark.slow
def test_digits_keep_their_class() -> None:
    assert_close_to_floating_point(digits("vim", config()), snr_db=15.0)


@pytest.mark.slow
def test_a_vmamba() -> None:
    """SiLU is a node of its own behind the depthwise convolution: both are rounded."""
    model = compiled_vmamba(config(ouro.W8A8, "ksq.search_rounds=1"))
    rows = model.report["layers"]["rows"]
    assert sum(row["kind"] == "scan" for row in rows) == 4
    assert all(row["status"] == "simulated" for row in rows), rows
    sites = {row["name"] for row in model.report["sites"]}
    assert "layers.0.blocks.0.op.conv2d.output_by_channel" in sites
    assert "layers.0.blocks.0.op.conv2d.silu.output_by_channel" in sites
    assert "layers.0.blocks.0.op.out_proj.output_by_token" in sites
    assert model.report["logits_snr_db"] > 15


def test_the_command(cli: Cli) -> None:  # noqa: F811
    result = cli(
        *("vim.safetensors", "--w8a8", "--recipe", "ksq", "--calibration", "images.npz"),
        *("--set", "ksq.clusters=2", "--set", "ksq.search_rounds=1"),
        *("--report", "report.json", "-q"),
    )
    assert result.code == 0, result.err
    report = json.loads(Path("report.json").read_text())
    assert report["config"]["ksq"]["clusters"] == 2
    assert report["layers"]["simulated"] == report["layers"]["total"]
    assert ouro.load(Path("vim.w8a8.pt2"))(images(2)).shape == (2, 10)


def test_settings_out_of_range_are_refused(cli: Cli) -> None:  # noqa: F811
    result = cli("vim.safetensors", "--w8a8", "--recipe", "ksq", "--set", "ksq.clusters=0")
    assert result.code == 2
    assert "clusters >= 1" in result.err


@pytest.mark.parametrize("pattern", ["*conv1d*", "*norm*", "head"])
def test_layers_that_are_excluded_stay(pattern: str) -> None:
    names = {site.name for site in planned(config(ouro.W8A8, f"exclude={pattern}")).sites}
    gone = {site.name for site in planned(config()).sites} - names
    assert gone
    assert all(pattern.strip("*") in name for name in gone)
