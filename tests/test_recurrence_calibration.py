"""Calibration inside a scan: what is observed, chunks, ranges, thresholds, the choice of codes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import fx

from ouro_compiler.calibration import recurrence as module
from ouro_compiler.calibration.expand import expand
from ouro_compiler.calibration.observers import THRESHOLD_MARGIN
from ouro_compiler.calibration.recurrence import RecurrenceObserver, recurrence
from ouro_compiler.calibration.search import (
    BINS,
    logarithmic_from_histogram,
    symmetric_from_histogram,
)
from ouro_compiler.config import DynamicOutlierSpec
from ouro_compiler.graph import DECAY, INPUT, STATE, Calibration, Site, StepParams
from ouro_compiler.ops.selective_scan import selective_scan_ref
from tests.helpers import assert_close, generator, randn

INDICES = {"decay": DECAY, "input": INPUT, "state": STATE}
SPEC = DynamicOutlierSpec(refresh_period=4)


def sites(bits: int = 4, **changes: Any) -> list[Site]:
    node = fx.Graph().placeholder("x")
    node.meta["val"] = torch.empty(1, 6, 11)
    made = {"node": node, "bits": bits, "kind": "ssm", "layer": "l", "transpose": True, **changes}
    return [Site(name=name, index=index, **made) for name, index in INDICES.items()]


def scan(
    batch: int = 5, channels: int = 6, length: int = 11, states: int = 3, *, reverse: bool = False
) -> tuple[Any, ...]:
    """Arguments of selective_scan; channel 2 is much louder than the others."""
    u, delta = randn(1, batch, channels, length), randn(2, batch, channels, length) - 1
    u[:, 2] *= 6
    delta[:, 2] += 9
    A = -torch.rand(channels, states, generator=generator(3)) - 0.2
    B, C = randn(4, batch, states, length), randn(5, batch, states, length)
    return u, delta, A, B, C, None, None, randn(6, channels), True, reverse


def observed(
    batches: list[tuple[Any, ...]], spec: DynamicOutlierSpec = SPEC, bits: int = 4, **changes: Any
) -> dict[str, StepParams]:
    observer = RecurrenceObserver(sites(bits, **changes), spec, sum(len(one[0]) for one in batches))
    for one in batches:
        observer.observe_range(one)
    observer.freeze_range()
    for one in batches:
        observer.observe_histogram(one)
    return observer.params()


def split(arguments: tuple[Any, ...], size: int) -> list[tuple[Any, ...]]:
    batched = (0, 1, 3, 4)
    count = len(arguments[0])
    return [
        tuple(a[i : i + size] if n in batched else a for n, a in enumerate(arguments))
        for i in range(0, count, size)
    ]


@pytest.mark.parametrize("reverse", [False, True])
def test_the_recurrence_is_the_scans(reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its states read by C give what the scan gives, however many samples at a time."""
    arguments = scan(reverse=reverse)
    expected = selective_scan_ref(*arguments)
    for elements in (1, 1 << 20):
        monkeypatch.setattr(module, "_ELEMENTS_AT_ONCE", elements)
        parts = list(recurrence(arguments))
        assert len(parts) == (5 if elements == 1 else 1)
        states = torch.cat([one.state for one in parts], 1)[:, :, 0]  # (L, B, N, D)
        y = torch.einsum("lbnd,bnl->bdl", states, arguments[4])
        assert_close(y, expected, 1e-5)
        decay, arriving = (
            torch.cat([getattr(one, name) for one in parts], 1)[:, :, 0]
            for name in ("decay", "input")
        )
        order = range(10, -1, -1) if reverse else range(11)
        h = torch.zeros_like(states[0])
        for t in order:
            h = decay[t] * h + arriving[t] * arguments[0][:, None, :, t]
            assert_close(h, states[t], 1e-5)
        for one in parts:
            assert torch.equal(one.input_peak, one.input.abs().amax(-2))


def test_streaming_in_batches_changes_nothing() -> None:
    arguments = scan()
    whole, parts = observed([arguments]), observed(split(arguments, 2))
    for name, found in whole.items():
        for field in ("scale", "threshold"):
            a, b = getattr(found, field), getattr(parts[name], field)
            assert a is None or torch.allclose(a, b, rtol=1e-3), (name, field)


def test_scales_cover_the_inliers_and_thresholds_lie_above() -> None:
    found = observed([scan(16, 40)])
    (samples,) = recurrence(scan(16, 40))
    for name in ("input", "state"):
        one = found[name]
        assert one.threshold is not None
        assert one.scale.shape == one.threshold.shape == (11,)
        limit = one.scale * 7
        assert (one.threshold >= THRESHOLD_MARGIN * limit * 0.999).all()
        assert torch.equal(one.threshold, one.threshold.half().float())
        values = getattr(samples, name)
        quiet = values[..., [*range(2), *range(3, 40)]].abs().flatten(1)
        assert (limit < quiet.amax(1) * 1.2).all(), "the loud channel does not set the scale"
        assert (limit > quiet.quantile(0.5, 1)).all()


def test_scales_without_outliers_are_the_clipping_searchs() -> None:
    """Against the search on a histogram made here."""
    (samples,) = recurrence(scan(40))
    found = observed([scan(40)], DynamicOutlierSpec(outliers="none"))["state"]
    values = samples.state.abs().flatten(1)
    peak = values.amax(1)
    histogram = torch.stack(
        [torch.histc(row, BINS, 0.0, float(top)) for row, top in zip(values, peak, strict=True)]
    )
    torch.testing.assert_close(found.scale, symmetric_from_histogram(histogram, peak, 4))
    assert found.threshold is None


@pytest.mark.parametrize("outliers", ["static", "none"])
def test_no_list_without_dynamic_outliers(outliers: str) -> None:
    spec = DynamicOutlierSpec(outliers=outliers)  # type: ignore[arg-type]
    assert observed([scan()], spec)["input"].threshold is None


def test_one_scale_a_site_and_its_expansion() -> None:
    spec = dataclasses.replace(SPEC, inlier_scale="per_tensor")
    found = observed([scan()], spec)
    for one in found.values():
        assert one.steps or len(one.scale.unique()) == 1
    longer = sites()
    longer[0].node.meta["val"] = torch.empty(1, 6, 29)
    expanded = expand(Calibration(sites=found), longer).sites
    assert expanded["state"].scale.shape == (29,)
    assert expanded["state"].scale[0] == found["state"].scale[0]


def decays(median: float) -> tuple[Any, ...]:
    """A scan whose decays lie around a median."""
    arguments = list(scan(16, 8, 12, 4))
    step = -torch.log(torch.tensor(median)) * torch.exp(0.6 * randn(7, 16, 8, 12))
    arguments[1], arguments[2] = step, -torch.ones(8, 4)
    arguments[7], arguments[8] = None, False
    return tuple(arguments)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_decays_near_one_get_logarithmic_codes(bits: int) -> None:
    """METHODS T15, T17: where they are chosen their error is below that of uniform codes."""
    arguments = decays(0.99)
    found = observed([arguments], bits=bits)["decay"]
    assert found.steps > 0
    assert found.scale.shape == (1,)
    (samples,) = recurrence(arguments)
    a = samples.decay.double()
    code = torch.round(-found.steps * torch.log2((1 - a) / float(found.scale)))
    rebuilt = 1 - float(found.scale) * torch.exp2(-code.clamp(0, 2**bits - 1) / found.steps)
    uniform = torch.round(a * (2**bits - 1)) / (2**bits - 1)
    assert (rebuilt - a).square().mean() < (uniform - a).square().mean()


def test_other_decays_get_uniform_codes() -> None:
    found = observed([decays(0.5)], bits=8)["decay"]
    assert found.steps == 0
    assert found.scale.shape == (12,)
    assert found.threshold is None
    assert (found.scale * 255 <= 1.01).all()
    assert (found.scale * 255 > 0.8).all()


def test_the_logarithmic_search_finds_a_grid_it_can_hit() -> None:
    values = 0.4 * torch.exp2(-torch.arange(16, dtype=torch.float64) / 3)
    assert logarithmic_from_histogram(torch.ones(16), values, 4) == (pytest.approx(0.4), 3)


def test_histograms_of_some_channels_are_like_those_of_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One channel in three, in turn: every sample shows others."""
    batches = split(scan(60, 12), 1)
    whole = observed(batches)
    monkeypatch.setattr(module, "_ENTRIES_A_STEP", 12 * 3 * 20)
    some = observed(batches)
    for name in ("input", "state"):
        ratio = some[name].scale / whole[name].scale
        assert ratio.log().abs().median() < 0.3
        assert torch.allclose(some[name].threshold, whole[name].threshold, rtol=0.5)  # type: ignore[arg-type]
