"""fold_constants: compute once what depends on parameters alone.

Covers `A = -exp(A_log)`, reshaped or cast weights, sums of constants, parts of a split parameter.
A chain folds as a whole into a buffer named `<first parameter it comes from>_folded`; part k of a
stacked parameter `w` is called `w_k`, or `w_k_folded` where more is done to it. Not folded:
random ops, ops that write in place and parameters that are written to, ops whose result is larger
than all of their inputs together (an expanded constant is cheaper to keep as an expand), and
`ouro::dequantize_weight`, which is how a quantized constant stays small.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

import ouro_compiler.ops  # noqa: F401  (registers torch.ops.ouro)
from ouro_compiler.graph import (
    add_constant,
    argument,
    aten,
    delete_unused_constants,
    get_constant,
    is_op,
    replace_node,
)
from ouro_compiler.passes.base import PassContext
from ouro_compiler.passes.editing import written_in_place

_SUFFIX = "_folded"
_KEPT = frozenset({torch.ops.ouro.dequantize_weight.default})


def fold_constants(gm: fx.GraphModule, ctx: PassContext) -> bool:
    """Replace by buffers all constant tensors that something not constant reads."""
    del ctx
    values = _constant_values(gm)
    modified = False
    for node, value in values.items():
        read = any(user not in values for user in node.users)
        if node.op == "get_attr" or not isinstance(value, Tensor) or not read:
            continue
        with gm.graph.inserting_before(node):
            folded = add_constant(gm, _folded_name(node), value)
        folded.meta["val"] = node.meta["val"]
        replace_node(node, folded)
        modified = True
    if modified:
        gm.graph.eliminate_dead_code()
        delete_unused_constants(gm)
    return modified


def _constant_values(gm: fx.GraphModule) -> dict[fx.Node, Any]:
    """Values of parameters and of what can be computed from them, in topological order."""
    written = written_in_place(gm.graph)
    values: dict[fx.Node, Any] = {}
    for node in gm.graph.nodes:
        if node in written:
            continue
        value = get_constant(gm, node)
        if value is None:
            value = _evaluate(node, values)
        if value is not None:
            values[node] = value
    return values


def _evaluate(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    target: Any = node.target
    inputs = node.all_input_nodes
    if node.op != "call_function" or not inputs or any(one not in values for one in inputs):
        return None
    if target is not operator.getitem:
        if not isinstance(target, torch._ops.OpOverload) or target in _KEPT:
            return None
        if torch.Tag.nondeterministic_seeded in target.tags or target._schema.is_mutable:
            return None
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
    with torch.no_grad():
        value = target(*args, **kwargs)
    size = sum(_elements(values[one]) for one in inputs)
    return value if 0 < _elements(value) <= size else None


def _elements(value: Any) -> int:
    """Elements of a tensor, or of all in a list; 0 for anything else."""
    if isinstance(value, (list, tuple)):
        return sum(_elements(one) for one in value)
    return value.numel() if isinstance(value, Tensor) else 0


def _folded_name(node: fx.Node) -> str:
    part, suffix = (
        "",
        "" if _is_part(node) and node.all_input_nodes[0].op == "get_attr" else _SUFFIX,
    )
    while node.op != "get_attr":
        part = f"_{argument(node, 'index')}{part}" if _is_part(node) else part
        node = node.all_input_nodes[0]
    return str(node.target).removesuffix(_SUFFIX) + part + suffix


def _is_part(node: fx.Node) -> bool:
    return is_op(node, aten.select.int) and argument(node, "dim") == 0
