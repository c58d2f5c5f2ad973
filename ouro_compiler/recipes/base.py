"""A recipe: one method of quantizing, as the compiler sees it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import fx

from ouro_compiler.calibration.calibrate import Progress
from ouro_compiler.calibration.images import Images
from ouro_compiler.config import DynamicOutlierSpec, QuantConfig
from ouro_compiler.errors import UsageError
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


def without_outliers(config: QuantConfig, recipe: str) -> QuantConfig:
    """The same without outliers, whose bits and rules then mean nothing.

    Raises UsageError where rules for them were asked for.
    """
    refuse_outlier_rules(config, f"recipe {recipe} has none")
    return dataclasses.replace(
        config, activations=dataclasses.replace(config.activations, outliers="none")
    )


def refuse_outlier_rules(config: QuantConfig, why: str) -> None:
    """Raise UsageError if a rule for dynamic outliers is set that nothing would read."""
    spec = config.activations
    for name in ("threshold", "trigger"):
        if getattr(spec, name) != getattr(DynamicOutlierSpec(), name):
            value = getattr(spec, name)
            raise UsageError(f"{name} {value} is a rule for dynamic outliers, and {why}")


def refuse_layer_bits(config: QuantConfig, recipe: str) -> QuantConfig:
    """The same configuration. Raises UsageError if single layers have bits of their own."""
    if config.overrides:
        raise UsageError(f"recipe {recipe} has one width for all layers: overrides do not apply")
    return config


def plain(config: QuantConfig, recipe: str) -> QuantConfig:
    """For methods with one width for all layers and no outliers. Raises UsageError as those two."""
    return without_outliers(refuse_layer_bits(config, recipe), recipe)
