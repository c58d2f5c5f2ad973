"""Nodes of a graph as plain rows: op, inputs, shape, bits, scales, outlier share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ouro_compiler.evaluation import site_name
from ouro_compiler.graph import argument, get_constant, is_op

NODES_SCHEMA_VERSION = 1
_OURO = torch.ops.ouro
_QUANTIZERS = (
    _OURO.quantize_dynamic_outlier.default,
    _OURO.quantize_static_outlier.default,
)
_SCALED = {
    **dict.fromkeys(_QUANTIZERS, "inlier_scale"),
    _OURO.dequantize_dynamic_outlier.default: "inlier_scale",
    _OURO.linear_dynamic_outlier.default: "weight_scale",
    _OURO.dequantize_weight.default: "weight_scale",
}


def node_rows(
    gm: fx.GraphModule, shares: Mapping[str, float | None] | None = None
) -> list[dict[str, Any]]:
    """A row for every call in the graph, in order.

    shares: outlier share by site, where it was measured. Keys: name, op, inputs, shape, dtype; for
    quantized nodes also bits, outlier_bits, scale {min, median, max}, site, outlier_share.
    """
    rows = []
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        value = node.meta.get("val")
        row: dict[str, Any] = {
            "name": node.name,
            "op": _op_name(node),
            "inputs": [one.name for one in node.all_input_nodes if one.op != "get_attr"],
            "constants": [str(one.target) for one in node.all_input_nodes if one.op == "get_attr"],
            "shape": _shape(value),
            "dtype": str(value.dtype).removeprefix("torch.") if _is_tensor(value) else None,
        }
        row.update(_quantization(gm, node, shares or {}))
        rows.append(row)
    return rows


def _quantization(
    gm: fx.GraphModule, node: fx.Node, shares: Mapping[str, float | None]
) -> dict[str, Any]:
    if node.target not in _SCALED:
        return {}
    found: dict[str, Any] = {}
    if is_op(node, _OURO.dequantize_weight.default):
        found["bits"] = argument(node, "bits")
    else:
        found["bits"] = argument(node, "inlier_bits")
        found["outlier_bits"] = argument(node, "outlier_bits")
        found["reverse"] = argument(node, "reverse")
    scale = get_constant(gm, argument(node, _SCALED[node.target]))
    if scale is not None:
        scale = scale.float()
        found["scale"] = {
            "min": float(scale.min()),
            "median": float(scale.median()),
            "max": float(scale.max()),
        }
    if is_op(node, *_QUANTIZERS):
        found["site"] = site_name(node)
        found["outlier_share"] = shares.get(found["site"])
    return found


def _op_name(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    return str(getattr(target, "__name__", target))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _shape(value: Any) -> list[Any] | None:
    """Sizes; the dynamic batch is the string "B"."""
    if not _is_tensor(value):
        return None
    return [size if isinstance(size, int) else "B" for size in value.shape]
