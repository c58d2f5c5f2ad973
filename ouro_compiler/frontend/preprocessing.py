"""Preprocessing of a checkpoint: from its own metadata, a config.json beside it, or the default."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ouro_compiler.config import Preprocessing
from ouro_compiler.errors import ModelError, UsageError
from ouro_compiler.frontend.families import Config
from ouro_compiler.models.mambavision import MambaVisionConfig
from ouro_compiler.models.vit import ViTConfig

_MAX_CONFIG = 1_000_000  # bytes of a config.json that is read
_HOLDERS = ("pretrained_cfg", "default_cfg")
_TIMM = {"mean": "mean", "std": "std", "crop_pct": "crop"}


def default_preprocessing(channels: int, size: int) -> Preprocessing:
    """For models that do not say: ImageNet's, and for grey images mean and std 0.5.

    Raises ModelError for another number of channels than 1 and 3.
    """
    if channels == 1:
        return Preprocessing(size=size, mean=(0.5,), std=(0.5,))
    if channels == 3:
        return Preprocessing(size=size)
    raise ModelError(f"the model takes images of {channels} channels, but only 1 and 3 work")


def expected_preprocessing(config: Config) -> Preprocessing:
    """What the public weights of an architecture were trained for."""
    default = default_preprocessing(config.in_chans, config.img_size)
    if isinstance(config, ViTConfig) and len(config.mean) == config.in_chans:
        return replace(default, mean=config.mean, std=config.std, crop=config.crop)
    return replace(default, crop=config.crop) if isinstance(config, MambaVisionConfig) else default


def find_preprocessing(
    path: Path, metadata: Mapping[str, str], default: Preprocessing
) -> Preprocessing:
    """What a checkpoint says of its images, checked against the default, the model's own input.

    In this order: `preprocessing` in the file's metadata; timm's keys (input_size, mean, std,
    crop_pct; flat, or under pretrained_cfg) in a config.json beside it; the default.
    Raises ModelError for values that cannot be used or do not fit the model.
    """
    size, channels = default.size, default.channels
    where = "the preprocessing in its metadata"
    try:
        if "preprocessing" in metadata:
            found = _parse_preprocessing(json.loads(metadata["preprocessing"]))
        else:
            where = "the preprocessing in config.json beside it"
            found = _parse_timm(path.parent / "config.json", default)
    except (ValueError, RecursionError, UsageError) as error:
        raise ModelError(f"{where} cannot be used: {error}") from error
    if (found.size, found.channels) != (size, channels):
        raise ModelError(
            f"{where} makes images of {found.channels} channels and {found.size} pixels, but the "
            f"model takes {channels} and {size}"
        )
    return found


def _parse_timm(path: Path, default: Preprocessing) -> Preprocessing:
    """timm's keys over a default; the default where there is no such file, or no such key."""
    try:
        if not path.is_file() or path.stat().st_size > _MAX_CONFIG:
            return default
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        return default
    if not isinstance(content, dict):
        return default
    held = next((content[key] for key in _HOLDERS if isinstance(content.get(key), dict)), content)
    data = {ours: held[theirs] for theirs, ours in _TIMM.items() if theirs in held}
    shape = held.get("input_size")
    if not data and shape is None:
        return default
    if shape is not None:
        if not isinstance(shape, list) or len(shape) != 3 or shape[1] != shape[2]:
            raise ValueError(f"input_size must be [channels, side, side], got {shape!r}")
        data["size"] = shape[1]
    plain = json.loads(json.dumps(default.to_dict()))  # lists for tuples, as in a file
    return _parse_preprocessing({**plain, **data})


def _parse_preprocessing(data: Any) -> Preprocessing:
    if not isinstance(data, dict):
        raise ValueError("expected a JSON object")
    valid = {
        "size": lambda value: type(value) is int,
        "mean": lambda value: isinstance(value, list) and all(map(_is_number, value)),
        "std": lambda value: isinstance(value, list) and all(map(_is_number, value)),
        "crop": _is_number,
    }
    for key, value in data.items():
        if key in valid and not valid[key](value):
            raise ValueError(f"{key} has a value of the wrong type")
    return Preprocessing.from_dict(data)


def _is_number(value: object) -> bool:
    # JSON's true is an int to Python, and Python's reader takes NaN, Infinity and any size.
    return type(value) in (int, float) and abs(value) < 1e6  # type: ignore[arg-type]
