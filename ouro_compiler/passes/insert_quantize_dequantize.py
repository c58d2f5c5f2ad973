"""insert_quantize_dequantize: put the calibrated quantizers into the graph, in floating point.

1. A linear's input at a site becomes `dequantize(quantize(x))`, its weight
`dequantize_weight(codes)`.
2. A scan's delta, B and C become `dequantize(quantize(.))` on their token-major form; A becomes
   `-exp(dequantize_weight(codes of log(-A)))`, one scale and zero point a channel; D is quantized
   with one symmetric scale.
3. Consumers of one activation share one quantizer.

The graph still computes in floating point and is the simulation that later passes must equal.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from ouro_compiler.calibration.search import quantize_rows_asymmetric, quantize_weight
from ouro_compiler.graph import (
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
        self.config, self.spec = ctx.config, ctx.config.activations
        self.dequantized: dict[str, fx.Node] = {}

    def quantize_activation(self, site: Site, params: QParams) -> None:
        if site.name not in self.dequantized:
            self.dequantized[site.name] = self._round_trip(site, params)
        site.node.update_arg(site.index, self.dequantized[site.name])

    def _round_trip(self, site: Site, params: QParams) -> fx.Node:
        """Nodes right after the site's source: to tokens, quantize, dequantize, and back."""
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
        result = insert_call(
            graph, before, _DEQUANTIZE, codes, scale, zero, outlier_scale, start, kept, *static
        )
        return from_tokens(graph, before, result, source) if site.transpose else result

    def quantize_linear_weight(self, site: Site) -> None:
        weight = self.calibration.weights.get(site.layer)
        if weight is None:
            found = get_constant(self.gm, site.node.args[1])
            assert found is not None
            weight = _searched(found, self._weight_bits(site))
        node = self._dequantized(site.node, site.layer, weight, self._weight_bits(site))
        site.node.update_arg(1, node)

    def quantize_scan_parameters(self, site: Site) -> None:
        scan = site.node
        arguments = all_arguments(scan)
        A = get_constant(self.gm, arguments[2])
        assert A is not None
        bits = self._weight_bits(site)
        codes, scale, zero = quantize_rows_asymmetric(torch.log(-A.float()), bits)
        weight = QWeight(codes=codes, scale=scale, zero_point=zero)
        log_a = self._dequantized(scan, f"{site.layer}.A", weight, bits)
        exp = insert_call(self.gm.graph, scan, aten.exp.default, log_a)
        arguments[2] = insert_call(self.gm.graph, scan, aten.neg.default, exp)
        D = get_constant(self.gm, arguments[5])
        if D is not None:
            weight = _searched(D.view(1, -1), bits)
            row = self._dequantized(scan, f"{site.layer}.D", weight, bits)
            arguments[5] = insert_call(self.gm.graph, scan, aten.select.int, row, 0, 0)
        scan.args, scan.kwargs = tuple(arguments), {}

    def _weight_bits(self, site: Site) -> int:
        return self.config.for_layer(site.layer).weights.bits

    def _dequantized(self, before: fx.Node, name: str, weight: QWeight, bits: int) -> fx.Node:
        return dequantized_weight(self.gm, before, name, weight, bits)

    def _constant(self, before: fx.Node, name: str, value: Tensor) -> fx.Node:
        return constant(self.gm, before, name, value)


def _searched(weight: Tensor, bits: int) -> QWeight:
    codes, scale = quantize_weight(weight, bits)
    return QWeight(codes=codes, scale=scale)
