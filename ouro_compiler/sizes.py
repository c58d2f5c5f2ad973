"""Where a model's bytes are: every constant of a graph, by what reads it."""

from __future__ import annotations

import torch
from torch import fx

from ouro_compiler.graph import aten, get_constant, is_op, value_of
from ouro_compiler.ops import QUANTIZERS

LINEAR, HEAD, CONVOLUTION = "linear weights", "heads", "convolutions"
SSM, WEIGHT_SCALES = "SSM parameters", "weight scales"
ACTIVATION_SCALES, OTHER = "activation scales", "norms, embeddings, biases"
ROTATIONS = "rotations"

_OURO = torch.ops.ouro
_CONVOLUTIONS = (
    _OURO.causal_conv1d.default,
    _OURO.causal_conv1d_quantize.default,
    _OURO.depthwise_conv.default,
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
)
_BY_NAME = (".rotation", ".smooth")
# On the way from a constant to what reads it.
_TRANSPARENT = (
    aten.exp.default,
    aten.neg.default,
    aten.select.int,
    aten.to.dtype,
    aten.reshape.default,
)


def bytes_by_part(gm: fx.GraphModule, *, as_half: bool = False) -> dict[str, int]:
    """Bytes of the constants that a graph reads, by part; `as_half` counts 2 bytes an element."""
    found: dict[str, int] = {}
    seen: set[str] = set()
    for node in gm.graph.nodes:
        value = get_constant(gm, node)
        if value is None or str(node.target) in seen:
            continue
        seen.add(str(node.target))
        part = _part(node)
        size = 2 if as_half else value.element_size()
        found[part] = found.get(part, 0) + value.numel() * size
    return dict(sorted(found.items()))


def _part(constant: fx.Node) -> str:
    node, name = constant, str(constant.target)
    if name.endswith(_BY_NAME):
        return ROTATIONS if name.endswith(".rotation") else ACTIVATION_SCALES
    while True:
        user = next(iter(node.users), None)
        if user is None:
            return OTHER
        if is_op(user, *_TRANSPARENT):
            node = user
            continue
        return _part_by_reader(user, node)


def _part_by_reader(user: fx.Node, operand: fx.Node) -> str:
    if is_op(user, _OURO.fake_quantize.default):
        return ACTIVATION_SCALES
    index = next((i for i, arg in enumerate(user.args) if arg is operand), -1)
    if is_op(user, *QUANTIZERS, _OURO.dequantize_dynamic_outlier.default):
        names = [one.name for one in user.target._schema.arguments]  # type: ignore[union-attr]
        if names[index] in ("inlier_scale", "zero_point", "threshold", "channels"):
            return ACTIVATION_SCALES
    if is_op(user, _OURO.linear_dynamic_outlier.default):
        return {1: ACTIVATION_SCALES, 5: LINEAR, 6: WEIGHT_SCALES}.get(index, OTHER)
    if is_op(user, _OURO.dequantize_weight.default):
        return _part(user) if index == 0 else WEIGHT_SCALES
    if is_op(user, _OURO.selective_scan.default):
        return SSM if index in (2, 5) else OTHER
    if is_op(user, _OURO.selective_scan_dynamic_outlier.default):
        # Scales are parts of the lists that delta, B and C are.
        return SSM if index in (2, 5) else ACTIVATION_SCALES if index < 0 else OTHER
    if is_op(user, _OURO.quantized_selective_scan.default):
        return SSM if index in (2, 5) else ACTIVATION_SCALES if 7 <= index <= 12 else OTHER
    if is_op(user, aten.linear.default) and index == 1:
        rank = value_of(user.args[0]).dim()  # type: ignore[arg-type]
        return LINEAR if rank == 3 else HEAD
    if is_op(user, *_CONVOLUTIONS) and index == 1:
        return CONVOLUTION
    return OTHER
