"""fuse_dequantize_scan: scans on the codes of delta, B and C instead of on dequantized values.

    selective_scan(u, dequantize(...), A, dequantize(...), dequantize(...), ...)
becomes one `ouro::selective_scan_dynamic_outlier`. Between a dequantizer and the scan stand the
views that insert_quantize_dequantize writes: a transpose, and for B (B, G, N, L) an unflatten.
Left alone: scans with an operand that is not dequantized, whose quantizer runs in another
direction or at other bits, or whose values something else than such a scan reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ouro_compiler.graph import (
    all_arguments,
    aten,
    insert_call,
    is_op,
    replace_node,
    value_of,
)
from ouro_compiler.passes.base import PassContext

_SCAN = torch.ops.ouro.selective_scan.default
_DEQUANTIZE = torch.ops.ouro.dequantize_dynamic_outlier.default
_FUSED = torch.ops.ouro.selective_scan_dynamic_outlier.default
_OPERANDS = (1, 3, 4)  # delta, B and C


def fuse_dequantize_scan(gm: fx.GraphModule, ctx: PassContext) -> bool:
    """Fuse every match of the module docstring's pattern."""
    del ctx
    scans = {node: found for node in gm.graph.nodes if (found := _quantized(node)) is not None}
    while True:  # a scan that is left alone keeps its dequantizers, and what shares them
        kept = {scan: found for scan, found in scans.items() if _read_by(found, scans)}
        if len(kept) == len(scans):
            break
        scans = kept
    for scan, dequantizers in scans.items():
        _fuse(scan, dequantizers)
    if scans:
        gm.graph.eliminate_dead_code()
    return bool(scans)


def _quantized(scan: fx.Node) -> list[fx.Node] | None:
    """The dequantizers of a scan's delta, B and C; None where they are not what the op takes."""
    if not is_op(scan, _SCAN):
        return None
    arguments = all_arguments(scan)
    found = []
    for index in _OPERANDS:
        operand = arguments[index]
        rank = value_of(operand).dim()
        if rank == 4 and is_op(operand, aten.unflatten.int) and operand.args[1] in (1, -3):
            operand = operand.args[0]
        elif rank == 4:
            return None
        if not is_op(operand, aten.transpose.int) or {d % 3 for d in operand.args[1:]} != {1, 2}:
            return None
        if not is_op(operand.args[0], _DEQUANTIZE):
            return None
        found.append(operand.args[0])
    statics = {tuple(all_arguments(one)[6:]) for one in found}
    if len(statics) > 1 or bool(statics.pop()[3]) != bool(arguments[9]):
        return None
    return found


def _read_by(dequantizers: list[fx.Node], scans: dict[fx.Node, Any]) -> bool:
    """Do only these scans, as delta, B or C, read the values of all of these?"""
    waiting = list(dequantizers)
    while waiting:
        node = waiting.pop()
        for user in node.users:
            if is_op(user, aten.transpose.int, aten.unflatten.int):
                waiting.append(user)
            elif user not in scans or any(
                node is other
                for index, other in enumerate(all_arguments(user))
                if index not in _OPERANDS
            ):
                return False
    return True


def _fuse(scan: fx.Node, dequantizers: list[fx.Node]) -> None:
    u, _, A, _, _, *rest, _ = all_arguments(scan)
    delta, B, C = ([*all_arguments(one)[:6]] for one in dequantizers)
    static = all_arguments(dequantizers[0])[6:]
    fused = insert_call(scan.graph, scan, _FUSED, u, delta, A, B, C, *rest, *static)
    fused.meta = dict(scan.meta)
    replace_node(scan, fused)
