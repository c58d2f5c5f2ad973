"""lower: apply the rules to a quantized graph and say what became of every layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from ouro_compiler.config import Target
from ouro_compiler.graph import delete_unused_constants, is_op
from ouro_compiler.kernels.plan import plan_kernels
from ouro_compiler.lowering import weights  # noqa: F401  (registers its rules)
from ouro_compiler.lowering.registry import RULES
from ouro_compiler.lowering.storage import store_as_half
from ouro_compiler.report import KernelRow, LayerRow

_LINEAR = torch.ops.ouro.linear_dynamic_outlier.default
_SCANS = (
    torch.ops.ouro.selective_scan.default,
    torch.ops.ouro.selective_scan_dynamic_outlier.default,
    torch.ops.ouro.quantized_selective_scan.default,
)


def lower(
    gm: fx.GraphModule, rows: Sequence[LayerRow], target: Target = "cpu"
) -> tuple[list[KernelRow], list[str]]:
    """Lower in place, filling the rows' status; returns kernels and notes for the report.

    Rows come from the recipe's plan; a layer it selected that did not become an integer op is
    turned into a skipped row with the reason.
    """
    refused: dict[str, str] = {}
    lowered: set[str] = set()  # run on integer codes, or are scans
    simulated: set[str] = set()
    for node in gm.graph.nodes:
        rule = RULES.get(node.target) if node.op == "call_function" else None
        layer = node.meta.get("ouro_layer")
        if rule is not None:
            reason = rule.supports(gm, node)
            if reason is None:
                rule.lower(gm, node)
            elif layer is not None:
                refused[layer] = reason
        if layer is not None and is_op(node, _LINEAR, *_SCANS):
            lowered.add(layer)
        elif layer is not None:
            simulated.add(layer)
    for row in rows:
        if row.status == "skipped" or (row.status == "simulated" and row.name in simulated):
            continue
        if row.name not in lowered or row.name in refused:
            row.status = "skipped"
            row.reason = refused.get(row.name, "no pass turned it into an integer op")
    kept = store_as_half(gm)
    delete_unused_constants(gm)
    kernels, by_layer = kernel_rows(gm, target)
    for row in rows:
        row.kernel = by_layer.get(row.name) if row.status != "skipped" else None
    notes = []
    if kept:
        notes.append(f"kept in fp32, since fp16 cannot hold them: {', '.join(sorted(kept))}")
    return kernels, notes


def kernel_rows(gm: fx.GraphModule, target: Target) -> tuple[list[KernelRow], dict[str, str]]:
    """What runs the graph's ouro ops on the target: rows by kind, and kernels by layer."""
    rows: dict[tuple[str, str, str | None], KernelRow] = {}
    by_layer: dict[str, str] = {}
    for plan in plan_kernels(gm, target):
        reason = "; ".join([*([plan.reason] if plan.reason else []), *plan.copies]) or None
        row = rows.setdefault(
            (plan.op, plan.kernel, reason),
            KernelRow(op=plan.op, kernel=plan.kernel, nodes=0, reason=reason),
        )
        row.nodes += 1
        layer = plan.node.meta.get("ouro_layer")
        if layer is not None and is_op(plan.node, _LINEAR, *_SCANS):
            by_layer[layer] = plan.kernel
    return list(rows.values()), by_layer
