"""insert_fake_quantize: the quantizers of simulated recipes, which compute in floating point.

1. What a site names, an argument or (OUTPUT) a node's result, becomes `fake_quantize(x / smooth)`,
   or `fake_quantize(linear(x, rotation))`.
2. The weight of a linear with a site becomes `dequantize_weight(codes)`; that of a convolution, in
   its own shape, and A and D of a scan, where the calibration has codes for them. A bias that comes
   with a weight takes its place.
3. Consumers of one site's name share one quantizer; sites that share a rotation, its constant.

Sites with other parameters are `insert_quantize_dequantize`'s.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

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
    value_of,
)
from ouro_compiler.passes.base import PassContext
from ouro_compiler.passes.quantized_parts import (
    as_tokens,
    constant,
    dequantized_weight,
    from_tokens,
    replace_argument,
    replace_behind,
    replace_scan_constants,
)

_FAKE_QUANTIZE = torch.ops.ouro.fake_quantize.default
_SCAN = torch.ops.ouro.selective_scan.default


def insert_fake_quantize(gm: fx.GraphModule, ctx: PassContext) -> bool:
    """Quantize every site of `ctx.sites` with UniformParams; False if all of them already are."""
    inserter = _Inserter(gm, ctx)
    modified = False
    for site in ctx.sites:
        params = ctx.calibration.sites[site.name]
        done = site.node.meta.get("ouro_sites", frozenset())
        inside = site.index in RECURRENCE  # quantize_recurrence's
        if not isinstance(params, UniformParams) or inside or site.index in done:
            continue
        inserter.quantize_activation(site, params)
        if not site.node.meta.get("ouro_weight"):
            inserter.quantize_constants(site)
        site.node.meta["ouro_sites"] = done | {site.index}
        site.node.meta["ouro_layer"] = site.layer
        modified = True
    if modified:
        gm.graph.eliminate_dead_code()
        delete_unused_constants(gm)
    return modified


class _Inserter:
    def __init__(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        self.gm, self.config, self.weights = gm, ctx.config, ctx.calibration.weights
        self.quantized: dict[str, fx.Node] = {}
        self.rotations: dict[int, str] = {}  # names of constants by their tensors' identities

    def quantize_activation(self, site: Site, params: UniformParams) -> None:
        source = site.source
        if site.name not in self.quantized:
            self.quantized[site.name] = self._round_trip(site, params)
        made = tokens = self.quantized[site.name]
        if site.transpose:
            made = from_tokens(self.gm.graph, tokens.next, tokens, source)
        if site.index == OUTPUT:
            replace_behind(source, made)
        else:
            replace_argument(site.node, site.index, made)

    def _round_trip(self, site: Site, params: UniformParams) -> fx.Node:
        """Nodes right after the site's source; the last one has tokens (B, L, K)."""
        gm, source = self.gm, site.source
        before = source.next
        x = as_tokens(gm.graph, before, source) if site.transpose else source
        if params.smooth is not None:
            smooth = constant(gm, before, f"{site.name}.smooth", params.smooth)
            x = insert_call(gm.graph, before, aten.div.Tensor, x, smooth)
        if params.rotation is not None:
            rotation = self._rotation(before, site.name, params.rotation)
            x = insert_call(gm.graph, before, aten.linear.default, x, rotation)
        scale = constant(gm, before, f"{site.name}.activation_scale", params.scale)
        zero = None
        if params.zero_point is not None:
            zero = constant(gm, before, f"{site.name}.zero_point", params.zero_point)
        x = insert_call(gm.graph, before, _FAKE_QUANTIZE, x, scale, zero, site.bits)
        x.meta["ouro_site"] = site.name
        return x

    def _rotation(self, before: fx.Node, name: str, matrix: Tensor) -> fx.Node:
        known = self.rotations.get(id(matrix))
        if known is None:
            node = constant(self.gm, before, f"{name}.rotation", matrix)
            self.rotations[id(matrix)] = str(node.target)
            return node
        with self.gm.graph.inserting_before(before):
            return self.gm.graph.get_attr(known)

    def quantize_constants(self, site: Site) -> None:
        """The weight of the site's layer, or what its calibration holds of a scan's."""
        gm, node, layer = self.gm, site.node, site.layer
        bits = self.config.for_layer(layer).weights.bits
        if is_op(node, _SCAN):
            log_a, skip = self.weights.get(f"{layer}.A"), self.weights.get(f"{layer}.D")
            replace_scan_constants(gm, node, layer, log_a=log_a, skip=skip, bits=bits)
        elif is_op(node, aten.linear.default) or layer in self.weights:
            found = self.weights.get(layer)
            if found is None:
                weight = get_constant(gm, node.args[1])
                assert weight is not None
                codes, scale = quantize_weight(weight, bits)
                found = QWeight(codes=codes, scale=scale)
            made = dequantized_weight(gm, node, layer, found, bits)
            shape = value_of(node.args[1]).shape  # type: ignore[arg-type]
            if len(shape) != 2:
                made = insert_call(gm.graph, node, aten.reshape.default, made, list(shape))
            node.update_arg(1, made)
            if found.bias is not None:
                replace_argument(node, 2, constant(gm, node, f"{layer}.corrected_bias", found.bias))
        node.meta["ouro_weight"] = True
