"""Calibration of k-scaled quantizers: magnitudes of all images, steps on some (METHODS 8.2-8.5)."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from ouro_compiler.calibration.calibrate import Progress
from ouro_compiler.calibration.images import Images
from ouro_compiler.calibration.scan_states import ScanInputs
from ouro_compiler.calibration.search import round_to_half
from ouro_compiler.calibration.similarity import (
    Steps,
    clustered,
    largest_step,
    per_tensor_weight,
    search_linear,
    search_per_row,
    search_steps,
    zero_point,
)
from ouro_compiler.calibration.state_factors import StateFactors, StateStatistics, no_factors
from ouro_compiler.calibration.watching import Watch, first_images, watch
from ouro_compiler.config import QuantConfig
from ouro_compiler.graph import RECURRENCE, Calibration, QWeight, Site, StepParams, UniformParams
from ouro_compiler.ops.activations import silu
from ouro_compiler.ops.selective_scan import per_channel
from ouro_compiler.recipes.planning import Plan

SEARCH_IMAGES = 32  # of all steps but those of states, which take STATE_IMAGES
STATE_IMAGES = 4
ROWS = 1024  # tokens, of all images, that a search looks at


def calibrate_sites(
    gm: fx.GraphModule,
    plan: Plan,
    config: QuantConfig,
    images: Images,
    *,
    batch_size: int,
    progress: Progress | None = None,
) -> Calibration:
    """Clusters and largest steps from all images, then the search for similarity on the first."""
    bits = (config.weights.bits, config.activations.inlier_bits)
    if bits != (8, 8):
        plan.notes.append(
            f"ksq is published for 8-bit weights and outputs: {bits[0]} and {bits[1]} bits are an "
            "extrapolation"
        )
    work = _Calibrator(plan, config)
    for stage, watches in (("magnitudes", work.means()), ("ranges of states", work.ranges())):
        if watches:
            batches = images.batches(batch_size)
            watch(gm, watches, batches, f"calibrating: {stage}", len(images), progress)
    some = first_images(images, SEARCH_IMAGES)
    watch(gm, work.searches(), [some], "calibrating: searching steps", len(some), progress)
    return Calibration(sites=work.sites, weights=work.weights)


class _Magnitudes:
    """Mean and largest |x| by channel or token, streamed."""

    def __init__(self) -> None:
        self.count = 0
        self.total = self.peak = torch.empty(0)

    def add(self, rows: Tensor) -> None:
        """rows (M, n): one column a channel or token."""
        magnitude = rows.abs()
        total, peak = magnitude.sum(0), magnitude.amax(0)
        if self.count:
            total, peak = total + self.total, torch.maximum(peak, self.peak)
        self.total, self.peak = total, peak
        self.count += len(rows)

    def steps(self, clusters: int, bits: int, *, tokens: bool = False) -> Steps:
        """Clusters of the columns; one of all of them needs no means."""
        return clustered(self.total / self.count, self.peak, clusters, bits, tokens=tokens)


class _Calibrator:
    def __init__(self, plan: Plan, config: QuantConfig) -> None:
        self.config, self.spec = config, config.ksq
        self.bits = config.activations.inlier_bits
        self.plan_sites = [site for site in plan.sites if site.index not in RECURRENCE]
        self.scan_nodes = {
            row.name: plan.nodes[row.name]
            for row in plan.rows
            if row.kind == "scan" and row.status != "skipped"
        }
        self.magnitudes: dict[str, _Magnitudes] = {}
        self.statistics = {layer: StateStatistics() for layer in self.scan_nodes}
        self.factors: dict[str, StateFactors] = {}
        self.sites: dict[str, UniformParams | StepParams] = {}
        self.weights: dict[str, QWeight] = {}

    def means(self) -> dict[fx.Node, Watch]:
        """Round 1: magnitudes of every site, and of what surrounds and fills the scans."""
        found: dict[fx.Node, Watch] = {
            site.node: partial(self._site_magnitudes, site) for site in self.plan_sites
        }
        for layer, node in self.scan_nodes.items():
            found[node] = partial(self._scan_means, layer)
        return found

    def ranges(self) -> dict[fx.Node, Watch]:
        """Round 2: ranges of reparameterized states."""
        return {node: partial(self._ranges, layer) for layer, node in self.scan_nodes.items()}

    def searches(self) -> dict[fx.Node, Watch]:
        """Round 3: every layer's steps when it has run on the images of the search."""
        found: dict[fx.Node, Watch] = {}
        for site in self.plan_sites:
            search = {"linear": self._linear, "conv": self._conv}.get(site.kind, self._output)
            found[site.node] = partial(search, site)
        for layer, node in self.scan_nodes.items():
            found[node] = partial(self._scan, layer)
        return found

    # --- round 1 and 2

    def _site_magnitudes(self, site: Site, arguments: list[Any], value: Tensor) -> None:
        del arguments
        found = self.magnitudes.setdefault(site.name, _Magnitudes())
        x = _features_last(site, value)
        if _by_token(site):
            found.add(x.transpose(1, 2).flatten(0, 1))
        else:
            found.add(x.flatten(0, -2))

    def _scan_means(self, layer: str, arguments: list[Any], value: Tensor) -> None:
        del value
        scan = ScanInputs.of(arguments)
        self.statistics[layer].observe_means(scan)
        for name, x in (("step", scan.step), ("gate", None if scan.z is None else silu(scan.z))):
            if x is not None:
                found = self.magnitudes.setdefault(f"{layer}.{name}", _Magnitudes())
                found.add(x.transpose(1, 2).flatten(0, 1))

    def _ranges(self, layer: str, arguments: list[Any], value: Tensor) -> None:
        del value
        scan, statistics = ScanInputs.of(arguments), self.statistics[layer]
        if layer not in self.factors:
            plain = no_factors(scan.A.shape[0], scan.length, scan.A.shape[1])
            self.factors[layer] = statistics.factors() if self.spec.reparameterize else plain
        statistics.observe_ranges(scan, self.factors[layer])

    # --- round 3

    def _start(self, site: Site) -> Steps:
        tokens = _by_token(site)
        clusters = self.spec.clusters if tokens or _by_channel(site) else 1
        return self.magnitudes[site.name].steps(clusters, self.bits, tokens=tokens)

    def _linear(self, site: Site, arguments: list[Any], value: Tensor) -> None:
        del value
        x, weight, bias = arguments[:3]
        start = self._start(site)
        found = search_linear(
            _some(x) if x.dim() == 3 else x[:ROWS],
            weight,
            bias,
            start,
            bits=self.bits,
            weight_bits=self.config.weights.bits,
            rounds=self.spec.search_rounds,
            power_of_two=self.spec.power_of_two and start.tokens,
        )
        self.weights[site.layer] = found.weight
        self.sites[site.name] = self._params(found.output)

    def _conv(self, site: Site, arguments: list[Any], value: Tensor) -> None:
        weight, bits = arguments[1], self.config.weights.bits
        step = largest_step(weight.float().abs().max(), bits)
        self.weights[site.layer] = per_tensor_weight(weight, step, bits)
        self._output(site, arguments, value)

    def _output(self, site: Site, arguments: list[Any], value: Tensor) -> None:
        """What a convolution, norm or SiLU returns; ratios of a SiLU's steps are free."""
        del arguments
        x = _rows(_features_last(site, value))
        power_of_two = self.spec.power_of_two and site.kind == "conv" and _by_channel(site)
        steps = search_steps(x, x, self._start(site), self.bits, power_of_two=power_of_two)
        params = self._params(steps)
        behind = (1,) * (value.dim() - 2)  # spatial dimensions after channels
        if _by_channel(site):
            params = dataclasses.replace(params, scale=params.scale.view(-1, *behind))
        self.sites[site.name] = params

    def _scan(self, layer: str, arguments: list[Any], value: Tensor) -> None:
        del value
        scan = ScanInputs.of(arguments)
        few = scan.first(STATE_IMAGES)
        factors, statistics = self.factors[layer], self.statistics[layer]
        states, outputs = _reparameterized(few, factors)
        state = search_per_row(states.flatten(2), statistics.state_peak, self.bits)
        count = statistics.images * len(factors.channel)
        tokens = clustered(
            *(statistics.output_sum / count, statistics.output_peak),
            *(self.spec.clusters, self.bits),
            tokens=True,
        )
        pot = self.spec.power_of_two
        output = search_steps(outputs, outputs, tokens, self.bits, power_of_two=pot)
        reparameterized = self.spec.reparameterize
        self.sites[f"{layer}.state"] = StepParams(
            scale=round_to_half(state * factors.time),
            factor=round_to_half(factors.static) if reparameterized else None,
            before_rounding=True,
        )
        self.sites[f"{layer}.readout"] = UniformParams(
            scale=output.scale.view(1, -1),
            zero_point=zero_point(self.bits),
            smooth=factors.channel[:, None] if reparameterized else None,
        )
        self.sites[f"{layer}.step"] = self._around(f"{layer}.step", scan.step)
        if scan.z is not None:
            self.sites[f"{layer}.gate"] = self._around(f"{layer}.gate", silu(scan.z.float()))

    def _around(self, name: str, x: Tensor) -> UniformParams:
        """By channels of x (B, D, L), with free ratios."""
        start = self.magnitudes[name].steps(self.spec.clusters, self.bits)
        rows = _rows(x.transpose(1, 2))
        found = self._params(search_steps(rows, rows, start, self.bits))
        return dataclasses.replace(found, scale=found.scale[:, None])

    def _params(self, steps: Steps) -> UniformParams:
        scale = steps.steps[:1] if len(steps.steps) == 1 else steps.scale
        return UniformParams(scale=scale.clone(), zero_point=zero_point(self.bits))


def _reparameterized(scan: ScanInputs, factors: StateFactors) -> tuple[Tensor, Tensor]:
    """h' (B, L, D, N), and y' = C h / r_C (B, L, D), by token."""
    c = per_channel(scan.C, scan.u.shape[1])
    states = torch.empty(len(scan.u), scan.length, *scan.A.shape)
    outputs = torch.empty(states.shape[:3])
    for t, h in scan.states():
        states[:, t] = h / factors.static / factors.time[t]
        outputs[:, t] = (h * c[..., t]).sum(-1) / factors.channel
    return states, outputs


def _by_channel(site: Site) -> bool:
    return site.name.endswith("by_channel")


def _by_token(site: Site) -> bool:
    return site.name.endswith("by_token")


def _features_last(site: Site, value: Tensor) -> Tensor:
    """(..., K): a convolution's result, or that of the SiLU behind it, is (B, K, ...)."""
    if site.kind == "conv" or _by_channel(site):
        return value.flatten(2).transpose(1, 2).float()
    return value.float()


def _rows(x: Tensor) -> Tensor:
    """Evenly spaced rows (M, K), at most ROWS of them, of x (..., K)."""
    rows = x.flatten(0, -2)
    return rows[:: -(-len(rows) // ROWS)]


def _some(x: Tensor) -> Tensor:
    """The first samples of x (B, L, K), about ROWS tokens."""
    return x[: max(1, ROWS // x.shape[1])]
