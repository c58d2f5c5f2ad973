"""quantize_heads: the weights of classifier heads in `config.head_bits`, dequantized around them.

A head reads one vector an image: its product takes no time, its weight takes room. Its input and
its arithmetic stay in floating point. Which linears are heads is marked by the recipe's plan.
"""

from __future__ import annotations

from torch import fx

from ouro_compiler.calibration.search import quantize_weight
from ouro_compiler.graph import HEAD_BITS, QWeight, delete_unused_constants, get_constant
from ouro_compiler.passes.base import PassContext
from ouro_compiler.passes.quantized_parts import dequantized_weight


def quantize_heads(gm: fx.GraphModule, ctx: PassContext) -> bool:
    """Quantize the weight of every linear that was marked, one scale an output channel (P4)."""
    del ctx
    modified = False
    for node in list(gm.graph.nodes):
        bits = node.meta.get(HEAD_BITS)
        weight = get_constant(gm, node.args[1]) if bits is not None else None
        if weight is None:
            continue
        codes, scale = quantize_weight(weight, bits)
        found = QWeight(codes=codes, scale=scale)
        node.update_arg(1, dequantized_weight(gm, node, node.meta["ouro_layer"], found, bits))
        modified = True
    if modified:
        gm.graph.eliminate_dead_code()
        delete_unused_constants(gm)
    return modified
