"""share_views: equal views of one tensor are one node, so that what copies is copied once.

1. Chains of views that became longer when a flip between them was dropped are shortened.
2. A permutation or a reshape of the same tensor to the same order or shape as an earlier one is
   replaced by it. VMamba's column-major order is the case: four readers, one reshape that copies.

Left alone: tensors that an op writes to in place.
"""

from __future__ import annotations

from torch import fx

from ouro_compiler.graph import is_op, replace_node, value_of
from ouro_compiler.passes.base import PassContext
from ouro_compiler.passes.editing import written_in_place
from ouro_compiler.passes.normalize_linear import arrange_views
from ouro_compiler.passes.views import PERMUTATIONS, VIEWS, axes_order

_Key = tuple[fx.Node, str, tuple[str, ...]]


def share_views(gm: fx.GraphModule, ctx: PassContext) -> bool:
    """Apply the rules of the module docstring; returns whether any did."""
    del ctx
    modified = arrange_views(gm)
    if modified:
        gm.graph.eliminate_dead_code()
    written = written_in_place(gm.graph)
    first: dict[_Key, fx.Node] = {}
    for node in list(gm.graph.nodes):
        if not is_op(node, *VIEWS) or node in written:
            continue
        earlier = first.setdefault(_key(node), node)
        if earlier is not node:
            replace_node(node, earlier)
            modified = True
    return modified


def _key(node: fx.Node) -> _Key:
    """Equal for equal views of one tensor. Sizes are compared as they are written."""
    source, value = node.all_input_nodes[0], value_of(node)
    if is_op(node, *PERMUTATIONS):
        return source, "permute", tuple(map(str, axes_order(node, value.dim())))
    return source, "reshape", tuple(map(str, value.shape))
