"""Data movement of public code that does not trace on a CPU or with a dynamic batch.

VMamba's cross scan and merge are ours, as ops where all four orders are asked for at once;
MambaVision's `window_reverse` is integer arithmetic, since `int(a / b)` of a symbolic size fixes
the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

import ouro_compiler.ops  # noqa: F401  (registers torch.ops.ouro)
from ouro_compiler.frontend.standins.refusals import refuse

_CROSS, _ONE, _BOTH = 0, 1, 2  # the values of `scans`


def cross_scan(
    x: Tensor,
    in_channel_first: bool = True,
    out_channel_first: bool = True,
    one_by_one: bool = False,
    scans: int = _CROSS,
) -> Tensor:
    """An image as four sequences: (B, C, H, W) -> (B, 4, C, H W).

    scans 0: by rows, by columns, and both reversed; 1: by rows; 2: by rows, the last two reversed.
    one_by_one: x has a plane for each, (B, 4, C, H, W). Channels come last in x without
    `in_channel_first`, and in the result, (B, H W, 4, C), without `out_channel_first`.
    """
    _check(scans)
    if not in_channel_first:
        x = x.permute(0, 3, 4, 1, 2) if one_by_one else x.permute(0, 3, 1, 2)
    if scans == _CROSS and not one_by_one:
        y = torch.ops.ouro.cross_scan(x)
    else:
        planes = [x[:, k] for k in range(4)] if one_by_one else [x] * 4
        y = torch.stack([_sequence(plane, k, scans) for k, plane in enumerate(planes)], dim=1)
    return y if out_channel_first else y.permute(0, 3, 1, 2).contiguous()


def _sequence(plane: Tensor, k: int, scans: int) -> Tensor:
    if scans == _CROSS and k % 2 == 1:
        plane = plane.transpose(2, 3)
    sequence = plane.flatten(2)
    return sequence.flip(-1) if scans != _ONE and k >= 2 else sequence


def cross_merge(
    y: Tensor,
    in_channel_first: bool = True,
    out_channel_first: bool = True,
    one_by_one: bool = False,
    scans: int = _CROSS,
) -> Tensor:
    """The inverse order of `cross_scan`, summed: (B, 4, C, H, W) -> (B, C, H W).

    y is (B, H, W, 4, C) without `out_channel_first`; without `in_channel_first` channels come last
    in the result. one_by_one: nothing is summed, the result is (B, 4, C, H W) or (B, H W, 4, C).
    """
    _check(scans)
    if not out_channel_first:
        y = y.permute(0, 3, 4, 1, 2)
    height, width = y.shape[3:]
    if scans == _CROSS and not one_by_one:
        total = torch.ops.ouro.cross_merge(y.flatten(3), height, width)
        return total if in_channel_first else total.permute(0, 2, 1).contiguous()
    planes = [_plane(y[:, k].flatten(2), k, scans, height, width) for k in range(4)]
    if one_by_one:
        stacked = torch.stack(planes, dim=1)
        return stacked if in_channel_first else stacked.permute(0, 3, 1, 2).contiguous()
    total = planes[0] + planes[2] + (planes[1] + planes[3])
    return total if in_channel_first else total.permute(0, 2, 1).contiguous()


def _plane(sequence: Tensor, k: int, scans: int, height: int, width: int) -> Tensor:
    """(B, C, L) in the order of direction k -> by rows."""
    if scans != _ONE and k >= 2:
        sequence = sequence.flip(-1)
    if scans == _CROSS and k % 2 == 1:
        return sequence.unflatten(2, (width, height)).transpose(2, 3).flatten(2)
    return sequence


def _check(scans: int) -> None:
    if scans not in (_CROSS, _ONE, _BOTH):
        refuse("cross_scan_fn", f"scans={scans!r} is not supported; 0, 1 and 2 are")


def join_windows(windows: Tensor, window_size: int, H: int, W: int) -> Tensor:
    """MambaVision's `window_reverse`: (B n, w w, C) -> (B, C, H, W), n windows an image."""
    rows, columns = H // window_size, W // window_size
    batch, channels = windows.shape[0] // (rows * columns), windows.shape[2]
    x = windows.reshape(batch, rows, columns, window_size, window_size, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, H, W)
