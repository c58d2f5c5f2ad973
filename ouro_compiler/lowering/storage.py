"""Storage of what stays floating point: fp16 wherever fp16 can hold it.

Scales and thresholds were rounded to fp16 values when they were calibrated, so theirs is lossless;
other parameters are rounded here. ouro ops read fp16 constants as they are and compute in fp32; for
every other consumer the graph casts the constant back.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ouro_compiler.graph import aten, get_constant, set_constant

# Ops that convert their constants to fp32 themselves.
_UPCASTING = frozenset(
    getattr(torch.ops.ouro, name).default
    for name in (
        "add_norm",
        "add_norm_quantize",
        "causal_conv1d_quantize",
        "cross_merge_norm_quantize",
        "depthwise_conv",
        "dequantize_dynamic_outlier",
        "dequantize_weight",
        "fake_quantize",
        "gate_sum_quantize",
        "linear_dynamic_outlier",
        "quantize_dynamic_outlier",
        "quantize_dynamic_outlier_variant",
        "quantize_static_outlier",
        "quantized_selective_scan",
        "selective_scan",
        "selective_scan_dynamic_outlier",
    )
)
_EXACT = (
    *(".inlier_scale", ".weight_scale", ".threshold", ".factor"),
    *(".activation_scale", ".zero_point", ".smooth", ".rotation", ".scale"),
)


def store_as_half(gm: fx.GraphModule) -> list[str]:
    """Convert fp32 constants to fp16 in place; returns the names of those that had to stay fp32."""
    kept: list[str] = []
    by_name: dict[str, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            by_name.setdefault(str(node.target), []).append(node)
    for name, nodes in by_name.items():
        value = get_constant(gm, nodes[0])
        if value is None or value.dtype != torch.float32:
            continue
        if not _fits_half(name, value):
            kept.append(name)
            continue
        set_constant(gm, name, value.half())
        for node in nodes:
            _cast_back(gm, node)
    return kept


def _fits_half(name: str, value: Tensor) -> bool:
    half = value.half()
    if name.endswith(_EXACT):
        return bool(torch.equal(half.float(), value))
    return bool(torch.isfinite(half).all())


def _cast_back(gm: fx.GraphModule, node: fx.Node) -> None:
    others = [user for user in node.users if user.target not in _UPCASTING]
    if not others:
        return
    with gm.graph.inserting_after(node):
        cast = gm.graph.call_function(aten.to.dtype, (node, torch.float32))
    for user in others:
        user.replace_input_with(node, cast)
