"""Recipes: which sites, which quantizers, which search. One file a method."""

from __future__ import annotations

from functools import partial

from ouro_compiler.errors import UsageError
from ouro_compiler.recipes import ksq, ouromamba, ptq4vm, qmamba, quamba
from ouro_compiler.recipes.base import Recipe, plain, without_outliers

_ALL = (
    Recipe(
        name="ouromamba",
        summary="static inlier scales per time step, dynamic outlier channels (the default)",
        plan=ouromamba.plan,
        calibrate=ouromamba.calibrate_sites,
        configure=ouromamba.configure,
        resizable=True,
    ),
    Recipe(
        name="rtn",
        summary="static scales per time step, no outliers",
        plan=ouromamba.plan,
        calibrate=ouromamba.calibrate_sites,
        configure=partial(without_outliers, recipe="rtn"),
        resizable=True,
    ),
    Recipe(
        name="ptq4vm",
        summary="smoothed channels, static scales per token, no outliers; scans in floating point",
        plan=ptq4vm.plan,
        calibrate=ptq4vm.calibrate_sites,
        configure=ptq4vm.configure,
    ),
    Recipe(
        name="quamba",
        summary="one static scale a tensor, a percentile for the scan's input, a rotated output",
        plan=quamba.plan,
        calibrate=quamba.calibrate_sites,
        configure=quamba.configure,
        resizable=True,
    ),
    Recipe(
        name="qmamba",
        summary="log-coded decays, states scaled by groups of time steps (simulated)",
        plan=qmamba.plan,
        calibrate=qmamba.calibrate_sites,
        configure=partial(plain, recipe="qmamba"),
    ),
    Recipe(
        name="ksq",
        summary="outputs scaled by clusters, reparameterized states (simulated)",
        plan=ksq.plan,
        calibrate=ksq.calibrate_sites,
        configure=partial(plain, recipe="ksq"),
    ),
)
RECIPES: dict[str, Recipe] = {one.name: one for one in _ALL}


def find_recipe(name: str) -> Recipe:
    """The recipe of a name. Raises UsageError for an unknown one."""
    if name not in RECIPES:
        raise UsageError(f"no recipe is called {name!r}: the recipes are {', '.join(RECIPES)}")
    return RECIPES[name]
