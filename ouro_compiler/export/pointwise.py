"""Translations of ATen's arithmetic and reductions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from ouro_compiler.errors import ModelError
from ouro_compiler.export.emitter import Emitter, translates
from ouro_compiler.graph import argument, aten, value_of

_UNARY = {
    "abs": "Abs",
    "ceil": "Ceil",
    "cos": "Cos",
    "erf": "Erf",
    "exp": "Exp",
    "floor": "Floor",
    "log": "Log",
    "neg": "Neg",
    "reciprocal": "Reciprocal",
    "relu": "Relu",
    "round": "Round",
    "sigmoid": "Sigmoid",
    "sin": "Sin",
    "sqrt": "Sqrt",
    "tanh": "Tanh",
    "hardsigmoid": "HardSigmoid",
    "hardswish": "HardSwish",
}
_BINARY = {
    "add": "Add",
    "sub": "Sub",
    "mul": "Mul",
    "div": "Div",
    "pow": "Pow",
    "maximum": "Max",
    "minimum": "Min",
}
_COMPARISONS = {
    "eq": "Equal",
    "ge": "GreaterOrEqual",
    "gt": "Greater",
    "le": "LessOrEqual",
    "lt": "Less",
}


def operand(emit: Emitter, arg: Any, dtype: torch.dtype) -> str:
    """A tensor or number as a value of this dtype."""
    if not isinstance(arg, fx.Node):
        return emit.number(arg, dtype)
    if not isinstance(value_of(arg), torch.Tensor):
        return emit.cast(emit.size_vector([arg]), dtype)
    name = emit.get(arg)
    return name if value_of(arg).dtype == dtype else emit.cast(name, dtype)


@translates(*(getattr(aten, name).default for name in _UNARY))
def _unary(emit: Emitter, node: fx.Node) -> str:
    name = node.target._schema.name.removeprefix("aten::")  # type: ignore[union-attr]
    attributes: dict[str, Any] = {"alpha": 1 / 6} if name == "hardsigmoid" else {}
    return emit.op(_UNARY[name], emit.get(node.args[0]), **attributes)


@translates(
    *(
        overload
        for name in (*_BINARY, *_COMPARISONS)
        for packet in [getattr(aten, name)]
        for overload in [getattr(packet, one) for one in packet.overloads()]
        if overload._overloadname in ("Tensor", "Scalar", "Tensor_Tensor", "Tensor_Scalar")
    ),
    aten.maximum.default,
    aten.minimum.default,
)
def _binary(emit: Emitter, node: fx.Node) -> str:
    name = node.target._schema.name.removeprefix("aten::")  # type: ignore[union-attr]
    left, right = node.args[:2]
    dtype = value_of(node).dtype
    if name in _COMPARISONS:
        values = [value_of(one) for one in (left, right) if isinstance(one, fx.Node)]
        dtype = values[0].dtype
        for value in values[1:]:
            dtype = torch.promote_types(dtype, value.dtype)
    y = operand(emit, right, dtype)
    alpha = node.kwargs.get("alpha", 1)
    if alpha != 1:
        y = emit.op("Mul", y, operand(emit, alpha, dtype))
    return emit.op((_BINARY | _COMPARISONS)[name], operand(emit, left, dtype), y)


@translates(aten.rsub.Scalar)
def _rsub(emit: Emitter, node: fx.Node) -> str:
    dtype = value_of(node).dtype
    return emit.op("Sub", operand(emit, node.args[1], dtype), operand(emit, node.args[0], dtype))


@translates(aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar)
def _where(emit: Emitter, node: fx.Node) -> str:
    dtype = value_of(node).dtype
    left, right = (operand(emit, one, dtype) for one in node.args[1:3])
    return emit.op("Where", emit.get(node.args[0]), left, right)


@translates(
    aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default, aten.hardtanh.default
)
def _clamp(emit: Emitter, node: fx.Node) -> str:
    low = high = None
    names = {"clamp_min": ("min", None), "clamp_max": (None, "max"), "clamp": ("min", "max")}
    name = node.target._schema.name.removeprefix("aten::")  # type: ignore[union-attr]
    for index, bound in enumerate(names.get(name, ("min_val", "max_val"))):
        value = None if bound is None else argument(node, bound)
        if value is not None:
            found = operand(emit, value, value_of(node).dtype)
            low, high = (found, high) if index == 0 else (low, found)
    return emit.op("Clip", emit.get(node.args[0]), low, high)


@translates(aten.rsqrt.default)
def _rsqrt(emit: Emitter, node: fx.Node) -> str:
    return emit.op("Reciprocal", emit.op("Sqrt", emit.get(node.args[0])))


@translates(aten.square.default)
def _square(emit: Emitter, node: fx.Node) -> str:
    x = emit.get(node.args[0])
    return emit.op("Mul", x, x)


@translates(aten.silu.default)
def _silu(emit: Emitter, node: fx.Node) -> str:
    x = emit.get(node.args[0])
    return emit.op("Mul", x, emit.op("Sigmoid", x))


@translates(aten.softplus.default)
def _softplus(emit: Emitter, node: fx.Node) -> str:
    if argument(node, "beta") != 1:
        raise ModelError(f"{node.name}: ONNX export has softplus with beta 1 only")
    return emit.op("Softplus", emit.get(node.args[0]))


@translates(aten.gelu.default)
def _gelu(emit: Emitter, node: fx.Node) -> str:
    return gelu(emit, emit.get(node.args[0]), argument(node, "approximate"))


def gelu(emit: Emitter, x: str, approximate: str) -> str:
    """GELU of a value; approximate as in `aten.gelu`: "none" or "tanh"."""
    if emit.opset >= 20:
        return emit.op("Gelu", x, approximate=approximate)
    if approximate == "tanh":
        cube = emit.op("Mul", emit.op("Mul", x, x), x)
        inner = emit.op("Add", x, emit.op("Mul", cube, emit.number(0.044715)))
        inner = emit.op("Tanh", emit.op("Mul", inner, emit.number(math.sqrt(2 / math.pi))))
    else:
        inner = emit.op("Erf", emit.op("Div", x, emit.number(math.sqrt(2))))
    half = emit.op("Mul", x, emit.number(0.5))
    return emit.op("Mul", half, emit.op("Add", inner, emit.number(1.0)))


@translates(aten.softmax.int, aten._softmax.default)
def _softmax(emit: Emitter, node: fx.Node) -> str:
    return emit.op("Softmax", emit.get(node.args[0]), axis=argument(node, "dim"))


@translates(
    aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.mean.default
)
def _reduce(emit: Emitter, node: fx.Node) -> str:
    name = node.target._schema.name.removeprefix("aten::")  # type: ignore[union-attr]
    kind = {"mean": "ReduceMean", "sum": "ReduceSum", "amax": "ReduceMax", "amin": "ReduceMin"}
    axes = () if node.target is aten.mean.default else argument(node, "dim")
    keep = False if node.target is aten.mean.default else argument(node, "keepdim")
    named = emit.integers(*axes) if axes else None
    return emit.op(kind[name], emit.get(node.args[0]), named, keepdims=int(keep))
