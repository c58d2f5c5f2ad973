"""Observers and calibration: masks, ranges, thresholds, and that streaming changes nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, fx

from ouro_compiler.calibration.calibrate import calibrate
from ouro_compiler.calibration.observers import THRESHOLD_MARGIN, SiteObserver, windowed_or
from ouro_compiler.config import DynamicOutlierSpec, OutlierMode
from ouro_compiler.errors import UsageError
from ouro_compiler.graph import QParams, Site
from ouro_compiler.ops.quantize import inlier_interval


def make_site(**overrides: object) -> Site:
    node = fx.Graph().placeholder("x")
    values = {"name": "s", "node": node, "index": 0, "bits": 4, "kind": "linear", "layer": "l"}
    return Site(**{**values, **overrides})  # type: ignore[arg-type]


def observe(site: Site, outliers: OutlierMode, batches: list[Tensor]) -> QParams:
    observer = SiteObserver(site, DynamicOutlierSpec(outliers=outliers, refresh_period=4))
    for batch in batches:
        observer.observe_range(batch)
    observer.freeze_range()
    for batch in batches:
        observer.observe_histogram(batch)
    return observer.qparams()


def activations(batch: int = 12, length: int = 10, channels: int = 64) -> Tensor:
    x = torch.randn(batch, length, channels, generator=torch.Generator().manual_seed(0))
    x[:, :, 3] *= 12
    return x


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("length", "period"), [(10, 4), (8, 4), (3, 3), (7, 1)])
def test_windowed_or_equals_a_loop(length: int, period: int, reverse: bool) -> None:
    mask = torch.rand(2, length, 5, generator=torch.Generator().manual_seed(1)) < 0.2
    expected = mask.clone()
    for step in range(length):
        token = length - 1 - step if reverse else step
        before = token + 1 if reverse else token - 1
        if step % period:
            expected[:, token] |= expected[:, before]
    assert torch.equal(windowed_or(mask, period, reverse), expected)


def test_streaming_in_batches_changes_nothing() -> None:
    x = activations()
    for outliers in ("none", "static", "dynamic"):
        for asymmetric in (False, True):
            site = make_site(asymmetric=asymmetric)
            whole = observe(site, outliers, [x])
            split = observe(site, outliers, list(x.split(5)))
            assert torch.equal(whole.scale, split.scale)
            assert torch.equal(whole.threshold, split.threshold)


def test_dynamic_outliers_leave_the_inlier_range() -> None:
    with_outliers = observe(make_site(), "dynamic", [activations()])
    without = observe(make_site(), "none", [activations()])
    assert (with_outliers.scale < 0.6 * without.scale).all()
    assert torch.isinf(without.threshold).all()
    _, limit = inlier_interval(with_outliers.scale, None, 4)
    # Above the limit even after rounding to fp16: this makes the gate redundant (METHODS 3.5).
    assert (with_outliers.threshold > limit).all()
    assert (with_outliers.threshold >= THRESHOLD_MARGIN * limit * (1 - 2.0**-11)).all()


def test_static_outliers_are_the_largest_channels() -> None:
    found = observe(make_site(), "static", [activations(channels=96)])
    assert found.channels is not None
    assert found.channels.numel() == 4  # 96 * 64 / 1536
    assert 3 in found.channels
    assert observe(make_site(), "static", [activations(channels=8)]).channels.numel() == 1  # type: ignore[union-attr]


def test_a_site_without_split_has_no_outliers() -> None:
    for outliers in ("static", "dynamic"):
        found = observe(make_site(split=False), outliers, [activations()])
        assert found.channels is None
        assert torch.isinf(found.threshold).all()


def test_asymmetric_site() -> None:
    x = activations() * 0.5 - 5
    found = observe(make_site(asymmetric=True, kappa=4.0), "dynamic", [x])
    assert found.zero_point is not None
    middle, limit = inlier_interval(found.scale, found.zero_point, 4)
    assert middle is not None
    assert (found.threshold > limit).all()
    inside = ((x[:, :, 5] - middle).abs() <= limit + found.scale).float().mean()
    assert inside > 0.95


def test_calibrate_rejects_values_that_are_not_finite() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(x)
    gm = fx.GraphModule({}, graph)
    site = make_site(node=next(node for node in graph.nodes if node.op == "output"))
    data = torch.full((1, 2, 3), float("nan"))

    def batches() -> Iterator[Tensor]:
        yield data

    with pytest.raises(UsageError, match="not finite at s"):
        calibrate(gm, [site], DynamicOutlierSpec(), batches, 1)
    with pytest.raises(UsageError, match="at least one image"):
        calibrate(gm, [site], DynamicOutlierSpec(), list, 0)


def test_a_single_channel_has_no_outliers() -> None:
    """There is nothing to stand out of; a threshold of NaN would say so at run time only."""
    params = observe(make_site(), "dynamic", [activations(channels=4)[..., :1]])
    assert bool(torch.isfinite(params.scale).all())
    assert bool(torch.isinf(params.threshold).all())
