"""A launch with other blocks, warps and stages than its operator gave it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ouro_compiler.kernels.candidates import OPTIONS, Choice
from ouro_compiler.kernels.grouping import written
from ouro_compiler.kernels.launch import Launch
from ouro_compiler.kernels.linear import product_tiles
from ouro_compiler.kernels.quantize import dequantize_grid
from ouro_compiler.kernels.scan import conv_grid
from ouro_compiler.kernels.spec import Template

Grid = tuple[int, int, int]
_LISTS = 4  # the argument of a product that is scratch: room for a list of columns a tile


def retile(launch: Launch, choice: Choice) -> Launch:
    """A single launch with the constants and options of a choice; it writes the same outputs."""
    values = dict(choice)
    constants = {**dict(launch.spec.constants), **_without_options(values)}
    grid, args = launch.grid, launch.args
    if launch.spec.template is Template.LINEAR:
        batch, columns = args[0].shape[0], constants["COLUMNS"]
        tiles = product_tiles(constants, batch)
        constants.update({name: int(value) for name, value in tiles.constants.items()})
        if tiles.rows != args[_LISTS].shape[0]:
            lists = args[_LISTS].new_empty((tiles.rows, columns))
            args = (*args[:_LISTS], lists, *args[_LISTS + 1 :])
        grid = tiles.grid
    elif launch.spec.template in _GRIDS:
        grid = _GRIDS[launch.spec.template](args, constants)
    spec = dataclasses.replace(
        launch.spec,
        constants=tuple(sorted(constants.items())),
        **{name: values[name] for name in OPTIONS if name in values},  # type: ignore[arg-type]
    )
    return Launch(spec=spec, grid=grid, args=args)


def outputs(launch: Launch) -> list[torch.Tensor]:
    """The tensors that a single launch is for, scratch left out."""
    scratch = {_LISTS} if launch.spec.template is Template.LINEAR else set()
    return [
        one
        for number, (one, is_written) in enumerate(zip(launch.args, written(launch), strict=True))
        if is_written and isinstance(one, torch.Tensor) and number not in scratch
    ]


def _without_options(values: Mapping[str, int]) -> dict[str, int]:
    return {name: value for name, value in values.items() if name not in OPTIONS}


def _dequantize(args: tuple[Any, ...], constants: Mapping[str, int]) -> Grid:
    return dequantize_grid(args[0].shape[0] * constants["LENGTH"], constants)


def _conv(args: tuple[Any, ...], constants: Mapping[str, int]) -> Grid:
    return conv_grid(args[0].shape[0], constants)


_GRIDS: Mapping[Template, Callable[[tuple[Any, ...], Mapping[str, int]], Grid]] = {
    Template.DEQUANTIZE: _dequantize,
    Template.CONV: _conv,
}
