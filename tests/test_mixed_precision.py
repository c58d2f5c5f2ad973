"""Bits of single layers: the measurements of layers, the choice, and the search."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import ouro_compiler as ouro
from ouro_compiler.calibration.images import TensorImages
from ouro_compiler.calibration.simulate import Simulation, simulated
from ouro_compiler.compiler import prepare
from ouro_compiler.config import LayerBits, MixedSpec, QuantConfig
from ouro_compiler.errors import UsageError
from ouro_compiler.evaluation import snr_db
from ouro_compiler.frontend.capture import capture
from ouro_compiler.mixed_precision.allocate import Option, Unit, after, smallest, upgrade_path
from ouro_compiler.mixed_precision.search import choose_bits
from ouro_compiler.mixed_precision.sensitivity import units_of
from ouro_compiler.recipes.planning import Plan
from ouro_compiler.refinement import inserted
from ouro_compiler.report import MixedReport
from tests.helpers import generator
from tests.models import images, small_vim
from tests.test_overrides import overriding
from tests.test_quantize_passes import TwoReaders, tokens
from tests.test_simulation import calibrated

# The choice


def random_units(seed: int, count: int = 6) -> list[Unit]:
    rng = generator(seed)
    units = []
    for index in range(count):
        size = int(torch.randint(1, 50, (), generator=rng)) * 2
        noise = torch.rand(3, generator=rng).sort(descending=True).values.tolist()
        if index == 0:
            noise[1] = noise[0] + 1  # a choice that makes it worse
        options = [
            Option(weights=bits, activations=bits, bytes=size * (1 if bits == 4 else 2), noise=one)
            for bits, one in zip((4, 6, 8), noise, strict=True)
        ]
        units.append(Unit(layers=(f"l{index}",), options=tuple(options)))
    return units


def total(units: list[Unit], chosen: Any) -> tuple[int, float]:
    options = [unit.options[option] for unit, option in zip(units, chosen, strict=True)]
    return sum(one.bytes for one in options), sum(one.noise for one in options)


@pytest.mark.parametrize("seed", range(8))
def test_a_path_against_every_assignment(seed: int) -> None:
    """Within the budget, and as good as the best of all but for the one step that did not fit."""
    units = random_units(seed)
    least, _ = total(units, smallest(units))
    every = [total(units, chosen) for chosen in itertools.product(range(3), repeat=len(units))]
    most = max(bytes for bytes, _ in every)
    for share in (0.0, 0.2, 0.5, 0.8, 1.0):
        spare = int((most - least) * share)
        path = upgrade_path(units, spare)
        used, noise = total(units, after(units, path))
        assert used == least + sum(step.bytes for step in path) <= least + spare
        best = min(noise for bytes, noise in every if bytes <= least + spare)
        ahead = upgrade_path(units, float("inf"))
        fitting = next(
            (i for i, step in enumerate(ahead) if sum(s.bytes for s in ahead[: i + 1]) > spare),
            None,
        )
        slack = 0.0
        if fitting is not None:
            slack = (
                total(units, after(units, ahead[:fitting]))[1]
                - total(units, after(units, ahead[: fitting + 1]))[1]
            )
        assert best <= noise + 1e-9 <= best + slack + 1e-9
        # Nothing that would help still fits.
        chosen = after(units, path)
        for unit, option in itertools.product(range(len(units)), range(3)):
            other = [*chosen]
            other[unit] = option
            size, worse = total(units, other)
            assert size > least + spare or worse >= noise


def test_choices_that_make_worse_are_not_made() -> None:
    units = random_units(0)
    assert after(units, upgrade_path(units, float("inf")))[0] == 2


def test_free_choices_are_made_first() -> None:
    free = Unit(
        layers=("a",),
        options=tuple(
            Option(weights=4, activations=bits, bytes=10, noise=1.0 / bits) for bits in (4, 6, 8)
        ),
    )
    units = [*random_units(1), free]
    assert after(units, upgrade_path(units, 0.0))[-1] == 2


def test_layers_of_one_quantizer_are_one_unit() -> None:
    gm = capture(TwoReaders(), tokens())
    assert units_of(prepare(gm, ouro.W4A4).sites) == [("a", "b")]
    gm = capture(small_vim(), images(2))
    units = units_of(prepare(gm, ouro.W4A4).sites)
    assert len(units) == 8
    assert all(len(unit) == 1 for unit in units)


# The search


class Labelled(TensorImages):
    def __init__(self, tensor: Tensor, labels: Tensor) -> None:
        super().__init__(tensor)
        self.labels = labels


@pytest.fixture(scope="module")
def graph() -> tuple[fx.GraphModule, Plan]:
    gm = capture(small_vim(), images(2))
    return gm, prepare(gm, ouro.W4A4)


Found = tuple[QuantConfig, Plan, MixedReport]


def search(graph: tuple[fx.GraphModule, Plan], **spec: float) -> Found:
    gm, plan = graph
    labels = small_vim()(images(8)).argmax(1)
    return choose_bits(gm, plan, ouro.W4A4, MixedSpec(**spec), Labelled(images(8), labels))


@pytest.fixture(scope="module")
def half(graph: tuple[fx.GraphModule, Plan]) -> Found:
    """Half of what there is to spend."""
    _, _, everything = search(graph, budget_mb=10.0)
    middle = (everything.smallest_bytes + everything.bytes) // 2
    return search(graph, budget_mb=middle / 1e6)


def test_a_budget_is_met_and_used(half: Found) -> None:
    config, plan, report = half
    assert report.budget_bytes is not None
    assert report.smallest_bytes < report.bytes <= report.budget_bytes
    model = ouro.compile(small_vim(), images(2), config, calibration=images(8))
    assert model.report["bytes"]["stored"] == report.bytes
    chosen = {row.layers[0]: row.options[row.chosen]["weights"] for row in report.rows}
    assert {4, 8} <= set(chosen.values())
    bits = {one.name: one.weight_bits for one in plan.rows if one.status != "skipped"}
    assert bits == chosen
    left = report.budget_bytes - report.bytes
    for row in report.rows:  # the next layer would not fit any more
        here = row.options[row.chosen]["bytes"]
        more = [one["bytes"] - here for one in row.options if one["bytes"] > here]
        assert all(one > left for one in more)


def test_layers_are_measured_alone(graph: tuple[fx.GraphModule, Plan], half: Found) -> None:
    """Against a graph with this layer's quantizers alone, that the passes made."""
    gm, _ = graph
    for row, bits in ((half[2].rows[0], 0), (half[2].rows[3], 1), (half[2].rows[-1], 2)):
        one = row.options[bits]
        config = dataclasses.replace(
            ouro.W4A4,
            include=tuple(row.layers),
            weights=dataclasses.replace(ouro.W4A4.weights, bits=one["weights"]),
            activations=dataclasses.replace(ouro.W4A4.activations, inlier_bits=one["activations"]),
        )
        _, _, found = calibrated(small_vim(), images(8), config)
        made = inserted(gm, found, config)(images(8))
        assert abs(snr_db(gm(images(8)), made) - one["logits_snr_db"]) < 0.05
    for row in half[2].rows:
        levels = [one["logits_snr_db"] for one in row.options]
        assert levels[2] > levels[0] + 6


def test_a_budget_that_is_too_small(graph: tuple[fx.GraphModule, Plan], half: Found) -> None:
    least = half[2].smallest_bytes
    with pytest.raises(UsageError, match=f"{least / 1e6:.6g} MB"):
        search(graph, budget_mb=least / 1e6 - 1e-3)
    config, _, report = search(graph, budget_mb=least / 1e6)
    assert report.bytes == least
    assert all(row.options[row.chosen]["bytes"] == row.options[0]["bytes"] for row in report.rows)
    plain = ouro.compile(small_vim(), images(2), config, calibration=images(8))
    assert plain.report["bytes"]["stored"] == least


def test_an_snr_takes_the_shortest_path(graph: tuple[fx.GraphModule, Plan], half: Found) -> None:
    gm, _ = graph
    reference = gm(images(8))

    def quality(config: QuantConfig) -> float:
        copy, plan, found = calibrated(small_vim(), images(8), config)
        simulation = Simulation(copy, plan.sites, found, config)
        simulation.round_constants()
        return snr_db(reference, simulated(simulation)(images(8)))

    low, high = quality(ouro.W4A4), quality(half[0])
    config, _, report = search(graph, min_snr=(low + high) / 2)
    assert report.met
    assert report.snr_db is not None
    assert abs(quality(config) - report.snr_db) < 1e-3
    assert report.snr_db >= (low + high) / 2
    assert report.smallest_bytes < report.bytes
    compiled = ouro.compile(small_vim(), images(2), config, calibration=images(8))
    assert abs(compiled.report["logits_snr_db"] - report.snr_db) < 0.02
    # One layer fewer is not enough: the last that was raised is among these.
    fewer = (
        dataclasses.replace(config, overrides=config.overrides[:i] + config.overrides[i + 1 :])
        for i in range(len(config.overrides))
    )
    assert any(quality(one) < (low + high) / 2 for one in fewer)
    _, _, unreachable = search(graph, min_snr=200.0)
    assert not unreachable.met


def test_a_drop_is_measured_on_labels(graph: tuple[fx.GraphModule, Plan]) -> None:
    _, _, report = search(graph, max_drop=0.0)
    assert report.drop is not None
    assert report.met == (report.drop <= 0)
    gm, plan = graph
    with pytest.raises(UsageError, match="labelled"):
        choose_bits(gm, plan, ouro.W4A4, MixedSpec(max_drop=1.0), TensorImages(images(8)))


def test_wrong_searches(graph: tuple[fx.GraphModule, Plan]) -> None:
    for wrong in ({}, {"budget_mb": 0.0}, {"max_drop": -1.0}, {"min_snr": float("nan")}):
        with pytest.raises(UsageError):
            MixedSpec(**wrong)
    gm, plan = graph
    twice = overriding(LayerBits(pattern="*", weights=8, activations=8))
    with pytest.raises(UsageError, match="leave out overrides"):
        choose_bits(gm, plan, twice, MixedSpec(budget_mb=1.0), TensorImages(images(8)))


def test_compile_searches(half: Found) -> None:
    """The same as the two steps, and nothing of the search in the artefact."""
    config, _, report = half
    assert report.budget_bytes is not None
    spec = MixedSpec(budget_mb=report.budget_bytes / 1e6)
    model = ouro.compile(small_vim(), images(2), calibration=images(8), mixed=spec)
    again = ouro.compile(small_vim(), images(2), config, calibration=images(8))
    assert model.manifest == again.manifest
    assert model.full_report["mixed"] == dataclasses.asdict(report)
    assert again.full_report["mixed"] is None
    a, b = model.state_dict(), again.state_dict()
    assert all(torch.equal(value, b[name]) for name, value in a.items())


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def test_a_model_without_layers_to_choose_for() -> None:
    model = ouro.compile(
        Nothing(), images(2), calibration=images(8), mixed=MixedSpec(budget_mb=1.0)
    )
    assert model.full_report["mixed"]["rows"] == []
