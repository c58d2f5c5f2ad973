"""Nodes of a graph as plain rows: op, inputs, shape, bits, scales, outlier share, kernel, block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ouro_compiler.evaluation import site_name
from ouro_compiler.graph import argument, get_constant, is_op
from ouro_compiler.inspection.places import block_names, layer_names, op_name
from ouro_compiler.ops import QUANTIZERS

NODES_SCHEMA_VERSION = 1
QUANTIZER_NAMES = tuple(str(op).removesuffix(".default") for op in QUANTIZERS)
_FAKE_QUANTIZE = torch.ops.ouro.fake_quantize.default
# The operand that holds a quantized node's scales; of a scan on codes, delta's are shown.
_SCALED = {
    **dict.fromkeys(QUANTIZER_NAMES, "inlier_scale"),
    "ouro.dequantize_dynamic_outlier": "inlier_scale",
    "ouro.linear_dynamic_outlier": "weight_scale",
    "ouro.selective_scan_dynamic_outlier": "delta",
    "ouro.dequantize_weight": "weight_scale",
    "ouro.fake_quantize": "scale",
}


def node_rows(
    gm: fx.GraphModule,
    shares: Mapping[str, float | None] | None = None,
    kernels: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """A row for every call in the graph, in order.

    shares: outlier share by site, where it was measured. kernels: what runs a node, by its own
    name or by that of its layer; the rest is "reference" for ouro ops, else "aten". Keys: name, op,
    inputs, constants, shape, dtype, kernel, block, layer (None where there is none); for quantized
    nodes also bits, outlier_bits, reverse, scale {min, median, max}, and for quantizers site and
    outlier_share.
    """
    blocks, layers, known = block_names(gm), layer_names(gm), kernels or {}
    rows = []
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        value = node.meta.get("val")
        row: dict[str, Any] = {
            "name": node.name,
            "op": op_name(node),
            "inputs": [one.name for one in node.all_input_nodes if one.op != "get_attr"],
            "constants": [str(one.target) for one in node.all_input_nodes if one.op == "get_attr"],
            "shape": shape_of(value),
            "dtype": dtype_of(value),
            "block": blocks[node.name],
            "layer": layers.get(node.name),
        }
        row["kernel"] = known.get(row["name"]) or known.get(row["layer"]) or _kernel(row["op"])
        row.update(_quantization(gm, node, shares or {}))
        rows.append(row)
    return rows


def _quantization(
    gm: fx.GraphModule, node: fx.Node, shares: Mapping[str, float | None]
) -> dict[str, Any]:
    op = op_name(node)
    if op not in _SCALED:
        return {}
    held = {one.name for one in node.target._schema.arguments}  # type: ignore[union-attr]
    found: dict[str, Any] = {"bits": argument(node, "bits" if "bits" in held else "inlier_bits")}
    found.update({key: argument(node, key) for key in ("outlier_bits", "reverse") if key in held})
    operand = argument(node, _SCALED[op])
    if isinstance(operand, (list, tuple)):  # codes, inlier_scale, ...
        operand = operand[1]
    scale = get_constant(gm, operand)
    if scale is not None:
        scale = scale.float()
        found["scale"] = {
            "min": float(scale.min()),
            "median": float(scale.median()),
            "max": float(scale.max()),
        }
    if is_op(node, *QUANTIZERS, _FAKE_QUANTIZE):
        found["site"] = site_of(node)
        found["outlier_share"] = shares.get(found["site"])
    return found


def _kernel(op: str) -> str:
    return "reference" if op.startswith("ouro.") else "aten"


def site_of(node: fx.Node) -> str:
    """The site of a quantizer, or of `fake_quantize`."""
    written = node.meta.get("ouro_site")
    if written is not None:
        return str(written)
    if not is_op(node, _FAKE_QUANTIZE):
        return site_name(node)
    scale = argument(node, "scale")
    while scale.op == "call_function":  # a cast of what is stored
        scale = scale.args[0]
    return str(scale.target).rpartition(".")[0]


def dtype_of(value: Any) -> str | None:
    """`float32`; None for what is no tensor."""
    return str(value.dtype).removeprefix("torch.") if isinstance(value, torch.Tensor) else None


def shape_of(value: Any) -> list[Any] | None:
    """Sizes, the dynamic batch as the string "B"; None for what is no tensor."""
    if not isinstance(value, torch.Tensor):
        return None
    return [size if isinstance(size, int) else "B" for size in value.shape]
