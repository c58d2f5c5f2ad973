"""insert_quantize_dequantize: put the calibrated quantizers into the graph, in floating point.

1. A linear's input at a site becomes `dequantize(quantize(x))`, its weight
`dequantize_weight(codes)`.
2. What a scan returns, where a site is its output, becomes `dequantize(quantize(.))` likewise.
3. A scan's delta, B and C become `dequantize(quantize(.))` on their token-major form; A becomes
   `-exp(dequantize_weight(codes of log(-A)))`, one scale and zero point a channel; D is quantized
   with one symmetric scale.
4. Consumers of one activation share one quantizer.

The graph still computes in floating point and is the simulation that later passes must equal.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from ouro_compiler.calibration.search import quantize_rows_asymmetric, quantize_weight
from ouro_compiler.graph import (
    OUTPUT,
    QParams,
    QWeight,
    Site,
    all_arguments,
    aten,
    delete_unused_constants,
    get_constant,
    insert_call,
    is_op,
)
from ouro_compiler.ops.quantize import KEEP_FLOAT_BITS
from ouro_compiler.passes.base import PassContext
from ouro_compiler.passes.quantized_parts import (
    as_tokens,
    constant,
    dequantized_weight,
    from_tokens,
    replace_behind,
)

_OURO = torch.ops.ouro
_DEQUANTIZE = _OURO.dequantize_dynamic_outlier.default


def insert_quantize_dequantize(gm: fx.GraphModule, ctx: PassContext) -> bool:
    """Quantize every site of `ctx.sites` with QParams; False if all of them already are."""
    inserter = _Inserter(gm, ctx)
    modified = False
    for site in ctx.sites:
        params = ctx.calibration.sites[site.name]
        done = site.node.meta.get("ouro_sites", frozenset())
        if not isinstance(params, QParams) or site.index in done:
            continue
        inserter.quantize_activation(site, params)
        if is_op(site.node, aten.linear.default):
            inserter.quantize_linear_weight(site)
        elif site.index == 1:  # once a scan, with its delta
            inserter.quantize_scan_parameters(site)
        site.node.meta["ouro_sites"] = done | {site.index}
        site.node.meta["ouro_layer"] = site.layer
        modified = True
    if modified:
        gm.graph.eliminate_dead_code()
        delete_unused_constants(gm)
    return modified


class _Inserter:
    def __init__(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        self.gm, self.calibration = gm, ctx.calibration
        self.spec, self.weight_bits = ctx.config.activations, ctx.config.weights.bits
        self.dequantized: dict[str, fx.Node] = {}

    def quantize_activation(self, site: Site, params: QParams) -> None:
        source = site.source
        if site.name not in self.dequantized:
            self.dequantized[site.name] = self._round_trip(site, params)
        made = tokens = self.dequantized[site.name]
        if site.transpose:
            made = from_tokens(self.gm.graph, tokens.next, tokens, source)
        if site.index == OUTPUT:
            replace_behind(source, made)
        else:
            site.node.update_arg(site.index, made)

    def _round_trip(self, site: Site, params: QParams) -> fx.Node:
        """Nodes right after the site's source: to tokens (B, L, K), quantize, dequantize."""
        graph, source = self.gm.graph, site.source
        before = source.next
        x = as_tokens(graph, before, source) if site.transpose else source
        if params.smooth is not None:
            smooth = self._constant(before, f"{site.name}.smooth", params.smooth)
            x = insert_call(graph, before, aten.div.Tensor, x, smooth)
        scale = self._constant(before, f"{site.name}.inlier_scale", params.scale)
        zero = None
        if params.zero_point is not None:
            zero = self._constant(
                before, f"{site.name}.zero_point", params.zero_point.to(torch.uint8)
            )
        static = (site.bits, self.spec.outlier_bits, self.spec.refresh_period, site.reverse)
        if params.channels is not None:
            rule = self._constant(before, f"{site.name}.channels", params.channels)
            op = _OURO.quantize_static_outlier.default
        else:
            rule = self._constant(before, f"{site.name}.threshold", params.threshold)
            op = _OURO.quantize_dynamic_outlier.default
        quantize = insert_call(graph, before, op, x, scale, zero, rule, *static)
        quantize.meta["ouro_site"] = site.name
        codes, outlier_scale, start = (
            insert_call(graph, before, operator.getitem, quantize, index) for index in range(3)
        )
        kept = x if self.spec.outlier_bits == KEEP_FLOAT_BITS else None
        return insert_call(
            graph, before, _DEQUANTIZE, codes, scale, zero, outlier_scale, start, kept, *static
        )

    def quantize_linear_weight(self, site: Site) -> None:
        weight = self.calibration.weights.get(site.layer)
        if weight is None:
            found = get_constant(self.gm, site.node.args[1])
            assert found is not None
            weight = self._searched(found)
        site.node.update_arg(1, self._dequantized(site.node, site.layer, weight))

    def quantize_scan_parameters(self, site: Site) -> None:
        scan = site.node
        arguments = all_arguments(scan)
        A = get_constant(self.gm, arguments[2])
        assert A is not None
        codes, scale, zero = quantize_rows_asymmetric(torch.log(-A.float()), self.weight_bits)
        weight = QWeight(codes=codes, scale=scale, zero_point=zero)
        log_a = self._dequantized(scan, f"{site.layer}.A", weight)
        exp = insert_call(self.gm.graph, scan, aten.exp.default, log_a)
        arguments[2] = insert_call(self.gm.graph, scan, aten.neg.default, exp)
        D = get_constant(self.gm, arguments[5])
        if D is not None:
            row = self._dequantized(scan, f"{site.layer}.D", self._searched(D.view(1, -1)))
            arguments[5] = insert_call(self.gm.graph, scan, aten.select.int, row, 0, 0)
        scan.args, scan.kwargs = tuple(arguments), {}

    def _searched(self, weight: Tensor) -> QWeight:
        codes, scale = quantize_weight(weight, self.weight_bits)
        return QWeight(codes=codes, scale=scale)

    def _dequantized(self, before: fx.Node, name: str, weight: QWeight) -> fx.Node:
        return dequantized_weight(self.gm, before, name, weight, self.weight_bits)

    def _constant(self, before: fx.Node, name: str, value: Tensor) -> fx.Node:
        return constant(self.gm, before, name, value)
