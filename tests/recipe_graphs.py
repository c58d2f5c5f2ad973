"""Recipes on small modules of tokens: planned, calibrated, and with passes run."""

from __future__ import annotations

from functools import lru_cache
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
from ouro_compiler.runtime.compiled_model import CompiledModel
from tests.helpers import randn

OPS = torch.ops.ouro


class Block(nn.Module):
    """Norm, linear, convolution, scan and linear on the pixels of images (B, 8, 4, 4)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.Parameter(torch.ones(8))
        self.into, self.out, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)
        self.taps = nn.Parameter(torch.randn(12, 3))
        self.A = nn.Parameter(-torch.rand(12, 4) - 0.1)
        self.D = nn.Parameter(torch.ones(12))
        self.requires_grad_(False)
        self.norm[3] = 9.0  # a channel of outliers

    def forward(self, image: Tensor) -> Tensor:
        x = image.flatten(2).transpose(1, 2)
        x = OPS.add_norm(x, None, self.norm, None, 1e-5, True, True)[0]
        u = OPS.causal_conv1d(self.into(x).transpose(1, 2), self.taps, None, True, False)
        B, C = u[:, :4], u[:, 4:8]
        y = OPS.selective_scan(u, u, self.A, B, C, self.D, None, None, True, False)
        return self.head(self.out(y.transpose(1, 2)).mean(1))


def pictures(count: int = 6, seed: int = 0) -> Tensor:
    """Images (count, 8, 4, 4) whose every fourth pixel is louder."""
    x = randn(seed, count, 8, 4, 4)
    x[:, :, ::2, ::2] *= 4
    return x


@lru_cache(maxsize=16)
def compiled(config: QuantConfig) -> CompiledModel:
    """Block, compiled on six pictures."""
    return ouro.compile(Block(), pictures(2), config, calibration=pictures())


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
