"""fold_delta_bias: move a scan's delta_bias into the linear that makes delta.

`selective_scan(delta=transpose(linear(x, W, b?)), delta_bias=c)` becomes a linear with bias b + c
and a scan without delta_bias, so that the quantizer of delta sees what softplus sees. A model that
adds its bias twice (MambaVision) keeps both. Requires the linear's result to feed this scan alone,
and fp32: a linear takes a bias of its own dtype, and rounding the sum would change numbers.
"""

from __future__ import annotations

import torch
from torch import fx

import ouro_compiler.ops  # noqa: F401  (registers torch.ops.ouro)
from ouro_compiler.graph import (
    add_constant,
    all_arguments,
    aten,
    delete_unused_constants,
    get_constant,
    is_op,
    value_of,
)
from ouro_compiler.passes.base import PassContext

_SCAN = torch.ops.ouro.selective_scan.default
_VIEWS = (aten.transpose.int, aten.permute.default)


def fold_delta_bias(gm: fx.GraphModule, ctx: PassContext) -> bool:
    """Fold wherever the pattern of the module docstring holds."""
    del ctx
    modified = False
    for scan in list(gm.graph.nodes):
        if not is_op(scan, _SCAN):
            continue
        arguments = all_arguments(scan)
        delta_bias = get_constant(gm, arguments[7])
        linear = _delta_linear(arguments[1])
        if delta_bias is None or linear is None:
            continue
        x, weight, *rest = linear.args
        bias = get_constant(gm, rest[0]) if rest and rest[0] is not None else None
        if rest and rest[0] is not None and bias is None:
            continue
        assert isinstance(weight, fx.Node)
        if value_of(linear).dtype != torch.float32:
            continue
        total = delta_bias.float() if bias is None else bias.float() + delta_bias.float()
        with gm.graph.inserting_before(linear):
            linear.args = (x, weight, add_constant(gm, _bias_name(weight, linear), total))
        arguments[7] = None
        scan.args, scan.kwargs = tuple(arguments), {}
        modified = True
    if modified:
        gm.graph.eliminate_dead_code()
        delete_unused_constants(gm)
    return modified


def _delta_linear(delta: fx.Node) -> fx.Node | None:
    """The linear behind delta's (single-use) views."""
    node = delta
    while is_op(node, *_VIEWS):
        if len(node.users) != 1:
            return None
        node = node.args[0]  # type: ignore[assignment]
    return node if is_op(node, aten.linear.default) and len(node.users) == 1 else None


def _bias_name(weight: fx.Node, linear: fx.Node) -> str:
    """`dt_proj.folded_bias` for `dt_proj.weight`, `dt_weight_folded_bias` for `dt_weight`."""
    name = str(weight.target) if weight.op == "get_attr" else linear.name
    layer = name.removesuffix(".weight")
    return f"{layer}.folded_bias" if layer != name else f"{name}_folded_bias"
