"""Quantizations of one model against floating point: what each keeps, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ouro_compiler.calibration.calibrate import Progress
from ouro_compiler.calibration.images import Images
from ouro_compiler.compiler import compile
from ouro_compiler.config import Preprocessing, QuantConfig
from ouro_compiler.data import ImageData
from ouro_compiler.errors import OuroError
from ouro_compiler.runtime.compiled_model import CompiledModel
from ouro_compiler.scoring import Model, Scores, logits_snr_db, model_row, score

Row = dict[str, Any]
# What a row that failed has not; in the order of columns.
MEASURED = (
    "top1",
    "top5",
    "drop",
    "agreement",
    "logits_snr_db",
    "bytes_stored",
    "bytes_fp16",
    "outlier_share",
    "layers",
    "layers_quantized",
    "layers_simulated",
    "calibration_seconds",
    "compile_seconds",
    "images_per_second",
)


class Comparison:
    """A model whose floating-point logits are kept, to hold quantized ones against.

    program: exported on the CPU (`frontend.capture.exported`), so that each row need not trace the
    model anew; `eager` the same model on `device`. images: labelled ones, scored in batches of
    `batch_size`.
    """

    def __init__(
        self,
        program: torch.export.ExportedProgram,
        eager: Model,
        example: Tensor,
        preprocessing: Preprocessing,
        images: ImageData,
        *,
        batch_size: int,
        device: torch.device | str = "cpu",
        progress: Progress | None = None,
    ) -> None:
        self.program, self.example, self.preprocessing = program, example, preprocessing
        self.images, self.batch_size = images, batch_size
        self.device, self._progress = torch.device(device), progress
        self._reference = _Recorded(eager)
        self._top1 = 0.0
        self.outputs = 0

    def floating_point(self) -> Row:
        """Score the model as it is; before any other row. Raises what `scoring.score` raises."""
        self._reference.logits.clear()
        scores = self._score([self._reference], "floating point")
        self.outputs = scores.outputs
        found = model_row(scores, 0, None)
        self._top1 = found["top1"]
        return {key: found[key] for key in ("top1", "top5", "images_per_second")}

    def compile(self, config: QuantConfig, calibration: Images) -> CompiledModel:
        """The quantized model, on the device."""
        compiled = compile(
            self.program,
            self.example,
            config,
            calibration=calibration,
            target="cuda" if self.device.type == "cuda" else "cpu",
            preprocessing=self.preprocessing,
            batch_size=self.batch_size,
            progress=self._progress,
        )
        return compiled if self.device.type == "cpu" else compiled.to(self.device)

    def measure(self, compiled: CompiledModel, stage: str = "quantized") -> Row:
        """MEASURED of a model made by `compile`.

        top1, top5, agreement: fractions of the images; drop: points of top-1 that floating point
        has more; logits_snr_db: None if there is no difference at all; outlier_share: on the
        calibration images; images_per_second: of the model alone, warm, None if never warm.
        """
        scores = self._score([compiled, self._reference.replayed()], stage)
        found = model_row(scores, 0, None)
        report, seconds = compiled.report, compiled.seconds
        values = {
            "top1": found["top1"],
            "top5": found["top5"],
            "drop": 100 * (self._top1 - found["top1"]),
            "agreement": int(scores.agreeing) / len(self.images),
            "logits_snr_db": logits_snr_db(scores),
            "bytes_stored": report["bytes"]["stored"],
            "bytes_fp16": report["bytes"]["fp16"],
            "outlier_share": report["outlier_share"],
            "layers": report["layers"]["total"],
            "layers_quantized": report["layers"]["quantized"],
            "layers_simulated": report["layers"]["simulated"],
            "calibration_seconds": seconds.get("calibrate", 0.0),
            "compile_seconds": round(sum(seconds.values()), 3),
            "images_per_second": found["images_per_second"],
        }
        return {key: values[key] for key in MEASURED}

    def _score(self, models: Sequence[Model], stage: str) -> Scores:
        def on_batch(done: int) -> None:
            if self._progress is not None:
                self._progress(f"evaluating: {stage}", done, len(self.images))

        return score(
            models,
            self.images,
            batch_size=self.batch_size,
            device=self.device,
            on_batch=on_batch,
        )


def failed_row(error: Exception) -> Row:
    """MEASURED of a row that could not be made, all None, and the reason in one line."""
    text = (str(error).strip().splitlines() or [""])[0]
    reason = text if isinstance(error, OuroError) else f"{type(error).__name__}: {text}"
    return {**dict.fromkeys(MEASURED), "reason": reason}


class _Recorded:
    """A model whose logits are kept batch by batch, in main memory."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.logits: list[Tensor] = []

    def __call__(self, batch: Tensor) -> Any:
        outputs = self._model(batch)
        first = outputs[0] if isinstance(outputs, (tuple, list)) and outputs else outputs
        if isinstance(first, Tensor):  # what else there is, `score` refuses
            self.logits.append(first.detach().cpu())
        return outputs

    def replayed(self) -> Model:
        """A model that gives them again, for the same batches in the same order."""
        left = iter(self.logits)
        return lambda batch: next(left)
