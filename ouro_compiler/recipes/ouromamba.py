"""OuroMamba-Quant (arXiv 2503.10959; METHODS 2.2, 3): dynamic outliers.

Selected are the linears inside blocks (input (B, L, K), constant weight) and, with `ssm` = params,
the scans' operands: A and D (weight bits), B and C (activation bits, no outliers), delta before
softplus (asymmetric). Patch embedding, convolutions, norms and the classifier head stay in floating
point, as in the published code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import fx

from ouro_compiler.config import QuantConfig
from ouro_compiler.graph import (
    Site,
    all_arguments,
    aten,
    get_constant,
    is_op,
    value_of,
)
from ouro_compiler.report import LayerRow

SCAN = torch.ops.ouro.selective_scan.default
CONVOLUTIONS = (
    torch.ops.ouro.causal_conv1d.default,
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


def plan(gm: fx.GraphModule, config: QuantConfig) -> Plan:
    """The sites and layers of a normalised graph, in graph order."""
    found = Plan()
    reversed_linears = _linears_of_reversed_scans(gm)
    sources: dict[tuple[fx.Node, bool], str] = {}
    for node in gm.graph.nodes:
        if is_op(node, aten.linear.default):
            row, sites = _plan_linear(gm, node, config, node in reversed_linears)
        elif is_op(node, SCAN):
            row, sites = _plan_scan(gm, node, config)
        elif is_op(node, *CONVOLUTIONS):
            row, sites = _plan_convolution(gm, node, config), []
        else:
            continue
        row.name = _unique(row.name, found.nodes)
        found.rows.append(row)
        found.nodes[row.name] = node
        for site in sites:
            # Consumers of one activation share one quantizer, under the first one's name.
            name = sources.setdefault((site.source, site.reverse), f"{row.name}.{site.name}")
            found.sites.append(_renamed(site, name, row.name))
    return found


def _plan_linear(
    gm: fx.GraphModule, node: fx.Node, config: QuantConfig, reverse: bool
) -> tuple[LayerRow, list[Site]]:
    weight = get_constant(gm, node.args[1])
    name = _layer_name(node.args[1], node)
    row = LayerRow(name=name, kind="linear", status="skipped", selected=False)
    x = value_of(node.args[0])  # type: ignore[arg-type]
    if x.dim() != 3:
        row.reason = "its input is no token sequence (B, L, K): the recipe leaves heads alone"
    elif not config.selects(name):
        row.reason = "excluded by the configuration"
    else:
        row.selected = True
        row.reason = _refusal(x, weight)
    if not row.selected or row.reason is not None:
        return row, []
    row.status = "quantized"
    row.weight_bits, row.activation_bits = config.weights.bits, config.activations.inlier_bits
    site = Site(
        name="input",
        node=node,
        index=0,
        bits=config.activations.inlier_bits,
        kind="linear",
        layer=name,
        reverse=reverse,
        kappa=config.activations.kappa,
    )
    return row, [site]


def _refusal(x: torch.Tensor, weight: torch.Tensor | None) -> str | None:
    if weight is None:
        return "its weight is computed at run time"
    if not isinstance(x.shape[1], int):
        return "its number of tokens is dynamic: scales per time step need a fixed length"
    if not x.dtype.is_floating_point:
        return f"its input is {x.dtype}"
    return None


def _plan_scan(
    gm: fx.GraphModule, node: fx.Node, config: QuantConfig
) -> tuple[LayerRow, list[Site]]:
    arguments = all_arguments(node)
    reverse = bool(arguments[9])
    owner = str(arguments[2].target).rpartition(".")[0] if arguments[2].op == "get_attr" else ""
    name = f"{owner}.selective_scan".lstrip(".") + ("_reverse" if reverse else "")
    row = LayerRow(name=name, kind="scan", status="skipped", selected=False)
    if config.ssm == "none":
        row.reason = "SSM operands stay in floating point (ssm = none)"
    elif not config.selects(name):
        row.reason = "excluded by the configuration"
    else:
        row.selected = True
        row.reason = _scan_refusal(gm, node, arguments)
    if not row.selected or row.reason is not None:
        return row, []
    row.status = "simulated"
    row.reason = "SSM operands are quantized and dequantized around a floating-point scan"
    spec = config.activations
    row.weight_bits, row.activation_bits = config.weights.bits, spec.inlier_bits
    sites = [
        Site(
            name=operand,
            node=node,
            index=index,
            bits=spec.inlier_bits,
            kind="ssm",
            layer=name,
            transpose=True,
            reverse=reverse,
            asymmetric=operand == "delta",
            split=operand == "delta",
            kappa=spec.kappa_delta,
        )
        for index, operand in ((1, "delta"), (3, "B"), (4, "C"))
    ]
    return row, sites


def _scan_refusal(gm: fx.GraphModule, node: fx.Node, arguments: list[object]) -> str | None:
    A = get_constant(gm, arguments[2])
    if A is None:
        return "its A is computed at run time"
    if not bool((A < 0).all()):
        return "its A has entries that are not negative"
    if arguments[5] is not None and get_constant(gm, arguments[5]) is None:
        return "its D is computed at run time"
    if not isinstance(value_of(node).shape[2], int):
        return "its number of tokens is dynamic: scales per time step need a fixed length"
    return None


def _plan_convolution(gm: fx.GraphModule, node: fx.Node, config: QuantConfig) -> LayerRow:
    name = _layer_name(node.args[1], node)
    reason = "the recipe keeps patch embedding and convolutions in floating point"
    if not config.selects(name):
        reason = "excluded by the configuration"
    return LayerRow(name=name, kind="conv", status="skipped", selected=False, reason=reason)


def _layer_name(weight: object, node: fx.Node) -> str:
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


def _renamed(site: Site, name: str, layer: str) -> Site:
    values = {key: getattr(site, key) for key in site.__dataclass_fields__}
    return Site(**{**values, "name": name, "layer": layer})


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
