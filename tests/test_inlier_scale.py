"""One inlier scale a site: equal at all time steps, and good for another resolution."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ouro_compiler as ouro
from ouro_compiler.calibration.expand import expand
from ouro_compiler.calibration.observers import THRESHOLD_MARGIN, SiteObserver
from ouro_compiler.config import DynamicOutlierSpec, OutlierMode, QuantConfig
from ouro_compiler.errors import UsageError
from ouro_compiler.frontend.capture import export
from ouro_compiler.graph import Calibration, QParams
from ouro_compiler.models.mambavision import MambaVisionConfig
from ouro_compiler.models.vmamba import VMambaConfig
from ouro_compiler.ops.quantize import inlier_interval
from tests.helpers import randn
from tests.models import images, small_vim
from tests.test_observers import activations, make_site

MAMBAVISION = MambaVisionConfig(
    img_size=64, stem_dim=4, embed_dim=4, depths=(1, 1, 2, 2), heads=(1, 1, 2, 2),
    windows=(8, 8, 2, 2), d_state=4, num_classes=5,
)  # fmt: skip
VMAMBA = VMambaConfig(img_size=16, embed_dim=16, depths=(1, 1), num_classes=5)
SMALL, LARGE = randn(0, 8, 3, 16, 16), randn(1, 4, 3, 32, 24)


def _per_tensor(config: QuantConfig = ouro.W4A4) -> QuantConfig:
    spec = dataclasses.replace(config.activations, inlier_scale="per_tensor")
    return dataclasses.replace(config, activations=spec)


def _observed(x: Tensor, spec: DynamicOutlierSpec, *, asymmetric: bool) -> QParams:
    observer = SiteObserver(make_site(asymmetric=asymmetric), spec)
    observer.observe_range(x)
    observer.freeze_range()
    observer.observe_histogram(x)
    return observer.qparams()


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("outliers", ["none", "static", "dynamic"])
def test_one_scale_of_all_time_steps(outliers: OutlierMode, asymmetric: bool) -> None:
    """What calibration finds where all these values belong to one time step."""
    x = activations() * torch.linspace(0.5, 2.0, 10)[:, None]
    spec = DynamicOutlierSpec(outliers=outliers, inlier_scale="per_tensor", refresh_period=1)
    found = _observed(x, spec, asymmetric=asymmetric)
    together = _observed(x.flatten(0, 1)[:, None], spec, asymmetric=asymmetric)
    assert found.scale.shape == found.threshold.shape == (10,)
    assert torch.equal(found.scale, together.scale.expand(10))
    if asymmetric:
        assert found.zero_point is not None
        assert together.zero_point is not None
        assert torch.equal(found.zero_point, together.zero_point.expand(10))
    assert len(found.threshold.unique()) == 1
    if outliers == "dynamic":
        limit = inlier_interval(found.scale, found.zero_point, 4)[1]
        assert bool((found.threshold >= THRESHOLD_MARGIN * limit * 0.999).all())
        assert bool(found.threshold.isfinite().all())


def test_the_threshold_is_the_median_of_the_steps() -> None:
    x = activations(batch=3) * torch.linspace(0.1, 9.0, 10)[:, None]
    site_spec = DynamicOutlierSpec(refresh_period=1, inlier_bits=4)
    steps = _observed(x, site_spec, asymmetric=False)
    spec = dataclasses.replace(site_spec, inlier_scale="per_tensor")
    one = _observed(x, spec, asymmetric=False)
    limit = inlier_interval(one.scale, None, 4)[1]
    expected = torch.maximum(steps.threshold.median(), THRESHOLD_MARGIN * limit)
    torch.testing.assert_close(one.threshold, expected, rtol=1e-3, atol=0)


def test_an_unknown_granularity_is_refused() -> None:
    with pytest.raises(UsageError, match=r"one of per_time_step, per_tensor, got 'per_window'"):
        DynamicOutlierSpec(inlier_scale="per_window")  # type: ignore[arg-type]


def test_a_table_of_other_sites_is_refused() -> None:
    with pytest.raises(UsageError, match=r"\(here is only in one of the two\)"):
        expand(
            Calibration(sites={"here": QParams(scale=torch.ones(1), threshold=torch.ones(1))}), []
        )


# --- compilation


MODELS = {  # a small model, the images it is calibrated on and those it is compiled for
    "vmamba": (VMAMBA, SMALL, LARGE),
    "mambavision": (MAMBAVISION, randn(0, 4, 3, 64, 64), randn(1, 4, 3, 96, 128)),
}


def _model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0].build().eval().requires_grad_(False)


@pytest.mark.parametrize("name", MODELS)
def test_calibrated_at_another_resolution(name: str, tmp_path: Path) -> None:
    model, (_, here, there) = _model(name), MODELS[name]
    config = _per_tensor(ouro.W8A8)
    compiled = ouro.compile(model, there[:2], config, calibration=here)
    ours, sides = compiled(there), [f"{x.shape[2]}x{x.shape[3]}" for x in (here, there)]
    assert (model(there) - ours).norm() < 0.1 * model(there).norm()
    assert (
        f"calibrated on images of {sides[0]}, compiled for {sides[1]}" in compiled.report["notes"]
    )
    assert compiled.report["snr_data"] == f"{len(here)} images resized to {sides[1]}"
    sites = compiled.report["sites"]
    assert all(site["scale_min"] == site["scale_max"] for site in sites)
    same = ouro.compile(model, here[:2], config, calibration=here).report["sites"]
    assert {s["name"]: s["scale_min"] for s in sites} == {s["name"]: s["scale_min"] for s in same}
    path = tmp_path / "model.pt2"
    compiled.save(path)
    assert torch.equal(ouro.load(path)(there), ours)
    with pytest.raises(UsageError, match=rf"images of {sides[1]}, 3 channels, got {sides[0]}, 3"):
        compiled(here)


def test_scales_per_time_step_belong_to_one_resolution() -> None:
    with pytest.raises(
        UsageError, match=r"calibration images are 16x16 and the model is compiled for 32x24"
    ):
        ouro.compile(_model("vmamba"), LARGE, ouro.W4A4, calibration=SMALL)


def test_a_model_of_one_resolution_says_so() -> None:
    other = randn(0, 4, 1, 20, 20)
    with pytest.raises(
        UsageError,
        match=r"20x20 cannot calibrate this model for 28x28, since it does not run at 20x20 \(",
    ):
        ouro.compile(small_vim(), images(2), _per_tensor(), calibration=other)


def test_an_exported_program_has_one_resolution() -> None:
    program = export(_model("vmamba"), LARGE)
    with pytest.raises(UsageError, match=r"an exported program takes one resolution, so use 32x24"):
        ouro.compile(program, LARGE, _per_tensor(), calibration=SMALL)


def test_images_of_another_kind_are_refused() -> None:
    with pytest.raises(UsageError, match=r"\(B, 1, 28, 28\), the model takes \(B, 3, 32, 24\)"):
        ouro.compile(_model("vmamba"), LARGE, _per_tensor(), calibration=images(4))
