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
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from ouro_compiler.calibration.search import quantize_rows_asymmetric, quantize_weight
from ouro_compiler.config import DynamicOutlierSpec
from ouro_compiler.graph import (
    QParams,
    Site,
    add_constant,
    all_arguments,
    aten,
    delete_unused_constants,
    get_constant,
    insert_call,
    is_op,
    value_of,
)
from ouro_compiler.ops.quantize import KEEP_FLOAT_BITS
from ouro_compiler.passes.base import PassContext

_OURO = torch.ops.ouro
_DEQUANTIZE = _OURO.dequantize_dynamic_outlier.default


def insert_quantize_dequantize(gm: fx.GraphModule, ctx: PassContext) -> bool:
    """Quantize every site of `ctx.sites` with `ctx.table`; False if all of them already are."""
    inserter = _Inserter(gm, ctx.config.activations, ctx.config.weights.bits)
    modified = False
    for site in ctx.sites:
        if site.node.meta.get("ouro_sites", frozenset()) >= {site.index}:
            continue
        inserter.quantize_activation(site, ctx.table[site.name])
        if is_op(site.node, aten.linear.default):
            inserter.quantize_linear_weight(site)
        elif site.index == 1:  # once a scan, with its delta
            inserter.quantize_scan_parameters(site)
        site.node.meta["ouro_sites"] = site.node.meta.get("ouro_sites", frozenset()) | {site.index}
        site.node.meta["ouro_layer"] = site.layer
        modified = True
    if modified:
        gm.graph.eliminate_dead_code()
        delete_unused_constants(gm)
    return modified


@dataclass
class _Inserter:
    gm: fx.GraphModule
    spec: DynamicOutlierSpec
    weight_bits: int
    dequantized: dict[str, fx.Node] = field(default_factory=dict)

    def quantize_activation(self, site: Site, params: QParams) -> None:
        source = site.source
        if site.name not in self.dequantized:
            self.dequantized[site.name] = self._round_trip(site, source, params)
        site.node.update_arg(site.index, self.dequantized[site.name])

    def _round_trip(self, site: Site, source: fx.Node, params: QParams) -> fx.Node:
        """Nodes right after `source`: to tokens, quantize, dequantize, and back."""
        graph = self.gm.graph
        before = source.next
        x = source
        shape = value_of(source).shape
        if site.transpose:
            if len(shape) == 4:
                x = insert_call(graph, before, aten.flatten.using_ints, x, 1, 2)
            x = insert_call(graph, before, aten.transpose.int, x, 1, 2)
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
        if site.transpose:
            result = insert_call(graph, before, aten.transpose.int, result, 1, 2)
            if len(shape) == 4:
                sizes = [int(shape[1]), int(shape[2])]
                result = insert_call(graph, before, aten.unflatten.int, result, 1, sizes)
        return result

    def quantize_linear_weight(self, site: Site) -> None:
        weight = get_constant(self.gm, site.node.args[1])
        assert weight is not None
        codes, scale = quantize_weight(weight, self.weight_bits)
        node = self._dequantized_weight(site.node, site.layer, codes, scale, None)
        site.node.update_arg(1, node)

    def quantize_scan_parameters(self, site: Site) -> None:
        scan = site.node
        arguments = all_arguments(scan)
        A = get_constant(self.gm, arguments[2])
        assert A is not None
        codes, scale, zero = quantize_rows_asymmetric(torch.log(-A.float()), self.weight_bits)
        log_a = self._dequantized_weight(scan, f"{site.layer}.A", codes, scale, zero)
        exp = insert_call(self.gm.graph, scan, aten.exp.default, log_a)
        arguments[2] = insert_call(self.gm.graph, scan, aten.neg.default, exp)
        D = get_constant(self.gm, arguments[5])
        if D is not None:
            codes, scale = quantize_weight(D.view(1, -1), self.weight_bits)
            row = self._dequantized_weight(scan, f"{site.layer}.D", codes, scale, None)
            arguments[5] = insert_call(self.gm.graph, scan, aten.select.int, row, 0, 0)
        scan.args, scan.kwargs = tuple(arguments), {}

    def _dequantized_weight(
        self, before: fx.Node, name: str, codes: Tensor, scale: Tensor, zero: Tensor | None
    ) -> fx.Node:
        qweight = self._constant(before, f"{name}.qweight", codes)
        weight_scale = self._constant(before, f"{name}.weight_scale", scale)
        zero_point = None
        if zero is not None:
            zero_point = self._constant(before, f"{name}.zero_point", zero.to(torch.uint8))
        return insert_call(
            self.gm.graph,
            before,
            _OURO.dequantize_weight.default,
            qweight,
            weight_scale,
            zero_point,
            self.weight_bits,
            codes.shape[1],
        )

    def _constant(self, before: fx.Node, name: str, value: Tensor) -> fx.Node:
        with self.gm.graph.inserting_before(before):
            return add_constant(self.gm, name, value)
