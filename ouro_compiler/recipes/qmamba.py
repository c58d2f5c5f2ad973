"""QMamba (METHODS 7): log-coded decays and states in groups of time steps, inside the recurrence.

Linears inside blocks: weights uniform, one scale an output channel; inputs uniform, asymmetric, one
scale a tensor. Scans, unless `ssm` = none: the input u as a linear's; exp(Delta A) by LtSQ or a
uniform grid (`calibration/decay.py`), Delta B and the state h with one symmetric scale a group of
time steps. C, D and the gate stay in floating point. Everything is simulated.

Scales start from the clipping search of all calibration images; a coordinate search then lessens
the squared error of each layer's output on the first of them, given floating-point inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from ouro_compiler.calibration.calibrate import Progress, observe_sites
from ouro_compiler.calibration.clusters import contiguous_groups, kmeans
from ouro_compiler.calibration.coordinate_search import Scales, search_linear, search_scales
from ouro_compiler.calibration.decay import DecayCode, fit_decay
from ouro_compiler.calibration.images import Images
from ouro_compiler.calibration.scan_states import ScanInputs, ScanObserver, quantized_scan
from ouro_compiler.calibration.search import weight_scale
from ouro_compiler.calibration.watching import Watch, first_images, watch
from ouro_compiler.config import QuantConfig
from ouro_compiler.graph import (
    DECAY,
    INPUT,
    RECURRENCE,
    STATE,
    Calibration,
    QParams,
    QWeight,
    Site,
    SiteParams,
    StepParams,
    UniformParams,
    aten,
    is_op,
)
from ouro_compiler.ops.fake_quantize import fake_quantize_ref
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

SEARCH_IMAGES = 8  # of the coordinate search
_LINEAR = "input and weight are quantized and dequantized around a floating-point product"
_SCAN = "input, decay, Delta B and state are quantized inside a floating-point recurrence"


def plan(gm: fx.GraphModule, config: QuantConfig) -> Plan:
    """The sites and layers of a normalised graph; each layer has quantizers of its own."""
    return plan_graph(
        gm,
        config,
        linear=_plan_linear,
        scan=_plan_scan,
        convolution=skip_convolution,
        shared=False,
    )


def _plan_linear(layer: Layer) -> Chosen:
    head = skip_head(layer)
    if head is not None:
        return head
    row = layer.selected(linear_refusal(layer), simulated=_LINEAR)
    return row, [] if row.status == "skipped" else [_site(layer, "input", "linear")]


def _plan_scan(layer: Layer) -> Chosen:
    if layer.config.ssm == "none":
        return layer.skipped("scans stay in floating point (ssm = none)"), []
    row = layer.selected(scan_refusal(layer), simulated=_SCAN)
    if row.status == "skipped":
        return row, []
    row.weight_bits = None  # A is coded as exp(Delta A)
    inside = [
        _site(layer, name, "ssm", index)
        for name, index in (("decay", DECAY), ("input", INPUT), ("state", STATE))
    ]
    return row, [_site(layer, "u", "ssm"), *inside]


def _site(layer: Layer, name: str, kind: str, index: int = 0) -> Site:
    return Site(
        name=name,
        node=layer.node,
        index=index,
        bits=layer.config.activations.inlier_bits,
        kind=kind,
        layer=layer.name,
        transpose=kind == "ssm",
        reverse=layer.reverse,
        asymmetric=index == 0,
        split=False,
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
    """Clipping search over all images, then the coordinate search; METHODS 7.4."""
    spec = dataclasses.replace(config.activations, inlier_scale="per_tensor", outliers="none")
    outside = [site for site in plan.sites if site.index not in RECURRENCE]
    source = partial(images.batches, batch_size)
    found = observe_sites(gm, outside, spec, source, len(images), progress)
    start = {name: _per_tensor(one.qparams()) for name, one in found.items()}
    searched = _Search(plan, config, start)
    searched.observe(gm, images, batch_size, progress)
    some = first_images(images, SEARCH_IMAGES)
    watch(gm, searched.watches(), [some], "calibrating: searching scales", len(some), progress)
    for row in plan.rows:
        if row.name in searched.decays:
            row.reason = f"{_SCAN}; {_shown(searched.decays[row.name])}"
    return Calibration(sites={**searched.tensors, **searched.inside}, weights=searched.weights)


def _per_tensor(params: SiteParams) -> UniformParams:
    assert isinstance(params, QParams)
    zero_point = params.zero_point
    return UniformParams(
        scale=params.scale[:1].clone(),
        zero_point=None if zero_point is None else zero_point[:1].clone(),
    )


def _shown(code: DecayCode) -> str:
    if code.scale is not None:
        return "the decay on a uniform grid"
    return f"1 - decay in powers of 2^(1/{code.steps}) (LtSQ)"


def _observe(see: Callable[[ScanInputs], None], arguments: list[Any], value: Tensor) -> None:
    del value
    see(ScanInputs.of(arguments))


class _Search:
    """The parameters of every layer: at first by ranges, then by the error of its output."""

    def __init__(self, plan: Plan, config: QuantConfig, start: dict[str, UniformParams]) -> None:
        self.plan, self.config, self.tensors = plan, config, dict(start)
        self.bits, self.rounds = config.activations.inlier_bits, config.qmamba.search_rounds
        self.weights: dict[str, QWeight] = {}
        self.inside: dict[str, StepParams] = {}
        self.decays: dict[str, DecayCode] = {}
        scans = [site for site in plan.sites if site.index == STATE]
        self.observers = {site.layer: ScanObserver(config.seed) for site in scans}
        self.reverse = {site.layer: site.reverse for site in scans}

    def observe(
        self, gm: fx.GraphModule, images: Images, batch_size: int, progress: Progress | None
    ) -> None:
        """Ranges and histograms inside the scans of all images, and the decays' codes."""
        if not self.observers:
            return
        for name in ("ranges", "histograms"):
            watches: dict[fx.Node, Watch] = {}
            for layer, observer in self.observers.items():
                see = observer.observe_range if name == "ranges" else observer.observe_histogram
                watches[self.plan.nodes[layer]] = partial(_observe, see)
            stage = f"calibrating: {name} of scans"
            watch(gm, watches, images.batches(batch_size), stage, len(images), progress)
            if name == "ranges":
                for layer, observer in self.observers.items():
                    observer.group(self._groups(layer, observer))

    def _groups(self, layer: str, observer: ScanObserver) -> Tensor:
        """The group (L,) of each token: runs of scan order, or states of similar size."""
        spec, peak = self.config.qmamba, observer.state_peak
        if spec.grouping == "kmeans":
            return kmeans(peak.clamp(min=torch.finfo(torch.float32).tiny).log(), spec.groups)
        groups = contiguous_groups(len(peak), spec.groups)
        return groups.flip(0) if self.reverse[layer] else groups

    def watches(self) -> dict[fx.Node, Watch]:
        """What to do when a layer of the plan has run on the images of the search."""
        found: dict[fx.Node, Watch] = {}
        for site in self.plan.sites:
            if site.index in RECURRENCE:
                continue
            search = self._linear if is_op(site.node, aten.linear.default) else self._scan
            found[site.node] = partial(search, site)
        return found

    def _linear(self, site: Site, arguments: list[Any], value: Tensor) -> None:
        del value
        x, weight = arguments[:2]
        bits = self.config.weights.bits
        self.tensors[site.name], self.weights[site.layer] = search_linear(
            x,
            weight,
            self.tensors[site.name],
            weight_scale(weight, bits),
            bits=self.bits,
            weight_bits=bits,
            rounds=self.rounds,
        )

    def _scan(self, site: Site, arguments: list[Any], value: Tensor) -> None:
        scan, observer, layer = ScanInputs.of(arguments), self.observers[site.layer], site.layer
        spec, activation = self.config.qmamba, self.tensors[site.name]
        code = fit_decay(
            observer.decay_sample(),
            observer.least_decay,
            self.bits,
            kind=spec.decay,
            skewness=spec.skewness,
        )
        input_scale, state_scale = observer.scales(self.bits)
        start = {"u": activation.scale, "input": input_scale, "state": state_scale}
        if code.scale is not None:
            start["decay"] = torch.full((scan.length,), code.scale)
        elif spec.decay == "calibrated":
            start["decay"] = torch.tensor([code.limit])

        def inside(scales: Scales) -> dict[int, StepParams]:
            decay = scales.get("decay", torch.tensor([code.limit]))
            return {
                DECAY: StepParams(scale=decay, steps=code.steps),
                INPUT: StepParams(scale=scales["input"]),
                STATE: StepParams(scale=scales["state"]),
            }

        def error(scales: Scales) -> float:
            u = fake_quantize_ref(scan.u, scales["u"], activation.zero_point, self.bits)
            made = quantized_scan(dataclasses.replace(scan, u=u), inside(scales), self.bits)
            return float((made - value).double().square().mean())

        best = search_scales(start, error, self.rounds)
        self.tensors[site.name] = dataclasses.replace(activation, scale=best["u"])
        self.decays[layer] = code
        for index, name in ((DECAY, "decay"), (INPUT, "input"), (STATE, "state")):
            self.inside[f"{layer}.{name}"] = inside(best)[index]
