"""Where a node belongs in the model: its block ("layers.0") and, for layers, its layer's name.

Re-exporting a graph drops what passes wrote into `node.meta`, but not the names of the constants,
so places are read off those names.
"""

from __future__ import annotations

import re

import torch
from torch import fx

from ouro_compiler.graph import argument

# The operand whose name names the layer, by op.
_NAMING_OPERAND = {
    "aten.linear": "weight",
    "aten.conv1d": "weight",
    "aten.conv1d.padding": "weight",
    "aten.conv2d": "weight",
    "aten.conv2d.padding": "weight",
    "aten.convolution": "weight",
    "ouro.causal_conv1d": "weight",
    "ouro.causal_conv1d_quantize": "weight",
    "ouro.depthwise_conv": "weight",
    "ouro.linear_dynamic_outlier": "qweight",
    "ouro.quantized_selective_scan": "A",
    "ouro.selective_scan": "A",
    "ouro.selective_scan_dynamic_outlier": "A",
}
# Literals that export lifted out of the code: they say nothing about the place of their reader.
_LITERAL = re.compile(r"_?(lifted_)?(tensor_constant|tensor|constant)_?\d+\w*")


def op_name(node: fx.Node) -> str:
    """`aten.add.Tensor`, `ouro.add_norm`, `getitem`; for nodes that are no calls their kind."""
    if node.op != "call_function":
        return node.op
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    return str(getattr(target, "__name__", target))


def block_names(gm: fx.GraphModule) -> dict[str, str | None]:
    """The block of every call, by node name; None outside blocks.

    A block is a constant's name up to its first number. A node that reads constants belongs to
    the latest block among theirs, and to none if none of them has one (final norm, head);
    any other node to the latest block among its inputs. So a residual add, a view or an activation
    stays with the layer before it.
    """
    constants = constants_behind(gm)
    found: dict[str, str | None] = {}
    order: dict[str, int] = {}

    def latest(blocks: list[str | None]) -> str | None:
        named = [one for one in blocks if one is not None]
        return max(named, key=lambda one: order.setdefault(one, len(order)), default=None)

    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        if node in constants:
            # Not ranked: casts of all parameters may stand in front of everything.
            found[node.name] = next(filter(None, map(block_of, constants[node])), None)
            continue
        read = [name for one in node.all_input_nodes for name in constants.get(one, ())]
        owners = [block_of(name) for name in read if not _LITERAL.fullmatch(name)]
        found[node.name] = latest(owners or [found.get(one.name) for one in node.all_input_nodes])
    return found


def layer_names(gm: fx.GraphModule) -> dict[str, str]:
    """The layer that a linear, convolution or scan is, by node name, as the report calls it."""
    constants = constants_behind(gm)
    found: dict[str, str] = {}
    for node in gm.graph.nodes:
        operand = _NAMING_OPERAND.get(op_name(node))
        if operand is None:
            continue
        written = node.meta.get("ouro_layer")
        names = constants.get(argument(node, operand), ())
        if written is not None:
            found[node.name] = str(written)
        elif names:
            owner = names[0].rpartition(".")[0]
            if "selective_scan" in op_name(node):
                owner = _scan_name(node, owner)
            found[node.name] = owner
    return found


def _scan_name(scan: fx.Node, owner: str) -> str:
    """A quantized A is stored below the scan's own name, any other beside it."""
    if owner.endswith(".A"):
        return owner.removesuffix(".A")
    name = f"{owner}.selective_scan".lstrip(".")
    return f"{name}_reverse" if argument(scan, "reverse") else name


def block_of(constant: str) -> str | None:
    """`layers.0` for `layers.0.mixer.D`; None for a name without a number between dots."""
    parts = constant.split(".")
    for index, part in enumerate(parts[:-1]):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    return None


def constants_behind(gm: fx.GraphModule) -> dict[fx.Node, tuple[str, ...]]:
    """The names of constants behind every node that depends on constants alone (casts, -exp(.))."""
    found: dict[fx.Node, tuple[str, ...]] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            found[node] = (str(node.target),)
        elif node.op == "call_function":
            inputs = node.all_input_nodes
            if inputs and all(one in found for one in inputs):
                names = [name for one in inputs for name in found[one]]
                found[node] = tuple(dict.fromkeys(names))
    return found
