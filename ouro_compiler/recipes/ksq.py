"""k-scaled quantization, kSQ-VMM (METHODS 8): outputs of layers, and reparameterized states.

What layers return is quantized, with codes [-2^(b-1), 2^(b-1) - 1]: linears, heads, norms and dense
convolutions with one step a tensor; depthwise convolutions, and the SiLU behind a convolution, with
one step a cluster of channels; the linear that reads a block's scans with one a cluster of tokens.
Weights of linears and convolutions have one step each; those of norms stay in floating point.

Scans, unless `ssm` = none: Delta after softplus and silu(z) by clusters of channels, the
reparameterized state with one step a time step, y before D u by clusters of tokens. The state is
rounded for the next step; y reads it unrounded. A convolution that carries its SiLU inside is
quantized once, behind it. Everything is simulated. Published for 8-bit weights and outputs.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import fx

from ouro_compiler.config import QuantConfig
from ouro_compiler.graph import (
    GATE,
    OUTPUT,
    READOUT,
    STATE,
    STEP,
    Site,
    all_arguments,
    argument,
    aten,
    get_constant,
    is_op,
)
from ouro_compiler.recipes.ksq_calibration import calibrate_sites as calibrate_sites
from ouro_compiler.recipes.planning import (
    CONVOLUTIONS,
    Chosen,
    Layer,
    Plan,
    is_token_linear,
    layer_name,
    linear_refusal,
    plan_graph,
    reads_scan,
    scan_refusal,
)

_DEPTHWISE = (torch.ops.ouro.causal_conv1d.default, torch.ops.ouro.depthwise_conv.default)
_ADD_NORM = torch.ops.ouro.add_norm.default
_LINEAR = "weight and output are quantized and dequantized around a floating-point product"
_CONVOLUTION = "weight and output are quantized and dequantized around a convolution"
_SCAN = "Delta, state, y and gate are quantized in and around a floating-point recurrence"

Scheme = Literal["tensor", "channel", "token"]


def plan(gm: fx.GraphModule, config: QuantConfig) -> Plan:
    """The sites and layers of a normalised graph, norms and SiLU after them."""
    found = plan_graph(
        gm, config, linear=_plan_linear, scan=_plan_scan, convolution=_plan_conv, shared=False
    )
    found.sites += [
        site
        for node in gm.graph.nodes
        for site in (_norm(node, config), _silu(node, config, found))
        if site is not None
    ]
    return found


def _plan_linear(layer: Layer) -> Chosen:
    tokens = is_token_linear(layer)
    refusal = linear_refusal(layer) if tokens else None
    if get_constant(layer.gm, layer.node.args[1]) is None:
        refusal = "its weight is computed at run time"
    row = layer.selected(refusal, simulated=_LINEAR)
    if row.status == "skipped":
        return row, []
    by_token = tokens and reads_scan(layer.node)
    return row, [_site(layer, "token" if by_token else "tensor")]


def _plan_conv(layer: Layer) -> Chosen:
    weight = get_constant(layer.gm, layer.node.args[1])
    refusal = None if weight is not None else "its weight is computed at run time"
    row = layer.selected(refusal, simulated=_CONVOLUTION)
    if row.status == "skipped":
        return row, []
    scheme: Scheme = "channel" if _is_depthwise(layer.node) else "tensor"
    return row, [_site(layer, scheme)]


def _plan_scan(layer: Layer) -> Chosen:
    if layer.config.ssm == "none":
        return layer.skipped("scans stay in floating point (ssm = none)"), []
    row = layer.selected(scan_refusal(layer), simulated=_SCAN)
    if row.status == "skipped":
        return row, []
    row.weight_bits = None
    around = [("step", STEP), ("state", STATE), ("readout", READOUT), ("gate", GATE)]
    gated = all_arguments(layer.node)[6] is not None
    found = _site(layer, "tensor")
    return row, [
        dataclasses.replace(found, name=name, index=index, kind="ssm", asymmetric=index != STATE)
        for name, index in around
        if gated or index != GATE
    ]


def _site(layer: Layer, scheme: Scheme) -> Site:
    return Site(
        name=_name(scheme),
        node=layer.node,
        index=OUTPUT,
        bits=layer.config.activations.inlier_bits,
        kind=layer.kind,
        layer=layer.name,
        reverse=layer.reverse,
        asymmetric=True,
        split=False,
    )


def _name(scheme: Scheme) -> str:
    """A site's last name: calibration reads the scheme off it."""
    return {"tensor": "output", "channel": "output_by_channel", "token": "output_by_token"}[scheme]


def _norm(node: fx.Node, config: QuantConfig) -> Site | None:
    """A norm's result, one step a tensor."""
    owner = node
    if node.op == "call_function" and not isinstance(node.target, torch._ops.OpOverload):
        owner = node.args[0] if node.args[1:] == (0,) else node  # type: ignore[assignment]
    if not is_op(owner, _ADD_NORM) and not is_op(node, aten.layer_norm.default):
        return None
    if node is owner and is_op(node, _ADD_NORM):
        return None
    name = layer_name(argument(owner, "weight"), owner)
    return _activation(node, name, "tensor", config)


def _silu(node: fx.Node, config: QuantConfig, found: Plan) -> Site | None:
    """SiLU right behind a convolution, by channels, under the convolution's name."""
    if not is_op(node, aten.silu.default) or not is_op(node.args[0], *CONVOLUTIONS):
        return None
    layer = next(name for name, one in found.nodes.items() if one is node.args[0])
    return _activation(node, f"{layer}.silu", "channel", config)


def _activation(node: fx.Node, name: str, scheme: Scheme, config: QuantConfig) -> Site | None:
    if not config.selects(name):
        return None
    return Site(
        name=f"{name}.{_name(scheme)}",
        node=node,
        index=OUTPUT,
        bits=config.activations.inlier_bits,
        kind="activation",
        layer=name,
        asymmetric=True,
        split=False,
    )


def _is_depthwise(node: fx.Node) -> bool:
    return is_op(node, *_DEPTHWISE) or int(argument(node, "groups")) > 1
