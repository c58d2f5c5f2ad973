"""raise_causal_conv1d: a depthwise conv1d that looks back only becomes `ouro.causal_conv1d`.

1. conv1d padded by W - 1 on both sides, all of whose users keep its first L positions, L being the
   input's length: each slice becomes the op;
2. conv1d without padding of an input padded with W - 1 zeros on the left: the conv becomes the op;
3. a silu that is the only user of such a result is done by the op.

The weight (D, 1, W) must be a parameter; the new one, (D, W), is called `<name>_folded`, as
fold_constants would call it. Left alone: anything but stride 1, dilation 1 and one input and
output channel a group; kernel size 1; symmetric padding ("same"), which looks ahead; lengths not
provably equal; results of which more than the first L positions are read; written in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

import ouro_compiler.ops  # noqa: F401  (registers torch.ops.ouro)
from ouro_compiler.graph import (
    all_arguments,
    argument,
    aten,
    delete_unused_constants,
    insert_call,
    is_op,
    replace_node,
    value_of,
)
from ouro_compiler.passes.base import PassContext
from ouro_compiler.passes.editing import new_constant, written_in_place
from ouro_compiler.passes.views import evaluate_constant, same_size

_CONVS = (aten.conv1d.default, aten.conv1d.padding)
_PADS = (aten.pad.default, aten.constant_pad_nd.default)


def raise_causal_conv1d(gm: fx.GraphModule, ctx: PassContext) -> bool:
    """Apply the rules of the module docstring; returns whether any did."""
    del ctx
    written = written_in_place(gm.graph)
    modified = False
    for node in list(gm.graph.nodes):
        if not is_op(node, *_CONVS) or any(n in written for n in (node, *node.all_input_nodes)):
            continue
        constant = evaluate_constant(gm, node.args[1])
        if constant is None or not _is_depthwise(node, constant[1]):
            continue
        width = constant[1].shape[2]
        x, results = _padded_both_sides(node, width) or _padded_left(node, width) or (None, [])
        if x is None or x in written:
            continue
        taps = new_constant(gm, node, _folded_name(constant[0]), constant[1].squeeze(1))
        for result in results:
            _raise_one(node, x, taps, result)
        modified = True
    if modified:
        gm.graph.eliminate_dead_code()
        delete_unused_constants(gm)
    return modified


def _is_depthwise(node: fx.Node, weight: Tensor) -> bool:
    x, _, _, stride, _, dilation, groups = all_arguments(node)
    value = value_of(x)
    return (
        value.dim() == 3
        and weight.dim() == 3
        and weight.shape[1] == 1
        and weight.shape[2] > 1
        and groups == weight.shape[0]
        and same_size(value.shape[1], groups)
        and all(one == 1 for one in (*stride, *dilation))
    )


def _padded_both_sides(node: fx.Node, width: int) -> tuple[fx.Node, list[fx.Node]] | None:
    """(input, slices that keep the causal part), if nothing else reads the result."""
    x, _, _, _, padding, _, _ = all_arguments(node)
    if isinstance(padding, str) or list(padding) != [width - 1]:
        return None
    length = value_of(x).shape[2]
    slices = list(node.users)
    kept = all(_keeps_first(one, length) for one in slices)
    return (x, slices) if kept and slices else None


def _keeps_first(node: fx.Node, length: int | torch.SymInt) -> bool:
    if not is_op(node, aten.slice.Tensor):
        return False
    return (
        argument(node, "dim") in (2, -1)
        and argument(node, "start") in (None, 0)
        and argument(node, "step") == 1
        and same_size(value_of(node).shape[2], length)
    )


def _padded_left(node: fx.Node, width: int) -> tuple[fx.Node, list[fx.Node]] | None:
    """(input before its padding, the conv itself)."""
    padded, _, _, _, padding, _, _ = all_arguments(node)
    if padding != "valid" and (isinstance(padding, str) or any(padding)):
        return None
    if not is_op(padded, *_PADS) or value_of(padded.args[0]).dim() != 3:
        return None
    sides: Sequence[int] = argument(padded, "pad")
    zeros = argument(padded, "value") in (None, 0)
    constant = not is_op(padded, aten.pad.default) or argument(padded, "mode") == "constant"
    left_only = list(sides[:2]) == [width - 1, 0] and not any(sides[2:])
    return (padded.args[0], [node]) if zeros and constant and left_only else None


def _raise_one(conv: fx.Node, x: fx.Node, taps: fx.Node, result: fx.Node) -> None:
    """Replace `result`, and the silu after it if that is all that reads it, by the op."""
    users = list(result.users)
    silu = len(users) == 1 and is_op(users[0], aten.silu.default)
    last = users[0] if silu else result
    bias = argument(conv, "bias")
    op = torch.ops.ouro.causal_conv1d.default
    replace_node(last, insert_call(conv.graph, last, op, x, taps, bias, silu, False))


def _folded_name(base: fx.Node) -> str:
    return str(base.target).removesuffix("_folded") + "_folded"
