"""concatenate_tokens: channels of (B, C, L) tensors are put side by side as those of tokens.

    transpose(cat([a, b], 1), 1, 2)  ->  cat([transpose(a, 1, 2), transpose(b, 1, 2)], 2)

where nothing else reads the concatenation. Scans and convolutions return memory laid out as
(B, L, C): so their channels are copied once, in rows, and what reads tokens finds them next to each
other. Left alone: what is written in place.
"""

from __future__ import annotations

from torch import fx

from ouro_compiler.graph import argument, aten, is_op, replace_node, value_of
from ouro_compiler.passes.base import PassContext
from ouro_compiler.passes.editing import call, written_in_place
from ouro_compiler.passes.views import PERMUTATIONS, axes_order


def concatenate_tokens(gm: fx.GraphModule, ctx: PassContext) -> bool:
    """Apply the rule of the module docstring; returns whether it applied anywhere."""
    del ctx
    written = written_in_place(gm.graph)
    modified = False
    for node in list(gm.graph.nodes):
        if not is_op(node, aten.cat.default) or value_of(node).dim() != 3 or not node.users:
            continue
        readers = list(node.users)
        along = argument(node, "dim") % 3 == 1
        if not along or not all(map(_is_turned, readers)) or written & {node, *node.args[0]}:
            continue
        turned = [call(node, aten.transpose.int, one, 1, 2) for one in node.args[0]]
        made = call(node, aten.cat.default, turned, 2)
        for reader in readers:
            replace_node(reader, made)
        modified = True
    if modified:
        gm.graph.eliminate_dead_code()
    return modified


def _is_turned(reader: fx.Node) -> bool:
    return is_op(reader, *PERMUTATIONS) and axes_order(reader, 3) == [0, 2, 1]
