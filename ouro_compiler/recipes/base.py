"""A recipe: one method of quantizing, as the compiler sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import fx

from ouro_compiler.calibration.calibrate import Progress
from ouro_compiler.calibration.images import Images
from ouro_compiler.config import QuantConfig
from ouro_compiler.graph import Calibration
from ouro_compiler.recipes.planning import Plan


class Calibrate(Protocol):
    """From images to the parameters of every site of a plan, and of weights where it has views."""

    def __call__(
        self,
        gm: fx.GraphModule,
        plan: Plan,
        config: QuantConfig,
        images: Images,
        *,
        batch_size: int,
        progress: Progress | None = None,
    ) -> Calibration: ...


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """plan chooses sites, calibrate their parameters; neither edits the graph.

    configure turns the user's configuration into what the method means by it. resizable: may its
    parameters be calibrated at another resolution (one scale a site)?
    """

    name: str
    summary: str  # a line for --help and the docs
    plan: Callable[[fx.GraphModule, QuantConfig], Plan]
    calibrate: Calibrate
    configure: Callable[[QuantConfig], QuantConfig] = lambda config: config
    resizable: bool = False
