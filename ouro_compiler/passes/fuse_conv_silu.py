"""fuse_conv_silu: a SiLU that alone reads an `ouro.depthwise_conv` is done by it."""

from __future__ import annotations

import torch
from torch import fx

from ouro_compiler.graph import all_arguments, aten, is_op, replace_node
from ouro_compiler.passes.base import PassContext


def fuse_conv_silu(gm: fx.GraphModule, ctx: PassContext) -> bool:
    """Fuse every such pair; returns whether there was one."""
    del ctx
    modified = False
    for node in list(gm.graph.nodes):
        if not is_op(node, torch.ops.ouro.depthwise_conv.default) or len(node.users) != 1:
            continue
        *operands, silu = all_arguments(node)
        (reader,) = node.users
        if not silu and is_op(reader, aten.silu.default):
            node.args, node.kwargs = (*operands, True), {}
            replace_node(reader, node)
            modified = True
    return modified
