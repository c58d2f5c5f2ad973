"""quantize_recurrence: scans with sites inside their recurrence become quantized ones.

`selective_scan(u, delta, ..., delta_bias, delta_softplus)` with DECAY, INPUT or STATE sites becomes
`quantized_selective_scan(u, softplus(delta + delta_bias), ...)` with scales and thresholds as
constants. Softplus is written out, as ops/activations.py does, so that a sample's values do not
depend on where they lie in a batch. What insert_quantize_dequantize did to the other operands and
to the scan's output stays as it is. Left alone: scans without such sites.
"""

from __future__ import annotations

import torch
from torch import fx

from ouro_compiler.config import DynamicOutlierSpec
from ouro_compiler.graph import (
    DECAY,
    INPUT,
    RECURRENCE,
    STATE,
    Site,
    StepParams,
    all_arguments,
    aten,
    insert_call,
    is_op,
    replace_node,
)
from ouro_compiler.passes.base import PassContext
from ouro_compiler.passes.quantized_parts import constant

_SCAN = torch.ops.ouro.selective_scan.default
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
    quantized = insert_call(
        gm.graph,
        scan,
        _QUANTIZED_SCAN,
        *(u, _step(gm.graph, scan, delta, bias, softplus), A, B, C, D, z),
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
    replace_node(scan, quantized)


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
