"""fold_batch_norm: a batch norm behind a convolution becomes part of its weight and bias.

    batch_norm(conv(x, W, b)) in inference  ->  conv(x, s W, s (b - mean) + beta)

with s = gamma / sqrt(var + eps), computed in fp64. The convolution's result must feed the norm
alone, and all parameters be fp32 constants. Not before recipes quantize: convolutions whose weight
or output has one scale a tensor (kSQ) lose 6 points of accuracy (MambaVision digits, W4A4) if the
norm's factors of channels are in them. Left alone: norms that use a batch's own statistics, or
stand behind something else; parameters that would not be finite; what is written in place.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ouro_compiler.graph import (
    add_constant,
    all_arguments,
    aten,
    delete_unused_constants,
    get_constant,
    is_op,
    replace_node,
)
from ouro_compiler.passes.base import PassContext
from ouro_compiler.passes.editing import written_in_place

_CONVS = (aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding)


def fold_batch_norm(gm: fx.GraphModule, ctx: PassContext) -> bool:
    """Fold every such pair; returns whether there was one."""
    del ctx
    written = written_in_place(gm.graph)
    modified = False
    for norm in list(gm.graph.nodes):
        if not is_op(norm, aten.batch_norm.default) or len(norm.args[0].users) != 1:
            continue
        conv = norm.args[0]
        if not is_op(conv, *_CONVS) or any(
            one in written for one in (conv, *conv.all_input_nodes, *norm.all_input_nodes)
        ):
            continue
        folded = _folded(gm, conv, norm)
        if folded is None:
            continue
        x, weight, bias, *rest = all_arguments(conv)
        name = str((weight if bias is None else bias).target)
        name = f"{name.rpartition('.')[0]}.folded_bias" if bias is None else f"{name}_folded"
        with gm.graph.inserting_before(conv):
            made = [
                add_constant(gm, f"{weight.target}_folded", folded[0]),
                add_constant(gm, name.lstrip("."), folded[1]),
            ]
        conv.args, conv.kwargs = (x, *made, *rest), {}
        replace_node(norm, conv)
        modified = True
    if modified:
        gm.graph.eliminate_dead_code()
        delete_unused_constants(gm)
    return modified


def _folded(gm: fx.GraphModule, conv: fx.Node, norm: fx.Node) -> tuple[Tensor, Tensor] | None:
    """(weight, bias) of the convolution that does both; None where there is none."""
    _, gamma, beta, mean, variance, training, _, eps, _ = all_arguments(norm)
    nodes = (*all_arguments(conv)[1:3], gamma, beta, mean, variance)
    values = [None if one is None else get_constant(gm, one) for one in nodes]
    unknown = any(one is not None and v is None for one, v in zip(nodes, values, strict=True))
    known = [one for one in values if one is not None]
    if training or unknown or mean is None or variance is None:
        return None
    if any(one.dtype != torch.float32 for one in known):
        return None
    weight, bias, gamma, beta, mean, variance = (
        None if one is None else one.detach().double() for one in values
    )
    assert weight is not None and mean is not None and variance is not None  # noqa: PT018
    scale = torch.rsqrt(variance + eps) * (1 if gamma is None else gamma)
    total = scale * ((0 if bias is None else bias) - mean) + (0 if beta is None else beta)
    made = ((weight * scale.view(-1, *[1] * (weight.dim() - 1))).float(), total.float())
    return made if all(bool(one.isfinite().all()) for one in made) else None
