"""What images are asked to do besides L^C: excite an output, and look like images (METHODS 5.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ouro_compiler.config import OutputLossName


class OutputLoss(Protocol):
    """A task's output loss: targets drawn once an image, and a loss an image."""

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """The targets of one image."""
        ...

    def __call__(self, outputs: Any, targets: list[dict[str, Tensor]]) -> Tensor:
        """(B,) losses of a batch, each of its own image's outputs and targets alone."""
        ...


class ClassificationLoss:
    """Random labels; `mae`: classes * mean |softmax - one-hot|; `ce`: cross-entropy."""

    def __init__(self, classes: int, kind: OutputLossName) -> None:
        self.classes, self.kind = classes, kind

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """{label: ()}"""
        return {"label": torch.randint(self.classes, (), generator=generator)}

    def __call__(self, outputs: Tensor, targets: list[dict[str, Tensor]]) -> Tensor:
        """outputs: logits (B, classes)."""
        labels = torch.stack([one["label"] for one in targets]).to(outputs.device)
        if self.kind == "ce":
            return F.cross_entropy(outputs, labels, reduction="none")
        wanted = F.one_hot(labels, self.classes)
        return (outputs.softmax(1) - wanted).abs().sum(1)


class SegmentationLoss:
    """Random smooth label maps, cross-entropy or MAE a pixel; outputs (B, classes, H, W)."""

    def __init__(self, classes: int, size: tuple[int, int], kind: OutputLossName) -> None:
        self.classes, self.size, self.kind = classes, size, kind

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """{labels: (H, W)}: the largest of `classes` smooth random fields at each pixel."""
        coarse = torch.randn(1, self.classes, 4, 4, generator=generator)
        fields = F.interpolate(coarse, self.size, mode="bicubic", align_corners=True)
        return {"labels": fields.argmax(1)[0]}

    def __call__(self, outputs: Tensor, targets: list[dict[str, Tensor]]) -> Tensor:
        """Mean over pixels; labels are resampled to the outputs' resolution."""
        labels = torch.stack([one["labels"] for one in targets])[:, None].float()
        labels = F.interpolate(labels, outputs.shape[2:]).squeeze(1).long().to(outputs.device)
        if self.kind == "ce":
            return F.cross_entropy(outputs, labels, reduction="none").mean((1, 2))
        wanted = F.one_hot(labels, self.classes).movedim(-1, 1)
        return (outputs.softmax(1) - wanted).abs().sum(1).mean((1, 2))


class DetectionLoss:
    """Random boxes and labels for a detector's own loss.

    loss: (outputs, targets) -> (B,), targets as torchvision spells them: boxes (n, 4) in pixels, x
    and y of two corners, and labels (n,), 1 and up.
    """

    def __init__(
        self, classes: int, size: int, loss: Callable[[Any, list[dict[str, Tensor]]], Tensor]
    ) -> None:
        self.classes, self.size, self.loss = classes, size, loss

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """{boxes, labels} of one to five objects, each a tenth of the side or more."""
        count = int(torch.randint(1, 6, (), generator=generator))
        extent = 0.1 + 0.5 * torch.rand(count, 2, generator=generator)
        corner = torch.rand(count, 2, generator=generator) * (1 - extent)
        boxes = torch.cat([corner, corner + extent], 1) * self.size
        labels = torch.randint(1, self.classes + 1, (count,), generator=generator)
        return {"boxes": boxes, "labels": labels}

    def __call__(self, outputs: Any, targets: list[dict[str, Tensor]]) -> Tensor:
        """The detector's loss of each image."""
        return self.loss(outputs, targets)


class NoOutputLoss:
    """For models without a task: features alone."""

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """No targets."""
        del generator
        return {}

    def __call__(self, outputs: Any, targets: list[dict[str, Tensor]]) -> Tensor:
        """Zeros."""
        return torch.zeros(len(targets))


def variation(images: Tensor) -> Tensor:
    """(B,): the L2 norms of horizontal, vertical and both diagonal differences, added up."""
    steps = (
        images[..., :, 1:] - images[..., :, :-1],
        images[..., 1:, :] - images[..., :-1, :],
        images[..., 1:, 1:] - images[..., :-1, :-1],
        images[..., 1:, :-1] - images[..., :-1, 1:],
    )
    return torch.stack([step.flatten(1).norm(dim=1) for step in steps]).sum(0)


def draw_variation(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """The variation wanted of one image (C, H, W): U(442, 530) at 3 x 224 x 224.

    A norm grows with the root of the number of elements, so other shapes scale by that.
    """
    scale = math.sqrt(math.prod(shape) / (3 * 224 * 224))
    return scale * (442 + 88 * torch.rand((), generator=generator))
