"""All images of a spec: batch by batch, kept as they are made, resumed where they were left."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ouro_compiler.calibration.calibrate import Progress
from ouro_compiler.calibration.synthesis.loop import CURVE, Batch, Synthesizer
from ouro_compiler.calibration.synthesis.store import Store, open_store
from ouro_compiler.calibration.synthesis.workers import Workers
from ouro_compiler.config import SynthesisSpec
from ouro_compiler.errors import UsageError

STAGE = "synthesising images"
# Says, once, how long all will take: a warning from a minute on, information below.
estimates = logging.getLogger(f"{__name__}.estimates")
_INTERVAL = 20.0  # seconds of work between two savings of an unfinished batch


@dataclass(kw_only=True)
class Synthesized:
    """Images made from a model, as calibration takes them.

    images: (n, C, H, W) fp32 on the CPU, normalised. targets: what each was asked to excite: drawn
    at random, so no ground truth, and `labels` is None. curve: (iterations, 4) fp64, the losses
    that `CURVE` names, means over the images. notes: on layers that took no part.
    """

    images: Tensor
    targets: list[dict[str, Tensor]]
    curve: Tensor
    spec: SynthesisSpec
    notes: list[str]
    labels: Tensor | None = None
    description: str = field(init=False)

    def __post_init__(self) -> None:
        self.description = f"{len(self)} synthetic {'image' if len(self) == 1 else 'images'}"

    @property
    def target_labels(self) -> Tensor | None:
        """(n,) int64, the class that each image was drawn; None for other tasks."""
        found = [one["label"] for one in self.targets if "label" in one]
        return torch.stack(found).to(torch.int64) if len(found) == len(self) else None

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, size: int) -> Iterator[Tensor]:
        """All images, in the same order each time."""
        yield from self.images.split(size)


def synthesize(
    synthesizer: Synthesizer,
    *,
    folder: Path | None = None,
    workers: Workers | None = None,
    progress: Progress | None = None,
) -> Synthesized:
    """Make all images of the synthesizer's spec, batch i of the numbers [i * size, (i + 1) * size).

    folder: where images are kept, and found again by the next run for the same model and spec (a
    run that was interrupted goes on, with the same bits); None keeps none. workers: the processes
    that share the batches; each returns all. progress: called after every step, in steps.
    Raises UsageError for images that are not finite.
    """
    workers = workers or Workers()
    spec = synthesizer.spec
    assert spec.batch_size is not None
    every = range(spec.images)
    numbers = [every[i : i + spec.batch_size] for i in every[:: spec.batch_size]]
    store = open_store(folder, synthesizer)
    with torch.inference_mode(False), torch.enable_grad():
        made = _make(synthesizer, numbers, store, workers, progress)
    images, curves = [], []
    for index, chosen in enumerate(numbers):
        if index not in made:
            made[index] = _place_for(chosen, synthesizer)
        images.append(workers.share(index, made[index].images))
        curve = torch.tensor(made[index].curve, dtype=torch.float64)
        curves.append(workers.share(index, curve) * len(chosen))
    found = torch.cat(images)
    if not bool(torch.isfinite(found).all()):
        raise UsageError(
            "synthesised images are not finite: check the weights, or choose a lower learning_rate"
        )
    return Synthesized(
        images=found,
        targets=[synthesizer.targets(number) for number in every],
        curve=torch.stack(curves).sum(0) / spec.images,
        spec=spec,
        notes=list(synthesizer.notes),
    )


def _make(
    synthesizer: Synthesizer,
    numbers: list[range],
    store: Store | None,
    workers: Workers,
    progress: Progress | None,
) -> dict[int, Batch]:
    """This process's batches, finished, on the CPU."""
    mine = [index for index in range(len(numbers)) if workers.makes(index)]
    kept = {
        index: store.load(index, numbers[index], synthesizer) if store is not None else None
        for index in mine
    }
    left = {
        index: synthesizer.iterations - (batch.iteration if batch is not None else 0)
        for index, batch in kept.items()
    }
    work = _Work(
        synthesizer.spec,
        left=sum(len(numbers[index]) * steps for index, steps in left.items()),
        total=synthesizer.iterations * len(mine),
        done=synthesizer.iterations * len(mine) - sum(left.values()),
        progress=progress,
    )
    made = {}
    for index in mine:
        batch = kept.pop(index)
        if batch is None:
            batch = synthesizer.start(numbers[index])
        if left[index]:
            _finish(synthesizer, index, batch, store, work)
        made[index] = replace(batch, images=batch.images.detach().cpu())
    return made


def _finish(
    synthesizer: Synthesizer, index: int, batch: Batch, store: Store | None, work: _Work
) -> None:
    """Take a batch through its steps, keeping it from time to time and when interrupted."""
    saved = time.perf_counter()
    whole = _copy(batch)  # an interrupted step leaves `batch` between two iterations
    try:
        while batch.iteration < synthesizer.iterations:
            synthesizer.step(batch)
            whole = _copy(batch)
            work.step(batch)
            if time.perf_counter() - saved > _INTERVAL:
                _keep(store, index, whole, synthesizer)
                saved = time.perf_counter()
    finally:
        _keep(store, index, whole, synthesizer)


def _keep(store: Store | None, index: int, batch: Batch, synthesizer: Synthesizer) -> None:
    if store is not None and bool(torch.isfinite(batch.images).all()):
        store.save(index, batch, finished=batch.iteration == synthesizer.iterations)


def _copy(batch: Batch) -> Batch:
    first, second = batch.moments
    return replace(
        batch,
        images=batch.images.clone(),
        moments=(first.clone(), second.clone()),
        curve=list(batch.curve),
    )


def _place_for(numbers: range, synthesizer: Synthesizer) -> Batch:
    """Where another process's batch goes."""
    side, channels = synthesizer.preprocessing.size, synthesizer.preprocessing.channels
    images = torch.empty(len(numbers), channels, side, side)
    curve = [(0.0,) * len(CURVE)] * synthesizer.iterations
    return Batch(list(numbers), images, (images, images), synthesizer.iterations, curve)


class _Work:
    """Steps done, told to `progress`, and how long the rest takes, said once it is known."""

    def __init__(
        self,
        spec: SynthesisSpec,
        *,
        left: int,
        total: int,
        done: int,
        progress: Progress | None,
    ) -> None:
        self.spec, self.progress = spec, progress
        self.left = left  # steps of one image
        self.total, self.done = total, done
        self.start = self.last = time.perf_counter()
        self.steps = self.images = 0  # timed: all but the first, which may compile kernels
        self.seconds = 0.0
        self.said = False

    def step(self, batch: Batch) -> None:
        """One more step of a batch is done."""
        now = time.perf_counter()
        if self.steps:
            self.seconds += now - self.last
            self.images += len(batch.numbers)
        self.steps, self.last = self.steps + 1, now
        self.done += 1
        self.left -= len(batch.numbers)
        if not self.said and self.images and (self.steps == 5 or now - self.start > 2):
            self._say()
        if self.progress is not None:
            self.progress(f"{STAGE}: loss {batch.curve[-1][0]:.3g}", self.done, self.total)

    def _say(self) -> None:
        self.said = True
        seconds = self.left * self.seconds / self.images
        estimates.log(
            logging.WARNING if seconds >= 60 else logging.INFO,
            "synthesising %d images in %d iterations: about %s",
            self.spec.images,
            self.spec.iterations,
            spoken(seconds),
        )


def spoken(seconds: float) -> str:
    """100 -> '1 min 40 s'."""
    whole = max(1, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
