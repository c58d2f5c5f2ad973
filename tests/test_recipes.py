"""What recipes share: the registry, rules for outliers, reports, artefacts, the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import ouro_compiler as ouro
from ouro_compiler.config import QuantConfig
from ouro_compiler.errors import UsageError
from ouro_compiler.graph import aten, is_op
from ouro_compiler.inspection.dot import to_dot
from ouro_compiler.inspection.network import build_network
from ouro_compiler.inspection.nodes import node_rows
from ouro_compiler.ops import QUANTIZERS
from ouro_compiler.passes.insert_quantize_dequantize import insert_quantize_dequantize
from ouro_compiler.recipes import RECIPES, find_recipe
from tests.command_line import Cli, cli, refused
from tests.recipe_graphs import (
    Block,
    apply,
    calibrated,
    compiled,
    configured,
    pictures,
    values_of,
)

__all__ = ["cli"]  # a fixture

OPS = torch.ops.ouro
PLAIN = OPS.quantize_dynamic_outlier.default
VARIANT = OPS.quantize_dynamic_outlier_variant.default
LINEAR, NORM = OPS.linear_dynamic_outlier.default, OPS.add_norm_quantize.default
EXAMPLES = Path(__file__).parent.parent / "examples"
SIMULATED = ("ptq4vm", "quamba")


# --- the registry


def test_an_unknown_recipe_is_named_with_those_there_are() -> None:
    with pytest.raises(
        UsageError, match=r"no recipe is called 'gptq': the recipes are ouromamba, "
    ):
        find_recipe("gptq")
    with pytest.raises(UsageError, match="no recipe is called 'gptq'"):
        ouro.compile(Block(), pictures(2), configured("recipe=gptq"), calibration=pictures())


@pytest.mark.parametrize("name", RECIPES)
def test_every_layer_has_a_row_and_every_exception_a_reason(name: str) -> None:
    """Nothing is left in floating point, or simulated, without saying so."""
    assert find_recipe(name).name == name
    assert RECIPES[name].summary
    assert "\n" not in RECIPES[name].summary
    _, plan, _ = calibrated(Block(), pictures(), configured(f"recipe={name}"))
    assert [row.name for row in plan.rows] == [
        "into",
        "taps_layer",
        "selective_scan",
        "out",
        "head",
    ]
    for row in plan.rows:
        assert row.status == "quantized" or row.reason
        if row.status == "skipped":
            assert (row.weight_bits, row.activation_bits) == (None, None)
        else:
            keeps = row.kind == "scan" and name in ("qmamba", "ksq")  # A and D are not quantized
            assert (row.weight_bits, row.activation_bits) == (None if keeps else 4, 4)
    layers = {site.layer for site in plan.sites if site.kind != "activation"}  # norms have no row
    assert layers <= {row.name for row in plan.rows if row.status != "skipped"}


def test_rtn_is_ouromamba_without_outliers() -> None:
    """T3, bit for bit: parameters and outputs."""
    graphs, tables = [], []
    for config in (configured("recipe=rtn"), configured("activations.outliers=none")):
        gm, plan, found = calibrated(Block(), pictures(), config)
        apply(gm, plan, found, config)
        graphs.append(gm)
        tables.append(found.sites)
    assert tables[0].keys() == tables[1].keys()
    for name, params in tables[0].items():
        assert torch.equal(params.scale, tables[1][name].scale)
        assert bool(params.threshold.isinf().all())  # type: ignore[union-attr]
    x = pictures(5, seed=7)
    assert torch.equal(graphs[0](x), graphs[1](x))


# --- rules for outliers


def _rules(threshold: str, trigger: str, *more: str) -> QuantConfig:
    """Kappas that a token of 8 or 12 channels can exceed: its largest z-score is 2.5 or 3.2."""
    kappas = ("activations.kappa=1.5", "activations.kappa_delta=2")
    return configured(
        f"activations.threshold={threshold}", f"activations.trigger={trigger}", *kappas, *more
    )


@pytest.mark.parametrize(
    ("threshold", "trigger", "variants"),
    [
        ("scalar", "gated", 0),
        ("static_t", "always", 0),
        ("static_t", "global_any", 3),
        ("dynamic_full", "gated", 3),
        ("dynamic_residual", "always", 3),
    ],
)
def test_where_the_variant_is_inserted(threshold: str, trigger: str, variants: int) -> None:
    """At sites that may have outliers: two linears and delta; never at B and C."""
    config = _rules(threshold, trigger)
    gm, plan, found = calibrated(Block(), pictures(), config)
    ctx = apply(gm, plan, found, config, passes=(insert_quantize_dequantize,))
    nodes = [node for node in gm.graph.nodes if is_op(node, VARIANT)]
    assert len(nodes) == variants
    assert sum(is_op(node, PLAIN) for node in gm.graph.nodes) == 5 - variants
    assert insert_quantize_dequantize(gm, ctx) is False
    for node in nodes:
        rule = "static" if threshold == "static_t" else threshold
        kappa = 2.0 if node.meta["ouro_site"].endswith("delta") else 1.5
        assert node.args[8:] == (rule, trigger, kappa)
        assert (node.args[3] is None) is (rule != "static")
    assert [note for note in ctx.notes if "not batch invariant, reproduction only" in note] == (
        ctx.notes if trigger == "global_any" else []
    )
    assert len(ctx.notes) == (trigger == "global_any")


def test_always_is_gated_where_thresholds_lie_above_the_range() -> None:
    """METHODS 3.5, on whole outputs; and below the range the variant is inserted after all."""
    x, found = pictures(5, seed=3), {}
    for trigger in ("gated", "always"):
        config = _rules("static_t", trigger)
        gm, plan, table = calibrated(Block(), pictures(), config)
        apply(gm, plan, table, config)
        found[trigger] = gm(x)
    assert torch.equal(found["gated"], found["always"])
    gm, plan, table = calibrated(Block(), pictures(), config)
    for params in table.sites.values():
        params.threshold.mul_(0.5)  # type: ignore[union-attr]
    apply(gm, plan, table, config, passes=(insert_quantize_dequantize,))
    assert sum(is_op(node, VARIANT) for node in gm.graph.nodes) == 3


def test_a_scalar_threshold_is_one_a_site_over_every_range() -> None:
    _, _, per_step = calibrated(Block(), pictures(), _rules("static_t", "gated"))
    _, _, found = calibrated(Block(), pictures(), _rules("scalar", "gated"))
    params, before = found.sites["into.input"], per_step.sites["into.input"]
    threshold = params.threshold  # type: ignore[union-attr]
    limit = 7 * params.scale
    assert torch.equal(params.scale, before.scale)
    raised = threshold > threshold.min() * 1.001
    assert bool((threshold >= limit).all())
    torch.testing.assert_close(threshold[raised], 1.001 * limit[raised], rtol=1e-3, atol=0)
    assert bool((~raised).any())
    assert len(before.threshold.unique()) > len(threshold[~raised].unique()) == 1  # type: ignore[union-attr]


def test_integer_products_read_the_variants_codes() -> None:
    """Fused into the linears as ever; the reference runs the quantizer, and the report says so."""
    model = compiled(_rules("dynamic_residual", "always"))
    nodes = list(model.graph_module.graph.nodes)
    assert sum(is_op(node, LINEAR) for node in nodes) == 2
    assert not any(is_op(node, NORM) for node in nodes)  # a prologue has the plain rule
    kernels = {row["op"]: row for row in model.report["kernels"]}
    row = kernels["quantize_dynamic_outlier_variant"]
    assert (row["kernel"], row["nodes"]) == ("reference", 3)
    assert row["reason"] == "no kernel is generated for this operator"
    assert kernels["linear_dynamic_outlier"]["kernel"].startswith("linear_dynamic_outlier int4")
    shares = {site["name"]: site["outlier_share"] for site in model.report["sites"]}
    assert shares["into.input"] > 0
    assert model.report["outlier_share"] > 0
    assert model.report["notes"] == []
    default = compiled(_rules("static_t", "gated"))
    assert any(is_op(node, NORM) for node in default.graph_module.graph.nodes)
    assert shares["into.input"] != default.report["sites"][0]["outlier_share"]


@pytest.mark.parametrize("threshold", ["static_t", "dynamic_full", "dynamic_residual"])
def test_codes_of_whole_graphs_do_not_depend_on_the_batch(threshold: str) -> None:
    """T5 where the quantizers stand, for every quantizer of the graph."""
    config = _rules(threshold, "always")
    gm, plan, found = calibrated(Block(), pictures(), config)
    apply(gm, plan, found, config, passes=(insert_quantize_dequantize,))
    x = pictures(4, seed=9)
    x[2] *= 30
    together = [value for op in QUANTIZERS for value in values_of(gm, op, x)]
    assert len(together) == 5
    first = [value for op in QUANTIZERS for value in values_of(gm, op, x[:1])]
    for many, alone in zip(together, first, strict=True):
        assert all(torch.equal(a[:1], b) for a, b in zip(many, alone, strict=True))


def test_the_global_trigger_is_noted_in_the_report() -> None:
    (note,) = compiled(_rules("dynamic_residual", "global_any")).report["notes"]
    assert note.startswith("trigger global_any is not batch invariant, reproduction only")


@pytest.mark.parametrize("mode", ["static", "none"])
def test_rules_that_nothing_would_read_are_refused(mode: str) -> None:
    config = _rules("scalar", "gated", f"activations.outliers={mode}")
    with pytest.raises(
        UsageError,
        match=f"^threshold scalar is a rule for dynamic outliers, and outliers are {mode}$",
    ):
        ouro.compile(Block(), pictures(2), config, calibration=pictures())
    with pytest.raises(UsageError, match=r"trigger always is .*, and recipe rtn has none"):
        find_recipe("rtn").configure(_rules("static_t", "always"))


# --- reports and artefacts of simulated recipes


@pytest.mark.parametrize("recipe", SIMULATED)
def test_simulated_artefacts_load_as_they_were(recipe: str, tmp_path: Path) -> None:
    model = compiled(configured(f"recipe={recipe}"))
    rows = {row["name"]: row for row in model.report["layers"]["rows"]}
    assert rows["into"]["status"] == rows["out"]["status"] == "simulated"
    assert rows["into"]["reason"]
    assert rows["into"]["kernel"] is None
    assert model.report["layers"]["simulated"] == model.report["layers"]["quantized"]
    x = pictures(5, seed=4)
    expected = model(x)
    assert not torch.equal(expected, Block()(x))
    model.save(tmp_path / "m.pt2")
    loaded = ouro.load(tmp_path / "m.pt2")
    assert torch.equal(loaded(x), expected)
    assert torch.equal(loaded(x[:1]), model.graph_module(x[:1]))  # one image may run on a tape
    assert loaded.report["config"]["recipe"] == recipe
    kinds = {node.target for node in loaded.graph_module.graph.nodes}
    assert OPS.fake_quantize.default in kinds


@pytest.mark.parametrize("recipe", SIMULATED)
def test_storing_halves_changes_no_code(recipe: str) -> None:
    """Scales, zero points, smoothing and rotations are values that fp16 holds."""
    config = configured(f"recipe={recipe}")
    gm, plan, found = calibrated(Block(), pictures(), config)
    apply(gm, plan, found, config)
    stored, x = compiled(config).graph_module, pictures(3, seed=6)
    first = values_of(gm, OPS.fake_quantize.default, x)[0]
    assert torch.equal(values_of(stored, OPS.fake_quantize.default, x)[0], first)
    assert not [note for note in compiled(config).report["notes"] if "kept in fp32" in note]


def test_an_artefact_of_another_rule_loads_as_it_was(tmp_path: Path) -> None:
    """Its operator has a word, a number and an optional operand among its arguments."""
    model, x = compiled(_rules("dynamic_residual", "always")), pictures(5, seed=4)
    model.save(tmp_path / "m.pt2")
    loaded = ouro.load(tmp_path / "m.pt2")
    assert torch.equal(loaded(x), model(x))
    assert torch.equal(loaded(x[:1]), model.graph_module(x[:1]))


def test_simulated_quantizers_are_inspected_like_others() -> None:
    gm = compiled(configured("recipe=ptq4vm")).graph_module
    rows = [row for row in node_rows(gm) if row["op"] == "ouro.fake_quantize"]
    assert [row["site"] for row in rows] == ["into.input", "out.input"]
    for row in rows:
        assert row["bits"] == 4
        assert row["kernel"] == "reference"
        assert 0 < row["scale"]["min"] <= row["scale"]["median"] <= row["scale"]["max"]
    text = to_dot(build_network(gm))
    (line,) = (one for one in text.splitlines() if "fake_quantize" in one and "into.input" in one)
    assert "4 bit" in line
    assert "#ffe0b2" in line  # the colour of quantizers
    assert any(is_op(node, aten.linear.default) for node in gm.graph.nodes)


# --- the command line


def test_ptq4vm_by_the_command(cli: Cli) -> None:
    args = ("--w8a8", "--recipe", "ptq4vm", "--calibration", "images.npz", "--verify", "test.npz")
    result = cli("vim.safetensors", *args, "-o", "out.pt2")
    assert result.code == 0, result.err
    assert "6 of 12 (6 simulated)" in result.out
    assert "2 scan left in floating point" in result.out
    assert "whatever --ssm" in result.out
    assert "run the reference" in result.out
    loaded = ouro.load("out.pt2")
    assert loaded.report["config"]["recipe"] == "ptq4vm"
    assert loaded.report["logits_snr_db"] > 15


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "snr"), [("ptq4vm", 25), ("quamba", 25), ("rtn", 20)])
def test_recipes_on_the_digits_example(cli: Cli, recipe: str, snr: float) -> None:
    """Measured on 1,000 images and 128 to calibrate: 31.9, 33.6 and 25.1 dB; fewer here."""
    with np.load(EXAMPLES / "digits_test.npz") as held:
        np.savez("few.npz", images=held["images"][:200], labels=held["labels"][:200])
    result = cli(
        str(EXAMPLES / "vim_digits.safetensors"),
        *("--w8a8", "--recipe", recipe, "--images", "64", "-o", "out.pt2"),
        *("--calibration", str(EXAMPLES / "digits_calibration.npz")),
        *("--verify", "few.npz", "--max-drop", "2", "-q"),
    )
    assert (result.code, result.out, result.err) == (0, "", "")
    assert ouro.load("out.pt2").report["logits_snr_db"] > snr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--recipe", "nonsense"), "no recipe is called 'nonsense': the recipes are ouromamba, "),
        (("--recipe", "ptq4vm", "--inlier-scale", "per-tensor"), "ptq4vm has one scale a token"),
        (("--recipe", "rtn", "--set", "activations.trigger=always"), "recipe rtn has none"),
        (("--set", "activations.trigger=sometimes"), "trigger must be one of gated, always,"),
        (("--set", "activations.colour=red"), "there is no setting activations.colour"),
        (("--set", "ptq4vm.alpha"), "a setting is written name=value, got 'ptq4vm.alpha'"),
        (("--set", "ptq4vm.alpha=2"), "alpha of ptq4vm must be in 0 .. 1, got 2.0"),
        (("--set", "quamba.percentile=high"), "quamba.percentile must be of type float"),
        (("--set", "activations.threshold=scalar", "--outliers", "none"), "outliers are none"),
    ],
)
def test_recipes_and_settings_that_are_refused(cli: Cli, args: tuple[str, ...], words: str) -> None:
    refused(cli("vim.safetensors", "--calibration", "noise", *args), 2, words)


def test_settings_reach_the_report(cli: Cli) -> None:
    args = ("--recipe", "quamba", "--set", "quamba.hadamard=false", "--set", "weights.bits=8")
    result = cli("vim.safetensors", "--dry-run", *args, "--report", "r.json")
    assert result.code == 0, result.err
    assert "simulated" in result.out
    config = json.loads(Path("r.json").read_text())["config"]
    assert config["quamba"] == {"percentile": 0.9995, "hadamard": False}
    assert config["weights"]["bits"] == 8
    assert config["activations"]["inlier_bits"] == 4  # the preset's
