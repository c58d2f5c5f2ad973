"""raise_depthwise_conv: a depthwise convolution that keeps its size becomes `ouro.depthwise_conv`.

conv1d and conv2d of one input and output channel a group, with padding "same", or (k - 1) / 2 on
both sides of odd filters. The tokens of the result lie next to each other in memory, so that the
flattens and transposes behind it are views. The weight, a parameter or computed, stays as it is.

Left alone: strides and dilations; other padding; one channel; filters of one tap; inputs without a
batch; what is not floating point; results that are written in place.

A SiLU behind it stays a node of its own, which recipes may quantize around: `fuse_conv_silu`.
"""

from __future__ import annotations

import math

import torch
from torch import fx

import ouro_compiler.ops  # noqa: F401  (registers torch.ops.ouro)
from ouro_compiler.graph import all_arguments, aten, insert_call, is_op, replace_node, value_of
from ouro_compiler.passes.base import PassContext
from ouro_compiler.passes.editing import written_in_place
from ouro_compiler.passes.views import same_size

_RANKS = {
    aten.conv1d.default: 3,
    aten.conv1d.padding: 3,
    aten.conv2d.default: 4,
    aten.conv2d.padding: 4,
}


def raise_depthwise_conv(gm: fx.GraphModule, ctx: PassContext) -> bool:
    """Apply the rule of the module docstring; returns whether it applied anywhere."""
    del ctx
    written = written_in_place(gm.graph)
    modified = False
    for node in list(gm.graph.nodes):
        if is_op(node, *_RANKS) and node not in written and _keeps_size(node):
            x, weight, bias, *_ = all_arguments(node)
            op = torch.ops.ouro.depthwise_conv.default
            replace_node(node, insert_call(gm.graph, node, op, x, weight, bias, False))
            modified = True
    return modified


def _keeps_size(node: fx.Node) -> bool:
    x, weight, _, stride, padding, dilation, groups = all_arguments(node)
    value, taps = value_of(x), value_of(weight).shape[2:]
    depthwise = (
        value.dim() == _RANKS[node.target]  # type: ignore[index]
        and value.dtype.is_floating_point
        and groups > 1
        and tuple(value_of(weight).shape[:2]) == (groups, 1)
        and same_size(value.shape[1], groups)
    )
    if not depthwise or math.prod(taps) == 1 or any(one != 1 for one in (*stride, *dilation)):
        return False
    if isinstance(padding, str):
        return bool(padding == "same")
    sides = padding if len(padding) == len(taps) else [*padding] * len(taps)
    return all(2 * side + 1 == size for side, size in zip(sides, taps, strict=True))
