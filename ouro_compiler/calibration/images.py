"""Calibration images as the compiler takes them, and their resolution."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from ouro_compiler.config import InlierScale
from ouro_compiler.errors import UsageError


class Images(Protocol):
    """Calibration or verification images; `ouro_compiler.data` has the ready-made ones."""

    description: str
    labels: Tensor | None

    def __len__(self) -> int: ...

    def batches(self, size: int) -> Iterator[Tensor]: ...


class TensorImages:
    """A tensor (n, C, H, W) as Images."""

    labels: Tensor | None = None

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.description = tensor, f"{len(tensor)} images"

    def __len__(self) -> int:
        return len(self.tensor)

    def batches(self, size: int) -> Iterator[Tensor]:
        yield from self.tensor.split(size)


class ResizedImages:
    """Images at another resolution (H, W), interpolated bilinearly."""

    def __init__(self, images: Images, resolution: Sequence[int]) -> None:
        self.images, self.resolution, self.labels = images, tuple(resolution), images.labels
        self.description = f"{images.description} resized to {shown(self.resolution)}"

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, size: int) -> Iterator[Tensor]:
        """Batches (B, C, H, W) of the new resolution."""
        for batch in self.images.batches(size):
            yield F.interpolate(batch, self.resolution, mode="bilinear", antialias=True)


def shown(resolution: Sequence[int]) -> str:
    """(224, 160) -> 224x160."""
    return "x".join(map(str, resolution))


def image_of_other_resolution(
    images: Images, shape: Sequence[int], inlier_scale: InlierScale | None
) -> Tensor | None:
    """One calibration image (1, C, H, W) if its resolution is not the model's, else None.

    shape: the model's input (B, C, H, W). inlier_scale: None for a recipe that always has scales
    per time step. Raises UsageError for images that are none of the model's, and where scales per
    time step, whose number depends on the resolution, rule it out.
    """
    image = next(iter(images.batches(1)), None)
    if image is None or image.shape[1:] == shape[1:]:
        return None  # without images calibration itself says so
    if image.dim() != 4 or len(shape) != 4 or image.shape[1] != shape[1]:
        raise UsageError(
            f"the calibration images have shape {_shape(image.shape)}, the model takes "
            f"{_shape(shape)}: pass images in the model's own shape"
        )
    if inlier_scale != "per_tensor":
        theirs, ours = shown(image.shape[2:]), shown(shape[2:])
        other = ", or choose one scale a site (inlier_scale per_tensor)" if inlier_scale else ""
        raise UsageError(
            f"the calibration images are {theirs} and the model is compiled for {ours}: scales per "
            f"time step belong to one resolution, so calibrate on images of {ours}{other}"
        )
    return image


def _shape(shape: Sequence[int]) -> str:
    return f"({', '.join(['B', *map(str, shape[1:])])})"
