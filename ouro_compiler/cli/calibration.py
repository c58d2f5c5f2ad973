"""The images of a command: opened, noise, or how to synthesise them; and how long that takes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ouro_compiler.cli.console import Progress, progress_bars
from ouro_compiler.config import Preprocessing, SynthesisSpec
from ouro_compiler.errors import UsageError

if TYPE_CHECKING:
    from ouro_compiler.data import ImageData


def check_calibration(source: str | None, iterations: int | None) -> None:
    """Refuse options that say nothing of this source of images."""
    if iterations is not None and not is_synthetic(source):
        raise UsageError(
            "--iterations is for synthetic images: leave out --calibration, or pass 'synthetic'"
        )


def is_synthetic(source: str | None) -> bool:
    """Are the images to be made from the model?"""
    return source in (None, "synthetic")


def calibration_images(
    source: str | None,
    preprocessing: Preprocessing,
    *,
    count: int,
    iterations: int | None,
    seed: int,
) -> ImageData | SynthesisSpec:
    """What --calibration names: a path, 'noise' or 'synthetic' (None)."""
    from ouro_compiler.data import noise_images, open_images

    if source is None or is_synthetic(source):
        return SynthesisSpec(images=count, iterations=iterations, seed=seed)
    if source == "noise":
        return noise_images(preprocessing, count, seed)
    return open_images(source, preprocessing, limit=count, seed=seed)


def labelled_images(
    source: str,
    preprocessing: Preprocessing,
    *,
    option: str = "--verify",
    limit: int | None = None,
    seed: int = 0,
) -> ImageData:
    """What an option names. Raises UsageError where there are no labels."""
    from ouro_compiler.data import open_images

    images = open_images(source, preprocessing, limit=limit, seed=seed)
    if images.labels is None:
        raise UsageError(
            f"{option} {source}: no labels there; use class folders or a 'labels' array"
        )
    return images


@contextmanager
def synthesis_progress(quiet: bool) -> Iterator[Progress | None]:
    """Bars on a terminal, and anywhere a line on stderr that says how long synthesis takes."""
    from ouro_compiler.calibration.synthesis.synthesize import estimates

    handler: logging.Handler = logging.NullHandler() if quiet else _Estimates()
    before = estimates.level, estimates.propagate
    estimates.addHandler(handler)
    estimates.setLevel(logging.INFO)
    estimates.propagate = False
    try:
        with progress_bars(quiet) as progress:
            yield progress
    finally:
        estimates.removeHandler(handler)
        estimates.setLevel(before[0])
        estimates.propagate = before[1]


class _Estimates(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        # sys.stderr of this moment: while bars are drawn, lines go above them.
        line = f"{record.getMessage()}; --images and --iterations shorten it"
        print(line, file=sys.stderr, flush=True)
