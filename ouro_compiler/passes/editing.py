"""What passes need while they edit: nodes that carry values, new parameters, in-place writes."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from ouro_compiler.graph import add_constant, aten, evaluating_fakes, get_constant, insert_call

# What these return depends on strides, which the passes are free to change.
_STRIDED = frozenset({aten.as_strided.default, aten.view.dtype, aten.view_as_complex.default})
# No alias annotation in their schema, and yet they may return their input.
_MAY_RETURN_INPUT = frozenset({aten.dropout.default, aten.feature_dropout.default})


def call(before: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """`insert_call` that also computes meta["val"], which later rules of the same pass read."""
    node = insert_call(before.graph, before, target, *args, **kwargs)
    values = fx.node.map_arg(node.args, lambda one: one.meta["val"])
    named = fx.node.map_arg(node.kwargs, lambda one: one.meta["val"])
    with evaluating_fakes(_fake_mode(before.graph)):
        node.meta["val"] = target(*values, **named)
    return node


def _fake_mode(graph: fx.Graph) -> Any:
    values = (node.meta.get("val") for node in graph.nodes)
    return next(value.fake_mode for value in values if hasattr(value, "fake_mode"))


def new_constant(gm: fx.GraphModule, before: fx.Node, name: str, value: Tensor) -> fx.Node:
    """`add_constant` before a node, with meta["val"]."""
    mode = _fake_mode(gm.graph)
    with gm.graph.inserting_before(before):
        node = add_constant(gm, name, value)
    node.meta["val"] = mode.from_tensor(get_constant(gm, node), static_shapes=True)
    return node


def written_in_place(graph: fx.Graph) -> set[fx.Node]:
    """Tensors that share memory with one that an op writes to: moving reads of them is unsafe."""
    roots: dict[fx.Node, fx.Node] = {}
    written: set[fx.Node] = set()
    for node in graph.nodes:
        roots[node] = node
        if node.op != "call_function" or not node.all_input_nodes:
            continue
        if node.target is operator.getitem or node.target in _MAY_RETURN_INPUT:
            roots[node] = roots[node.all_input_nodes[0]]
        elif isinstance(node.target, torch._ops.OpOverload):
            for schema, arg in zip(node.target._schema.arguments, node.args, strict=False):
                if isinstance(arg, fx.Node) and schema.alias_info is not None:
                    roots[node] = roots[arg]
                    if schema.alias_info.is_write or node.target in _STRIDED:
                        written.add(roots[arg])
    return {node for node, root in roots.items() if root in written}
