"""Quamba (arXiv 2410.13229; METHODS 9): one symmetric static scale a tensor, everywhere.

Quantized are the linears inside blocks, causal convolutions, and with `ssm` the operands of scans:
u, delta before softplus (its bias folded in), B, C and z at activation bits, log(-A) and D at
weight bits. Scales of activations are their largest magnitude on the calibration images over Q; for
a scan's input u, which x_proj reads too, the `percentile` of |u| over all images. (The published
code keeps a running mean of the percentiles of batches: that depends on the order of images.)
Weights are scaled by their largest magnitude.

What a scan gives goes through a Hadamard rotation before out_proj quantizes it, H x, and out_proj's
weight is W H^-1, which spreads outliers over all channels. The rotation is a product in the graph.

All of it is simulated around floating-point convolutions and scans, whose states are not quantized.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, fx

from ouro_compiler.calibration.calibrate import Progress, Transform, observe_sites
from ouro_compiler.calibration.hadamard import hadamard
from ouro_compiler.calibration.images import Images
from ouro_compiler.calibration.observers import SiteObserver
from ouro_compiler.calibration.search import percentile_from_histogram, round_to_half
from ouro_compiler.config import QuantConfig
from ouro_compiler.graph import (
    Calibration,
    QWeight,
    Site,
    UniformParams,
    all_arguments,
    aten,
    get_constant,
    is_op,
    walk_back,
)
from ouro_compiler.ops.quantize import MIN_SCALE, quantize_symmetric, symmetric_max
from ouro_compiler.recipes.base import plain
from ouro_compiler.recipes.planning import (
    SCAN,
    Chosen,
    Layer,
    Plan,
    linear_refusal,
    plan_graph,
    reads_scan,
    scan_refusal,
    skip_convolution,
    skip_head,
)

_CONV = torch.ops.ouro.causal_conv1d.default
_VIEWS = (
    aten.transpose.int,
    aten.permute.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.contiguous.default,
)
_SIMULATED = "quantized and dequantized around products in floating point"
_OPERANDS = ((0, "u"), (1, "delta"), (3, "B"), (4, "C"), (6, "z"))


def configure(config: QuantConfig) -> QuantConfig:
    """One scale a tensor, no outliers."""
    found = plain(config, "quamba")
    spec = dataclasses.replace(found.activations, inlier_scale="per_tensor")
    return dataclasses.replace(found, activations=spec)


def plan(gm: fx.GraphModule, config: QuantConfig) -> Plan:
    """The sites and layers of a normalised graph, in graph order."""
    return plan_graph(
        gm, config, linear=_plan_linear, scan=_plan_scan, convolution=_plan_convolution
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
    """Scales from maxima and percentiles; weights rotated where their input is."""
    rotations = _rotations(plan.sites) if config.quamba.hadamard else {}
    transforms: dict[str, Transform] = {
        name: partial(torch.nn.functional.linear, weight=matrix)
        for name, matrix in rotations.items()
    }
    observers = observe_sites(
        gm,
        plan.sites,
        config.activations,
        partial(images.batches, batch_size),
        len(images),
        progress,
        transforms,
    )
    inputs = {_base(node.args[0]) for node in gm.graph.nodes if is_op(node, SCAN)}
    sites: dict[str, UniformParams] = {}
    weights: dict[str, QWeight] = {}
    for site in plan.sites:
        clipped = site.name not in rotations and _base(site.source) in inputs
        share = config.quamba.percentile if clipped else 1.0
        scale = _scale(observers[site.name], share)
        rotation = rotations.get(site.name)
        sites.setdefault(site.name, UniformParams(scale=scale, rotation=rotation))
        for name, weight in _constants(gm, site, rotation):
            weights[name] = quantize_tensor(weight, config.weights.bits)
    return Calibration(sites=sites, weights=weights)


def quantize_tensor(weight: Tensor, bits: int) -> QWeight:
    """Symmetric codes of a matrix, with one scale (1,) from its largest magnitude."""
    peak = weight.float().abs().max().reshape(1)
    scale = round_to_half((peak / symmetric_max(bits)).clamp(min=MIN_SCALE))
    codes = quantize_symmetric(weight.float(), scale, bits)
    return QWeight(codes=codes.to(torch.int8), scale=scale)


def rotation_of(order: int) -> Tensor | None:
    """A Hadamard matrix over sqrt(order), entries rounded to what fp16 holds; None without one."""
    found = hadamard(order)
    if found is None:
        return None
    return found * round_to_half(torch.tensor(order**-0.5))


def undone(weight: Tensor, rotation: Tensor) -> Tensor:
    """W R^-1 of a weight (O, K): its product with R x is W x. R R^T is a multiple of I."""
    exact = rotation.double()
    length = float(exact[0].square().sum())
    return (weight.double() @ exact.t() / length).float()


def _rotations(sites: list[Site]) -> dict[str, Tensor]:
    """Rotations by site's name; one tensor for all sites of one width."""
    known: dict[int, Tensor | None] = {}
    found = {}
    for site in sites:
        if is_op(site.node, aten.linear.default) and reads_scan(site.node):
            width = _width(site.node)
            rotation = known.setdefault(width, rotation_of(width))
            if rotation is not None:
                found[site.name] = rotation
    return found


def _width(linear: fx.Node) -> int:
    return int(linear.args[1].meta["val"].shape[1])  # type: ignore[union-attr]


def _base(node: object) -> fx.Node | None:
    return walk_back(node, _VIEWS)


def _scale(observer: SiteObserver, share: float) -> Tensor:
    """The scale (1,) of a site after both rounds of its observer."""
    peak = float(observer.high[0])
    clip = percentile_from_histogram(observer.histogram.sum(0), peak, share)
    scale = torch.tensor([clip / symmetric_max(observer.site.bits)])
    return round_to_half(scale.clamp(min=MIN_SCALE))


def _constants(
    gm: fx.GraphModule, site: Site, rotation: Tensor | None
) -> Iterator[tuple[str, Tensor]]:
    """Names and values (matrices) of what the site's layer has to quantize."""
    if is_op(site.node, SCAN):
        arguments = all_arguments(site.node)
        A, D = (get_constant(gm, arguments[index]) for index in (2, 5))
        if A is not None:
            yield f"{site.layer}.A", torch.log(-A.float())
        if D is not None:
            yield f"{site.layer}.D", D.view(1, -1)
        return
    weight = get_constant(gm, site.node.args[1])
    assert weight is not None  # planned
    yield site.layer, weight if rotation is None else undone(weight, rotation)


def _plan_linear(layer: Layer) -> Chosen:
    head = skip_head(layer)
    if head is not None:
        return head
    reason = _SIMULATED
    if layer.config.quamba.hadamard and reads_scan(layer.node):
        width = _width(layer.node)
        if hadamard(width) is None:
            reason += f"; not rotated: no Hadamard matrix of order {width} is known here"
    row = layer.selected(linear_refusal(layer), simulated=reason)
    return row, [] if row.status == "skipped" else [_site(layer, "input", 0)]


def _plan_scan(layer: Layer) -> Chosen:
    if layer.config.ssm == "none":
        return layer.skipped("SSM operands stay in floating point (ssm = none)"), []
    reason = "operands are quantized and dequantized around a floating-point scan, not states"
    row = layer.selected(scan_refusal(layer), simulated=reason)
    if row.status == "skipped":
        return row, []
    given = all_arguments(layer.node)
    return row, [_site(layer, name, i) for i, name in _OPERANDS if given[i] is not None]


def _plan_convolution(layer: Layer) -> Chosen:
    if not is_op(layer.node, _CONV):
        return skip_convolution(layer)
    refusal = None
    if get_constant(layer.gm, layer.node.args[1]) is None:
        refusal = "its weight is computed at run time"
    row = layer.selected(refusal, simulated=_SIMULATED)
    return row, [] if row.status == "skipped" else [_site(layer, "input", 0)]


def _site(layer: Layer, name: str, index: int) -> Site:
    linear = layer.kind == "linear"
    return Site(
        name=name,
        node=layer.node,
        index=index,
        bits=layer.config.activations.inlier_bits,
        kind="linear" if linear else "ssm",
        layer=layer.name,
        transpose=not linear,
        split=False,
    )
