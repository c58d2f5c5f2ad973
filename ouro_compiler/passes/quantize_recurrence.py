"""quantize_recurrence: scans with sites inside their recurrence become quantized ones.

`selective_scan(u, delta, ..., delta_bias, delta_softplus)` with DECAY, INPUT or STATE sites becomes
`quantized_selective_scan(u, softplus(delta + delta_bias), ...)` with scales and thresholds as
constants. Where there is a site STEP its result is rounded; where there is one READOUT or GATE, D u
and the gate move behind the scan: y = round(C h) + D u, times round(silu(z)).

Softplus is written out, as ops/activations.py does, so that a sample's values do not
depend on where they lie in a batch. What insert_quantize_dequantize did to the other operands and
to the scan's output stays as it is. Left alone: scans without such sites.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ouro_compiler.config import DynamicOutlierSpec
from ouro_compiler.graph import (
    DECAY,
    GATE,
    INPUT,
    READOUT,
    RECURRENCE,
    STATE,
    STEP,
    Site,
    SiteParams,
    StepParams,
    UniformParams,
    all_arguments,
    aten,
    insert_call,
    is_op,
    replace_node,
)
from ouro_compiler.passes.base import PassContext
from ouro_compiler.passes.quantized_parts import constant

_SCAN = torch.ops.ouro.selective_scan.default
_FAKE_QUANTIZE = torch.ops.ouro.fake_quantize.default
_QUANTIZED_SCAN = torch.ops.ouro.quantized_selective_scan.default


def quantize_recurrence(gm: fx.GraphModule, ctx: PassContext) -> bool:
    """Quantize inside every scan that has sites there; False if all of them already are."""
    left = {node for node in gm.graph.nodes if is_op(node, _SCAN)}
    scans: dict[fx.Node, dict[int, Site]] = {}
    for site in ctx.sites:
        if site.index in RECURRENCE and site.node in left:
            scans.setdefault(site.node, {})[site.index] = site
    for scan, sites in scans.items():
        _quantize(gm, scan, sites, ctx)
    return bool(scans)


def _quantize(gm: fx.GraphModule, scan: fx.Node, sites: dict[int, Site], ctx: PassContext) -> None:
    u, delta, A, B, C, D, z, bias, softplus, reverse = all_arguments(scan)
    spec, calibration = ctx.config.activations, ctx.calibration
    found = {index: calibration.sites[site.name] for index, site in sites.items()}
    params: dict[int, StepParams] = {
        index: one for index, one in found.items() if isinstance(one, StepParams)
    }
    decay, state = params.get(DECAY), params.get(STATE)
    logarithmic = decay is not None and decay.steps > 0
    around = _Around(gm, scan, sites, {i: p for i, p in found.items() if i not in params})
    behind = READOUT in sites or GATE in sites
    step = around.rounded(STEP, _step(gm.graph, scan, delta, bias, softplus))
    quantized = insert_call(
        gm.graph,
        scan,
        _QUANTIZED_SCAN,
        *(u, step, A, B, C, *((None, None) if behind else (D, z))),
        None if logarithmic else _constant(gm, scan, sites, params, DECAY, "scale"),
        _constant(gm, scan, sites, params, INPUT, "scale"),
        _constant(gm, scan, sites, params, INPUT, "threshold"),
        _constant(gm, scan, sites, params, STATE, "scale"),
        _constant(gm, scan, sites, params, STATE, "threshold"),
        _constant(gm, scan, sites, params, STATE, "factor"),
        float(decay.scale) if decay is not None and logarithmic else 0.0,
        decay.steps if decay is not None else 0,
        *_static(next(iter(sites.values())).bits, spec),
        state is not None and state.before_rounding,
        reverse,
    )
    quantized.meta = dict(scan.meta)
    quantized.meta["ouro_layer"] = next(iter(sites.values())).layer
    replace_node(scan, around.behind(quantized, u, D, z) if behind else quantized)


class _Around:
    """Quantizers of what the op takes or leaves in floating point, in front of a scan."""

    def __init__(
        self,
        gm: fx.GraphModule,
        scan: fx.Node,
        sites: dict[int, Site],
        params: Mapping[int, SiteParams],
    ) -> None:
        self.gm, self.scan, self.sites, self.params = gm, scan, sites, params

    def rounded(self, index: int, x: fx.Node) -> fx.Node:
        """x (B, D, L) through the quantizer of a site; x where there is none."""
        params = self.params.get(index)
        if not isinstance(params, UniformParams):
            return x
        site, smooth, zero = self.sites[index], None, None
        if params.smooth is not None:
            smooth = self._constant(f"{site.name}.smooth", params.smooth)
            x = self._call(aten.div.Tensor, x, smooth)
        scale = self._constant(f"{site.name}.scale", params.scale)
        if params.zero_point is not None:
            zero = self._constant(f"{site.name}.zero_point", params.zero_point)
        x = self._call(_FAKE_QUANTIZE, x, scale, zero, site.bits)
        x.meta["ouro_site"] = site.name
        return x if smooth is None else self._call(aten.mul.Tensor, x, smooth)

    def behind(self, y: fx.Node, u: fx.Node, D: fx.Node | None, z: fx.Node | None) -> fx.Node:
        """D u and the gate, of C h."""
        y = self.rounded(READOUT, y)
        if D is not None:
            skip = self._call(aten.mul.Tensor, u, self._call(aten.unsqueeze.default, D, 1))
            y = self._call(aten.add.Tensor, y, skip)
        if z is not None:
            gate = self.rounded(GATE, self._call(aten.silu.default, z))
            y = self._call(aten.mul.Tensor, y, gate)
        return y

    def _constant(self, name: str, value: Tensor) -> fx.Node:
        return constant(self.gm, self.scan, name, value)

    def _call(self, target: Any, *args: Any) -> fx.Node:
        return insert_call(self.gm.graph, self.scan, target, *args)


def _static(bits: int, spec: DynamicOutlierSpec) -> tuple[int, int, int]:
    return bits, spec.outlier_bits, spec.refresh_period


def _constant(
    gm: fx.GraphModule,
    scan: fx.Node,
    sites: dict[int, Site],
    params: dict[int, StepParams],
    index: int,
    part: str,
) -> fx.Node | None:
    """A site's vector as a constant in front of the scan; None if there is none."""
    value = getattr(params[index], part) if index in params else None
    if value is None:
        return None
    # Names that end so are known to hold fp16 values: storing them loses nothing.
    name = {"scale": "inlier_scale"}.get(part, part)
    return constant(gm, scan, f"{sites[index].name}.{name}", value)


def _step(
    graph: fx.Graph, scan: fx.Node, delta: fx.Node, bias: fx.Node | None, softplus: bool
) -> fx.Node:
    """Delta in front of the scan: the bias added, through softplus."""
    step = delta
    if bias is not None:
        column = insert_call(graph, scan, aten.unsqueeze.default, bias, 1)
        step = insert_call(graph, scan, aten.add.Tensor, step, column)
    if not softplus:
        return step
    magnitude = insert_call(graph, scan, aten.abs.default, step)
    negative = insert_call(graph, scan, aten.neg.default, magnitude)
    small = insert_call(graph, scan, aten.exp.default, negative)
    logarithm = insert_call(graph, scan, aten.log1p.default, small)
    positive = insert_call(graph, scan, aten.clamp.default, step, 0)
    return insert_call(graph, scan, aten.add.Tensor, positive, logarithm)
