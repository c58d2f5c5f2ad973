"""Finished blocks of learned scales on disk: what they depend on, and their rows of the report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ouro_compiler.calibration.blocks import Block
from ouro_compiler.calibration.learning import Learned
from ouro_compiler.calibration.simulate import Simulation
from ouro_compiler.calibration.tensor_store import constants_of, tensors_digest
from ouro_compiler.config import QuantConfig
from ouro_compiler.graph import Calibration
from ouro_compiler.report import RefineRow

FORMAT_VERSION = 1


def scales_key(
    simulation: Simulation,
    calibration: Calibration,
    config: QuantConfig,
    images: Sequence[Tensor],
) -> str:
    """A digest of the graph, its constants, calibration, configuration, images and the code.

    images: the batches, in order.
    """
    gm = simulation.gm
    calibrated = {
        f"{kind} {name} {field}": value
        for kind, table in (("site", calibration.sites), ("weight", calibration.weights))
        for name, params in table.items()
        for field, value in vars(params).items()
        if isinstance(value, Tensor)
    }
    settings = {
        "format": FORMAT_VERSION,
        "code": _code_digest(),
        "torch": torch.__version__,
        "device": simulation.device.type,
        "config": config.to_dict(),
        "graph": str(gm.graph),
        "constants": tensors_digest(constants_of(gm)),
        "calibration": tensors_digest(calibrated),
        "images": [tensors_digest({"images": batch}) for batch in images],
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def row_tensors(row: RefineRow) -> dict[str, Tensor]:
    """A row as tensors of a file."""
    numbers = (row.loss_before, row.loss_after, row.seconds)
    return {
        "row.numbers": torch.tensor(numbers, dtype=torch.float64),
        "row.learned": torch.tensor(row.used == "learned"),
    }


def row_of(
    block: Block, kept: dict[str, Tensor], vectors: Sequence[Learned], epochs: int
) -> RefineRow | None:
    """The row of a block that was kept; None unless it is of these vectors."""
    shapes = {name: tuple(value.shape) for name, value in kept.items()}
    expected = {one.name: tuple(one.start.shape) for one in vectors}
    if shapes != expected | {"row.numbers": (3,), "row.learned": ()}:
        return None
    before, after, seconds = kept["row.numbers"].tolist()
    return RefineRow(
        block=block.label,
        layers=len(block.layers),
        epochs=epochs,
        loss_before=before,
        loss_after=after,
        used="learned" if bool(kept["row.learned"]) else "searched",
        seconds=seconds,
    )


def _code_digest() -> str:
    """Of the code beside this file: scales of another version are not taken for this one's."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
