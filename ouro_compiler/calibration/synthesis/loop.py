"""The loop of OuroMamba-Gen: noise, losses, Adam, until the images excite the model (METHODS 5.2).

An image depends on the model, the spec and its own number: losses are sums over images, what is
random is drawn from the seed and that number (jitter and flips: and the iteration). The others of
its batch change no more than last bits, by how products of that size are added up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from hashlib import blake2b

import torch
from torch import Tensor, fx

from ouro_compiler.calibration.synthesis.features import FeatureRunner, find_layers
from ouro_compiler.calibration.synthesis.objectives import (
    ClassificationLoss,
    NoOutputLoss,
    OutputLoss,
    draw_variation,
    variation,
)
from ouro_compiler.config import Preprocessing, SynthesisSpec
from ouro_compiler.errors import UsageError
from ouro_compiler.graph import value_of

_ROUNDS = 2  # each with its own warm-up and cosine; the second with twice the jitter
_WARM_UP = 0.2  # of a round
_BETAS = (0.5, 0.9)
_SMALL = 64  # pixels of an image's side, at most
_BUDGET = 2 << 30  # bytes of values that a batch keeps for its backward pass, about
CURVE = ("total", "contrastive", "output", "variation")


@dataclass
class Batch:
    """Images in the making: everything the next step needs.

    images: (B, C, H, W), normalised. numbers: which of all images these are. moments: Adam's two,
    shaped as the images. curve: a row of `CURVE` an iteration, means over the batch.
    """

    numbers: list[int]
    images: Tensor
    moments: tuple[Tensor, Tensor]
    iteration: int
    curve: list[tuple[float, ...]]


class Synthesizer:
    """Makes calibration images for a normalised graph of one image input.

    output_loss: of another task than classification. Raises UsageError where neither features nor
    outputs say anything of the images.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        preprocessing: Preprocessing,
        spec: SynthesisSpec,
        *,
        output_loss: OutputLoss | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.spec = resolve(spec, gm, preprocessing, self.device)
        self.preprocessing = preprocessing
        self.layers, self.notes = find_layers(gm)
        self.output_loss = output_loss or _default_loss(gm, spec)
        if not (self.layers and spec.contrastive_weight) and isinstance(
            self.output_loss, NoOutputLoss
        ):
            raise UsageError(
                "images cannot be synthesised from this model: it has no scan or attention over a "
                "map of patches and its output is no classification; pass calibration images"
            )
        for parameter in gm.parameters():
            parameter.requires_grad_(False)
        self.run = FeatureRunner(gm.to(self.device), self.layers, self.spec)
        channels = list(zip(preprocessing.mean, preprocessing.std, strict=True))
        self._low, self._high = (
            torch.tensor([(edge - mean) / std for mean, std in channels], device=self.device).view(
                -1, 1, 1
            )
            for edge in (0.0, 1.0)
        )

    def start(self, numbers: Iterable[int]) -> Batch:
        """The images of these numbers before the first step: noise."""
        chosen = list(numbers)
        noise = torch.stack([self._noise(number) for number in chosen]).to(self.device)
        zeros = torch.zeros_like(noise)
        return Batch(chosen, noise, (zeros, zeros.clone()), 0, [])

    def step(self, batch: Batch) -> None:
        """One iteration, in place."""
        assert batch.iteration < self.iterations
        targets = [self.targets(number) for number in batch.numbers]
        images = batch.images.detach().requires_grad_()
        moved = self._moved(images, batch.iteration)
        losses = self.losses(moved, targets, batch.numbers, batch.iteration)
        losses[:, 0].sum().backward()
        assert images.grad is not None
        _adam(batch, images.grad, self.rate(batch.iteration), self._of_round(batch.iteration)[0])
        torch.clamp(batch.images, self._low, self._high, out=batch.images)
        batch.iteration += 1
        batch.curve.append(tuple(losses.detach().double().mean(0).tolist()))

    def losses(
        self, images: Tensor, targets: list[dict[str, Tensor]], numbers: list[int], iteration: int
    ) -> Tensor:
        """(B, 4): the total, L^C, the output's and the variation's loss of each image."""
        spec = self.spec
        outputs, contrastive = self.run(images, self._generator(iteration, 4))
        outputs = outputs if isinstance(outputs, Tensor) else outputs[0]
        output = self.output_loss(outputs, targets).to(self.device)
        shape = images.shape[1:]
        wanted = torch.stack([draw_variation(shape, self._generator(n, 2)) for n in numbers])
        rough = (variation(images) - wanted.to(self.device)).abs()
        assert spec.variation_weight is not None
        total = (
            spec.contrastive_weight * contrastive
            + spec.output_weight * output
            + spec.variation_weight * rough
        )
        return torch.stack([total, contrastive, output, rough], 1)

    def targets(self, number: int) -> dict[str, Tensor]:
        """What the output loss asks of one image."""
        return self.output_loss.draw(self._generator(number, 1))

    @property
    def iterations(self) -> int:
        """Steps that an image takes."""
        assert self.spec.iterations is not None
        return self.spec.iterations

    def _noise(self, number: int) -> Tensor:
        side = self.preprocessing.size
        shape = (self.preprocessing.channels, side, side)
        return torch.randn(shape, generator=self._generator(number, 0))

    def _generator(self, number: int, purpose: int) -> torch.Generator:
        # Hashed, since torch's generator reads no more than 32 bits of a seed.
        name = f"{self.spec.seed}/{number}/{purpose}".encode()
        return torch.Generator().manual_seed(
            int.from_bytes(blake2b(name, digest_size=4).digest(), "little")
        )

    def _of_round(self, iteration: int) -> tuple[int, int, int]:
        """(step within its round, steps of the round, the round)."""
        length = math.ceil(self.iterations / _ROUNDS)
        round_ = iteration // length
        return iteration - round_ * length, min(length, self.iterations - round_ * length), round_

    def rate(self, iteration: int) -> float:
        """Adam's, at an iteration."""
        step, length, _ = self._of_round(iteration)
        warm_up = max(1, round(_WARM_UP * length))
        if step < warm_up:
            return self.spec.learning_rate * (step + 1) / warm_up
        progress = (step - warm_up) / max(1, length - warm_up)
        return self.spec.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))

    def _moved(self, images: Tensor, iteration: int) -> Tensor:
        """Rolled and flipped: the same for all images, so that none depends on its batch."""
        generator = self._generator(iteration, 3)
        reach = (
            self.spec.jitter * self.preprocessing.size / 224 * (1 + self._of_round(iteration)[2])
        )
        limit = round(reach)
        shift = torch.randint(-limit, limit + 1, (2,), generator=generator).tolist()
        moved = torch.roll(images, shift, dims=(2, 3))
        flipped = bool(torch.rand((), generator=generator) < 0.5)
        return moved.flip(3) if self.spec.flip and flipped else moved


def _adam(batch: Batch, grad: Tensor, rate: float, step: int) -> None:
    """Adam; its moments start anew with each round (step 0)."""
    first, second = batch.moments
    if step == 0:
        first.zero_()
        second.zero_()
    first.lerp_(grad, 1 - _BETAS[0])
    second.lerp_(grad.square(), 1 - _BETAS[1])
    size = rate / (1 - _BETAS[0] ** (step + 1))
    scale = (second / (1 - _BETAS[1] ** (step + 1))).sqrt_().add_(1e-8)
    batch.images.sub_(size * first / scale)


def _default_loss(gm: fx.GraphModule, spec: SynthesisSpec) -> OutputLoss:
    """Classification where the first output is logits (B, classes)."""
    (output,) = (node for node in gm.graph.nodes if node.op == "output")
    first = output.args[0]
    while isinstance(first, (list, tuple)):
        first = first[0]
    value = value_of(first)
    if spec.output_loss == "none" or not spec.output_weight or value.dim() != 2:
        return NoOutputLoss()
    return ClassificationLoss(int(value.shape[1]), spec.output_loss)


def resolve(
    spec: SynthesisSpec, gm: fx.GraphModule, preprocessing: Preprocessing, device: torch.device
) -> SynthesisSpec:
    """Fill in what the size of the images and of the model decides."""
    weight = spec.variation_weight
    if weight is None:
        # How much natural images vary is known at 224 pixels; digits vary twice as much.
        weight = 0.0 if preprocessing.size <= _SMALL else 0.28
    iterations = spec.iterations or default_iterations(preprocessing.size, device)
    batch = spec.batch_size or max(1, min(32, _BUDGET // max(1, _bytes_per_image(gm))))
    return replace(
        spec,
        iterations=iterations,
        batch_size=min(batch, spec.images),
        variation_weight=weight,
    )


def default_iterations(size: int, device: torch.device) -> int:
    """1000, as published, on a GPU; what a CPU does in bearable time elsewhere."""
    if device.type == "cuda":
        return 1000
    return 100 if size <= _SMALL else 50


def _bytes_per_image(gm: fx.GraphModule) -> int:
    """Bytes of every value that the graph computes for one image."""
    total = 0
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, Tensor):
            sizes = [size for size in value.shape if isinstance(size, int)]
            total += math.prod(sizes) * value.element_size()
    return total
