"""Learned scales, block by block (METHODS 3.2.8; with smoothing it is PTQ4VM's JLSS, METHODS 6.2).

A block's inputs are the outputs of the blocks before it, quantized and refined; its target is what
the floating-point block makes of floating-point inputs. Learned are the scales of weights and
inliers and, where there are any, smoothing vectors; zero points stay, thresholds follow. What was
learned is rounded to values that fp16 holds, and kept where it is better on the calibration images
than what the search found.

Between blocks the values of all calibration images are kept on the CPU, twice: in floating point
and quantized. On the device there is one batch at a time.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ouro_compiler.calibration.blocks import Block, cut_into_blocks
from ouro_compiler.calibration.calibrate import Progress
from ouro_compiler.calibration.images import Images
from ouro_compiler.calibration.learning import (
    BlockLearner,
    Example,
    Learned,
    learned_of,
    on_device,
    tensors_in,
)
from ouro_compiler.calibration.refine_store import row_of, row_tensors, scales_key
from ouro_compiler.calibration.simulate import Simulation
from ouro_compiler.calibration.tensor_store import TensorStore
from ouro_compiler.config import QuantConfig
from ouro_compiler.errors import UsageError
from ouro_compiler.graph import Calibration, Site
from ouro_compiler.report import RefineReport, RefineRow

logger = logging.getLogger(__name__)

STAGE = "learning scales"


@dataclass(frozen=True, kw_only=True)
class Refined:
    """The calibration with learned scales in it, and what became of every block."""

    calibration: Calibration
    report: RefineReport


def refine(
    gm: fx.GraphModule,
    sites: Sequence[Site],
    calibration: Calibration,
    config: QuantConfig,
    images: Images,
    *,
    device: torch.device | str = "cpu",
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Refined:
    """Learn the scales of a normalised graph, which stays as it is.

    gm: without parameters that want gradients, on `device`. folder: where finished blocks are kept
    for a run that was interrupted; None keeps none. progress: called after every epoch of a block.
    Raises UsageError without images.
    """
    with torch.inference_mode(False), torch.enable_grad():
        simulation = Simulation(gm, sites, calibration, config, device=torch.device(device))
        return _Refiner(simulation, sites, calibration, config, images, folder, progress).run()


class _Refiner:
    def __init__(
        self,
        simulation: Simulation,
        sites: Sequence[Site],
        calibration: Calibration,
        config: QuantConfig,
        images: Images,
        folder: Path | None,
        progress: Progress | None,
    ) -> None:
        self.simulation, self.calibration = simulation, calibration
        self.config, self.spec, self.progress = config, config.refine, progress
        self.blocks = cut_into_blocks(simulation.gm, sites)
        batches = images.batches(self.spec.batch_size)
        self.streams = [_start(simulation, one) for one in batches if len(one)]
        if not self.streams:
            raise UsageError("learning scales needs at least one calibration image")
        self.store = None
        if folder is not None:
            self.store = TensorStore(
                folder,
                scales_key(
                    simulation, calibration, config, [stream.images for stream in self.streams]
                ),
                "learned scales",
            )
        self.taken: set[str] = set()
        self.bytes_kept = 0

    def run(self) -> Refined:
        """Every block in order."""
        learning = [block for block in self.blocks if block.sites]
        rows: list[RefineRow] = []
        for block in self.blocks:
            if len(rows) == len(learning):
                break  # what follows learns nothing
            self._advance_float(block)
            if block.sites:
                rows.append(self._learn(block, len(rows), len(learning)))
            self._advance_quantized(block)
        found = dataclasses.replace(
            self.calibration,
            sites={
                **self.calibration.sites,
                **{name: one.found() for name, one in self.simulation.quantizers.items()},
            },
            weights={
                **self.calibration.weights,
                **{layer: one.found() for layer, one in self.simulation.weights.items()},
            },
        )
        count = sum(stream.count for stream in self.streams)
        logger.info("%s: %.1f MB of values kept between blocks", STAGE, self.bytes_kept / 1e6)
        return Refined(
            calibration=found,
            report=RefineReport(rows=rows, images=count, bytes_kept=self.bytes_kept),
        )

    def _advance_float(self, block: Block) -> None:
        for stream in self.streams:
            shared = stream.quantized is stream.exact
            stream.exact = self._after(block, stream.exact, layers=())
            if shared and not block.sites:
                stream.quantized = stream.exact
        self.bytes_kept = max(self.bytes_kept, _bytes(self.streams))

    def _advance_quantized(self, block: Block) -> None:
        for stream in self.streams:
            if stream.quantized is not stream.exact:
                stream.quantized = self._after(block, stream.quantized, layers=None)

    def _after(
        self, block: Block, values: dict[fx.Node, Any], layers: tuple[()] | None
    ) -> dict[fx.Node, Any]:
        """What nodes after a block read of it and of those before, on the CPU."""
        simulation = self.simulation
        inputs = {**simulation.constants, **on_device(values, simulation.device)}
        with torch.no_grad():
            found = simulation.run_nodes(block.calls, inputs, layers=layers)
        return {n: _kept(value) for n, value in found.items() if n not in simulation.constants}

    def _learn(self, block: Block, index: int, blocks: int) -> RefineRow:
        vectors = learned_of(block, self.simulation, self.spec, self.taken)
        name = f"block-{index:03d}"
        kept = self.store.load(name) if self.store is not None else None
        if kept is not None and (row := row_of(block, kept, vectors, self.spec.epochs)) is not None:
            for one in vectors:
                one.set_value(kept[one.name].to(one.start.device))
            self._report(index + 1, self.spec.epochs, blocks, row.loss_after)
            return row
        if kept is not None and self.store is not None:
            self.store.refuse(name, "other scales")
        row = self._train(block, vectors, index, blocks)
        if self.store is not None:
            held = {one.name: getattr(one.owner, one.attribute) for one in vectors}
            self.store.save(name, held | row_tensors(row))
        return row

    def _train(self, block: Block, vectors: list[Learned], index: int, blocks: int) -> RefineRow:
        start = time.perf_counter()
        examples = [
            Example(
                inputs=stream.quantized,
                targets=[tensors_in(stream.exact[node]) for node in block.outputs],
                count=stream.count,
            )
            for stream in self.streams
        ]
        learner = BlockLearner(
            self.simulation, block, vectors, self.spec, seed=self.config.seed + index
        )
        before = after = learner.evaluate(examples) if block.outputs else 0.0
        for epoch in range(self.spec.epochs if vectors and block.outputs else 0):
            loss = learner.epoch(examples)
            self._report(index, epoch + 1, blocks, loss)
        for one in vectors:
            one.set_value(one.rounded)
        if vectors and block.outputs:
            after = learner.evaluate(examples)
        is_better = after < before
        if not is_better:  # not a number, too
            after = before
            for one in vectors:
                one.set_value(one.start)
        return RefineRow(
            block=block.label,
            layers=len(block.layers),
            epochs=self.spec.epochs,
            loss_before=before,
            loss_after=after,
            used="learned" if is_better else "searched",
            seconds=round(time.perf_counter() - start, 3),
        )

    def _report(self, block: int, epochs: int, blocks: int, loss: float) -> None:
        if self.progress is not None:
            done = min(block * self.spec.epochs + epochs, blocks * self.spec.epochs)
            self.progress(f"{STAGE}: loss {loss:.3g}", done, blocks * self.spec.epochs)


@dataclass(kw_only=True)
class _Stream:
    """One batch between two blocks: values of nodes in floating point, and quantized."""

    exact: dict[fx.Node, Any]
    quantized: dict[fx.Node, Any]
    images: Tensor
    count: int


def _start(simulation: Simulation, batch: Tensor) -> _Stream:
    batch = batch.clone()  # of a loader in inference mode: it is to take part in gradients
    values = simulation.values_of(batch)
    values = {node: value for node, value in values.items() if node not in simulation.constants}
    return _Stream(exact=values, quantized=values, images=batch, count=len(batch))


def _kept(value: Any) -> Any:
    """A value on the CPU that holds no more memory than its own."""
    if isinstance(value, (tuple, list)):
        return type(value)(_kept(one) for one in value)
    if not isinstance(value, Tensor):
        return value
    value = value.cpu()
    is_part = value.untyped_storage().nbytes() > value.numel() * value.element_size()
    return value.clone() if is_part else value


def _bytes(streams: Sequence[_Stream]) -> int:
    def tensors() -> Iterator[Tensor]:
        for stream in streams:
            for value in (*stream.exact.values(), *stream.quantized.values()):
                yield from tensors_in(value)

    held = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors()}
    return sum(held.values())
