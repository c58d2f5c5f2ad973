"""PTQ4VM (arXiv 2412.20386; METHODS 6): scales a token, smoothed channels, no outliers.

Quantized are the linears inside blocks. An activation X (B, L, K) is divided by a smoothing vector
s (K,), s_k = a_k^alpha / w_k^(1 - alpha) of the largest |X| and |W| of channel k, and the weight is
multiplied by it, so that (X / s)(s W) = X W; every linear has its own. Activations then have one
static scale and zero point a token, shared by images and channels, and weights one scale an output
channel, all by clipping search (P4). Scans, convolutions, norms and heads stay in floating point,
whatever `ssm` says.

The published method goes on to learn steps and smoothing block by block (JLSS). `smoothing` gives
what such learning starts from, and the parameters here are searched, not learned.
With `ptq4vm.asymmetric` off there are no zero points, and integer kernels run the products.
"""

from __future__ import annotations

import dataclasses
from functools import partial

from torch import Tensor, fx

from ouro_compiler.calibration.calibrate import Progress, Transform, channel_peaks, observe_sites
from ouro_compiler.calibration.images import Images
from ouro_compiler.calibration.search import quantize_weight, round_to_half
from ouro_compiler.config import QuantConfig
from ouro_compiler.errors import UsageError
from ouro_compiler.graph import Calibration, QParams, QWeight, Site, UniformParams, get_constant
from ouro_compiler.recipes.base import without_outliers
from ouro_compiler.recipes.planning import (
    Chosen,
    Layer,
    Plan,
    linear_refusal,
    plan_graph,
    skip_convolution,
    skip_head,
)

_MIN_PEAK, _MIN_SMOOTH = 1e-3, 1e-5
SIMULATED = (
    "zero points are simulated in floating point: with ptq4vm.asymmetric=false integer kernels run "
    "it"
)


def configure(config: QuantConfig) -> QuantConfig:
    """No outliers, and so no list that could keep them in floating point."""
    if config.activations.inlier_scale != "per_time_step":
        raise UsageError(
            "recipe ptq4vm has one scale a token: --inlier-scale per-tensor is not for it"
        )
    found = without_outliers(config, "ptq4vm")
    spec = dataclasses.replace(found.activations, outlier_bits=8)  # 16 would pass x to products
    return dataclasses.replace(found, activations=spec)


def plan(gm: fx.GraphModule, config: QuantConfig) -> Plan:
    """The sites and layers of a normalised graph, in graph order; no two linears share a site."""
    return plan_graph(
        gm,
        config,
        linear=_plan_linear,
        scan=_leave_scan,
        convolution=skip_convolution,
        shared=False,
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
    """Smoothing from the channels' maxima, then scales of X / s and of s W by clipping search."""
    source, total = partial(images.batches, batch_size), len(images)
    peaks = channel_peaks(gm, plan.sites, source, total, progress)
    smooth: dict[str, Tensor] = {}
    weights: dict[str, QWeight] = {}
    for site in plan.sites:
        weight = get_constant(gm, site.node.args[1])
        assert weight is not None  # planned
        smooth[site.name] = smoothing(peaks[site.name], weight, config.ptq4vm.alpha)
        bits = config.for_layer(site.layer).weights.bits
        codes, scale = quantize_weight(weight.float() * smooth[site.name], bits)
        weights[site.layer] = QWeight(codes=codes, scale=scale)
    transforms = {name: _divided_by(vector) for name, vector in smooth.items()}
    found = observe_sites(gm, plan.sites, config.activations, source, total, progress, transforms)
    sites = {name: _parameters(one.qparams(), smooth[name]) for name, one in found.items()}
    return Calibration(sites=sites, weights=weights)


def smoothing(peaks: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """s (K,) from the largest |x| of each channel (K,) and the weight (O, K); values fp16 holds."""
    activations = peaks.clamp(min=_MIN_PEAK).pow(alpha)
    columns = weight.float().abs().amax(0).clamp(min=_MIN_SMOOTH).pow(1 - alpha)
    return round_to_half((activations / columns).clamp(min=_MIN_SMOOTH))


def _divided_by(smooth: Tensor) -> Transform:
    return lambda x: x / smooth


def _parameters(found: QParams, smooth: Tensor) -> QParams | UniformParams:
    if found.zero_point is None:
        return dataclasses.replace(found, smooth=smooth)
    return UniformParams(
        scale=found.scale[:, None], zero_point=found.zero_point[:, None], smooth=smooth
    )


def _plan_linear(layer: Layer) -> Chosen:
    head = skip_head(layer)
    if head is not None:
        return head
    asymmetric = layer.config.ptq4vm.asymmetric
    row = layer.selected(linear_refusal(layer), simulated=SIMULATED if asymmetric else None)
    if row.status == "skipped":
        return row, []
    site = Site(
        name="input",
        node=layer.node,
        index=0,
        bits=layer.config.activations.inlier_bits,
        kind="linear",
        layer=layer.name,
        reverse=layer.reverse,
        asymmetric=asymmetric,
        split=False,
    )
    return row, [site]


def _leave_scan(layer: Layer) -> Chosen:
    return layer.skipped("the recipe leaves scans in floating point, whatever --ssm says"), []
