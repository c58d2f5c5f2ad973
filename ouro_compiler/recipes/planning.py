"""Planning: the walk over a graph that recipes share, and what it says of each layer.

A recipe gives a function for linears, one for scans and one for convolutions; each returns the
layer's row of the report and the sites to calibrate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import fx

from ouro_compiler.config import QuantConfig
from ouro_compiler.graph import (
    HEAD_BITS,
    RECURRENCE,
    Site,
    all_arguments,
    aten,
    get_constant,
    is_op,
    value_of,
)
from ouro_compiler.report import LayerKind, LayerRow

SCAN = torch.ops.ouro.selective_scan.default
CONVOLUTIONS = (
    torch.ops.ouro.causal_conv1d.default,
    torch.ops.ouro.depthwise_conv.default,
    aten.conv1d.default,
    aten.conv2d.default,
    aten.convolution.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
)
# Ops that move values without mixing time steps: a direction is carried through them.
_CARRIERS = (
    aten.transpose.int,
    aten.permute.default,
    aten.reshape.default,
    aten.view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.contiguous.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.linear.default,
    aten.add.Tensor,
    aten.softplus.default,
)


@dataclass(kw_only=True)
class Plan:
    """What a recipe chose: sites to calibrate, and a row for every linear, conv and scan.

    nodes: the node behind each row, by the row's name. notes: what normalising passes had to say.
    """

    sites: list[Site] = field(default_factory=list)
    rows: list[LayerRow] = field(default_factory=list)
    nodes: dict[str, fx.Node] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer as a recipe's functions get it. reverse: its time runs from the last token."""

    gm: fx.GraphModule
    node: fx.Node
    name: str
    kind: LayerKind
    config: QuantConfig
    reverse: bool = False

    def skipped(self, reason: str) -> LayerRow:
        """The row of a layer that the recipe leaves alone."""
        return LayerRow(
            name=self.name, kind=self.kind, status="skipped", selected=False, reason=reason
        )

    def selected(self, refusal: str | None, *, simulated: str | None = None) -> LayerRow:
        """The row of a layer that the recipe wants: skipped for a refusal, else at its bits.

        simulated: how it computes in floating point; None: it runs on integer codes.
        """
        if not self.config.selects(self.name):
            return self.skipped("excluded by the configuration")
        if refusal is not None:
            return dataclasses.replace(self.skipped(refusal), selected=True)
        return LayerRow(
            name=self.name,
            kind=self.kind,
            status="quantized" if simulated is None else "simulated",
            selected=True,
            reason=simulated,
            weight_bits=self.config.weights.bits,
            activation_bits=self.config.activations.inlier_bits,
        )


Chosen = tuple[LayerRow, list[Site]]
Choice = Callable[[Layer], Chosen]


def plan_graph(
    gm: fx.GraphModule,
    config: QuantConfig,
    *,
    linear: Choice,
    scan: Choice,
    convolution: Choice,
    shared: bool = True,
) -> Plan:
    """Ask the recipe's functions about every layer of a normalised graph, in graph order.

    shared: consumers of one activation, at the same bits, share one quantizer, under the first
    one's name.
    """
    found = Plan()
    reversed_linears = _linears_of_reversed_scans(gm)
    sources: dict[tuple[fx.Node, bool, bool, int], str] = {}
    for node in gm.graph.nodes:
        if is_op(node, aten.linear.default):
            choose, layer = linear, _linear(gm, node, config, node in reversed_linears)
        elif is_op(node, SCAN):
            choose, layer = scan, _scan(gm, node, config)
        elif is_op(node, *CONVOLUTIONS):
            name = layer_name(node.args[1], node)
            choose = convolution
            layer = Layer(gm=gm, node=node, name=name, kind="conv", config=config)
        else:
            continue
        name = _unique(layer.name, found.nodes)
        layer = dataclasses.replace(layer, name=name, config=config.for_layer(name))
        row, sites = choose(layer)
        found.rows.append(row)
        found.nodes[row.name] = node
        for site in sites:
            name = f"{row.name}.{site.name}"
            if shared and site.index not in RECURRENCE:
                name = sources.setdefault((*_tokens_of(site), site.reverse, site.bits), name)
            found.sites.append(dataclasses.replace(site, name=name, layer=row.name))
    return found


def _tokens_of(site: Site) -> tuple[fx.Node, bool]:
    """What a site's tokens (B, L, K) are: a node, and whether it is transposed to them."""
    node, turned = site.source, site.transpose
    while is_op(node, aten.transpose.int) and value_of(node).dim() == 3:
        if {int(dim) % 3 for dim in node.args[1:3]} != {1, 2}:  # type: ignore[arg-type]
            break
        node, turned = node.args[0], not turned  # type: ignore[assignment]
    return node, turned


def _linear(gm: fx.GraphModule, node: fx.Node, config: QuantConfig, reverse: bool) -> Layer:
    name = layer_name(node.args[1], node)
    return Layer(gm=gm, node=node, name=name, kind="linear", config=config, reverse=reverse)


def _scan(gm: fx.GraphModule, node: fx.Node, config: QuantConfig) -> Layer:
    arguments = all_arguments(node)
    reverse = bool(arguments[9])
    owner = str(arguments[2].target).rpartition(".")[0] if arguments[2].op == "get_attr" else ""
    name = f"{owner}.selective_scan".lstrip(".") + ("_reverse" if reverse else "")
    return Layer(gm=gm, node=node, name=name, kind="scan", config=config, reverse=reverse)


def linear_refusal(layer: Layer) -> str | None:
    """Why a linear of a token sequence cannot be quantized along time; None if it can."""
    x = value_of(layer.node.args[0])  # type: ignore[arg-type]
    if get_constant(layer.gm, layer.node.args[1]) is None:
        return "its weight is computed at run time"
    if not isinstance(x.shape[1], int):
        return "its number of tokens is dynamic: scales per time step need a fixed length"
    if not x.dtype.is_floating_point:
        return f"its input is {x.dtype}"
    return None


def skip_head(layer: Layer) -> Chosen | None:
    """The row of a linear that reads no tokens, a classifier's head; None for others.

    With `head_bits` its weight is quantized, if it is a constant.
    """
    if is_token_linear(layer):
        return None
    bits = layer.config.head_bits
    if bits is None or get_constant(layer.gm, layer.node.args[1]) is None:
        reason = "its input is no token sequence (B, L, K): the recipe leaves heads alone"
        return layer.skipped(reason), []
    row = layer.selected(None, simulated="a head: its weight is quantized, its input is not")
    if row.status == "skipped":
        return row, []
    layer.node.meta.update({HEAD_BITS: bits, "ouro_layer": layer.name})
    return dataclasses.replace(row, weight_bits=bits, activation_bits=None), []


def is_token_linear(layer: Layer) -> bool:
    """Is a linear's input a token sequence (B, L, K)? Heads read (B, K)."""
    return int(value_of(layer.node.args[0]).dim()) == 3  # type: ignore[arg-type]


def scan_refusal(layer: Layer) -> str | None:
    """Why a scan's operands cannot be quantized; None if they can."""
    gm, arguments = layer.gm, all_arguments(layer.node)
    A = get_constant(gm, arguments[2])
    if A is None:
        return "its A is computed at run time"
    if not bool((A < 0).all()):
        return "its A has entries that are not negative"
    if arguments[5] is not None and get_constant(gm, arguments[5]) is None:
        return "its D is computed at run time"
    if not isinstance(value_of(layer.node).shape[2], int):
        return "its number of tokens is dynamic: scales per time step need a fixed length"
    return None


def reads_scan(linear: fx.Node) -> bool:
    """Does a linear read what a scan gives, with no other linear, scan or convolution between?"""
    seen: set[fx.Node] = set()
    waiting = [linear.args[0]]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        if is_op(node, SCAN):
            return True
        if not is_op(node, aten.linear.default, *CONVOLUTIONS):
            waiting += node.all_input_nodes
    return False


def skip_convolution(layer: Layer) -> Chosen:
    """Patch embeddings and convolutions stay in floating point."""
    reason = "the recipe keeps patch embedding and convolutions in floating point"
    if not layer.config.selects(layer.name):
        reason = "excluded by the configuration"
    return layer.skipped(reason), []


def layer_name(weight: object, node: fx.Node) -> str:
    """`layers.0.mixer.in_proj` for `layers.0.mixer.in_proj.weight` (or `weight_folded`, ...).

    Part k of a stacked `op.x_proj_weight` is `op.x_proj_k`; never the name of the parameter itself,
    since what a layer is given at compilation lives under its name: `w` is `w_layer`.
    """
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return node.name
    path, _, leaf = str(weight.target).rpartition(".")
    if path and leaf.startswith("weight"):
        return path
    stem = leaf.removesuffix("_folded").replace("_weight", "")
    return f"{path}.{stem}".lstrip(".") + ("_layer" if stem == leaf else "")


def _unique(name: str, taken: dict[str, fx.Node]) -> str:
    number, free = 1, name
    while free in taken:
        free = f"{name}_{number}"
        number += 1
    return free


def _linears_of_reversed_scans(gm: fx.GraphModule) -> set[fx.Node]:
    """Linears whose result becomes delta, B or C of reversed scans: their time runs backwards."""
    found: set[fx.Node] = set()
    for scan in gm.graph.nodes:
        if is_op(scan, SCAN):
            arguments = all_arguments(scan)
            if arguments[9]:
                for operand in (arguments[1], arguments[3], arguments[4]):
                    found.update(_linears_behind(operand))
    return found


def _linears_behind(node: object) -> Iterator[fx.Node]:
    while isinstance(node, fx.Node) and node.op == "call_function":
        is_getitem = not isinstance(node.target, torch._ops.OpOverload)
        if not is_getitem and not is_op(node, *_CARRIERS):
            return
        if is_op(node, aten.linear.default):
            yield node
        node = node.args[0]
