"""split_scan_groups: a selective scan of G groups becomes G scans of one group.

1. Group k reads channels k*E to (k+1)*E of u, delta and z, these rows of A, D and delta_bias, and
   part k of B and C; the results are concatenated. Every channel computes what it did.
2. Each scan thereby has its own delta, B and C, and so its own scales per time step. In VMamba the
   groups are four orders of the same pixels: step t is another pixel in each, and a scale shared
   by the four would serve none.

Slices and concatenations that this leaves are cancel_slices' work. Left alone: scans of one group,
written (B, N, L) or (B, 1, N, L).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

import ouro_compiler.ops  # noqa: F401  (registers torch.ops.ouro)
from ouro_compiler.graph import all_arguments, aten, is_op, replace_node, value_of
from ouro_compiler.passes.base import PassContext
from ouro_compiler.passes.editing import call

_SCAN = torch.ops.ouro.selective_scan.default


def split_scan_groups(gm: fx.GraphModule, ctx: PassContext) -> bool:
    """Apply the rules of the module docstring; returns whether any scan was split."""
    del ctx
    modified = False
    for scan in list(gm.graph.nodes):
        if is_op(scan, _SCAN) and _groups(scan) > 1:
            _split(scan, _groups(scan))
            modified = True
    return modified


def _groups(scan: fx.Node) -> int:
    B = value_of(all_arguments(scan)[3])
    return int(B.shape[1]) if B.dim() == 4 else 1


def _split(scan: fx.Node, groups: int) -> None:
    u, delta, A, B, C, D, z, delta_bias, softplus, reverse = all_arguments(scan)
    width = value_of(u).shape[1] // groups
    results: list[fx.Node] = []
    for group in range(groups):

        def channels(operand: Any, axis: int, first: int = group * width) -> fx.Node | None:
            if operand is None:
                return None
            return call(scan, aten.slice.Tensor, operand, axis, first, first + width)

        y = call(
            scan,
            _SCAN,
            channels(u, 1),
            channels(delta, 1),
            channels(A, 0),
            call(scan, aten.select.int, B, 1, group),
            call(scan, aten.select.int, C, 1, group),
            channels(D, 0),
            channels(z, 1),
            channels(delta_bias, 0),
            softplus,
            reverse,
        )
        results.append(y)
    replace_node(scan, call(scan, aten.cat.default, results, 1))
