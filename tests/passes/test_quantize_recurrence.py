"""quantize_recurrence: fires on scans with sites inside, leaves others alone, equals, ends."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, fx, nn

import ouro_compiler as ouro
from ouro_compiler.config import QuantConfig
from ouro_compiler.frontend.capture import capture
from ouro_compiler.graph import (
    DECAY,
    INPUT,
    OUTPUT,
    STATE,
    Calibration,
    Site,
    StepParams,
    argument,
    is_op,
)
from ouro_compiler.passes import NORMALIZE
from ouro_compiler.passes.base import PassContext, run_passes
from ouro_compiler.passes.insert_quantize_dequantize import insert_quantize_dequantize
from ouro_compiler.passes.quantize_recurrence import quantize_recurrence
from ouro_compiler.recipes import find_recipe
from tests.helpers import randn
from tests.models import images, small_vim

OURO = torch.ops.ouro
SCAN, QUANTIZED = OURO.selective_scan.default, OURO.quantized_selective_scan.default
QUANTIZE = OURO.quantize_dynamic_outlier.default
FULL = dataclasses.replace(ouro.W4A4, ssm="full")


def calls(gm: fx.GraphModule, target: object) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if is_op(node, target)]


class Images:
    """Calibration images of a test."""

    description, labels = "noise", None

    def __len__(self) -> int:
        return 16

    def batches(self, size: int) -> list[Tensor]:
        return list(images().split(size))


def quantized(config: QuantConfig, depth: int = 1) -> tuple[fx.GraphModule, PassContext]:
    """small_vim up to and with the pass."""
    gm = capture(small_vim(depth), images(2))
    run_passes(gm, NORMALIZE, PassContext(config=config))
    recipe = find_recipe(config.recipe)
    plan = recipe.plan(gm, config)
    found = recipe.calibrate(gm, plan, config, Images(), batch_size=8)
    ctx = PassContext(config=config, sites=plan.sites, calibration=found)
    run_passes(gm, (insert_quantize_dequantize, quantize_recurrence), ctx)
    return gm, ctx


class Scan(nn.Module):
    """One scan of tokens (B, L, 6), two states."""

    def __init__(self, *, softplus: bool = True, bias: bool = True) -> None:
        super().__init__()
        self.softplus = softplus
        self.A = nn.Parameter(-torch.rand(6, 2, generator=torch.Generator().manual_seed(0)) - 0.1)
        self.bias = nn.Parameter(randn(1, 6)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        u = x.transpose(1, 2)
        delta = u if self.softplus else u.abs()
        B, C = u[:, :2], u[:, 2:4]
        y = OURO.selective_scan(u, delta, self.A, B, C, None, u, self.bias, self.softplus, True)
        return y * 1


def with_sites(model: nn.Module, params: dict[int, StepParams], bits: int) -> fx.GraphModule:
    """A scan's graph, with these parameters and none for its other operands."""
    gm = capture(model, randn(1, 2, 9, 6))
    (scan,) = calls(gm, SCAN)
    sites = [
        Site(name=f"s{-i}", node=scan, index=i, bits=bits, kind="ssm", layer="l", transpose=True)
        for i in params
    ]
    calibration = Calibration(sites={f"s{-i}": one for i, one in params.items()})
    ctx = PassContext(config=ouro.W8A8, sites=sites, calibration=calibration)
    assert run_passes(gm, (quantize_recurrence,), ctx)
    assert not quantize_recurrence(gm, ctx), "a second run has nothing to do"
    return gm


def test_fires_on_every_scan_with_sites() -> None:
    gm, ctx = quantized(FULL)
    assert not calls(gm, SCAN)
    scans = calls(gm, QUANTIZED)
    assert [argument(one, "reverse") for one in scans] == [False, True]
    assert [one.meta["ouro_layer"] for one in scans] == [
        "layers.0.mixer.selective_scan",
        "layers.0.mixer.selective_scan_reverse",
    ]
    for scan in scans:
        for name in ("input_scale", "input_threshold", "state_scale", "state_threshold"):
            assert argument(scan, name).op == "get_attr"
        assert argument(scan, "state_factor") is None
    # in_proj, two x_proj (shared with u), two dt_proj, out_proj; delta, B, C, z, y a direction
    assert len(calls(gm, QUANTIZE)) == 6 + 2 * 5
    assert quantize_recurrence(gm, ctx) is False


def test_u_and_x_proj_share_one_quantizer() -> None:
    gm, ctx = quantized(FULL)
    names = [site.name for site in ctx.sites]
    assert names.count("layers.0.mixer.x_proj.input") == 2
    assert "layers.0.mixer.selective_scan.u" not in names
    for scan in calls(gm, QUANTIZED):
        u = argument(scan, "u")
        assert is_op(u, torch.ops.aten.transpose.int)
        assert is_op(u.args[0], OURO.dequantize_dynamic_outlier.default)
        assert len(u.args[0].users) == 2, "x_proj reads it too"


def test_what_a_scan_returns_is_quantized() -> None:
    gm, ctx = quantized(FULL)
    outputs = [site for site in ctx.sites if site.index == OUTPUT]
    assert len(outputs) == 2
    for scan in calls(gm, QUANTIZED):
        (tokens,) = scan.users
        assert is_op(tokens, torch.ops.aten.transpose.int)
        assert all(is_op(user, QUANTIZE) for user in tokens.users)


def test_leaves_other_coverage_alone() -> None:
    gm, _ = quantized(ouro.W4A4)
    assert len(calls(gm, SCAN)) == 2
    assert not calls(gm, QUANTIZED)


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_without_rounding_it_is_the_scan(softplus: bool, bias: bool) -> None:
    """Thresholds of zero list every channel, and 16-bit outliers stay in floating point."""
    model = Scan(softplus=softplus, bias=bias).eval().requires_grad_(False)
    everything = StepParams(scale=torch.ones(9), threshold=torch.zeros(9))
    gm = with_sites(model, {INPUT: everything, STATE: everything}, 8)
    x = randn(2, 3, 9, 6)
    torch.testing.assert_close(gm(x), model(x), rtol=1e-5, atol=1e-5)
    decay = StepParams(scale=torch.full((9,), 1 / 255))
    gm = with_sites(model, {DECAY: decay}, 8)
    error = (gm(x) - model(x)).norm() / model(x).norm()
    assert 1e-4 < error < 0.05


def test_a_logarithmic_decay_is_two_numbers() -> None:
    model = Scan().eval().requires_grad_(False)
    gm = with_sites(model, {DECAY: StepParams(scale=torch.tensor([1.0]), steps=16)}, 8)
    (scan,) = calls(gm, QUANTIZED)
    assert argument(scan, "decay_scale") is None
    assert (argument(scan, "decay_limit"), argument(scan, "decay_steps")) == (1.0, 16)
    x = randn(2, 3, 9, 6)
    assert (gm(x) - model(x)).norm() < 0.05 * model(x).norm()


def test_a_state_may_have_factors_and_be_read_before_rounding() -> None:
    model = Scan().eval().requires_grad_(False)
    state = StepParams(
        scale=torch.full((9,), 0.05), factor=torch.full((6, 2), 2.0), before_rounding=True
    )
    gm = with_sites(model, {STATE: state}, 8)
    (scan,) = calls(gm, QUANTIZED)
    assert argument(scan, "output_before_rounding") is True
    assert argument(scan, "state_factor").op == "get_attr"


def test_a_sample_does_not_depend_on_its_batch() -> None:
    """Softplus is written out: ATen's own rounds differently at the end of a tensor."""
    model = Scan().eval().requires_grad_(False)
    state = StepParams(scale=torch.full((9,), 0.1), threshold=torch.full((9,), 13.0))
    gm = with_sites(model, {STATE: state}, 8)
    x = randn(5, 7, 9, 6)
    together = gm(x)
    for index in range(7):
        assert torch.equal(gm(x[index : index + 1])[0], together[index])


def test_rows_say_which_settings_do_not_reach_the_recurrence() -> None:
    gm = capture(small_vim(), images(2))
    run_passes(gm, NORMALIZE, PassContext(config=FULL))
    for setting, sentence in (
        ("activations.outliers=dynamic", "on dequantized values"),
        ("activations.outliers=static", "where a fixed list has no meaning"),
        ("activations.trigger=always", "whatever the settings"),
    ):
        config = FULL.with_setting(setting)
        rows = find_recipe(config.recipe).plan(gm, config).rows
        reasons = [row.reason for row in rows if row.kind == "scan"]
        assert len(reasons) == 2
        assert all(reason is not None and reason.endswith(sentence) for reason in reasons)
