"""What the passes that insert quantizers share: constants, weights, views as tokens."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ouro_compiler.graph import QWeight, add_constant, aten, insert_call, value_of


def constant(gm: fx.GraphModule, before: fx.Node, name: str, value: Tensor) -> fx.Node:
    """A get_attr node placed before another, for a new buffer."""
    with gm.graph.inserting_before(before):
        return add_constant(gm, name, value)


def dequantized_weight(
    gm: fx.GraphModule, before: fx.Node, name: str, weight: QWeight, bits: int
) -> fx.Node:
    """`dequantize_weight` of new constants called `name`.*."""
    zero_point = None
    if weight.zero_point is not None:
        zero = weight.zero_point.to(torch.uint8)
        zero_point = constant(gm, before, f"{name}.zero_point", zero)
    return insert_call(
        gm.graph,
        before,
        torch.ops.ouro.dequantize_weight.default,
        constant(gm, before, f"{name}.qweight", weight.codes),
        constant(gm, before, f"{name}.weight_scale", weight.scale),
        zero_point,
        bits,
        weight.codes.shape[1],
    )


def as_tokens(graph: fx.Graph, before: fx.Node, node: fx.Node) -> fx.Node:
    """(B, K, L) or (B, G, N, L) as tokens (B, L, K)."""
    if len(value_of(node).shape) == 4:
        node_flat = insert_call(graph, before, aten.flatten.using_ints, node, 1, 2)
        return insert_call(graph, before, aten.transpose.int, node_flat, 1, 2)
    return insert_call(graph, before, aten.transpose.int, node, 1, 2)


def from_tokens(graph: fx.Graph, before: fx.Node, tokens: fx.Node, like: fx.Node) -> fx.Node:
    """Inverse of as_tokens: the shape of `like`."""
    shape = value_of(like).shape
    found = insert_call(graph, before, aten.transpose.int, tokens, 1, 2)
    if len(shape) == 4:
        sizes = [int(shape[1]), int(shape[2])]
        found = insert_call(graph, before, aten.unflatten.int, found, 1, sizes)
    return found


def replace_behind(source: fx.Node, made: fx.Node) -> None:
    """Let every reader of `source` read `made` instead, but for those that `made` is made of."""
    own: set[fx.Node] = set()
    found = [made]
    while found:
        node = found.pop()
        if node is not source and node not in own:
            own.add(node)
            found.extend(node.all_input_nodes)
    source.replace_all_uses_with(made, delete_user_cb=lambda user: user not in own)
