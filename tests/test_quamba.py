"""Recipe quamba: one scale a tensor, a percentile for u, the rotation before out_proj."""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import ouro_compiler as ouro
from ouro_compiler.calibration.search import BINS, percentile_from_histogram
from ouro_compiler.compiler import prepare
from ouro_compiler.errors import UsageError
from ouro_compiler.frontend.capture import capture
from ouro_compiler.graph import UniformParams, aten, constant_names, is_op
from ouro_compiler.models.vmamba import VMambaConfig
from ouro_compiler.recipes import find_recipe
from ouro_compiler.recipes.planning import reads_scan
from ouro_compiler.recipes.quamba import quantize_tensor, rotation_of
from tests.helpers import randn
from tests.models import images, small_vim
from tests.recipe_graphs import apply, calibrated, compiled, configured

OPS = torch.ops.ouro
SCAN, CONV = OPS.selective_scan.default, OPS.causal_conv1d.default
QUAMBA = configured("recipe=quamba", preset="w8a8")
MIXER = "layers.0.mixer"


@lru_cache(maxsize=1)
def vim_graph() -> fx.GraphModule:
    """A small Vim of two blocks, normalised; planning does not edit it."""
    gm = capture(small_vim(2), images(2))
    prepare(gm, QUAMBA)
    return gm


class _Inputs(fx.Interpreter):
    """The values of named nodes."""

    def __init__(self, gm: fx.GraphModule, names: set[str]) -> None:
        super().__init__(gm)
        self.names, self.found = names, dict[str, Tensor]()

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if n.name in self.names:
            self.found[n.name] = value
        return value


def _site_values(config: object = QUAMBA) -> tuple[dict[str, Tensor], dict[str, UniformParams]]:
    """Activations by site's name on the calibration images, and the sites' parameters."""
    gm, plan, found = calibrated(small_vim(), images(), config)  # type: ignore[arg-type]
    sources = {site.name: site.source.name for site in plan.sites}
    inputs = _Inputs(gm, set(sources.values()))
    with torch.no_grad():
        inputs.run(images())
    values = {name: inputs.found[source] for name, source in sources.items()}
    return values, dict(found.sites)  # type: ignore[arg-type]


def test_scales_are_maxima_and_percentiles() -> None:
    """Of x_proj's input, which is u, the percentile, of all else the largest magnitude."""
    values, table = _site_values()
    clipped = {f"{MIXER}.x_proj.input", f"{MIXER}.x_proj_b.input"}
    assert clipped < table.keys()
    for name, params in table.items():
        assert params.scale.shape == (1,)
        assert params.zero_point is None
        magnitudes = values[name].abs().flatten()
        if name == f"{MIXER}.out_proj.input":
            assert params.rotation is not None
            magnitudes = (values[name] @ params.rotation.t()).abs().flatten()
        else:
            assert params.rotation is None
        peak, clip = float(magnitudes.max()), float(params.scale) * 127
        slack = 1e-3 * peak + peak / BINS  # of fp16, and a bin of the histogram
        if name in clipped:
            ordered = magnitudes.sort().values
            at = int(0.9995 * len(ordered))
            assert ordered[at - 1] - slack <= clip <= ordered[at + 1] + slack, name
            assert clip < 0.95 * peak
        else:
            assert clip == pytest.approx(peak, rel=1e-3), name


def test_operands_and_layers_that_have_sites() -> None:
    plan = find_recipe("quamba").plan(vim_graph(), QUAMBA)
    names = {
        site.name.removeprefix(f"{MIXER}.") for site in plan.sites if site.name.startswith(MIXER)
    }
    for direction, suffix in (("", ""), ("_reverse", "_b")):
        scan = f"selective_scan{direction}"
        assert {f"{scan}.{one}" for one in ("delta", "B", "C")} <= names
        assert {f"x_proj{suffix}.input", f"dt_proj{suffix}.input"} <= names
        (u,) = (one for one in plan.sites if one.layer == f"{MIXER}.{scan}" and one.index == 0)
        assert u.name == f"{MIXER}.x_proj{suffix}.input"  # one quantizer, as in the published code
    assert {"in_proj.input", "out_proj.input", "conv1d.input", "selective_scan.z"} <= names
    # Both directions read one z and one input of their convolutions.
    assert "selective_scan_reverse.z" not in names
    assert "conv1d_b.input" not in names
    assert len(names) == 1 + 1 + 1 + 2 * 3 + 2 * 2 + 1


def test_weights_have_one_scale() -> None:
    weight = randn(0, 5, 12)
    found = quantize_tensor(weight, 4)
    assert found.scale.shape == (1,)
    assert float(found.scale) == pytest.approx(float(weight.abs().max()) / 7, rel=1e-3)
    expected = (weight / found.scale).round().clamp(-7, 7)
    assert torch.equal(found.codes.float(), expected)
    assert quantize_tensor(torch.zeros(2, 3), 4).codes.abs().max() == 0


@pytest.mark.parametrize("share", [0.5, 0.9, 0.9995, 1.0])
def test_percentile_of_a_histogram(share: float) -> None:
    values = randn(1, 40000).abs()
    peak = float(values.max())
    histogram = torch.histc(values, BINS, 0, peak)
    found = percentile_from_histogram(histogram, peak, share)
    assert found == pytest.approx(float(np.quantile(values.numpy(), share)), abs=2 * peak / BINS)


def test_percentiles_of_nothing() -> None:
    assert percentile_from_histogram(torch.zeros(BINS), 0.0, 0.9) == 0.0
    one = torch.zeros(BINS)
    one[-1] = 3  # a constant activation
    assert percentile_from_histogram(one, 2.0, 0.5) == pytest.approx(2.0, rel=1e-3)


# --- the rotation


class Block(nn.Module):
    """A scan of `width` channels and the linear behind it, on tokens (B, L, 4)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into, self.out = nn.Linear(4, width), nn.Linear(width, 4)
        self.register_buffer("A", -torch.rand(width, 2) - 0.1)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        u = self.into(x).transpose(1, 2)
        y = OPS.selective_scan(u, u, self.A, u[:, :2], u[:, 2:4], None, None, None, True, False)
        return self.out(F.silu(y.transpose(1, 2)) + 1).relu()


TOKENS = randn(0, 4, 9, 4)


@pytest.mark.parametrize("hadamard", ["true", "false"])
def test_the_rotation_changes_nothing_before_it_is_quantized(hadamard: str) -> None:
    """The graph with 16-bit activations; what is left is the error of one 8-bit weight."""
    config = configured("recipe=quamba", f"quamba.hadamard={hadamard}", preset="w8a8")
    model = Block(12)
    gm, plan, found = calibrated(model, TOKENS, config)
    (only,) = (site for site in plan.sites if site.layer == "out")
    params = found.sites[only.name]
    assert isinstance(params, UniformParams)
    assert (params.rotation is not None) is (hadamard == "true")
    plan.sites = [dataclasses.replace(only, bits=16)]
    fine = dataclasses.replace(params, scale=params.scale * 127 / 32767)
    apply(gm, plan, dataclasses.replace(found, sites={only.name: fine}), config)
    difference = (gm(TOKENS) - model(TOKENS)).norm() / model(TOKENS).norm()
    assert difference < 0.01


def test_the_rotation_is_a_product_in_the_graph() -> None:
    """Between what the scan gives and out_proj's quantizer; stored once for all blocks."""
    gm, plan, found = calibrated(nn.Sequential(Block(12), Block(12)), TOKENS, QUAMBA)
    apply(gm, plan, found, QUAMBA)
    rotated = [
        node
        for node in gm.graph.nodes
        if is_op(node, aten.linear.default) and str(node.args[1].target).endswith(".rotation")
    ]
    readers = []
    for node in rotated:
        (quantizer,) = node.users
        assert is_op(quantizer, OPS.fake_quantize.default)
        readers += [reader.meta["ouro_layer"] for reader in quantizer.users]
    assert readers == ["0.out", "1.out"]
    assert sum(name.endswith(".rotation") for name in constant_names(gm)) == 1


def test_a_width_without_a_matrix_is_a_reason() -> None:
    model = Block(6)
    gm, plan, found = calibrated(model, TOKENS, QUAMBA)
    rows = {row.name: row for row in plan.rows}
    assert str(rows["out"].reason).endswith(
        "not rotated: no Hadamard matrix of order 6 is known here"
    )
    assert "not rotated" not in str(rows["into"].reason)
    assert rotation_of(6) is None
    params = found.sites["out.input"]
    assert isinstance(params, UniformParams)
    assert params.rotation is None
    apply(gm, plan, found, QUAMBA)
    assert (gm(TOKENS) - model(TOKENS)).norm() / model(TOKENS).norm() < 0.05


def test_linears_that_read_scans() -> None:
    """out_proj, through gate, sum and transpose; neither x_proj nor the next block."""
    readers = [
        str(node.args[1].target)
        for node in vim_graph().graph.nodes
        if is_op(node, aten.linear.default) and reads_scan(node)
    ]
    assert readers == [f"layers.{i}.mixer.out_proj.weight" for i in (0, 1)]


# --- whole models


def test_everything_is_simulated() -> None:
    report = compiled(QUAMBA).report
    rows = {row["name"]: row for row in report["layers"]["rows"]}
    statuses = {name: row["status"] for name, row in rows.items()}
    assert statuses.pop("head") == "skipped"
    assert statuses == dict.fromkeys(("into", "taps_layer", "selective_scan", "out"), "simulated")
    assert all(row["reason"] for row in rows.values())
    assert "not states" in rows["selective_scan"]["reason"]
    parts = report["bytes"]["by_part"]
    assert parts["rotations"]["stored"] == 12 * 12 * 2
    assert parts["convolutions"]["stored"] == parts["convolutions"]["fp16"] / 2
    assert parts["SSM parameters"]["stored"] == parts["SSM parameters"]["fp16"] / 2
    assert report["logits_snr_db"] > 15


def test_without_scans() -> None:
    config = configured("recipe=quamba", "ssm=none", preset="w8a8")
    plan = find_recipe("quamba").plan(vim_graph(), config)
    assert not [site for site in plan.sites if is_op(site.node, SCAN)]
    assert [site for site in plan.sites if is_op(site.node, CONV)]
    reasons = {row.reason for row in plan.rows if row.kind == "scan"}
    assert reasons == {"SSM operands stay in floating point (ssm = none)"}


@pytest.mark.slow
def test_scales_of_tensors_fit_another_resolution() -> None:
    model = VMambaConfig(img_size=16, embed_dim=16, depths=(1,), num_classes=5).build()
    model = model.eval().requires_grad_(False)
    here, there = randn(0, 4, 3, 16, 16), randn(1, 4, 3, 24, 16)
    compiled = ouro.compile(model, there[:2], QUAMBA, calibration=here)
    assert "calibrated on images of 16x16, compiled for 24x16" in compiled.report["notes"]
    rows = compiled.report["layers"]["rows"]
    assert sum(row["kind"] == "scan" and row["status"] == "simulated" for row in rows) == 4
    error = (compiled(there) - model(there)).norm() / model(there).norm()
    assert error < 0.2


def test_rules_for_outliers_are_refused() -> None:
    config = configured("recipe=quamba", "activations.trigger=always")
    with pytest.raises(UsageError, match="trigger always is a rule for dynamic outliers, and reci"):
        find_recipe("quamba").configure(config)
