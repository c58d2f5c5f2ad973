"""`ouro::cross_scan`, `ouro::cross_merge`: a map of pixels as four sequences, and back (VMamba).

The four orders are row-major, column-major, and both of them reversed; entry t of an order is the
t-th pixel that its scan meets. `cross_merge` takes every order back to the raster and adds the four
up, so each op is the other's transpose, and thereby its gradient. Results are contiguous: public
code views the four orders as one channel axis. They exist for graphs in which all orders are
written out; `models/vmamba.py` reads two orders from both ends and needs no copies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ouro_compiler.ops.library import LIBRARY, define_op, reject

ORDERS = 4


def cross_scan_ref(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 4, C, H*W)."""
    check_scan(x)
    ahead = torch.stack((x.flatten(2), x.transpose(2, 3).flatten(2)), dim=1)
    return torch.cat((ahead, ahead.flip(-1)), dim=1)


def cross_merge_ref(y: Tensor, height: int, width: int) -> Tensor:
    """(B, 4, C, height * width) -> (B, C, height * width), in raster order."""
    check_merge(y, height, width)
    rows, columns = (y[:, :2] + y[:, 2:].flip(-1)).unbind(1)
    return rows + columns.unflatten(-1, (width, height)).transpose(2, 3).flatten(2)


def check_scan(x: Tensor) -> None:
    """Raise ValueError for what is no batch of maps."""
    if x.dim() != 4:
        reject("cross_scan", f"x must be (B, C, H, W), got {tuple(x.shape)}")


def check_merge(y: Tensor, height: int, width: int) -> None:
    """Raise ValueError for orders that are not those of a map of this size."""
    if y.dim() != 4 or y.shape[1] != ORDERS:
        reject("cross_merge", f"y must be (B, 4, C, L), got {tuple(y.shape)}")
    if height < 1 or width < 1 or y.shape[3] != height * width:
        reject("cross_merge", f"{y.shape[3]} tokens are no map of {height} x {width}")


def _fake_scan(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    return x.new_empty((batch, ORDERS, channels, height * width))


def _fake_merge(y: Tensor, height: int, width: int) -> Tensor:
    return y.new_empty((y.shape[0], y.shape[2], height * width))


def _setup_scan(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    ctx.shape = inputs[0].shape


def _scan_backward(ctx: Any, grad: Tensor) -> Tensor:
    height, width = ctx.shape[2:]
    return torch.ops.ouro.cross_merge(grad, height, width).view(ctx.shape)


def _setup_merge(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    ctx.size = inputs[1:]


def _merge_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.ouro.cross_scan(grad.unflatten(-1, ctx.size)), None, None


define_op("cross_scan(Tensor x) -> Tensor", implementation=cross_scan_ref, fake=_fake_scan)
define_op(
    "cross_merge(Tensor y, int height, int width) -> Tensor",
    implementation=cross_merge_ref,
    fake=_fake_merge,
)
for _name, _backward, _setup in (
    ("cross_scan", _scan_backward, _setup_scan),
    ("cross_merge", _merge_backward, _setup_merge),
):
    torch.library.register_autograd(f"ouro::{_name}", _backward, setup_context=_setup, lib=LIBRARY)
