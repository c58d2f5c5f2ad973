"""What each layer alone does to a model: noise on its block's output and on the logits.

One unit of layers is quantized at a time, at every choice of bits, and the rest stays in floating
point. The floating-point model runs once a batch; each trial starts at its block's door.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ouro_compiler.calibration.blocks import Block, cut_into_blocks
from ouro_compiler.calibration.calibrate import Progress
from ouro_compiler.calibration.images import Images
from ouro_compiler.calibration.learning import tensors_in
from ouro_compiler.calibration.simulate import Simulation, Values
from ouro_compiler.evaluation import powers
from ouro_compiler.graph import Site

STAGE = "measuring layers one by one"


@dataclass(frozen=True, kw_only=True)
class Noise:
    """(2,) fp64 each: the sums of squares of the floating-point values, and of the error."""

    block: Tensor
    logits: Tensor


def units_of(sites: Sequence[Site]) -> list[tuple[str, ...]]:
    """Layers in order, those that share a quantizer together."""
    groups: dict[str, list[str]] = {}  # of each layer, the list that it is in
    of_site: dict[str, list[str]] = {}
    for site in sites:
        group = groups.setdefault(site.layer, [site.layer])
        other = of_site.setdefault(site.name, group)
        if other is group:
            continue
        other += group
        for layer in group:
            groups[layer] = other
        for name, held in of_site.items():
            if held is group:
                of_site[name] = other
    return [tuple(group) for layer, group in groups.items() if layer == group[0]]


def measure_units(
    simulations: Sequence[Simulation],
    sites: Sequence[Site],
    units: Sequence[Sequence[str]],
    images: Images,
    *,
    batch_size: int,
    progress: Progress | None = None,
) -> list[list[Noise]]:
    """A row a unit, an entry a simulation: the same graph and sites, at other bits.

    Values of one batch are held, in floating point, for every block.
    """
    zeros = torch.zeros(2, dtype=torch.float64)
    found = [[Noise(block=zeros, logits=zeros) for _ in simulations] for _ in units]
    exact = simulations[0]
    blocks = cut_into_blocks(exact.gm, sites)
    first = [_first_block(blocks, layers) for layers in units]
    done = 0
    with torch.no_grad():
        for batch in images.batches(batch_size):
            doors = [exact.values_of(batch.to(exact.device))]
            for block in blocks:
                doors.append(exact.run_nodes(block.calls, doors[-1], layers=()))
            for row, layers, start in zip(found, units, first, strict=True):
                for index, simulation in enumerate(simulations):
                    made = _trial(simulation, blocks[start:], doors[start:], layers)
                    row[index] = Noise(
                        block=row[index].block + made.block, logits=row[index].logits + made.logits
                    )
                done += len(batch)
                if progress is not None:
                    progress(STAGE, done, len(images) * len(units))
    return found


def _first_block(blocks: Sequence[Block], layers: Sequence[str]) -> int:
    return next(i for i, block in enumerate(blocks) if not set(layers).isdisjoint(block.layers))


def _trial(
    simulation: Simulation, blocks: Sequence[Block], doors: Sequence[Values], layers: Sequence[str]
) -> Noise:
    """Powers with these layers quantized, from the values at the first block's door on.

    doors: of floating point, at each block and after the last.
    """
    values = simulation.run_nodes(blocks[0].calls, doors[0], layers=layers)
    at_block = [
        powers(wanted, made).cpu()
        for node in blocks[0].outputs
        for wanted, made in zip(tensors_in(doors[1][node]), tensors_in(values[node]), strict=True)
    ]
    for block in blocks[1:]:
        values = simulation.run_nodes(block.calls, values, layers=layers)
    logits = powers(simulation.outputs(doors[-1]), simulation.outputs(values)).cpu()
    total = torch.stack(at_block).sum(0) if at_block else torch.zeros(2, dtype=torch.float64)
    return Noise(block=total, logits=logits)


def decibels(found: Tensor) -> float:
    """SNR of two such sums; infinite without noise."""
    return float(10 * torch.log10(found[0] / found[1]))
