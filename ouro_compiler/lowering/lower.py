"""lower: apply the rules to a quantized graph and say what became of every layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from ouro_compiler.graph import delete_unused_constants, is_op
from ouro_compiler.lowering import weights  # noqa: F401  (registers its rules)
from ouro_compiler.lowering.registry import RULES
from ouro_compiler.lowering.storage import store_as_half
from ouro_compiler.report import LayerRow

_LINEAR = torch.ops.ouro.linear_dynamic_outlier.default
_SCAN = torch.ops.ouro.selective_scan.default


def lower(gm: fx.GraphModule, rows: Sequence[LayerRow]) -> list[str]:
    """Lower in place, filling the rows' status; returns notes for the report.

    Rows come from the recipe's plan; a layer it selected that did not become an integer op is
    turned into a skipped row with the reason.
    """
    refused: dict[str, str] = {}
    lowered: set[str] = set()
    for node in gm.graph.nodes:
        rule = RULES.get(node.target) if node.op == "call_function" else None
        layer = node.meta.get("ouro_layer")
        if rule is not None:
            reason = rule.supports(gm, node)
            if reason is None:
                rule.lower(gm, node)
            elif layer is not None:
                refused[layer] = reason
        if layer is not None and is_op(node, _LINEAR, _SCAN):
            lowered.add(layer)
    for row in rows:
        if row.status == "skipped":
            continue
        if row.name in lowered and row.name not in refused:
            row.kernel = "reference"
        else:
            row.status = "skipped"
            row.reason = refused.get(row.name, "no pass turned it into an integer op")
    kept = store_as_half(gm)
    delete_unused_constants(gm)
    notes = ["every op runs its reference implementation: no kernel is generated for it yet"]
    if kept:
        notes.append(f"kept in fp32, since fp16 cannot hold them: {', '.join(sorted(kept))}")
    return notes
