"""insert_fake_quantize: the quantizers of simulated recipes, which compute in floating point.

1. What a site names, an argument or (OUTPUT) a node's result, becomes `fake_quantize(x / smooth)`.
2. The weight of a layer with a linear's site becomes `dequantize_weight(codes)`.
3. Consumers of one site's name share one quantizer.

Sites with other parameters are `insert_quantize_dequantize`'s.
"""

from __future__ import annotations

import torch
from torch import fx

from ouro_compiler.calibration.search import quantize_weight
from ouro_compiler.graph import (
    OUTPUT,
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
)

_FAKE_QUANTIZE = torch.ops.ouro.fake_quantize.default


def insert_fake_quantize(gm: fx.GraphModule, ctx: PassContext) -> bool:
    """Quantize every site of `ctx.sites` with UniformParams; False if all of them already are."""
    quantized: dict[str, fx.Node] = {}
    modified = False
    for site in ctx.sites:
        params = ctx.calibration.sites[site.name]
        done = site.node.meta.get("ouro_sites", frozenset())
        if not isinstance(params, UniformParams) or site.index in done:
            continue
        _quantize(gm, site, params, quantized)
        if is_op(site.node, aten.linear.default) and not site.node.meta.get("ouro_weight"):
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
    if site.index != OUTPUT:
        site.node.update_arg(site.index, quantized[site.name])
        return
    made = quantized[site.name]
    own = {made, *_chain(source, made)}
    source.replace_all_uses_with(made, delete_user_cb=lambda user: user not in own)


def _chain(source: fx.Node, last: fx.Node) -> set[fx.Node]:
    """The nodes between a source and what was made of it."""
    found: set[fx.Node] = set()
    node = last
    while node is not source:
        found.add(node)
        node = node.args[0]  # type: ignore[assignment]
    return found


def _round_trip(gm: fx.GraphModule, site: Site, params: UniformParams) -> fx.Node:
    """Nodes right after the site's source."""
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
    return from_tokens(gm.graph, before, x, source) if site.transpose else x


def _quantize_weight(gm: fx.GraphModule, site: Site, ctx: PassContext) -> None:
    bits = ctx.config.for_layer(site.layer).weights.bits
    found = ctx.calibration.weights.get(site.layer)
    if found is None:
        weight = get_constant(gm, site.node.args[1])
        assert weight is not None
        codes, scale = quantize_weight(weight, bits)
        found = QWeight(codes=codes, scale=scale)
    node = dequantized_weight(gm, site.node, site.layer, found, bits)
    site.node.update_arg(1, node)
    site.node.meta["ouro_weight"] = True
