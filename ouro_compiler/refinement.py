"""Learned scales for a plan: the recipe's calibration, made better block by block.

What learning runs is checked first against the graph that the QUANTIZE passes would make.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor, fx

from ouro_compiler.calibration.calibrate import Progress
from ouro_compiler.calibration.images import Images
from ouro_compiler.calibration.refine import Refined, refine
from ouro_compiler.calibration.simulate import Simulation, simulated
from ouro_compiler.config import QuantConfig
from ouro_compiler.errors import CacheError, UsageError
from ouro_compiler.graph import Calibration
from ouro_compiler.kernels import cpu as cpu  # gradients of scans in C++
from ouro_compiler.kernels.cache import cache_directory
from ouro_compiler.passes import INSERT
from ouro_compiler.passes.base import PassContext, run_passes
from ouro_compiler.recipes import find_recipe
from ouro_compiler.synthetic import detached_copy

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-3  # of the largest output: kernels that sum in another order, not other scales


@torch.inference_mode(False)
def refined(
    gm: fx.GraphModule,
    calibration: Calibration,
    config: QuantConfig,
    images: Images,
    *,
    device: torch.device | str = "cpu",
    cache: bool = True,
    progress: Progress | None = None,
) -> Refined:
    """Learn the scales of a normalised graph, which stays as it is, as `config.refine` says.

    config: as its recipe configured it. Finished blocks are kept in the user's cache unless
    `cache` is False. Raises UsageError for a recipe with quantizers that cannot be learned.
    """
    target = torch.device(device)
    copy = detached_copy(gm, target).to(target)
    sites = find_recipe(config.recipe).plan(copy, config).sites
    batch = next(iter(images.batches(1)), None)
    if batch is not None:
        with torch.no_grad():
            simulation = Simulation(copy, sites, calibration, config, device=target)
            made = simulated(simulation)(batch)
            wanted = inserted(gm, calibration, config)(batch)
        _check(made.cpu(), wanted, config)
    folder = _folder() if cache else None
    return refine(
        copy,
        sites,
        calibration,
        config,
        images,
        device=target,
        folder=folder,
        progress=progress,
    )


def inserted(gm: fx.GraphModule, calibration: Calibration, config: QuantConfig) -> fx.GraphModule:
    """A copy of a normalised graph with its quantizers in it, which computes in floating point."""
    copy = detached_copy(gm, torch.device("cpu"))
    sites = find_recipe(config.recipe).plan(copy, config).sites
    run_passes(copy, INSERT, PassContext(config=config, sites=sites, calibration=calibration))
    return copy


def _check(made: Tensor, wanted: Tensor, config: QuantConfig) -> None:
    wanted = wanted if isinstance(wanted, Tensor) else wanted[0]
    error = float((made - wanted).abs().max())
    if not error <= _TOLERANCE * float(wanted.abs().max()):
        raise UsageError(
            f"the recipe {config.recipe} quantizes what learning scales does not know: leave out "
            "--refine"
        )


def _folder() -> Path | None:
    try:
        return cache_directory("scales")
    except CacheError as error:
        logger.warning("learned scales are not kept: %s", error)
        return None
