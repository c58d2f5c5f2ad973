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
    plan = find_recipe(config.recipe).plan
    here = detached_copy(gm, torch.device("cpu")).cpu()
    simulation = Simulation(here, plan(here, config).sites, calibration, config)
    check_simulation(simulation, calibration, config, images)
    target = torch.device(device)
    copy = detached_copy(gm, target).to(target)
    sites = plan(copy, config).sites
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


def check_simulation(
    simulation: Simulation, calibration: Calibration, config: QuantConfig, images: Images
) -> None:
    """Raise UsageError unless a simulation gives on one image what the graph of the passes does.

    On a CPU, where both run the same kernels: elsewhere a value may round to another code.
    """
    batch = next((one for one in images.batches(1) if len(one)), None)
    if batch is None:
        return
    with torch.no_grad():
        made = simulated(simulation)(batch).cpu()
        wanted = inserted(simulation.gm, calibration, config)(batch)
    wanted = wanted if isinstance(wanted, Tensor) else wanted[0]
    if not float((made - wanted).abs().max()) <= _TOLERANCE * float(wanted.abs().max()):
        raise UsageError(
            f"the recipe {config.recipe} quantizes what simulated quantizers do not know: its "
            "scales cannot be learned (leave out --refine), nor the bits of its layers chosen"
        )


def inserted(gm: fx.GraphModule, calibration: Calibration, config: QuantConfig) -> fx.GraphModule:
    """A copy of a normalised graph with its quantizers in it, which computes in floating point."""
    copy = detached_copy(gm, torch.device("cpu")).cpu()
    sites = find_recipe(config.recipe).plan(copy, config).sites
    run_passes(copy, INSERT, PassContext(config=config, sites=sites, calibration=calibration))
    return copy


def _folder() -> Path | None:
    try:
        return cache_directory("scales")
    except CacheError as error:
        logger.warning("learned scales are not kept: %s", error)
        return None
