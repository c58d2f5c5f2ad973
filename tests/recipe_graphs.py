"""Recipes on small modules of tokens: planned, calibrated, and with passes run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

import ouro_compiler as ouro
from ouro_compiler.compiler import TensorImages, prepare
from ouro_compiler.config import QuantConfig
from ouro_compiler.frontend.capture import capture
from ouro_compiler.graph import Calibration, is_op
from ouro_compiler.passes import QUANTIZE
from ouro_compiler.passes.base import Pass, PassContext, run_passes
from ouro_compiler.recipes import find_recipe
from ouro_compiler.recipes.planning import Plan


def configured(*settings: str, preset: str = "w4a4") -> QuantConfig:
    """A preset with settings applied."""
    config = ouro.PRESETS[preset]
    for one in settings:
        config = config.with_setting(one)
    return config


def calibrated(
    model: nn.Module, x: Tensor, config: QuantConfig, batch_size: int = 3
) -> tuple[fx.GraphModule, Plan, Calibration]:
    """A captured and normalised graph, its plan, and what the recipe calibrates on x."""
    gm = capture(model, x[:2])
    plan = prepare(gm, config)
    recipe = find_recipe(config.recipe)
    found = recipe.calibrate(
        gm, plan, recipe.configure(config), TensorImages(x), batch_size=batch_size
    )
    return gm, plan, found


def apply(
    gm: fx.GraphModule,
    plan: Plan,
    found: Calibration,
    config: QuantConfig,
    passes: tuple[Pass, ...] = QUANTIZE,
) -> PassContext:
    """Run passes on a calibrated graph, in place."""
    configured = find_recipe(config.recipe).configure(config)
    ctx = PassContext(config=configured, sites=plan.sites, calibration=found)
    run_passes(gm, passes, ctx)
    return ctx


class _Keeper(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, target: Any) -> None:
        super().__init__(gm)
        self.target, self.kept = target, list[Any]()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if is_op(n, self.target):
            self.kept.append(value)
        return value


def values_of(gm: fx.GraphModule, target: Any, x: Tensor) -> list[Any]:
    """What every call of an op returns for an input, in graph order."""
    keeper = _Keeper(gm, target)
    with torch.no_grad():
        keeper.run(x)
    return keeper.kept
