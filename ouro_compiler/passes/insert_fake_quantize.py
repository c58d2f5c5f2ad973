"""insert_fake_quantize: the quantizers of simulated recipes, which compute in floating point.

1. What a site names, an argument or (OUTPUT) a node's result, becomes `fake_quantize(x / smooth)`.
2. The weight of a linear with a site becomes `dequantize_weight(codes)`, and so does that of a
convolution if calibration has it, in its own shape. A bias that comes with a weight takes its
place.
3. Consumers of one site's name share one quantizer.

Sites with other parameters are `insert_quantize_dequantize`'s.
"""

from __future__ import annotations

import torch
from torch import fx

from ouro_compiler.calibration.search import quantize_weight
from ouro_compiler.graph import (
    OUTPUT,
    RECURRENCE,
    QWeight,
    Site,
    UniformParams,
    aten,
    delete_unused_constants,
    get_constant,
    insert_call,
    is_op,
)
from ouro_compiler.passes.base import PassContext
from ouro_compiler.passes.quantized_parts import (
    as_tokens,
    constant,
    dequantized_weight,
    from_tokens,
    replace_behind,
)

_FAKE_QUANTIZE = torch.ops.ouro.fake_quantize.default


def insert_fake_quantize(gm: fx.GraphModule, ctx: PassContext) -> bool:
    """Quantize every site of `ctx.sites` with UniformParams; False if all of them already are."""
    quantized: dict[str, fx.Node] = {}
    modified = False
    for site in ctx.sites:
        params = ctx.calibration.sites[site.name]
        done = site.node.meta.get("ouro_sites", frozenset())
        inside = site.index in RECURRENCE  # quantize_recurrence's
        if not isinstance(params, UniformParams) or inside or site.index in done:
            continue
        _quantize(gm, site, params, quantized)
        linear = is_op(site.node, aten.linear.default)
        if linear or (site.kind == "conv" and site.layer in ctx.calibration.weights):
            _quantize_weight(gm, site, ctx)
        site.node.meta["ouro_sites"] = done | {site.index}
        site.node.meta["ouro_layer"] = site.layer
        modified = True
    if modified:
        gm.graph.eliminate_dead_code()
        delete_unused_constants(gm)
    return modified


def _quantize(
    gm: fx.GraphModule, site: Site, params: UniformParams, quantized: dict[str, fx.Node]
) -> None:
    source = site.source
    if site.name not in quantized:
        quantized[site.name] = _round_trip(gm, site, params)
    made = tokens = quantized[site.name]
    if site.transpose:
        made = from_tokens(gm.graph, tokens.next, tokens, source)
    if site.index != OUTPUT:
        site.node.update_arg(site.index, made)
        return
    replace_behind(source, made)


def _round_trip(gm: fx.GraphModule, site: Site, params: UniformParams) -> fx.Node:
    """Nodes right after the site's source; the last one has tokens (B, L, K)."""
    source = site.source
    before = source.next
    x = as_tokens(gm.graph, before, source) if site.transpose else source
    if params.smooth is not None:
        smooth = constant(gm, before, f"{site.name}.smooth", params.smooth)
        x = insert_call(gm.graph, before, aten.div.Tensor, x, smooth)
    scale = constant(gm, before, f"{site.name}.scale", params.scale)
    zero = None
    if params.zero_point is not None:
        zero = constant(gm, before, f"{site.name}.zero_point", params.zero_point)
    x = insert_call(gm.graph, before, _FAKE_QUANTIZE, x, scale, zero, site.bits)
    x.meta["ouro_site"] = site.name
    return x


def _quantize_weight(gm: fx.GraphModule, site: Site, ctx: PassContext) -> None:
    layer = site.node
    if layer.meta.get("ouro_weight"):
        return
    bits = ctx.config.weights.bits
    found = ctx.calibration.weights.get(site.layer)
    weight = get_constant(gm, layer.args[1])
    assert weight is not None
    if found is None:
        codes, scale = quantize_weight(weight, bits)
        found = QWeight(codes=codes, scale=scale)
    node = dequantized_weight(gm, layer, site.layer, found, bits)
    if weight.dim() != 2:
        node = insert_call(gm.graph, layer, aten.reshape.default, node, list(weight.shape))
    layer.update_arg(1, node)
    if found.bias is not None:
        layer.update_arg(2, constant(gm, layer, f"{site.layer}.corrected_bias", found.bias))
    layer.meta["ouro_weight"] = True
