"""The search: calibrate at every choice of bits, measure layers one by one, walk the best path.

A size is met by walking as far as it allows. An SNR or a drop of accuracy is met by the shortest
part of the path that does, measured with all layers together; bisection finds it.
"""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from ouro_compiler.calibration.calibrate import Progress
from ouro_compiler.calibration.images import Images
from ouro_compiler.calibration.simulate import Simulation, simulated
from ouro_compiler.config import LayerBits, MixedSpec, QuantConfig
from ouro_compiler.errors import UsageError
from ouro_compiler.evaluation import accuracy, run_batches, snr_db
from ouro_compiler.graph import Calibration, Site
from ouro_compiler.lowering.lower import lower
from ouro_compiler.lowering.weights import stored_bytes
from ouro_compiler.mixed_precision.allocate import Option, Step, Unit, after, smallest, upgrade_path
from ouro_compiler.mixed_precision.sensitivity import Noise, decibels, measure_units, units_of
from ouro_compiler.passes import QUANTIZE
from ouro_compiler.passes.base import PassContext, run_passes
from ouro_compiler.precision_specs import BITS
from ouro_compiler.recipes import find_recipe
from ouro_compiler.recipes.planning import Plan
from ouro_compiler.refinement import check_simulation
from ouro_compiler.report import MixedReport, MixedRow
from ouro_compiler.sizes import bytes_by_part
from ouro_compiler.synthetic import detached_copy

STAGE = "trying bits"


@torch.inference_mode(False)
def choose_bits(
    gm: fx.GraphModule,
    plan: Plan,
    config: QuantConfig,
    spec: MixedSpec,
    images: Images,
    verify: Images | None = None,
    *,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> tuple[QuantConfig, Plan, MixedReport]:
    """The configuration with bits for every layer, its plan, and how they were found.

    gm, plan: normalised and planned; they stay as they are. config: where the search starts; no
    layer gets fewer bits than it says, and `overrides` must be empty. images: for calibration and
    the measurements of layers. verify: what an SNR or accuracy is measured on (None: images).
    Raises UsageError for a budget that not even the start fits, for max_drop without labels, and
    for a recipe whose quantizers are not simulated.
    """
    if config.overrides:
        raise UsageError("mixed precision chooses the bits of layers: leave out overrides")
    measured = verify or images
    if spec.max_drop is not None and measured.labels is None:
        raise UsageError("a drop of accuracy needs labelled images to measure it on")
    recipe = find_recipe(config.recipe)
    search = _Search(gm, recipe.configure(config), images, batch_size, progress)
    least = search.smallest_bytes
    budget = None if spec.budget_mb is None else round(spec.budget_mb * 1e6)
    if budget is not None and budget < least:
        raise UsageError(
            f"{spec.budget_mb:g} MB cannot be reached: with every layer at {config.weights.bits} "
            f"bits the parameters and scales take {least / 1e6:.6g} MB"
        )
    path = upgrade_path(search.units, float("inf") if budget is None else budget - least)
    quality = _Quality(search, spec, measured)
    if quality.has_target:
        path = quality.shortest(path)
    chosen = after(search.units, path)
    report = MixedReport(
        budget_bytes=budget,
        min_snr_db=spec.min_snr,
        max_drop=spec.max_drop,
        smallest_bytes=least,
        bytes=least + sum(step.bytes for step in path),
        snr_db=quality.snr_db,
        drop=quality.drop,
        met=quality.met,
        rows=search.rows(chosen),
    )
    config = dataclasses.replace(config, overrides=search.mixed(chosen).overrides)
    plan = dataclasses.replace(recipe.plan(gm, recipe.configure(config)), notes=plan.notes)
    return config, plan, report


class _Search:
    """Calibrations at every choice, and the units with what they cost."""

    def __init__(
        self,
        gm: fx.GraphModule,
        config: QuantConfig,
        images: Images,
        batch_size: int,
        progress: Progress | None,
    ) -> None:
        self.gm = detached_copy(gm, torch.device("cpu"))
        self.base, self.progress, self.batch_size = config, progress, batch_size
        self.recipe = find_recipe(config.recipe)
        self.configs = [_at(config, bits) for bits in BITS if bits >= config.weights.bits]
        self.simulations: list[Simulation] = []
        self.calibrations: list[Calibration] = []
        for one in self.configs:
            plan = self.recipe.plan(self.gm, one)
            found = self.recipe.calibrate(
                self.gm, plan, one, images, batch_size=batch_size, progress=progress
            )
            simulation = Simulation(self.gm, plan.sites, found, one)
            if not self.simulations:
                check_simulation(simulation, found, one, images)
            self.simulations.append(simulation)
            self.calibrations.append(found)
        self.sites = self.recipe.plan(self.gm, self.configs[0]).sites
        self.layers = units_of(self.sites)
        self.noise = measure_units(
            self.simulations,
            self.sites,
            self.layers,
            images,
            batch_size=batch_size,
            progress=progress,
        )
        self.units = [
            Unit(layers=layers, options=self._options(layers, noise))
            for layers, noise in zip(self.layers, self.noise, strict=True)
        ]
        self.smallest_bytes = self._stored(smallest(self.units))

    def _options(self, layers: Sequence[str], noise: Sequence[Noise]) -> tuple[Option, ...]:
        pairs = zip(self.configs, self.simulations, noise, strict=True)
        return tuple(
            Option(
                weights=config.weights.bits,
                activations=config.activations.inlier_bits,
                bytes=_code_bytes(simulation, layers),
                noise=float(found.logits[1]),
            )
            for config, simulation, found in pairs
        )

    def mixed(self, chosen: Sequence[int]) -> QuantConfig:
        """The configuration of a choice: an override for every layer that is not as the start."""
        overrides = tuple(
            LayerBits(
                pattern=glob.escape(layer),
                weights=unit.options[option].weights,
                activations=unit.options[option].activations,
            )
            for unit, option in zip(self.units, chosen, strict=True)
            if option
            for layer in unit.layers
        )
        return dataclasses.replace(self.base, overrides=overrides)

    def simulation(self, chosen: Sequence[int]) -> Simulation:
        """All layers together, each as chosen, and the other parameters as they are stored."""
        sites, calibration = self._calibrated(chosen)
        found = Simulation(self.gm, sites, calibration, self.mixed(chosen))
        found.round_constants()
        return found

    def _calibrated(self, chosen: Sequence[int]) -> tuple[list[Site], Calibration]:
        by_layer = {
            layer: option
            for unit, option in zip(self.units, chosen, strict=True)
            for layer in unit.layers
        }
        sites = self.recipe.plan(self.gm, self.mixed(chosen)).sites
        weights = {}
        for layer, option in by_layer.items():
            found = self.simulations[option].weights.get(layer)
            if found is not None:
                weights[layer] = found.found()
        table = {s.name: self.calibrations[by_layer[s.layer]].sites[s.name] for s in sites}
        return sites, Calibration(sites=table, weights=weights)

    def _stored(self, chosen: Sequence[int]) -> int:
        """Bytes of all stored parameters and scales, by compiling a copy."""
        copy = detached_copy(self.gm, torch.device("cpu"))
        config = self.mixed(chosen)
        plan = self.recipe.plan(copy, config)
        _, calibration = self._calibrated(chosen)
        context = PassContext(config=config, sites=plan.sites, calibration=calibration)
        run_passes(copy, QUANTIZE, context)
        lower(copy, plan.rows)
        return sum(bytes_by_part(copy).values())

    def rows(self, chosen: Sequence[int]) -> list[MixedRow]:
        """The table of the report."""
        found = []
        for unit, noise, option in zip(self.units, self.noise, chosen, strict=True):
            options = [
                {
                    "weights": one.weights,
                    "activations": one.activations,
                    "bytes": one.bytes,
                    "block_snr_db": _finite(decibels(measured.block)),
                    "logits_snr_db": _finite(decibels(measured.logits)),
                }
                for one, measured in zip(unit.options, noise, strict=True)
            ]
            found.append(MixedRow(layers=list(unit.layers), options=options, chosen=option))
        return found


class _Quality:
    """SNR and accuracy of choices, and the shortest path that has enough of both."""

    def __init__(self, search: _Search, spec: MixedSpec, images: Images) -> None:
        self.search, self.spec, self.images = search, spec, images
        self.has_target = spec.min_snr is not None or spec.max_drop is not None
        self.snr_db: float | None = None  # of the path that was measured last
        self.drop: float | None = None
        self.met = True
        self.tried = 0
        self.reference = torch.empty(0)
        if self.has_target:
            self.reference = self._run(search.simulations[0], ())

    def shortest(self, path: Sequence[Step]) -> list[Step]:
        """The shortest beginning of a path that meets the target; all of it if none does."""
        low, high = -1, len(path)  # `high` meets it, or is all there is; `low` does not
        self.met = self._meets(path)
        results = {high: (self.met, self.snr_db, self.drop)}
        while self.met and high - low > 1:
            middle = (low + high) // 2
            results[middle] = (self._meets(path[:middle]), self.snr_db, self.drop)
            low, high = (low, middle) if results[middle][0] else (middle, high)
        self.met, self.snr_db, self.drop = results[high]
        return list(path[:high])

    def _meets(self, path: Sequence[Step]) -> bool:
        made = self._run(self.search.simulation(after(self.search.units, path)), None)
        self.snr_db, self.drop = _finite(snr_db(self.reference, made)), None
        enough = self.spec.min_snr is None or snr_db(self.reference, made) >= self.spec.min_snr
        if self.spec.max_drop is not None:
            assert self.images.labels is not None
            before = accuracy(self.reference, self.images.labels)
            self.drop = 100 * (before - accuracy(made, self.images.labels))
            enough = enough and self.drop <= self.spec.max_drop + 1e-9
        return enough

    def _run(self, simulation: Simulation, layers: tuple[()] | None) -> Tensor:
        self.tried += 1
        stage = f"{STAGE}: choice {self.tried}"
        progress, total = self.search.progress, len(self.images)

        def on_batch(done: int) -> None:
            if progress is not None:
                progress(stage, done, total)

        batches = self.images.batches(self.search.batch_size)
        return run_batches(simulated(simulation, layers), batches, on_batch).cpu()


def _at(config: QuantConfig, bits: int) -> QuantConfig:
    """The configuration with every layer at these bits; activations never below its own."""
    activations = max(bits, config.activations.inlier_bits)
    return dataclasses.replace(
        config,
        weights=dataclasses.replace(config.weights, bits=bits),
        activations=dataclasses.replace(config.activations, inlier_bits=activations),
    )


def _code_bytes(simulation: Simulation, layers: Sequence[str]) -> int:
    """Bytes of the codes of these layers' weights; their scales take the same at any bits."""
    weights = [one.given.codes for one in map(simulation.weights.get, layers) if one is not None]
    scans = [one for one in map(simulation.scans.get, layers) if one is not None]
    return sum(map(stored_bytes, [*weights, *(codes for one in scans for codes in one.codes)]))


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None
