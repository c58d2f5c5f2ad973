"""raise_norm: normalisation over the last dimension, and the residual sum before it, in one op.

1. `layer_norm(x, [K], w, b?)`, `rms_norm(x, [K], w)` and RMS norms spelled out, in either order of
   each product, `x * rsqrt(mean(x^2) + eps) * w` or `x / sqrt(mean(x^2) + eps) * w`, become
   `ouro.add_norm(x, None, w, b, eps, rms, True)[0]`;
2. where x is `a + b`, both of x's shape, the op adds them; other uses of the sum read its second
   output. A linear's result, scaled or not, goes first, the stream it is added to second.

Only with fp32 throughout: the op computes in fp32 and would round elsewhere than other dtypes do.
Left alone: norms without a weight, or whose weight or bias is no parameter; more than one
normalised dimension; sums with alpha other than 1 or a broadcast operand (the norm is still
raised); tensors that an op writes to in place.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

import ouro_compiler.ops  # noqa: F401  (registers torch.ops.ouro)
from ouro_compiler.graph import (
    all_arguments,
    argument,
    aten,
    get_constant,
    insert_call,
    is_op,
    replace_node,
    value_of,
)
from ouro_compiler.passes.base import PassContext
from ouro_compiler.passes.editing import written_in_place
from ouro_compiler.passes.views import same_shape

_MUL = aten.mul.Tensor


@dataclass(frozen=True)
class _Norm:
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    eps: float
    rms: bool


def raise_norm(gm: fx.GraphModule, ctx: PassContext) -> bool:
    """Apply the rules of the module docstring; returns whether any did."""
    del ctx
    written = written_in_place(gm.graph)
    modified = False
    for node in list(gm.graph.nodes):
        norm = None if node.op != "call_function" else _match(gm, node)
        if norm is None or node in written or norm.x in written:
            continue
        _write(node, norm, _sum(norm.x, written))
        modified = True
    if modified:
        gm.graph.eliminate_dead_code()
    return modified


def _match(gm: fx.GraphModule, node: fx.Node) -> _Norm | None:
    if is_op(node, aten.layer_norm.default):
        x, shape, weight, bias, eps, _ = all_arguments(node)
        found = _Norm(x, weight, bias, eps, False) if len(shape) == 1 else None
    elif is_op(node, aten.rms_norm.default):
        x, shape, weight, eps = all_arguments(node)
        eps = torch.finfo(torch.float32).eps if eps is None else eps
        found = _Norm(x, weight, None, eps, True) if len(shape) == 1 else None
    else:
        found = _match_rms(gm, node)
    if found is None or not _is_vector(gm, found.weight, found.x):
        return None
    if found.bias is not None and not _is_vector(gm, found.bias, found.x):
        return None
    return found if value_of(found.x).dtype == torch.float32 else None


def _is_vector(gm: fx.GraphModule, node: Any, x: fx.Node) -> bool:
    """An fp32 parameter with as many entries as x's last dimension?"""
    value = get_constant(gm, node)
    return (
        value is not None and value.dtype == torch.float32 and value.shape == value_of(x).shape[-1:]
    )


def _match_rms(gm: fx.GraphModule, node: fx.Node) -> _Norm | None:
    if not is_op(node, _MUL):
        return None
    for scaled, weight in (node.args[:2], node.args[1::-1]):
        if get_constant(gm, weight) is None or not isinstance(weight, fx.Node):
            continue
        found = _match_scaled(scaled)
        if found is not None:
            return _Norm(found[0], weight, None, found[1], True)
    return None


def _match_scaled(node: Any) -> tuple[fx.Node, float] | None:
    """(x, eps) of x * rsqrt(mean(x^2) + eps) or x / sqrt(mean(x^2) + eps)."""
    if is_op(node, aten.div.Tensor):
        pairs, root = [node.args[:2]], aten.sqrt.default
    elif is_op(node, _MUL):
        pairs, root = [node.args[:2], node.args[1::-1]], aten.rsqrt.default
    else:
        return None
    for x, scale in pairs:
        if isinstance(x, fx.Node) and is_op(scale, root):
            eps = _match_mean_square(scale.args[0], x)
            if eps is not None:
                return x, eps
    return None


def _match_mean_square(node: Any, x: fx.Node) -> float | None:
    """eps, where node is mean(x^2, -1, keepdim) + eps."""
    if not is_op(node, aten.add.Tensor) or argument(node, "alpha") != 1:
        return None
    mean, eps = node.args[:2]
    if not isinstance(eps, float) or not is_op(mean, aten.mean.dim):
        return None
    dims = argument(mean, "dim")
    if not argument(mean, "keepdim") or dims not in ([-1], [value_of(x).dim() - 1]):
        return None
    square = mean.args[0]
    if is_op(square, aten.pow.Tensor_Scalar):
        squared = square.args == (x, 2)
    elif is_op(square, aten.square.default):
        squared = square.args[0] is x
    else:
        squared = is_op(square, _MUL) and square.args[0] is x and square.args[1] is x
    return eps if squared and argument(mean, "dtype") is None else None


def _sum(node: fx.Node, written: set[fx.Node]) -> tuple[fx.Node, fx.Node] | None:
    """The operands of a plain sum, the branch first and the stream second."""
    if not is_op(node, aten.add.Tensor) or argument(node, "alpha") != 1:
        return None
    a, b = node.args[:2]
    for one in (a, b):
        if not isinstance(one, fx.Node) or one in written or one.op == "get_attr":
            return None
        value = value_of(one)
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return None
        if not same_shape(value, value_of(node)):
            return None
    assert isinstance(a, fx.Node)
    assert isinstance(b, fx.Node)
    return (b, a) if _is_branch(b) and not _is_branch(a) else (a, b)


def _is_branch(node: fx.Node) -> bool:
    """A linear's result, scaled or not."""
    made = node.all_input_nodes if is_op(node, _MUL, aten.div.Tensor) else [node]
    return any(is_op(one, aten.linear.default) for one in made)


def _write(node: fx.Node, norm: _Norm, terms: tuple[fx.Node, fx.Node] | None) -> None:
    # Other uses of the sum may come before the norm, so the op takes the sum's place.
    before = node if terms is None else norm.x
    x, residual = (norm.x, None) if terms is None else terms
    with node.graph.inserting_before(before):
        weight = _again(norm.weight)
        bias = None if norm.bias is None else _again(norm.bias)
    op = torch.ops.ouro.add_norm.default
    call = insert_call(node.graph, before, op, x, residual, weight, bias, norm.eps, norm.rms, True)
    y = insert_call(node.graph, before, operator.getitem, call, 0)
    y.meta["val"] = value_of(node)
    replace_node(node, y)
    if terms is not None:
        total = insert_call(node.graph, before, operator.getitem, call, 1)
        total.meta["val"] = value_of(norm.x)
        replace_node(norm.x, total)


def _again(constant: fx.Node) -> fx.Node:
    """Another get_attr node of the same parameter, where the graph is being written."""
    node = constant.graph.get_attr(str(constant.target))
    node.meta["val"] = constant.meta["val"]
    return node
