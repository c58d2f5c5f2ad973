"""fuse_dequantize_epilogue: products on integer codes instead of on dequantized values.

    linear(dequantize(codes, ...), dequantize_weight(qweight), bias)
        [-> silu | softplus | gelu]  [-> + residual]
becomes one `ouro::linear_dynamic_outlier`. The activation is taken in only if nothing else reads
the linear's result; the residual only if it has exactly the result's shape and dtype. Left alone:
asymmetric activations or weights, and a linear with only one of the two quantized.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ouro_compiler.graph import (
    all_arguments,
    argument,
    aten,
    insert_call,
    is_op,
    replace_node,
    value_of,
)
from ouro_compiler.ops.quantize import KEEP_FLOAT_BITS
from ouro_compiler.passes.base import PassContext

_DEQUANTIZE = torch.ops.ouro.dequantize_dynamic_outlier.default
_WEIGHT = torch.ops.ouro.dequantize_weight.default
_LINEAR = torch.ops.ouro.linear_dynamic_outlier.default
_ACTIVATIONS = {aten.silu.default: "silu", aten.softplus.default: "softplus"}


def fuse_dequantize_epilogue(gm: fx.GraphModule, ctx: PassContext) -> bool:
    """Fuse every match of the module docstring's pattern."""
    del ctx
    modified = False
    for node in list(gm.graph.nodes):
        if is_op(node, aten.linear.default) and _is_quantized(node):
            _fuse(gm, node)
            modified = True
    return modified


def _is_quantized(linear: fx.Node) -> bool:
    x, weight = linear.args[:2]
    return (
        is_op(x, _DEQUANTIZE)
        and is_op(weight, _WEIGHT)
        and argument(x, "zero_point") is None  # type: ignore[arg-type]
        and argument(weight, "zero_point") is None  # type: ignore[arg-type]
    )


def _fuse(gm: fx.GraphModule, linear: fx.Node) -> None:
    dequantize, weight = linear.args[:2]
    codes, scale, _, outlier_scale, start, x, *static = all_arguments(dequantize)  # type: ignore[arg-type]
    qweight, weight_scale, *_ = all_arguments(weight)  # type: ignore[arg-type]
    last, activation = linear, "none"
    follower = _only_user(last)
    if follower is not None and (found := _activation_of(follower)) is not None:
        last, activation = follower, found
    residual = None
    follower = _only_user(last)
    if follower is not None and (other := _residual_of(follower, last)) is not None:
        last, residual = follower, other
    fused = insert_call(
        gm.graph,
        last,
        _LINEAR,
        codes,
        scale,
        outlier_scale,
        start,
        x if static[1] == KEEP_FLOAT_BITS else None,
        qweight,
        weight_scale,
        linear.args[2] if len(linear.args) > 2 else None,
        residual,
        activation,
        *static,
    )
    fused.meta = {**linear.meta, "val": last.meta.get("val")}
    replace_node(last, fused)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _activation_of(node: fx.Node) -> str | None:
    """What the epilogue calls SiLU, either GELU, or softplus of default slope and threshold."""
    if is_op(node, aten.gelu.default):
        return "gelu" if argument(node, "approximate") == "none" else "gelu_tanh"
    plain = is_op(node, *_ACTIVATIONS) and len(node.args) == 1 and not node.kwargs
    return _ACTIVATIONS[node.target] if plain else None  # type: ignore[index]


def _residual_of(add: fx.Node, result: fx.Node) -> fx.Node | None:
    """The other operand of `result + other` where it can be added in the epilogue."""
    if not is_op(add, aten.add.Tensor) or add.kwargs.get("alpha", 1) != 1 or len(add.args) != 2:
        return None
    others: list[Any] = [arg for arg in add.args if arg is not result]
    if len(others) != 1 or not isinstance(others[0], fx.Node):
        return None
    other, value = value_of(others[0]), value_of(result)
    same = isinstance(other, torch.Tensor) and other.shape == value.shape
    return others[0] if same and other.dtype == value.dtype else None
