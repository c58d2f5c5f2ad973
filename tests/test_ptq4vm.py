"""Recipe ptq4vm: smoothing, scales a token, zero points in integers, what stays as it is."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ouro_compiler as ouro
from ouro_compiler.errors import UsageError
from ouro_compiler.graph import QParams, UniformParams, is_op
from ouro_compiler.passes.insert_fake_quantize import insert_fake_quantize
from ouro_compiler.recipes import find_recipe
from ouro_compiler.recipes.ptq4vm import smoothing
from tests.helpers import randn
from tests.models import images, small_vim
from tests.recipe_graphs import apply, calibrated, compiled, configured, values_of

OPS = torch.ops.ouro
FAKE, LINEAR = OPS.fake_quantize.default, OPS.linear_dynamic_outlier.default
ASYMMETRIC = configured("recipe=ptq4vm")
SYMMETRIC = configured("recipe=ptq4vm", "ptq4vm.asymmetric=false")


class TwoLinears(nn.Module):
    """Two linears that read one activation (B, L, 12), for smoothing vectors of their own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(12, 5), nn.Linear(12, 7, bias=False)
        self.requires_grad_(False)
        self.b.weight[:, 3] *= 30

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x)], -1)


def tokens(count: int = 8, seed: int = 0) -> Tensor:
    """(count, 9, 12): one loud channel, a mean that is not 0, louder last tokens."""
    x = randn(seed, count, 9, 12) * torch.linspace(0.5, 2.0, 9)[:, None] + 0.7
    x[..., 2] *= 20
    return x


# --- smoothing (T21)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.65, 1.0])
def test_smoothing_is_the_published_formula_and_cancels(alpha: float) -> None:
    x, weight = tokens(), randn(1, 5, 12)
    x[..., 4], weight[:, 5] = 0.0, 0.0  # a silent channel, and one that no output reads
    peaks = x.abs().amax((0, 1))
    found = smoothing(peaks, weight, alpha)
    expected = [
        max(max(float(a), 1e-3) ** alpha / max(float(w), 1e-5) ** (1 - alpha), 1e-5)
        for a, w in zip(peaks, weight.abs().amax(0), strict=True)
    ]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-3, atol=0)
    identity = F.linear(x / found, weight * found)
    torch.testing.assert_close(identity, F.linear(x, weight), rtol=1e-4, atol=1e-4)


def test_alpha_moves_the_range_of_activations() -> None:
    """alpha 1 makes every channel's largest smoothed magnitude 1; alpha 0 every column's."""
    x, weight = tokens(), randn(1, 5, 12)
    peaks = x.abs().amax((0, 1))
    whole = (x / smoothing(peaks, weight, 1.0)).abs().amax((0, 1))
    torch.testing.assert_close(whole, torch.ones(12), rtol=1e-3, atol=0)
    none = (weight * smoothing(peaks, weight, 0.0)).abs().amax(0)
    torch.testing.assert_close(none, torch.ones(12), rtol=1e-3, atol=0)


def test_every_linear_has_its_own_smoothing() -> None:
    x = tokens()
    _, plan, found = calibrated(TwoLinears(), x, ASYMMETRIC)
    assert [site.name for site in plan.sites] == ["a.input", "b.input"]
    vectors = [found.sites[name].smooth for name in ("a.input", "b.input")]
    peaks, model = x.abs().amax((0, 1)), TwoLinears()
    for vector, layer in zip(vectors, (model.a, model.b), strict=True):
        assert vector is not None
        assert torch.equal(vector, smoothing(peaks, layer.weight, 0.5))
    assert not torch.equal(*vectors)


# --- calibration


def test_scales_are_of_tokens_and_weights_of_outputs() -> None:
    _, _, found = calibrated(TwoLinears(), tokens(), ASYMMETRIC)
    for name, outputs in (("a", 5), ("b", 7)):
        params, weight = found.sites[f"{name}.input"], found.weights[name]
        assert isinstance(params, UniformParams)
        assert params.zero_point is not None
        assert params.scale.shape == params.zero_point.shape == (9, 1)
        assert bool(((params.zero_point >= 0) & (params.zero_point <= 15)).all())
        assert torch.equal(params.zero_point, params.zero_point.round())
        assert weight.codes.shape == (outputs, 12)
        assert weight.scale.shape == (outputs,)
        assert params.scale[-1] > 1.5 * params.scale[0]  # the last tokens are louder


def test_the_order_and_the_batches_of_images_change_nothing() -> None:
    x = tokens(9)
    _, _, found = calibrated(TwoLinears(), x, ASYMMETRIC, batch_size=3)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    _, _, other = calibrated(TwoLinears(), x[order], ASYMMETRIC, batch_size=4)
    for name, params in found.sites.items():
        again = other.sites[name]
        assert torch.equal(params.scale, again.scale)
        assert params.smooth is not None
        assert again.smooth is not None
        assert torch.equal(params.smooth, again.smooth)
    for name, weight in found.weights.items():
        assert torch.equal(weight.codes, other.weights[name].codes)


# --- at run time


def test_codes_of_a_sample_and_of_a_token_are_its_own() -> None:
    gm, plan, table = calibrated(TwoLinears(), tokens(), ASYMMETRIC)
    apply(gm, plan, table, ASYMMETRIC)
    x = tokens(4, seed=5)
    first = values_of(gm, FAKE, x)
    assert len(first) == 2
    order = torch.tensor([2, 0, 3, 1])
    for before, permuted in zip(first, values_of(gm, FAKE, x[order]), strict=True):
        assert torch.equal(before[order], permuted)
    changed = x.clone()
    changed[:, 4] = 3 * x[:, 4] + 1
    others = torch.arange(9) != 4
    for before, after in zip(first, values_of(gm, FAKE, changed), strict=True):
        assert torch.equal(before[:, others], after[:, others])
        assert not torch.equal(before[:, 4], after[:, 4])


@pytest.mark.parametrize("preset", ["w4a4", "w8a8"])
def test_zero_points_in_integers_equal_the_simulation(preset: str) -> None:
    """T22: an int64 product minus zero point times the row sums of the weight's codes."""
    config = configured("recipe=ptq4vm", preset=preset)
    gm, plan, found = calibrated(TwoLinears(), tokens(), config)
    apply(gm, plan, found, config)
    x, model = tokens(4, seed=5), TwoLinears()
    results = []
    for name, layer in (("a", model.a), ("b", model.b)):
        params, weight = found.sites[f"{name}.input"], found.weights[name]
        assert isinstance(params, UniformParams)
        assert params.zero_point is not None
        assert params.smooth is not None
        top = 2**config.activations.inlier_bits - 1
        codes = (x / params.smooth / params.scale).round() + params.zero_point
        codes, rows = codes.clamp(0, top).long(), weight.codes.long()
        zeros = params.zero_point.long()
        exact = codes @ rows.t() - zeros * rows.sum(1)
        assert (zeros > 0).any()
        y = exact.double() * params.scale.double() * weight.scale.double()
        results.append(y if layer.bias is None else y + layer.bias.double())
    torch.testing.assert_close(gm(x).double(), torch.cat(results, -1), rtol=1e-5, atol=1e-5)


def test_sixteen_bits_are_nearly_floating_point() -> None:
    """Smoothing loses nothing: with fine codes only the weights' error is left (METHODS 6.5)."""
    config = configured("recipe=ptq4vm", preset="w8a8")
    gm, plan, _ = calibrated(TwoLinears(), tokens(), config)
    plan.sites = [dataclasses.replace(site, bits=16) for site in plan.sites]
    recipe = find_recipe("ptq4vm")
    fine = recipe.calibrate(
        gm, plan, recipe.configure(config), ouro.compiler.TensorImages(tokens()), batch_size=4
    )
    apply(gm, plan, fine, config, passes=(insert_fake_quantize,))
    x, model = tokens(), TwoLinears()
    parts = []
    for name, layer in (("a", model.a), ("b", model.b)):
        smooth, weight = fine.sites[f"{name}.input"].smooth, fine.weights[name]
        assert smooth is not None
        used = weight.codes * weight.scale[:, None] / smooth
        parts.append(F.linear(x, used, layer.bias))
    expected = torch.cat(parts, -1)
    assert float((gm(x) - expected).norm() / expected.norm()) < 1e-3
    assert float((gm(x) - model(x)).norm() / model(x).norm()) < 0.02


# --- what becomes of layers


def test_the_published_form_is_simulated() -> None:
    report = compiled(ASYMMETRIC).report
    rows = {row["name"]: row for row in report["layers"]["rows"]}
    linears = [row for row in rows.values() if row["status"] == "simulated"]
    assert [row["name"] for row in linears] == ["into", "out"]
    assert report["layers"]["quantized"] == 2
    assert all("ptq4vm.asymmetric=false" in row["reason"] for row in linears)
    assert rows["selective_scan"]["status"] == "skipped"
    assert rows["selective_scan"]["reason"] == (
        "the recipe leaves scans in floating point, whatever --ssm says"
    )
    assert [site["outlier_bits"] for site in report["sites"]] == [None, None]
    assert report["outlier_share"] == 0
    # 16 tokens, steps and zero points in 2 bytes, and a smoothing vector a site
    scales = report["bytes"]["by_part"]["activation scales"]["stored"]
    assert scales == 2 * 16 * 2 * 2 + (8 + 12) * 2
    (row,) = (row for row in report["kernels"] if row["op"] == "fake_quantize")
    assert (row["kernel"], row["nodes"]) == ("reference", 2)
    assert "no kernel" in row["reason"]


def test_without_zero_points_integer_kernels_run_it() -> None:
    report = compiled(SYMMETRIC).report
    linears = [row for row in report["layers"]["rows"] if row["status"] == "quantized"]
    assert [row["name"] for row in linears] == ["into", "out"]
    assert all(row["kernel"].startswith("linear_dynamic_outlier int4") for row in linears)
    kernels = {row["op"]: row for row in report["kernels"]}
    assert kernels["quantize_dynamic_outlier"]["kernel"] != "reference"
    assert "fake_quantize" not in kernels
    assert report["outlier_share"] == 0
    assert report["logits_snr_db"] > 3


def test_the_integer_form_equals_codes_in_int64() -> None:
    gm, plan, found = calibrated(TwoLinears(), tokens(), SYMMETRIC)
    apply(gm, plan, found, SYMMETRIC)
    assert sum(is_op(node, LINEAR) for node in gm.graph.nodes) == 2
    x, model, parts = tokens(4, seed=5), TwoLinears(), []
    for name, layer in (("a", model.a), ("b", model.b)):
        params, weight = found.sites[f"{name}.input"], found.weights[name]
        assert isinstance(params, QParams)
        assert bool(params.threshold.isinf().all())
        codes = (x / params.smooth / params.scale[:, None]).round().clamp(-7, 7).long()
        y = (codes @ weight.codes.long().t()).double() * params.scale.double()[:, None]
        y = y * weight.scale.double()
        parts.append(y if layer.bias is None else y + layer.bias.double())
    torch.testing.assert_close(gm(x).double(), torch.cat(parts, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", ["w4a8", "w8a8"])
def test_the_integer_form_reads_no_floating_point(preset: str) -> None:
    """Presets that keep outliers in floating point have none to keep here."""
    config = configured("recipe=ptq4vm", "ptq4vm.asymmetric=false", preset=preset)
    gm, plan, found = calibrated(TwoLinears(), tokens(), config)
    apply(gm, plan, found, config)
    linears = [node for node in gm.graph.nodes if is_op(node, LINEAR)]
    assert [node.args[4] for node in linears] == [None, None]


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("activations.inlier_scale=per_tensor", "ptq4vm has one scale a token: --inlier-scale"),
        ("activations.trigger=always", "trigger always is a rule for dynamic outliers, and recipe"),
        ("activations.threshold=scalar", "threshold scalar is a rule for dynamic outliers, and"),
    ],
)
def test_settings_that_it_cannot_mean(setting: str, sentence: str) -> None:
    config = configured("recipe=ptq4vm", setting)
    with pytest.raises(UsageError, match=sentence):
        find_recipe("ptq4vm").configure(config)


def test_images_of_another_resolution_are_refused() -> None:
    other = randn(0, 4, 1, 20, 20)
    with pytest.raises(
        UsageError, match=r"are 20x20 .* compiled for 28x28: .* so calibrate on images of 28x28$"
    ):
        ouro.compile(small_vim(), images(2), ASYMMETRIC, calibration=other)
