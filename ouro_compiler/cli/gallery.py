"""The folder that `ouro generate` writes: images to look at, arrays to calibrate on, losses."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ouro_compiler.config import Preprocessing
from ouro_compiler.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import Tensor

    from ouro_compiler.calibration.synthesis.synthesize import Synthesized

_FORMAT = "ouro_compiler synthetic images"
_IMAGES, _ARRAYS, _LOSS, _PLOT, _SHEET = (
    "images",
    "images.safetensors",
    "loss.json",
    "loss.svg",
    "contact_sheet.png",
)
_NUMBERED = re.compile(r"[0-9]{4,}\.png|.+\.partial")  # partial: of a run that was killed
_GAP = 2  # pixels between the images of a sheet
_WIDEST = 4096  # pixels of a sheet
_SMALLEST = 64  # pixels of an image there: smaller ones are shown enlarged


def check_folder(folder: Path) -> None:
    """Raise UsageError unless a folder can be made here, is empty, or holds what we wrote."""
    if not folder.exists() and folder.absolute().parent.is_dir():
        return
    if not folder.is_dir():
        raise UsageError(f"--output {folder}: not a folder, nor a name in an existing folder")
    try:
        found = {entry.name for entry in folder.iterdir() if entry.suffix != ".partial"}
    except OSError as error:
        raise UsageError(f"--output {folder}: it cannot be listed: {error.strerror}") from error
    if found and not (found <= {_IMAGES, _ARRAYS, _LOSS, _PLOT, _SHEET} and _is_ours(folder)):
        raise UsageError(
            f"--output {folder}: it holds other files; choose an empty folder, or an earlier output"
        )


def _is_ours(folder: Path) -> bool:
    try:
        said = json.loads((folder / _LOSS).read_text(encoding="utf-8"))["format"]
        within = [entry.name for entry in (folder / _IMAGES).iterdir()]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return said == _FORMAT and all(map(_NUMBERED.fullmatch, within))


def write_gallery(folder: Path, made: Synthesized, preprocessing: Preprocessing) -> None:
    """Write everything; what an earlier output holds beyond it is removed.

    Raises UsageError where the place cannot be written.
    """
    try:
        _write(folder, made, preprocessing)
    except OSError as error:
        raise UsageError(f"cannot write {folder}: {error.strerror or error}") from error


def _write(folder: Path, made: Synthesized, preprocessing: Preprocessing) -> None:
    from ouro_compiler.calibration.synthesis.loop import CURVE
    from ouro_compiler.cli.console import write_json, write_text
    from ouro_compiler.cli.plot import plot_curves

    (folder / _IMAGES).mkdir(parents=True, exist_ok=True)
    curve = made.curve.tolist()
    record: dict[str, Any] = {  # first: it makes the folder ours
        "format": _FORMAT,
        "schema_version": 1,
        "images": len(made),
        "columns": list(CURVE),
        "curve": [[value if math.isfinite(value) else None for value in row] for row in curve],
        "synthesis": made.spec.to_dict(),
        "preprocessing": preprocessing.to_dict(),
        "notes": made.notes,
    }
    write_json(folder / _LOSS, record)
    title = f"{made.description}, {len(curve)} iterations"
    write_text(folder / _PLOT, plot_curves(curve, CURVE, title))
    pixels = to_pixels(made.images, preprocessing)
    names = {f"{index:04d}.png": image for index, image in enumerate(pixels)}
    for name, image in names.items():
        _save(_picture(image), folder / _IMAGES / name)
    for entry in (folder / _IMAGES).iterdir():
        if entry.name not in names:
            entry.unlink()
    _save(contact_sheet(pixels), folder / _SHEET)
    _save_arrays(folder / _ARRAYS, made)


def to_pixels(images: Tensor, preprocessing: Preprocessing) -> np.ndarray:
    """(n, C, H, W) normalised -> (n, H, W, C) bytes."""
    import torch

    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    scaled = (255 * (images * std + mean)).round().clamp(0, 255)
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).numpy()


def contact_sheet(pixels: np.ndarray) -> Image.Image:
    """All images in rows, about as many as in columns; smaller ones where they are many."""
    from PIL import Image

    count, side = len(pixels), pixels.shape[1]
    columns = math.ceil(math.sqrt(count))
    shown = side * -(-_SMALLEST // side)
    way = Image.Resampling.NEAREST if shown > side else Image.Resampling.BICUBIC
    side = max(1, min(shown, _WIDEST // columns - _GAP))
    cell = side + _GAP
    size = (columns * cell + _GAP, -(-count // columns) * cell + _GAP)
    first = _picture(pixels[0])
    sheet = Image.new(first.mode, size, "white")
    for index, image in enumerate(pixels):
        row, column = divmod(index, columns)
        small = _picture(image).resize((side, side), way)
        sheet.paste(small, (_GAP + column * cell, _GAP + row * cell))
    return sheet


def _picture(pixels: np.ndarray) -> Image.Image:
    from PIL import Image

    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _save(image: Image.Image, path: Path) -> None:
    partial = _partial(path)
    try:
        image.save(partial, format="PNG")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _save_arrays(path: Path, made: Synthesized) -> None:
    from safetensors.torch import save

    arrays = {"images": made.images.contiguous()}
    if made.target_labels is not None:
        arrays["labels"] = made.target_labels
    partial = _partial(path)
    try:
        partial.write_bytes(save(arrays, {"labels": "drawn at random"}))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.parent / f"{path.name}.{os.getpid()}.partial"
