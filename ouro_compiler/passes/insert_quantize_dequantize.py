"""insert_quantize_dequantize: put the calibrated quantizers into the graph, in floating point.

1. A linear's input at a site becomes `dequantize(quantize(x))`, its weight
`dequantize_weight(codes)`.
2. What a scan returns, where a site is its output, becomes `dequantize(quantize(.))` likewise.
3. A scan's delta, B and C become `dequantize(quantize(.))` on their token-major form; A becomes
   `-exp(dequantize_weight(codes of log(-A)))`, one scale and zero point a channel; D is quantized
   with one symmetric scale.
4. Consumers of one activation share one quantizer.
5. A site of dynamic outliers whose list follows another rule than that of METHODS 3.3 (thresholds
   from the token itself, a trigger that reads the whole batch) becomes
   `quantize_dynamic_outlier_variant`. Triggers `gated` and `always` list the same channels where
   the thresholds lie above the inlier range (METHODS 3.5), and stay the plain quantizer there.

The graph still computes in floating point and is the simulation that later passes must equal.
"""

from __future__ import annotations

import operator
from typing import Any

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
from ouro_compiler.ops.outlier_rules import RULES
from ouro_compiler.ops.quantize import KEEP_FLOAT_BITS, inlier_interval
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

_OURO = torch.ops.ouro
_DEQUANTIZE = _OURO.dequantize_dynamic_outlier.default
_VARIANT = _OURO.quantize_dynamic_outlier_variant.default
_GLOBAL_ANY = (
    "trigger global_any is not batch invariant, reproduction only: what is an outlier in one image "
    "depends on the others of its batch"
)


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
        if any(is_op(node, _VARIANT) and node.args[9] == "global_any" for node in gm.graph.nodes):
            ctx.notes.append(_GLOBAL_ANY)
    return modified


class _Inserter:
    def __init__(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        self.gm, self.calibration = gm, ctx.calibration
        self.config, self.spec = ctx.config, ctx.config.activations
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
            replace_argument(site.node, site.index, made)

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
        op, listing, rule = self._listing(site, params, before)
        quantize = insert_call(graph, before, op, x, scale, zero, listing, *static, *rule)
        quantize.meta["ouro_site"] = site.name
        codes, outlier_scale, start = (
            insert_call(graph, before, operator.getitem, quantize, index) for index in range(3)
        )
        kept = x if self.spec.outlier_bits == KEEP_FLOAT_BITS else None
        return insert_call(
            graph, before, _DEQUANTIZE, codes, scale, zero, outlier_scale, start, kept, *static
        )

    def _listing(
        self, site: Site, params: QParams, before: fx.Node
    ) -> tuple[Any, fx.Node | None, tuple[Any, ...]]:
        """The quantizer, the constant that its list is found with, and its last arguments."""
        if params.channels is not None:
            channels = self._constant(before, f"{site.name}.channels", params.channels)
            return _OURO.quantize_static_outlier.default, channels, ()
        spec = self.spec
        rule = spec.threshold if spec.threshold in RULES else "static"
        threshold = None
        if rule == "static" or not self._is_variant(site, params):
            threshold = self._constant(before, f"{site.name}.threshold", params.threshold)
        if not self._is_variant(site, params):
            return _OURO.quantize_dynamic_outlier.default, threshold, ()
        return _VARIANT, threshold, (rule, spec.trigger, site.kappa)

    def _is_variant(self, site: Site, params: QParams) -> bool:
        """Rule 5; the site may have outliers, and they are dynamic."""
        spec = self.spec
        if spec.outliers != "dynamic" or not site.split:
            return False
        if spec.threshold in RULES or spec.trigger == "global_any":
            return True
        limit = inlier_interval(params.scale, params.zero_point, site.bits)[1]
        return spec.trigger == "always" and not bool((params.threshold > limit).all())

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
        D = get_constant(self.gm, arguments[5])
        replace_scan_constants(
            self.gm,
            scan,
            site.layer,
            log_a=QWeight(codes=codes, scale=scale, zero_point=zero),
            skip=None if D is None else _searched(D.view(1, -1), bits),
            bits=bits,
        )

    def _weight_bits(self, site: Site) -> int:
        return self.config.for_layer(site.layer).weights.bits

    def _dequantized(self, before: fx.Node, name: str, weight: QWeight, bits: int) -> fx.Node:
        return dequantized_weight(self.gm, before, name, weight, bits)

    def _constant(self, before: fx.Node, name: str, value: Tensor) -> fx.Node:
        return constant(self.gm, before, name, value)


def _searched(weight: Tensor, bits: int) -> QWeight:
    codes, scale = quantize_weight(weight, bits)
    return QWeight(codes=codes, scale=scale)
