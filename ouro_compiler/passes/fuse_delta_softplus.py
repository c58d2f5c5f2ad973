"""fuse_delta_softplus: softplus of a scan's delta in the epilogue of the product that makes delta.

    linear_dynamic_outlier -> transpose -> selective_scan(delta, delta_softplus=True)
becomes a product with activation "softplus" and a scan without. A product waits for memory where a
scan waits for its exponential unit, and what is rounded to 16 bits (narrow_activations) is delta
itself. Left alone: a delta_bias that only the scan adds, a delta that something else reads, and a
quantized one, whose codes are those of the values before softplus.
"""

from __future__ import annotations

import torch
from torch import fx

from ouro_compiler.graph import all_arguments, aten, is_op
from ouro_compiler.passes.base import PassContext

_SCAN = torch.ops.ouro.selective_scan.default
_LINEAR = torch.ops.ouro.linear_dynamic_outlier.default
_VIEWS = (aten.transpose.int, aten.permute.default)
_DELTA, _DELTA_BIAS, _DELTA_SOFTPLUS = 1, 7, 8  # of the scan's arguments
_RESIDUAL, _ACTIVATION = 8, 9  # of the product's


def fuse_delta_softplus(gm: fx.GraphModule, ctx: PassContext) -> bool:
    """Fuse wherever the pattern of the module docstring holds."""
    del ctx
    modified = False
    for scan in gm.graph.nodes:
        if not is_op(scan, _SCAN):
            continue
        arguments = all_arguments(scan)
        if not arguments[_DELTA_SOFTPLUS] or arguments[_DELTA_BIAS] is not None:
            continue
        product = _read_once(arguments[_DELTA])
        if product is None or product.args[_ACTIVATION] != "none" or product.args[_RESIDUAL]:
            continue
        operands = all_arguments(product)
        operands[_ACTIVATION] = "softplus"
        product.args = tuple(operands)
        arguments[_DELTA_SOFTPLUS] = False
        scan.args, scan.kwargs = tuple(arguments), {}
        modified = True
    return modified


def _read_once(delta: fx.Node) -> fx.Node | None:
    """The product behind delta's views where nothing else reads any of them."""
    node = delta
    while len(node.users) == 1 and is_op(node, *_VIEWS):
        node = node.args[0]  # type: ignore[assignment]
    return node if len(node.users) == 1 and is_op(node, _LINEAR) else None
