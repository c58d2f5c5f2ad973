"""Right answers of models on labelled images, by class; agreement of two models; speed."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ouro_compiler.data import ImageData
from ouro_compiler.errors import ModelError, OuroError, UsageError, VerificationError
from ouro_compiler.evaluation import powers

SCORES_SCHEMA_VERSION = 1
TOP = 5
# The first of a size compiles kernels, on a CPU the second one records the tape of an artefact.
COLD_BATCHES = 2

Model = Callable[[Tensor], Any]


@dataclass(kw_only=True)
class Scores:
    """What was counted of one model or two; the tensors of several processes add up.

    hits: (models, classes, 3) int64: a class's images, those whose label has the largest logit, and
    those where it is among the TOP largest. agreeing: (1,) int64, images that both models put into
    the same class. powers: (batches, 2) fp64, of the second model's logits and of the first's
    error, a row a batch, so that their sum is the same however processes share the batches.
    speed: (models, 2) fp64, images in warm batches and images a second.
    seconds: (1,) fp64, from the first image to the last, decoding included.
    """

    hits: Tensor
    agreeing: Tensor
    powers: Tensor
    speed: Tensor
    seconds: Tensor
    outputs: int = 0


def label_ranks(logits: Tensor, labels: Tensor) -> Tensor:
    """(n,) how many logits of (n, classes) come before the label's; of equal ones the first does.

    So 0 where argmax gives the label.
    """
    own = logits.gather(1, labels[:, None])
    earlier = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    return ((logits > own) | ((logits == own) & earlier)).sum(1)


def count_classes(images: ImageData) -> int:
    """Class folders, or the largest label and one. Raises UsageError for a negative label."""
    assert images.labels is not None
    if int(images.labels.min()) < 0:
        raise UsageError(f"labels must not be negative, found {int(images.labels.min())}")
    if images.class_names is not None:
        return len(images.class_names)
    return int(images.labels.max()) + 1


def score(
    models: Sequence[Model],
    images: ImageData,
    *,
    batch_size: int,
    device: torch.device,
    first: int = 0,
    step: int = 1,
    on_batch: Callable[[int], None] | None = None,
) -> Scores:
    """Run one model or two on the batches first, first + step, ... of labelled images.

    models: on `device`, images (B, C, H, W) -> logits (B, outputs), or a tuple of which the first
    counts. on_batch gets the images done so far.
    Raises UsageError for more classes than outputs, ModelError for models that fail or give no
    logits, VerificationError for logits that are not finite.
    """
    assert images.labels is not None
    classes = count_classes(images)
    found = Scores(
        hits=torch.zeros(len(models), classes, 3, dtype=torch.int64),
        agreeing=torch.zeros(1, dtype=torch.int64),
        powers=torch.zeros(math.ceil(len(images) / batch_size), 2, dtype=torch.float64),
        speed=torch.zeros(len(models), 2, dtype=torch.float64),
        seconds=torch.zeros(1, dtype=torch.float64),
    )
    timed = [_Timed(model, device) for model in models]
    done, began = 0, time.perf_counter()
    with torch.no_grad():
        for turn, batch in enumerate(images.batches(batch_size, first=first, step=step)):
            number = first + turn * step
            labels = images.labels[number * batch_size :][: len(batch)]
            inputs = batch.to(device)
            logits = [one(inputs) for one in timed]
            _check(logits, classes)
            found.outputs = logits[0].shape[1]
            for row, one in zip(found.hits, logits, strict=True):
                _count(row, label_ranks(one, labels), labels)
            if len(logits) == 2:
                found.agreeing += (logits[0].argmax(1) == logits[1].argmax(1)).sum()
                found.powers[number] = powers(logits[1], logits[0])
            done += len(batch)
            if on_batch is not None:
                on_batch(done)
    found.seconds[0] = time.perf_counter() - began
    for row, each in zip(found.speed, timed, strict=True):
        row[0], row[1] = each.images, each.images / each.seconds if each.images else 0.0
    return found


def _count(hits: Tensor, ranks: Tensor, labels: Tensor) -> None:
    for column, counted in enumerate((ranks >= 0, ranks < 1, ranks < TOP)):
        hits[:, column] += torch.bincount(labels[counted], minlength=hits.shape[0])


def _check(logits: Sequence[Tensor], classes: int) -> None:
    outputs = [one.shape[1] for one in logits]
    if classes > min(outputs):
        raise UsageError(f"the images are of {classes} classes, the model knows {min(outputs)}")
    if len(set(outputs)) > 1:
        raise UsageError(
            f"the models have {outputs[0]} and {outputs[1]} outputs: they cannot be compared"
        )


class _Timed:
    """A model that is timed once it is warm; its logits come back in main memory."""

    def __init__(self, model: Model, device: torch.device) -> None:
        self._model, self._device = model, device
        self._seen: Counter[int] = Counter()
        self.images, self.seconds = 0, 0.0

    def __call__(self, batch: Tensor) -> Tensor:
        self._wait()
        began = time.perf_counter()
        try:
            outputs = self._model(batch)
            self._wait()
        except OuroError:
            raise
        except Exception as error:  # the user's own code
            reason = (str(error).strip().splitlines() or [""])[0]
            raise ModelError(
                f"the model fails on images {tuple(batch.shape)} ({type(error).__name__}: {reason})"
            ) from error
        seconds = time.perf_counter() - began
        self._seen[len(batch)] += 1
        if self._seen[len(batch)] > COLD_BATCHES:
            self.images += len(batch)
            self.seconds += seconds
        return _logits(outputs, len(batch))

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _logits(outputs: Any, count: int) -> Tensor:
    found = outputs[0] if isinstance(outputs, (tuple, list)) and outputs else outputs
    if not isinstance(found, Tensor) or found.dim() != 2 or found.shape[0] != count:
        what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ModelError(
            f"the model gives {what} for {count} images, not a score for each class: "
            "accuracy needs a classifier"
        )
    if not torch.isfinite(found).all():
        raise VerificationError("the model gives logits that are not finite")
    return found.float().cpu()


def model_row(scores: Scores, index: int, names: Sequence[str] | None) -> dict[str, Any]:
    """One model's part of the JSON (docs/evaluation.md)."""
    hits = scores.hits[index]
    images, top1, top5 = hits.sum(0).tolist()
    warm, rate = scores.speed[index].tolist()
    return {
        "top1": top1 / images,
        "top5": top5 / images,
        "correct": {"top1": top1, "top5": top5},
        "images_per_second": rate if warm else None,
        "timed_images": int(warm),
        "per_class": [
            {
                "class": label,
                "name": names[label] if names is not None else None,
                "images": count,
                "top1": right / count if count else None,
                "top5": among / count if count else None,
            }
            for label, (count, right, among) in enumerate(hits.tolist())
        ],
    }


def worst_classes(rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The rows of the classes with the lowest top-1, then top-5; those without images are out."""
    seen = [row for row in rows if row["images"]]
    return sorted(seen, key=lambda row: (row["top1"], row["top5"], row["class"]))[:count]


def logits_snr_db(scores: Scores) -> float | None:
    """Of the first model's logits against the second's; None if there is no difference at all."""
    signal, noise = scores.powers.sum(0).tolist()
    return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None
