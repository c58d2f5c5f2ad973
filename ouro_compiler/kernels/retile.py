"""A launch with other blocks, warps and stages than its operator gave it."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch

from ouro_compiler.kernels.candidates import OPTIONS, Choice
from ouro_compiler.kernels.grouping import written
from ouro_compiler.kernels.launch import Launch
from ouro_compiler.kernels.linear import product_tiles
from ouro_compiler.kernels.quantize import dequantize_grid
from ouro_compiler.kernels.scan import conv_grid
from ouro_compiler.kernels.spec import KernelSpec, Template

_LISTS = 4  # the argument of a product that is scratch: room for a list of columns a tile


def retile(launch: Launch, choice: Choice) -> Launch:
    """A single launch with the constants and options of a choice; it writes the same outputs."""
    form, args = _form(launch.spec, choice, int(launch.args[0].shape[0])), launch.args
    if form.lists is not None and form.lists != args[_LISTS].shape[0]:
        lists = args[_LISTS].new_empty((form.lists, *args[_LISTS].shape[1:]))
        args = (*args[:_LISTS], lists, *args[_LISTS + 1 :])
    return Launch(spec=form.spec, grid=form.grid or launch.grid, args=args)


@dataclass(frozen=True, kw_only=True)
class _Form:
    """A kernel with a choice; grid: None where it stays; lists: tiles that need a list, if any."""

    spec: KernelSpec
    grid: tuple[int, int, int] | None = None
    lists: int | None = None


@functools.lru_cache(maxsize=4096)
def _form(spec: KernelSpec, choice: Choice, batch: int) -> _Form:
    """What a choice makes of a kernel at a batch size."""
    options = {name: value for name, value in choice if name in OPTIONS}
    constants = {**dict(spec.constants), **dict(one for one in choice if one[0] not in options)}
    grid, lists = None, None
    if spec.template is Template.LINEAR:
        tiles = product_tiles(constants, batch)
        constants.update({name: int(value) for name, value in tiles.constants.items()})
        grid, lists = tiles.grid, tiles.rows
    elif spec.template is Template.DEQUANTIZE:
        grid = dequantize_grid(batch * constants["LENGTH"], constants)
    elif spec.template is Template.CONV:
        grid = conv_grid(batch, constants)
    new = dataclasses.replace(spec, constants=tuple(sorted(constants.items())), **options)  # type: ignore[arg-type]
    return _Form(spec=new, grid=grid, lists=lists)


def outputs(launch: Launch) -> list[torch.Tensor]:
    """The tensors that a single launch is for, scratch left out."""
    scratch = {_LISTS} if launch.spec.template is Template.LINEAR else set()
    return [
        one
        for number, (one, is_written) in enumerate(zip(launch.args, written(launch), strict=True))
        if is_written and isinstance(one, torch.Tensor) and number not in scratch
    ]
