"""OuroMamba-Quant (arXiv 2503.10959; METHODS 2.2, 3): dynamic outliers.

Selected are the linears inside blocks (input (B, L, K), constant weight) and, with `ssm` = params,
the scans' operands: A and D (weight bits), B and C (activation bits, no outliers), delta before
softplus (asymmetric). Patch embedding, convolutions, norms and the classifier head stay in floating
point, as in the published code.
"""

from __future__ import annotations

from torch import fx

from ouro_compiler.calibration.calibrate import Progress, calibrate
from ouro_compiler.calibration.images import Images
from ouro_compiler.config import QuantConfig
from ouro_compiler.graph import Calibration, Site
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
    row.weight_bits, row.activation_bits = layer.config.weights.bits, spec.inlier_bits
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
    row = layer.selected(scan_refusal(layer))
    if row.status == "skipped":
        return row, []
    row.status = "simulated"
    row.reason = "SSM operands are quantized and dequantized around a floating-point scan"
    spec = layer.config.activations
    row.weight_bits, row.activation_bits = layer.config.weights.bits, spec.inlier_bits
    sites = [
        Site(
            name=operand,
            node=layer.node,
            index=index,
            bits=spec.inlier_bits,
            kind="ssm",
            layer=layer.name,
            transpose=True,
            reverse=layer.reverse,
            asymmetric=operand == "delta",
            split=operand == "delta",
            kappa=spec.kappa_delta,
        )
        for index, operand in ((1, "delta"), (3, "B"), (4, "C"))
    ]
    return row, sites
