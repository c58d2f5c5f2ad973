"""Translations of floating-point layers: linear, convolutions, norms, attention, pooling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ouro_compiler.errors import ModelError
from ouro_compiler.export.emitter import Emitter, static, translates
from ouro_compiler.export.pointwise import operand
from ouro_compiler.graph import argument, aten, value_of


@translates(aten.linear.default)
def _linear(emit: Emitter, node: fx.Node) -> str:
    x, weight = emit.get(node.args[0]), argument(node, "weight")
    known = emit.known(weight)
    if known is None:
        turned = emit.op("Transpose", emit.get(weight), perm=[1, 0])
    else:
        turned = emit.constant(known.t(), f"{weight.target}.transposed")
    y = emit.op("MatMul", x, turned)
    bias = argument(node, "bias")
    return y if bias is None else emit.op("Add", y, emit.get(bias))


@translates(aten.matmul.default, aten.bmm.default, aten.mm.default)
def _matmul(emit: Emitter, node: fx.Node) -> str:
    return emit.op("MatMul", emit.get(node.args[0]), emit.get(node.args[1]))


@translates(aten.addmm.default)
def _addmm(emit: Emitter, node: fx.Node) -> str:
    bias, x, weight = (emit.get(one) for one in node.args[:3])
    factors: dict[str, Any] = {
        name: float(node.kwargs.get(name, 1))  # type: ignore[arg-type]
        for name in ("alpha", "beta")
    }
    return emit.op("Gemm", x, weight, bias, **factors)


@translates(aten.einsum.default)
def _einsum(emit: Emitter, node: fx.Node) -> str:
    names = [emit.get(one) for one in argument(node, "tensors")]
    return emit.op("Einsum", *names, equation=argument(node, "equation").replace(" ", ""))


@translates(aten.conv1d.default, aten.conv2d.default, aten.conv1d.padding, aten.conv2d.padding)
def _conv(emit: Emitter, node: fx.Node) -> str:
    stride, padding, dilation = (argument(node, n) for n in ("stride", "padding", "dilation"))
    rank = value_of(node).dim() - 2
    stride, dilation = _each(stride, rank), _each(dilation, rank)
    kernel = value_of(argument(node, "weight")).shape[2:]
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pads = [one // 2 for one in total] + [one - one // 2 for one in total]
    else:
        pads = 2 * (_each(0 if padding == "valid" else padding, rank))
    names = [emit.get(arg) for arg in (node.args[0], argument(node, "weight"))]
    bias = argument(node, "bias")
    return emit.op(
        "Conv",
        *names,
        None if bias is None else emit.get(bias),
        strides=stride,
        dilations=dilation,
        pads=pads,
        group=argument(node, "groups"),
    )


def _each(value: Any, rank: int) -> list[int]:
    values = list(value) if isinstance(value, Sequence) else [value]
    return values * rank if len(values) == 1 else values


@translates(aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default)
def _batch_norm(emit: Emitter, node: fx.Node) -> str:
    x = node.args[0]
    channels = value_of(x).shape[1]  # type: ignore[arg-type]
    names = []
    for name, default in (
        ("weight", torch.ones),
        ("bias", torch.zeros),
        ("running_mean", torch.zeros),
        ("running_var", torch.ones),
    ):
        arg = argument(node, name)
        names.append(emit.constant(default(channels)) if arg is None else emit.get(arg))
    return emit.op("BatchNormalization", emit.get(x), *names, epsilon=argument(node, "eps"))


@translates(aten.layer_norm.default)
def _layer_norm(emit: Emitter, node: fx.Node) -> str:
    shape = argument(node, "normalized_shape")
    weight, bias = argument(node, "weight"), argument(node, "bias")
    scale = emit.constant(torch.ones(shape)) if weight is None else emit.get(weight)
    shift = None if bias is None else emit.get(bias)
    x = emit.get(node.args[0])
    return emit.op(
        "LayerNormalization", x, scale, shift, axis=-len(shape), epsilon=argument(node, "eps")
    )


@translates(aten.rms_norm.default)
def _rms_norm(emit: Emitter, node: fx.Node) -> str:
    axes = [-1 - index for index in range(len(argument(node, "normalized_shape")))]
    weight = argument(node, "weight")
    eps = argument(node, "eps")
    eps = torch.finfo(value_of(node).dtype).eps if eps is None else eps
    x = emit.get(node.args[0])
    return rms_norm(emit, x, None if weight is None else emit.get(weight), eps, axes)


def rms_norm(emit: Emitter, x: str, weight: str | None, eps: float, axes: Sequence[int]) -> str:
    """x / sqrt(mean of squares over axes + eps) * weight."""
    mean = emit.op("ReduceMean", emit.op("Mul", x, x), emit.integers(*axes))
    root = emit.op("Sqrt", emit.op("Add", mean, emit.number(eps)))
    y = emit.op("Mul", x, emit.op("Reciprocal", root))
    return y if weight is None else emit.op("Mul", y, weight)


@translates(aten.group_norm.default)
def _group_norm(emit: Emitter, node: fx.Node) -> str:
    x, groups = node.args[0], argument(node, "num_groups")
    shape = list(value_of(x).shape)  # type: ignore[arg-type]
    fixed = [static(one) for one in shape[1:]]
    if None in fixed:
        raise ModelError(f"{node.name}: ONNX export needs static sizes for group_norm")
    inside = [groups, math.prod(fixed) // groups]  # type: ignore[arg-type]
    rows = emit.op("Reshape", emit.get(x), emit.integers(0, *inside))
    ones = emit.constant(torch.ones(inside[1]))
    y = emit.op("LayerNormalization", rows, ones, axis=-1, epsilon=argument(node, "eps"))
    y = emit.reshape(y, shape, shape)
    for name, kind in (("weight", "Mul"), ("bias", "Add")):
        arg = argument(node, name)
        if arg is not None:
            column = emit.op("Reshape", emit.get(arg), emit.integers(-1, *[1] * (len(shape) - 2)))
            y = emit.op(kind, y, column)
    return y


@translates(aten.scaled_dot_product_attention.default)
def _attention(emit: Emitter, node: fx.Node) -> str:
    if argument(node, "is_causal") or argument(node, "enable_gqa"):
        raise ModelError(f"{node.name}: ONNX export has no causal or grouped attention")
    query, key, value = (emit.get(arg) for arg in node.args[:3])
    shape = value_of(node.args[1]).shape  # type: ignore[arg-type]
    scale = argument(node, "scale") or 1 / math.sqrt(shape[-1])
    order = [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2]
    scaled = emit.op("Mul", query, emit.number(scale))
    scores = emit.op("MatMul", scaled, emit.op("Transpose", key, perm=order))
    mask = argument(node, "attn_mask")
    if mask is not None:
        if value_of(mask).dtype == torch.bool:
            shown = emit.op("Where", emit.get(mask), emit.number(0.0), emit.number(-math.inf))
        else:
            shown = operand(emit, mask, value_of(node).dtype)
        scores = emit.op("Add", scores, shown)
    return emit.op("MatMul", emit.op("Softmax", scores, axis=-1), value)


@translates(aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool1d.default)
def _adaptive_pool(emit: Emitter, node: fx.Node) -> str:
    if any(one != 1 for one in argument(node, "output_size")):
        raise ModelError(f"{node.name}: ONNX export pools adaptively to one value only")
    return emit.op("GlobalAveragePool", emit.get(node.args[0]))


@translates(aten.max_pool2d.default, aten.avg_pool2d.default)
def _pool(emit: Emitter, node: fx.Node) -> str:
    most = node.target is aten.max_pool2d.default
    kernel = _each(argument(node, "kernel_size"), 2)
    stride = _each(argument(node, "stride") or kernel, 2)
    attributes: dict[str, Any] = {
        "kernel_shape": kernel,
        "strides": stride,
        "pads": 2 * _each(argument(node, "padding"), 2),
        "ceil_mode": int(argument(node, "ceil_mode")),
    }
    if most:
        attributes["dilations"] = _each(argument(node, "dilation"), 2)
    else:
        if argument(node, "divisor_override") is not None:
            raise ModelError(f"{node.name}: ONNX export has no divisor_override")
        attributes["count_include_pad"] = int(argument(node, "count_include_pad"))
    return emit.op("MaxPool" if most else "AveragePool", emit.get(node.args[0]), **attributes)
