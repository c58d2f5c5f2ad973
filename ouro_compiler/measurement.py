"""What a compilation measures: outputs before and after, accuracy, outliers, seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from ouro_compiler.calibration.calibrate import Progress
from ouro_compiler.calibration.images import Images
from ouro_compiler.errors import VerificationError
from ouro_compiler.evaluation import OutlierCounter, accuracy, run_batches, snr_db
from ouro_compiler.report import Report


def outputs_on(
    model: Callable[[Tensor], Any],
    images: Images,
    batch_size: int,
    stage: str,
    progress: Progress | None,
) -> Tensor:
    """First outputs (n, ...) of a model on images, in order."""

    def on_batch(done: int) -> None:
        if progress is not None:
            progress(stage, done, len(images))

    def first_output(batch: Tensor) -> Tensor:
        outputs = model(batch)
        return outputs if isinstance(outputs, Tensor) else outputs[0]

    return run_batches(first_output, images.batches(batch_size), on_batch)


def measure(
    program: torch.export.ExportedProgram,
    report: Report,
    images: Images,
    reference: Tensor,
    batch_size: int,
    progress: Progress | None,
) -> OutlierCounter:
    """Fill the report with what a quantized program gives, beside the reference's outputs.

    Raises VerificationError for outputs that are not finite.
    """
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    counter = OutlierCounter(module)
    logits = outputs_on(counter.run, images, batch_size, "measuring: quantized", progress)
    if not bool(torch.isfinite(logits).all()):
        raise VerificationError(
            f"the quantized model's outputs on {images.description} are not all finite: "
            "no artefact was written"
        )
    report.logits_snr_db = snr_db(reference, logits)
    report.outlier_share = counter.share()
    if images.labels is not None:
        report.accuracy_before = accuracy(reference, images.labels)
        report.accuracy_after = accuracy(logits, images.labels)
    return counter


@contextmanager
def timed(report: Report, stage: str) -> Iterator[None]:
    """Note the seconds that a stage takes, added to what it took before."""
    start = time.perf_counter()
    yield
    seconds = report.seconds.get(stage, 0.0) + time.perf_counter() - start
    report.seconds[stage] = round(seconds, 3)
