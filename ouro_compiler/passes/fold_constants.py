"""fold_constants: compute once what depends on parameters alone.

Covers `A = -exp(A_log)`, reshaped or cast weights, sums of constants: a whole chain becomes one
buffer, named `<first parameter it comes from>_folded`. Not folded: random ops, ops whose result is
larger than their inputs together (an expanded constant is cheaper to keep as an expand), and
`ouro::dequantize_weight`, which is how a quantized constant stays small.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ouro_compiler.graph import add_constant, delete_unused_constants, get_constant, replace_node
from ouro_compiler.passes.base import PassContext

_SUFFIX = "_folded"
_KEPT = frozenset({torch.ops.ouro.dequantize_weight.default})


def fold_constants(gm: fx.GraphModule, ctx: PassContext) -> bool:
    """Replace by a buffer every constant result that something not constant reads."""
    del ctx
    values: dict[fx.Node, Tensor] = {}
    for node in gm.graph.nodes:
        value = get_constant(gm, node) if node.op == "get_attr" else _evaluate(node, values)
        if value is not None:
            values[node] = value
    folded = [
        node
        for node in values
        if node.op != "get_attr" and any(user not in values for user in node.users)
    ]
    for node in folded:
        with gm.graph.inserting_before(node):
            constant = add_constant(gm, _origin(node) + _SUFFIX, values[node])
        constant.meta["val"] = node.meta["val"]
        replace_node(node, constant)
    if folded:
        gm.graph.eliminate_dead_code()
        delete_unused_constants(gm)
    return bool(folded)


def _evaluate(node: fx.Node, values: dict[fx.Node, Tensor]) -> Tensor | None:
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return None
    if target in _KEPT or torch.Tag.nondeterministic_seeded in target.tags:
        return None
    inputs = node.all_input_nodes
    if not inputs or any(one not in values for one in inputs):
        return None

    def real(argument: Any) -> Any:
        return values[argument] if isinstance(argument, fx.Node) else argument

    args, kwargs = fx.node.map_aggregate((node.args, dict(node.kwargs)), real)  # type: ignore[misc]
    with torch.no_grad():
        value = target(*args, **kwargs)
    size = sum(values[one].numel() for one in inputs)
    return value if isinstance(value, Tensor) and value.numel() <= size else None


def _origin(node: fx.Node) -> str:
    while node.op != "get_attr":
        node = node.all_input_nodes[0]
    return str(node.target).removesuffix(_SUFFIX)
