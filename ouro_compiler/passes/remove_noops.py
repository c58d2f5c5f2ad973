"""remove_noops: drop what does nothing at inference.

1. assertions on metadata;
2. `to` / `type_as`-like casts to the dtype (and device) the tensor already has;
3. dropout that is inactive (eval mode, or p = 0);
4. slices that provably keep everything; detach and alias.

Left alone: anything that shares memory with a tensor an op writes to in place, where a cast may be
the copy that keeps the original intact.
"""

from __future__ import annotations

import torch
from torch import fx

from ouro_compiler.graph import argument, aten, is_op, value_of
from ouro_compiler.passes.base import PassContext
from ouro_compiler.passes.editing import written_in_place
from ouro_compiler.passes.views import same_shape

_CASTS = (aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.to.device)
_ALIASES = (aten.detach.default, aten.alias.default, aten.detach_.default)
_DROPOUTS = (aten.dropout.default, aten.feature_dropout.default)


def remove_noops(gm: fx.GraphModule, ctx: PassContext) -> bool:
    """Remove the nodes of the module docstring; returns whether there were any."""
    del ctx
    written = written_in_place(gm.graph)
    modified = False
    for node in list(gm.graph.nodes):
        if node in written or any(one in written for one in node.all_input_nodes):
            continue
        if is_op(node, aten._assert_tensor_metadata.default):
            gm.graph.erase_node(node)
        elif _does_nothing(node):
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
        else:
            continue
        modified = True
    return modified


def _does_nothing(node: fx.Node) -> bool:
    if is_op(node, *_ALIASES):
        return True
    if is_op(node, *_DROPOUTS):
        _, p, train = node.args
        return bool(p == 0 or train is False)
    if is_op(node, aten.slice.Tensor):  # without a step, a slice of full size is all there is
        source, result = value_of(node.args[0]), value_of(node)  # type: ignore[arg-type]
        return argument(node, "step") == 1 and same_shape(source, result)
    if is_op(node, *_CASTS):
        source, result = value_of(node.args[0]), value_of(node)  # type: ignore[arg-type]
        return isinstance(source, torch.Tensor) and (
            (source.dtype, source.device, source.layout)
            == (result.dtype, result.device, result.layout)
        )
    return False
