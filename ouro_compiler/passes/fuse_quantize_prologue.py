"""fuse_quantize_prologue: what makes an activation also quantizes it.

    add_norm(...)[0] -> quantize                                  add_norm_quantize
    causal_conv1d -> transpose -> quantize                        causal_conv1d_quantize
    scan(z) [+ scan(z)] [* number] -> transpose -> quantize       gate_sum_quantize

A norm may be of a map (B, H, W, K) whose tokens are quantized: it becomes one of tokens. The third
takes the gate out of the scans, which then read no z. Values that something else reads are emitted
beside the codes. Left alone: asymmetric quantizers and static outliers; a convolution whose
direction is not its quantizer's; scans with different gates, or whose sum is read elsewhere;
division by anything but a power of two (its reciprocal is inexact).
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ouro_compiler.graph import all_arguments, argument, aten, insert_call, is_op, value_of
from ouro_compiler.passes.base import PassContext
from ouro_compiler.passes.editing import call
from ouro_compiler.passes.views import same_size

_OURO = torch.ops.ouro
_QUANTIZE = _OURO.quantize_dynamic_outlier.default
_SCAN = _OURO.selective_scan.default


def fuse_quantize_prologue(gm: fx.GraphModule, ctx: PassContext) -> bool:
    """Fuse every match of the module docstring's patterns."""
    del ctx
    modified = False
    for node in list(gm.graph.nodes):
        if is_op(node, _QUANTIZE) and argument(node, "zero_point") is None:
            modified |= _fuse_norm(node) or _fuse_conv(node) or _fuse_gate_sum(node)
    if modified:
        gm.graph.eliminate_dead_code()
    return modified


@dataclass(frozen=True)
class _Quantizer:
    """A quantize node's operands."""

    node: fx.Node
    x: fx.Node
    scale: fx.Node
    threshold: fx.Node
    static: tuple[Any, ...]  # inlier_bits, outlier_bits, refresh_period, reverse

    @staticmethod
    def of(node: fx.Node) -> _Quantizer:
        x, scale, _, threshold, *static = all_arguments(node)
        return _Quantizer(node, x, scale, threshold, tuple(static))

    @property
    def read_elsewhere(self) -> bool:
        """Does anything but the quantizer read its input?"""
        return len(self.x.users) > 1

    def constants_before(self, anchor: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Scale and threshold, moved up where they stand behind `anchor`."""
        for constant in (self.scale, self.threshold):
            if anchor < constant:
                anchor.prepend(constant)
        return self.scale, self.threshold


def _fuse_norm(quantize: fx.Node) -> bool:
    found = _Quantizer.of(quantize)
    x, sides = _map_of(found.x)
    if not (is_op(x, operator.getitem) and x.args[1] == 0):
        return False
    norm = x.args[0]
    if not is_op(norm, _OURO.add_norm.default):
        return False
    assert isinstance(norm, fx.Node)
    if value_of(norm)[0].dim() != (4 if sides else 3):
        return False
    operands = all_arguments(norm)
    if sides:
        operands[:2] = [
            None if one is None else call(norm, aten.flatten.using_ints, one, 1, 2)
            for one in operands[:2]
        ]
    fused = insert_call(
        quantize.graph,
        norm,
        _OURO.add_norm_quantize.default,
        *operands,
        *found.constants_before(norm),
        *found.static,
        found.read_elsewhere or len(x.users) > 1,
    )
    _take_codes(quantize, fused)
    for item in list(norm.users):
        _replace_item(item, fused, 3 + int(item.args[1]), sides)  # type: ignore[arg-type]
    return True


def _map_of(x: fx.Node) -> tuple[fx.Node, tuple[int, int] | None]:
    """The map (B, H, W, K) whose tokens in a row x is, and (H, W); x and None for any other x."""
    if not is_op(x, aten.flatten.using_ints, aten.reshape.default):
        return x, None
    source = x.args[0]
    assert isinstance(source, fx.Node)
    shape, sizes = value_of(x).shape, value_of(source).shape
    if len(sizes) != 4 or len(shape) != 3:
        return x, None
    batch, height, width, channels = sizes
    if not isinstance(height, int) or not isinstance(width, int):
        return x, None
    same = (batch, height * width, channels)
    return (source, (height, width)) if all(map(same_size, shape, same)) else (x, None)


def _fuse_conv(quantize: fx.Node) -> bool:
    found = _Quantizer.of(quantize)
    conv, transposed = _through_transposes(found.x)
    if not transposed or not is_op(conv, _OURO.causal_conv1d.default):
        return False
    x, weight, bias, silu, reverse = all_arguments(conv)
    if bool(reverse) != bool(found.static[3]):
        return False
    fused = insert_call(
        quantize.graph,
        conv,
        _OURO.causal_conv1d_quantize.default,
        *(x, weight, bias, silu),
        *found.constants_before(conv),
        *found.static,
    )
    _take_codes(quantize, fused)
    conv.replace_all_uses_with(insert_call(quantize.graph, conv, operator.getitem, fused, 3))
    return True


def _fuse_gate_sum(quantize: fx.Node) -> bool:
    found = _Quantizer.of(quantize)
    match = _match_gate_sum(found.x)
    if match is None:
        return False
    scans, z, factor = match
    for scan in scans:
        arguments = all_arguments(scan)
        arguments[6] = None
        scan.args, scan.kwargs = tuple(arguments), {}
    constants = found.constants_before(found.x)
    # Whatever reads the value stands behind the node that makes it: so does the fused op.
    fused = insert_call(
        quantize.graph,
        found.x.next,
        _OURO.gate_sum_quantize.default,
        scans[0],
        scans[1] if len(scans) > 1 else None,
        z,
        factor,
        *constants,
        *found.static,
        found.read_elsewhere,
    )
    _take_codes(quantize, fused)
    if found.x.users:
        value = insert_call(quantize.graph, fused.next, operator.getitem, fused, 3)
        found.x.replace_all_uses_with(value)
    return True


def _match_gate_sum(x: fx.Node) -> tuple[list[fx.Node], fx.Node | None, float] | None:
    """(scans, gate, factor) of an activation (B, L, K) that is a scaled sum of gated scans."""
    node, transposed = _through_transposes(x)
    if node is not x and len(node.users) > 1:
        return None
    factor = 1.0
    number = _scalar_factor(node)
    if number is not None:
        factor = number
        inner = node.args[0]
        assert isinstance(inner, fx.Node)
        node, again = _through_transposes(inner)
        transposed ^= again
        if len(inner.users) > 1 or len(node.users) > 1:
            return None
    operands: list[Any] = [node]
    if is_op(node, aten.add.Tensor) and not node.kwargs:
        operands = list(node.args)
    scans = []
    for operand in operands:
        if not isinstance(operand, fx.Node):
            return None
        scan, again = _through_transposes(operand)
        read_once = len(operand.users) == 1 and len(scan.users) == 1
        if not is_op(scan, _SCAN) or not read_once or not transposed ^ again:
            return None
        scans.append(scan)
    gates = {argument(scan, "z") for scan in scans}
    if len(gates) > 1 or (len(scans) == 1 and gates == {None}) or len(set(scans)) < len(scans):
        return None
    return scans, gates.pop(), factor


def _scalar_factor(node: fx.Node) -> float | None:
    """f where the node is y * f, or y / n with an exact reciprocal f."""
    if not is_op(node, aten.mul.Tensor, aten.div.Tensor) or node.kwargs:
        return None
    number = node.args[1]
    if not isinstance(number, (int, float)) or not math.isfinite(number):
        return None
    if is_op(node, aten.mul.Tensor):
        return float(number)
    return 1 / number if number and math.frexp(number)[0] in (0.5, -0.5) else None


def _through_transposes(node: fx.Node) -> tuple[fx.Node, bool]:
    """The node under transposes of the last two of three dimensions; was their number odd?"""
    odd = False
    while is_op(node, aten.transpose.int) and value_of(node).dim() == 3:
        if {int(dim) % 3 for dim in node.args[1:3]} != {1, 2}:  # type: ignore[arg-type]
            break
        node = node.args[0]  # type: ignore[assignment]
        odd = not odd
    return node, odd


def _take_codes(quantize: fx.Node, fused: fx.Node) -> None:
    """Let the fused op's first outputs take the quantizer's uses."""
    fused.meta.update({key: quantize.meta[key] for key in quantize.meta if key != "val"})
    for item in list(quantize.users):
        _replace_item(item, fused, int(item.args[1]))  # type: ignore[arg-type]
    quantize.graph.erase_node(quantize)


def _replace_item(
    item: fx.Node, fused: fx.Node, index: int, sides: tuple[int, int] | None = None
) -> None:
    """Replace a getitem by another one of the fused op, right behind it; a map where it was one."""
    new = insert_call(item.graph, fused.next, operator.getitem, fused, index)
    if sides is not None:
        new = insert_call(item.graph, new.next, aten.unflatten.int, new, 1, sides)
    item.replace_all_uses_with(new)
    item.graph.erase_node(item)
