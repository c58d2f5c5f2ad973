"""Options of the torch.compile backend, and the calibration images that they name."""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ouro_compiler.compiler import Images, TensorImages
from ouro_compiler.config import PRESETS, W4A4, Preprocessing, QuantConfig, SynthesisSpec
from ouro_compiler.data import noise_images, open_images
from ouro_compiler.errors import UsageError
from ouro_compiler.frontend.dynamo import UncalibratableError
from ouro_compiler.frontend.preprocessing import default_preprocessing

Inner = Literal["inductor", "eager"]
Calibration = Tensor | str | os.PathLike[str] | Images | SynthesisSpec
_IMAGES = 128  # of a path, noise or synthesis, as for ouro-compile
_TRIED = 8  # images of noise


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `options=` of torch.compile may hold; docs/torch_compile.md says what each means."""

    calibration: Calibration = "synthetic"
    config: QuantConfig = W4A4
    inner: Inner = "inductor"
    images: int | None = None
    preprocessing: Preprocessing | None = None
    strict: bool = False
    batch_size: int = 32
    cache: bool = True

    @staticmethod
    def read(options: Mapping[str, Any] | None, mode: str | None) -> Options:
        """Check what torch.compile passed on. Raises UsageError."""
        if mode is not None:
            raise UsageError(f"the ouro backend has no modes, got mode={mode!r}: use options=")
        given = dict(options or {})
        known = [field.name for field in dataclasses.fields(Options)]
        unknown = sorted(str(key) for key in given.keys() - set(known))
        if unknown:
            raise UsageError(f"no option {', '.join(unknown)}: options are {', '.join(known)}")
        if given.get("calibration") is None:
            given["calibration"] = "synthetic"
        if isinstance(given.get("config"), str):
            given["config"] = _preset(given["config"])
        read = Options(**given)
        _check(read)
        return read

    @property
    def synthesis(self) -> SynthesisSpec | None:
        """How calibration images are synthesised; None where they are given."""
        if isinstance(self.calibration, SynthesisSpec):
            return self.calibration
        if isinstance(self.calibration, str) and self.calibration == "synthetic":
            return SynthesisSpec(images=self.images or _IMAGES, seed=self.config.seed)
        return None


def _preset(name: str) -> QuantConfig:
    if name not in PRESETS:
        raise UsageError(f"there is no preset {name!r}: presets are {', '.join(PRESETS)}")
    return PRESETS[name]


def _check(options: Options) -> None:
    source = options.calibration
    if not isinstance(options.config, QuantConfig):
        raise UsageError(
            f"config must be a QuantConfig or the name of a preset, got {options.config!r}"
        )
    if options.inner not in typing.get_args(Inner):
        raise UsageError(f"inner must be inductor or eager, got {options.inner!r}")
    if options.preprocessing is not None and not isinstance(options.preprocessing, Preprocessing):
        raise UsageError(f"preprocessing must be a Preprocessing, got {options.preprocessing!r}")
    for name in ("strict", "cache"):
        if not isinstance(getattr(options, name), bool):
            raise UsageError(f"{name} must be True or False, got {getattr(options, name)!r}")
    for name in ("images", "batch_size"):
        value = getattr(options, name)
        if value is not None and (type(value) is not int or value < 1):
            raise UsageError(f"{name} must be a whole number of at least 1, got {value!r}")
    if isinstance(source, Tensor):
        if source.dtype != torch.float32 or source.dim() < 2 or not len(source):
            raise UsageError(
                "a calibration tensor must be fp32 images (n, C, H, W), "
                f"got {source.dtype} {tuple(source.shape)}"
            )
    elif not (isinstance(source, (str, os.PathLike, SynthesisSpec)) or hasattr(source, "batches")):
        raise UsageError(
            "calibration must be a tensor, a path, 'noise', 'synthetic' or a SynthesisSpec, "
            f"got {source!r}"
        )
    if options.images is not None and not isinstance(source, (str, os.PathLike)):
        raise UsageError(
            "images limits a path, noise or 'synthetic': a tensor, images and a SynthesisSpec "
            "have a number of their own"
        )


def open_calibration(options: Options, shape: tuple[int, ...]) -> Images:
    """The calibration images; noise, to try a graph on, where they are yet to be synthesised.

    Raises UncalibratableError if the graph takes something else.
    """
    source = options.calibration
    if options.synthesis is not None:
        _refuse_no_image(shape)
        return noise_images(default_preprocessing(shape[1], shape[2]), _TRIED, 0)
    assert not isinstance(source, SynthesisSpec)
    if isinstance(source, Tensor):
        images: Images = TensorImages(source.detach().cpu())
    elif not isinstance(source, (str, os.PathLike)):
        images = source
    else:
        images = _open_path(source, options, shape)
    found = next(iter(images.batches(1))).shape
    if found[1:] != shape[1:]:
        raise UncalibratableError(
            f"its input has shape {_shown(shape)}, the calibration images {_shown(found)}, "
            "so it is no image of theirs"
        )
    return images


def _open_path(source: str | os.PathLike[str], options: Options, shape: tuple[int, ...]) -> Images:
    _refuse_no_image(shape)
    preprocessing = options.preprocessing or default_preprocessing(shape[1], shape[2])
    limit, seed = options.images or _IMAGES, options.config.seed
    if source == "noise":
        return noise_images(preprocessing, limit, seed)
    return open_images(os.fspath(source), preprocessing, limit=limit, seed=seed)


def _refuse_no_image(shape: tuple[int, ...]) -> None:
    if len(shape) != 4 or shape[1] not in (1, 3) or shape[2] != shape[3]:
        raise UncalibratableError(
            f"its input has shape {_shown(shape)}, no square image of 1 or 3 channels"
        )


def _shown(shape: Sequence[int]) -> str:
    return f"({', '.join(['B', *(str(size) for size in shape[1:])])})"


def some_images(images: Images, count: int) -> Tensor:
    """(count, ...) of the images, the first ones, from the start again if they are fewer."""
    found = next(iter(images.batches(count)))
    times = -(-count // len(found))
    return torch.cat([found] * times)[:count]
