"""Learning the scales of one block: AdamW on their logarithms, by the cosine of its outputs.

On logarithms a step is relative, the same for scales of weights (0.01) and of activations (1), and
scales stay positive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ouro_compiler.calibration.blocks import Block
from ouro_compiler.calibration.quantizers import SiteQuantizer, WeightQuantizer
from ouro_compiler.calibration.search import round_to_half
from ouro_compiler.calibration.simulate import Simulation
from ouro_compiler.config import RefineSpec
from ouro_compiler.graph import QParams
from ouro_compiler.ops.quantize import MIN_SCALE


@dataclass(kw_only=True)
class Learned:
    """One vector that is learned: the attribute of a quantizer, `start * exp(log)`.

    name: of the vector, in files. log is of one element where all of them move together.
    """

    name: str
    owner: SiteQuantizer | WeightQuantizer
    attribute: str
    start: Tensor
    log: Tensor
    rate: float

    def set_learned(self) -> None:
        """Let the quantizer use the vector of now, with its gradient."""
        setattr(self.owner, self.attribute, self.start * self.log.exp())

    def set_value(self, value: Tensor) -> None:
        """Let it use this one."""
        setattr(self.owner, self.attribute, value)

    @property
    def rounded(self) -> Tensor:
        """What is learned, as values that fp16 holds."""
        return round_to_half((self.start * self.log.detach().exp()).clamp(min=MIN_SCALE))


def learned_of(
    block: Block, simulation: Simulation, spec: RefineSpec, taken: set[str]
) -> list[Learned]:
    """The vectors that a block learns: those of its quantizers, less `taken` by earlier blocks."""
    found: list[Learned] = []

    def add(name: str, owner: SiteQuantizer | WeightQuantizer, attribute: str, rate: float) -> None:
        start: Tensor | None = getattr(owner, attribute)
        if start is None or rate == 0 or name in taken:
            return
        taken.add(name)
        pooled = attribute == "scale" and isinstance(owner, SiteQuantizer) and _is_pooled(owner)
        log = torch.zeros_like(start[:1] if pooled else start).requires_grad_()
        found.append(
            Learned(name=name, owner=owner, attribute=attribute, start=start, log=log, rate=rate)
        )

    for site in block.sites:
        quantizer = simulation.quantizers[site.name]
        add(f"site.{site.name}.scale", quantizer, "scale", spec.learning_rate)
        if not any(one.fixed for one in simulation.weights.values() if one.site is quantizer):
            add(f"site.{site.name}.smooth", quantizer, "smooth", spec.smoothing_rate)
    for layer in block.layers:
        weight = simulation.weights.get(layer)
        if weight is not None:
            add(f"weight.{layer}.scale", weight, "scale", spec.learning_rate)
    return found


def _is_pooled(quantizer: SiteQuantizer) -> bool:
    """One scale for all time steps, written as a vector of equals."""
    is_vector = isinstance(quantizer.params, QParams)
    return is_vector and quantizer.spec.inlier_scale == "per_tensor"


@dataclass(frozen=True, kw_only=True)
class Example:
    """One batch at a block's door, on the CPU: what it reads, and what it should give.

    inputs: values of the nodes before it, quantized and refined; targets: of the floating-point
    block on floating-point inputs, a list for each of its outputs.
    """

    inputs: dict[Any, Any]
    targets: list[list[Tensor]]
    count: int


class BlockLearner:
    """Takes the scales of one block through epochs."""

    def __init__(
        self,
        simulation: Simulation,
        block: Block,
        vectors: Sequence[Learned],
        spec: RefineSpec,
        seed: int,
    ) -> None:
        self.simulation, self.block, self.vectors, self.spec = simulation, block, vectors, spec
        groups = [{"params": [one.log], "lr": one.rate} for one in vectors]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0) if groups else None
        self.order = torch.Generator().manual_seed(seed)

    def epoch(self, examples: Sequence[Example]) -> float:
        """One step a batch, in random order; returns the mean loss on the way."""
        assert self.optimizer is not None
        total = 0.0
        for index in torch.randperm(len(examples), generator=self.order).tolist():
            for one in self.vectors:
                one.set_learned()
            loss = self._loss(examples[index])
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([one.log for one in self.vectors], self.spec.clip)
            self.optimizer.step()
            total += float(loss.detach()) * examples[index].count
        return total / sum(one.count for one in examples)

    def evaluate(self, examples: Sequence[Example]) -> float:
        """Mean loss with the scales that the quantizers hold."""
        with torch.no_grad():
            total = sum(float(self._loss(one)) * one.count for one in examples)
        return total / sum(one.count for one in examples)

    def _loss(self, example: Example) -> Tensor:
        simulation = self.simulation
        inputs = on_device(example.inputs, simulation.device)
        values = simulation.run_nodes(self.block.calls, {**simulation.constants, **inputs})
        losses = [
            _distance(made, wanted.to(simulation.device))
            for node, targets in zip(self.block.outputs, example.targets, strict=True)
            for made, wanted in zip(tensors_in(values[node]), targets, strict=True)
        ]
        return torch.stack(losses).mean()


def _distance(made: Tensor, wanted: Tensor) -> Tensor:
    """Mean over tokens of 1 - cosine along the channels: the dimension that is densest in memory.

    Everything is token-major (docs/architecture.md), whatever the order of its dimensions.
    """
    dense = [dim for dim in range(made.dim()) if wanted.stride(dim) == 1 and wanted.shape[dim] > 1]
    return (
        1 - F.cosine_similarity(made.float(), wanted.float(), dim=dense[-1] if dense else -1)
    ).mean()


def tensors_in(value: Any) -> list[Tensor]:
    """The floating-point tensors of a node's value: itself, or those of a tuple."""
    items = value if isinstance(value, (tuple, list)) else (value,)
    return [one for one in items if isinstance(one, Tensor) and one.is_floating_point()]


def on_device(values: dict[Any, Any], device: torch.device) -> dict[Any, Any]:
    """Values of nodes, moved; strides stay."""

    def moved(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(moved(one) for one in value)
        return value.to(device) if isinstance(value, Tensor) else value

    return {node: moved(value) for node, value in values.items()}
