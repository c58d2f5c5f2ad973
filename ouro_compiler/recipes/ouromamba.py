"""OuroMamba-Quant (arXiv 2503.10959; METHODS 2.2, 3): dynamic outliers.

Selected are the linears inside blocks (input (B, L, K), constant weight) and, with `ssm` = params,
the scans' operands: A and D (weight bits), B and C (activation bits, no outliers), delta before
softplus (asymmetric). With `ssm` = full also the scan's input, gate and output, and inside its
recurrence the decay, the input and the state. Patch embedding, convolutions, norms and the
classifier head stay in floating point, as in the published code.
"""

from __future__ import annotations

import dataclasses

from torch import fx

from ouro_compiler.calibration.calibrate import Progress, calibrate
from ouro_compiler.calibration.images import Images
from ouro_compiler.config import DynamicOutlierSpec, QuantConfig
from ouro_compiler.graph import DECAY, INPUT, OUTPUT, STATE, Calibration, Site, all_arguments
from ouro_compiler.recipes.base import refuse_outlier_rules
from ouro_compiler.recipes.planning import (
    Chosen,
    Layer,
    Plan,
    linear_refusal,
    plan_graph,
    scan_refusal,
    skip_convolution,
    skip_head,
)

_PARAMS = "SSM operands are quantized and dequantized around a floating-point scan"
_FULL = (
    "every operand is quantized where it arises, the recurrence included; its arithmetic is in "
    "floating point, on dequantized values"
)


def plan(gm: fx.GraphModule, config: QuantConfig) -> Plan:
    """The sites and layers of a normalised graph, in graph order."""
    return plan_graph(
        gm, config, linear=_plan_linear, scan=_plan_scan, convolution=skip_convolution
    )


def calibrate_sites(
    gm: fx.GraphModule,
    plan: Plan,
    config: QuantConfig,
    images: Images,
    *,
    batch_size: int,
    progress: Progress | None = None,
) -> Calibration:
    """Scales by clipping search and thresholds by statistics of the tokens (METHODS 3.2)."""
    spec = config.activations
    return Calibration(
        sites=calibrate(
            gm, plan.sites, spec, lambda: images.batches(batch_size), len(images), progress
        )
    )


def configure(config: QuantConfig) -> QuantConfig:
    """Other thresholds and triggers are rules of dynamic outliers."""
    if config.activations.outliers != "dynamic":
        refuse_outlier_rules(config, f"outliers are {config.activations.outliers}")
    return config


def _plan_linear(layer: Layer) -> Chosen:
    head = skip_head(layer)
    if head is not None:
        return head
    row = layer.selected(linear_refusal(layer))
    if row.status == "skipped":
        return row, []
    spec = layer.config.activations
    site = Site(
        name="input",
        node=layer.node,
        index=0,
        bits=spec.inlier_bits,
        kind="linear",
        layer=layer.name,
        reverse=layer.reverse,
        kappa=spec.kappa,
    )
    return row, [site]


def _plan_scan(layer: Layer) -> Chosen:
    if layer.config.ssm == "none":
        return layer.skipped("SSM operands stay in floating point (ssm = none)"), []
    spec, full = layer.config.activations, layer.config.ssm == "full"
    row = layer.selected(
        scan_refusal(layer), simulated=_FULL + _lists_inside(spec) if full else _PARAMS
    )
    if row.status == "skipped":
        return row, []
    sites = [
        dataclasses.replace(
            _scan_site(layer, operand, index),
            asymmetric=operand == "delta",
            split=operand == "delta",
            kappa=spec.kappa_delta,
        )
        for index, operand in ((1, "delta"), (3, "B"), (4, "C"))
    ]
    return row, [*sites, *_full_sites(layer)] if full else sites


def _lists_inside(spec: DynamicOutlierSpec) -> str:
    """What settings of outlier lists mean inside the recurrence, where it is something else."""
    if spec.outliers == "static":
        return "; no channel is listed inside it, where a fixed list has no meaning"
    if spec.outliers == "dynamic" and (spec.threshold, spec.trigger) != ("static_t", "gated"):
        return "; inside it lists go by calibrated thresholds per time step, whatever the settings"
    return ""


def _full_sites(layer: Layer) -> list[Site]:
    """u, the gate where there is one, what arises inside the recurrence, and y (METHODS 3.6)."""
    chosen = [(0, "u"), (6, "z"), (DECAY, "decay"), (INPUT, "input"), (STATE, "state")]
    arguments = all_arguments(layer.node)
    if not isinstance(arguments[6], fx.Node):
        chosen.remove((6, "z"))
    return [_scan_site(layer, name, index) for index, name in (*chosen, (OUTPUT, "y"))]


def _scan_site(layer: Layer, name: str, index: int) -> Site:
    spec = layer.config.activations
    return Site(
        name=name,
        node=layer.node,
        index=index,
        bits=spec.inlier_bits,
        kind="ssm",
        layer=layer.name,
        transpose=True,
        reverse=layer.reverse,
        kappa=spec.kappa,
    )
