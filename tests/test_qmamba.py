"""QMamba end to end, and what happens inside scans while it is calibrated (METHODS 7)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import ouro_compiler as ouro
from ouro_compiler.calibration.clusters import contiguous_groups
from ouro_compiler.calibration.coordinate_search import scaled, search_linear, search_scales
from ouro_compiler.calibration.scan_states import ScanInputs, ScanObserver
from ouro_compiler.calibration.search import weight_scale
from ouro_compiler.config import QuantConfig
from ouro_compiler.errors import UsageError
from ouro_compiler.graph import StepParams, UniformParams, argument, is_op
from ouro_compiler.recipes import qmamba
from ouro_compiler.recipes.planning import Plan
from tests.command_line import Cli, cli  # noqa: F401  (a fixture)
from tests.helpers import assert_close, generator, mamba_selective_scan_ref, randn
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

SCAN = torch.ops.ouro.quantized_selective_scan.default
SCANS = ("layers.0.mixer.selective_scan", "layers.0.mixer.selective_scan_reverse")
CHANNELS, STATES, LENGTH = 5, 3, 12


def config(preset: QuantConfig = ouro.W8A8, *settings: str) -> QuantConfig:
    found = dataclasses.replace(preset, recipe="qmamba")
    for setting in settings:
        found = found.with_setting(setting)
    return found


def scan(seed: int = 0, reverse: bool = False) -> ScanInputs:
    return ScanInputs(
        u=randn(seed, 2, CHANNELS, LENGTH),
        step=randn(seed + 1, 2, CHANNELS, LENGTH).abs() * 0.3,
        A=-1 - 3 * torch.rand(CHANNELS, STATES, generator=generator(seed + 2)),
        B=randn(seed + 3, 2, STATES, LENGTH),
        C=randn(seed + 4, 2, STATES, LENGTH),
        D=None,
        z=None,
        reverse=reverse,
    )


# --- inside scans


def states_by_mamba(one: ScanInputs) -> Tensor:
    """h (B, D, N, L), each state read by a C of its own through mamba_ssm's reference."""
    u, step, B = ((t.flip(-1) if one.reverse else t) for t in (one.u, one.step, one.B))
    found = []
    for n in range(STATES):
        C = torch.zeros_like(B)
        C[:, n] = 1
        found.append(mamba_selective_scan_ref()(u, step, one.A, B, C))
    h = torch.stack(found, 2)
    return h.flip(-1) if one.reverse else h


@pytest.mark.parametrize("reverse", [False, True])
def test_states_are_those_of_the_scan(reverse: bool) -> None:
    made = scan(reverse=reverse)
    states = dict(made.states())
    assert list(states) == list(range(LENGTH))[:: -1 if reverse else 1]
    stacked = torch.stack([states[t] for t in range(LENGTH)], -1)
    assert_close(stacked, states_by_mamba(made), 1e-5)


def test_inputs_of_a_scan_are_those_of_the_op() -> None:
    """delta_bias and softplus are in the step; groups of B reach their channels."""
    u, delta, bias = randn(0, 2, 4, 7), randn(1, 2, 4, 7), randn(2, 4)
    B = randn(3, 2, 2, 3, 7)
    found = ScanInputs.of([u, delta, -torch.ones(4, 3), B, B, None, None, bias, True, False])
    assert_close(found.step, torch.nn.functional.softplus(delta + bias[:, None]), 1e-6)
    arriving = found.arriving(5)
    assert_close(arriving[:, 3], found.step[:, 3, 5, None] * B[:, 1, :, 5], 1e-6)
    assert_close(arriving[:, 1], found.step[:, 1, 5, None] * B[:, 0, :, 5], 1e-6)


def observed(batches: list[ScanInputs], groups: int) -> ScanObserver:
    observer = ScanObserver(seed=0)
    for one in batches:
        observer.observe_range(one)
    observer.group(contiguous_groups(LENGTH, groups))
    for one in batches:
        observer.observe_histogram(one)
    return observer


def test_observed_ranges() -> None:
    batches = [scan(0), scan(100)]
    observer = observed(batches, 4)
    states = torch.cat([states_by_mamba(one) for one in batches])
    assert_close(observer.state_peak, states.abs().amax((0, 1, 2)), 1e-5)
    arriving = torch.cat([one.step[:, :, None] * one.B[:, None] for one in batches])
    assert_close(observer.input_peak, arriving.abs().amax((0, 1, 2)), 1e-6)
    decays = [torch.exp(one.step[..., None] * one.A[:, None]) for one in batches]
    least = min(float(one.min()) for one in decays)
    assert observer.least_decay <= least * (1 + 1e-6)
    sample = observer.decay_sample()
    everything = torch.cat([one.flatten() for one in decays])
    assert float(sample.mean()) == pytest.approx(float(everything.mean()), rel=0.1)
    assert observer.input_histogram.sum() == arriving.numel()


def test_one_scale_a_group() -> None:
    """T16: shared inside a group, and of its own steps alone."""
    before = observed([scan()], 4)
    changed = scan()
    changed.B[..., -3:] *= 50  # what the last group of a forward scan sees
    after = observed([changed], 4)
    for index in range(2):
        first, second = before.scales(8)[index], after.scales(8)[index]
        assert len(first.unique()) == 4
        assert torch.equal(first.view(4, 3), first.view(4, 3)[:, :1].expand(4, 3))
        assert torch.equal(first[:-3], second[:-3])
        assert bool((second[-3:] > 5 * first[-3:]).all())


def test_groups_follow_the_scan() -> None:
    """The longer groups are the first that a scan walks through; k-means groups sizes of states."""
    made = qmamba._Search(Plan(), config(), {})
    made.reverse = {"forward": False, "backward": True}
    observer = ScanObserver(0)
    observer.state_peak = torch.rand(11, generator=generator(0))
    assert made._groups("forward", observer).bincount().tolist() == [2, 2, 2, 1, 1, 1, 1, 1]
    assert made._groups("forward", observer)[:2].tolist() == [0, 0]
    assert made._groups("backward", observer)[-2:].tolist() == [0, 0]
    loud = qmamba._Search(
        Plan(), config(ouro.W8A8, "qmamba.grouping=kmeans", "qmamba.groups=2"), {}
    )
    observer.state_peak = torch.tensor([1.0, 90.0, 1.1, 0.0, 100.0])
    assert loud._groups("forward", observer).tolist() in ([1, 1, 1, 0, 1], [0, 1, 0, 0, 1])


# --- the search


def test_the_search_finds_the_best_corner() -> None:
    """A bowl over two scales: every coordinate ends at its best multiple, fixed ones stay."""

    def error(scales: dict[str, Tensor]) -> float:
        return float((scales["a"] - 0.7).abs() + (scales["b"] - 2 * 1.2).abs() + scales["c"].sum())

    start = {"a": torch.tensor(1.0), "b": torch.tensor(2.0), "c": torch.tensor([0.25])}
    found = search_scales(start, error, 3)
    assert float(found["a"]) == float(scaled(torch.tensor(1.0), 0.7))
    assert float(found["b"]) == float(scaled(torch.tensor(2.0), 1.2))
    assert float(found["c"]) == 0.125
    assert search_scales(start, error, 0) == start


def test_the_search_of_a_linear_lessens_its_error() -> None:
    x, weight = randn(0, 3, 20, 16), randn(1, 12, 16)
    x[..., 0] *= 6
    start = UniformParams(scale=(x.amax() - x.amin())[None] / 15, zero_point=torch.tensor([8.0]))

    def error(activation: UniformParams, codes: Tensor, scale: Tensor) -> float:
        made = torch.round(x / activation.scale) + 8
        rounded = (made.clamp(0, 15) - 8) * activation.scale
        product = rounded @ (codes.float() * scale[:, None]).T
        return float((product - x @ weight.T).square().mean())

    rows = weight_scale(weight, 4)
    found = [
        search_linear(x, weight, start, rows, bits=4, weight_bits=4, rounds=rounds)
        for rounds in (0, 1, 3)
    ]
    errors = [error(activation, one.codes, one.scale) for activation, one in found]
    assert errors[1] < 0.9 * errors[0]
    assert errors[2] <= errors[1]
    assert torch.equal(found[0][1].scale, rows)
    assert torch.equal(found[0][0].scale, start.scale)


# --- end to end


@pytest.mark.parametrize("preset", ["w8a8", "w4a4"])
def test_scales_of_every_scan(preset: str) -> None:
    plan, found = calibrated(config(ouro.PRESETS[preset], "qmamba.search_rounds=1"))
    rows = {row.name: row for row in plan.rows}
    for name in SCANS:
        for operand in ("input", "state"):
            params = found.sites[f"{name}.{operand}"]
            assert isinstance(params, StepParams)
            assert params.scale.shape == (50,)
            assert 1 < len(params.scale.unique()) <= 8
            assert params.threshold is params.factor is None
            assert not params.before_rounding
        decay = found.sites[f"{name}.decay"]
        assert isinstance(decay, StepParams)
        assert decay.scale.shape == ((1,) if decay.steps else (50,))
        assert rows[name].status == "simulated"
        assert "recurrence" in str(rows[name].reason)
        assert ("LtSQ" in str(rows[name].reason)) == (decay.steps > 0)
        assert found.sites[f"{name}.u"].scale.shape == (1,)
    assert all(site.bits == (8 if preset == "w8a8" else 4) for site in plan.sites)
    assert found.weights.keys() == {
        row.name for row in plan.rows if row.kind == "linear" and row.name != "head"
    }


def test_scans_stay_without_ssm() -> None:
    plan, found = calibrated(config(ouro.W8A8, "ssm=none", "qmamba.search_rounds=0"))
    rows = {row.name: row for row in plan.rows}
    assert "ssm = none" in str(rows["layers.0.mixer.selective_scan"].reason)
    assert not any("scan" in name for name in found.sites)
    assert all(site.kind == "linear" for site in plan.sites)


@pytest.mark.parametrize("decay", ["uniform", "plain", "calibrated"])
def test_the_decays_code_is_the_setting(decay: str) -> None:
    settings = (f"qmamba.decay={decay}", "qmamba.skewness=0", "qmamba.search_rounds=1")
    found = calibrated(config(ouro.W8A8, *settings))[1].sites
    for params in (found[f"{name}.decay"] for name in SCANS):
        assert isinstance(params, StepParams)
        if decay == "uniform":
            assert params.steps == 0
        elif decay == "plain":
            assert (params.steps, float(params.scale)) == (1, 1.0)
        else:
            assert params.steps > 1
            assert 0 < float(params.scale) <= 1.2


def test_calibration_is_deterministic() -> None:
    made = config(ouro.W8A8, "qmamba.search_rounds=1")
    first, second = (calibrated(made)[1] for _ in range(2))
    for name, params in first.sites.items():
        assert torch.equal(params.scale, second.sites[name].scale)
    for name, weight in first.weights.items():
        assert torch.equal(weight.codes, second.weights[name].codes)
        assert torch.equal(weight.scale, second.weights[name].scale)


def test_images_that_are_not_finite_are_refused() -> None:
    broken = images(4).clone()
    broken[1, 0, 3, 3] = np.nan
    with pytest.raises(UsageError, match="not finite"):
        calibrated(config(), broken)


def test_layers_that_are_excluded_stay() -> None:
    rows = {row.name: row for row in planned(config(ouro.W8A8, "exclude=*x_proj*,*reverse")).rows}
    assert rows["layers.0.mixer.x_proj"].status == "skipped"
    assert rows["layers.0.mixer.selective_scan"].status == "simulated"
    assert rows["layers.0.mixer.selective_scan_reverse"].status == "skipped"


def test_a_compiled_model(tmp_path: Path) -> None:
    """Scans run quantized; files and batches change nothing."""
    model = compiled_vim(config())
    scans = [node for node in model.graph_module.graph.nodes if is_op(node, SCAN)]
    assert len(scans) == 2
    assert all(argument(node, "state_scale") is not None for node in scans)
    rows = {row["name"]: row for row in model.report["layers"]["rows"]}
    assert rows["layers.0.mixer.selective_scan"]["status"] == "simulated"
    assert rows["layers.0.mixer.in_proj"]["status"] == "simulated"
    assert rows["head"]["status"] == "skipped"
    sites = {row["name"] for row in model.report["sites"]}
    assert {f"layers.0.mixer.selective_scan.{name}" for name in ("u", "input", "state")} <= sites
    assert_survives_a_file(model, tmp_path)
    assert_batch_invariant_model(model)


@pytest.mark.slow
def test_digits_keep_their_class() -> None:
    assert_close_to_floating_point(digits("vim", config()), snr_db=15.0)


@pytest.mark.slow
def test_a_vmamba() -> None:
    """Four scans a block, over two orders of the tokens, forwards and backwards."""
    model = compiled_vmamba(config(ouro.W8A8, "qmamba.search_rounds=1"))
    rows = [row for row in model.report["layers"]["rows"] if row["kind"] == "scan"]
    assert len(rows) == 4
    assert all(row["status"] == "simulated" for row in rows)
    reverse = {row["name"]: row["reverse"] for row in model.report["sites"]}
    assert sum(reverse[f"{row['name']}.state"] for row in rows) == 2
    assert model.report["logits_snr_db"] > 15


def test_the_command(cli: Cli) -> None:  # noqa: F811
    result = cli(
        *("vim.safetensors", "--w4a8", "--recipe", "qmamba", "--calibration", "images.npz"),
        *("--set", "qmamba.grouping=kmeans", "--set", "qmamba.search_rounds=1"),
        *("--report", "report.json", "-q"),
    )
    assert result.code == 0, result.err
    report = json.loads(Path("report.json").read_text())
    assert report["config"]["qmamba"]["grouping"] == "kmeans"
    assert report["layers"]["simulated"] == 6 + 2
    artefact = ouro.load(Path("vim.w4a8.pt2"))
    assert artefact(images(2)).shape == (2, 10)
