"""Learned scales: better or left alone, positive, in fp16, resumed bit for bit."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest
import torch
from torch import fx

import ouro_compiler as ouro
from ouro_compiler.calibration import refine as module
from ouro_compiler.calibration.learning import BlockLearner
from ouro_compiler.calibration.observers import THRESHOLD_MARGIN
from ouro_compiler.calibration.refine import Refined, refine
from ouro_compiler.calibration.search import round_to_half
from ouro_compiler.compiler import TensorImages
from ouro_compiler.config import QuantConfig, RefineSpec
from ouro_compiler.errors import UsageError
from ouro_compiler.graph import Calibration, QParams, UniformParams
from ouro_compiler.ops.quantize import inlier_interval, quantize_symmetric
from ouro_compiler.recipes.planning import Plan
from ouro_compiler.refinement import refined
from ouro_compiler.synthetic import detached_copy
from tests.models import images, small_vim
from tests.test_simulation import calibrated, changed, with_uniform_params

SPEC = RefineSpec(epochs=2, batch_size=8, learning_rate=2e-2)
CONFIG = dataclasses.replace(ouro.W4A4, refine=SPEC)
Prepared = tuple[fx.GraphModule, Plan, Calibration]


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    gm, plan, found = calibrated(small_vim(2), images(), CONFIG)
    gm = detached_copy(gm, torch.device("cpu"))
    plan.sites = ouro_sites(gm, CONFIG)
    return gm, plan, found


def ouro_sites(gm: fx.GraphModule, config: QuantConfig) -> list[module.Site]:
    from ouro_compiler.recipes import find_recipe

    return find_recipe(config.recipe).plan(gm, config).sites


def learn(prepared: Prepared, config: QuantConfig = CONFIG, **options: object) -> Refined:
    gm, plan, found = prepared
    return refine(gm, plan.sites, found, config, TensorImages(images()), **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def plain(prepared: Prepared) -> Refined:
    """What a run without a cache gives."""
    return learn(prepared)


def tensors(found: Calibration) -> dict[str, torch.Tensor]:
    return {
        f"{name} {field}": value
        for table in (found.sites, found.weights)
        for name, params in table.items()
        for field, value in vars(params).items()
        if value is not None
    }


def assert_same(a: Refined, b: Refined) -> None:
    first, second = tensors(a.calibration), tensors(b.calibration)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert a.report.to_dict(timing=False) == b.report.to_dict(timing=False)


def test_every_block_gets_better(plain: Refined) -> None:
    rows = plain.report.rows
    assert [(row.block, row.layers, row.used) for row in rows] == [
        ("layers.0", 8, "learned"),
        ("layers.1", 8, "learned"),
    ]
    assert all(row.loss_after < 0.97 * row.loss_before for row in rows)
    assert plain.report.images == 16
    # Between blocks: hidden and residual, twice, of (16, 50, 48) fp32, while a block is crossed.
    assert 4 * 16 * 50 * 48 * 4 <= plain.report.bytes_kept <= 8 * 16 * 50 * 48 * 4


def test_what_is_learned(prepared: Prepared, plain: Refined) -> None:
    """All scales moved; zero points did not; scales are positive and fp16's (T23)."""
    _, plan, before = prepared
    after = plain.calibration
    assert after.sites.keys() == before.sites.keys()
    for site in plan.sites:
        old, new = before.sites[site.name], after.sites[site.name]
        assert isinstance(new, QParams)
        assert not torch.equal(old.scale, new.scale)
        assert bool((new.scale > 0).all())
        assert torch.equal(round_to_half(new.scale), new.scale)
        assert (old.zero_point is None) == (new.zero_point is None)
        if old.zero_point is not None and new.zero_point is not None:
            assert torch.equal(old.zero_point, new.zero_point)
        ratio = new.scale / old.scale
        assert 0.9 < float(ratio.min()) <= float(ratio.max()) < 1.1
    assert {site.layer for site in plan.sites if site.kind == "linear"} == after.weights.keys()
    for layer, weight in after.weights.items():
        found: object = prepared[0]
        for part in f"{layer}.weight".split("."):
            found = getattr(found, part)
        assert isinstance(found, torch.Tensor)
        expected = quantize_symmetric(found, weight.scale[:, None], 4).to(torch.int8)
        assert torch.equal(weight.codes, expected)
        assert torch.equal(round_to_half(weight.scale), weight.scale)


def test_thresholds_are_bounded_again(prepared: Prepared, plain: Refined) -> None:
    _, plan, before = prepared
    raised = 0
    for site in plan.sites:
        old, new = before.sites[site.name], plain.calibration.sites[site.name]
        assert isinstance(old, QParams)
        assert isinstance(new, QParams)
        zero = None if new.zero_point is None else new.zero_point.float()
        _, limit = inlier_interval(new.scale, zero, site.bits)
        moved = new.scale != old.scale
        assert bool((new.threshold >= THRESHOLD_MARGIN * limit)[moved].all())
        assert bool((new.threshold >= old.threshold).all())
        assert torch.equal(round_to_half(new.threshold), new.threshold)
        raised += int((new.threshold > old.threshold).sum())
    assert raised > 0


def test_learning_that_makes_worse_is_not_kept(prepared: Prepared) -> None:
    """At a rate that throws scales about, the search's stay, and the report says so."""
    wild = dataclasses.replace(
        CONFIG, refine=RefineSpec(epochs=1, batch_size=16, learning_rate=3.0)
    )
    found = learn(prepared, wild)
    assert [row.used for row in found.report.rows] == ["searched", "searched"]
    assert all(row.loss_after == row.loss_before for row in found.report.rows)
    before = tensors(prepared[2])
    after = tensors(found.calibration)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_run_that_was_interrupted_goes_on(
    prepared: Prepared, plain: Refined, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        assert total == 4
        if done == 3:  # in the second block
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(prepared, folder=tmp_path, progress=stop)
    (folder,) = tmp_path.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["block-000.safetensors"]
    epochs = []
    honest = BlockLearner.epoch
    monkeypatch.setattr(
        BlockLearner, "epoch", lambda self, x: epochs.append(self.block.name) or honest(self, x)
    )
    assert_same(learn(prepared, folder=tmp_path), plain)
    assert epochs == ["layers.1", "layers.1"]
    assert_same(learn(prepared, folder=tmp_path), plain)
    assert len(epochs) == 2  # nothing was left to do
    path = folder / "block-000.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    logging.disable(logging.WARNING)
    try:
        assert_same(learn(prepared, folder=tmp_path), plain)
    finally:
        logging.disable(logging.NOTSET)
    assert epochs[2:] == ["layers.0", "layers.0"]


def test_other_images_are_another_run(prepared: Prepared, tmp_path: Path) -> None:
    gm, plan, found = prepared
    for seed in (0, 1):
        refine(gm, plan.sites, found, CONFIG, TensorImages(images(8, seed)), folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_smoothing_is_learned_with_its_weights(prepared: Prepared) -> None:
    config = dataclasses.replace(changed(ouro.W4A4, ssm="none"), refine=SPEC)
    gm, _, searched = prepared
    plan = Plan(sites=ouro_sites(gm, config))
    found = with_uniform_params(gm, plan, searched)
    result = learn((gm, plan, found), config)
    smoothed = 0
    for site in plan.sites:
        old, new = found.sites[site.name], result.calibration.sites[site.name]
        assert isinstance(new, UniformParams)
        assert not torch.equal(old.scale, new.scale)
        assert old.scale.shape == new.scale.shape
        if new.smooth is None:
            continue
        smoothed += 1
        assert old.smooth is not None
        assert not torch.equal(new.smooth, old.smooth)
        assert bool((new.smooth > 0).all())
        weight: object = gm
        for part in f"{site.layer}.weight".split("."):
            weight = getattr(weight, part)
        assert isinstance(weight, torch.Tensor)
        made = result.calibration.weights[site.layer]
        expected = quantize_symmetric(weight * new.smooth, made.scale[:, None], 4)
        assert torch.equal(made.codes, expected.to(torch.int8))
    assert smoothed >= 3
    assert all(row.used == "learned" for row in result.report.rows)


def test_one_scale_a_site_stays_one(prepared: Prepared) -> None:
    config = dataclasses.replace(
        changed(ouro.W4A4, ssm="none", inlier_scale="per_tensor"),
        refine=RefineSpec(epochs=1, batch_size=8),
        include=("layers.0.*",),
    )
    gm, plan, found = calibrated(small_vim(1), images(), config)
    result = refined(gm, found, config, TensorImages(images()), cache=False)
    for site in plan.sites:
        new = result.calibration.sites[site.name]
        assert not torch.equal(new.scale, found.sites[site.name].scale)
        assert torch.equal(new.scale, new.scale[:1].expand_as(new.scale))


def test_compile_learns_scales() -> None:
    config = dataclasses.replace(CONFIG, refine=RefineSpec(epochs=1, batch_size=8))
    first, second = (
        ouro.compile(small_vim(1), images(2), config, calibration=images(), cache=False)
        for _ in range(2)
    )
    rows = first.report["refine"]["rows"]
    assert [row["block"] for row in rows] == ["layers.0"]
    assert "seconds" not in rows[0]
    assert first.seconds["refine"] > 0
    a, b = first.state_dict(), second.state_dict()
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    assert first.report == second.report


def test_a_recipe_that_it_does_not_know(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    gm, _, found = prepared
    monkeypatch.setattr("ouro_compiler.refinement.INSERT", ())
    with pytest.raises(UsageError, match="leave out --refine"):
        refined(gm, found, CONFIG, TensorImages(images()), cache=False)


def test_no_images_is_an_error(prepared: Prepared) -> None:
    gm, plan, found = prepared
    with pytest.raises(UsageError, match="at least one calibration image"):
        refine(gm, plan.sites, found, CONFIG, TensorImages(images()[:0]))


def test_settings() -> None:
    assert ouro.W4A4.refine.epochs == 0
    config = ouro.W4A4.with_setting("refine.epochs=20")
    assert config.refine == RefineSpec(epochs=20)
    assert QuantConfig.from_dict(config.to_dict()) == config
    for wrong in ("epochs=-1", "batch_size=0", "clip=0", "learning_rate=-1", "smoothing_rate=nan"):
        with pytest.raises(UsageError, match="refine takes"):
            ouro.W4A4.with_setting(f"refine.{wrong}")
