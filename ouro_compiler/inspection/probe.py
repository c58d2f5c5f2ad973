"""What images show of a quantized graph: outliers over time, codes, errors of layers, times."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ouro_compiler.evaluation import powers
from ouro_compiler.graph import argument, is_op
from ouro_compiler.inspection.nodes import site_of
from ouro_compiler.inspection.places import layer_names
from ouro_compiler.ops import QUANTIZERS
from ouro_compiler.ops.linear import ACTIVATIONS
from ouro_compiler.ops.quantize import listed_mask, quantize_asymmetric, quantize_symmetric

_CONV_QUANTIZE = torch.ops.ouro.causal_conv1d_quantize.default
_LINEAR = torch.ops.ouro.linear_dynamic_outlier.default
_SCANS = (
    torch.ops.ouro.selective_scan.default,
    torch.ops.ouro.selective_scan_dynamic_outlier.default,
)
_FAKE_QUANTIZE = torch.ops.ouro.fake_quantize.default
_CODES = 256


@dataclass(kw_only=True)
class SiteSample:
    """One quantized activation on some images.

    listed: (L, K) fp64, the share of images in which channel k is an outlier at token t. inliers,
    outliers: (256,) int64, how often each code from -128 to 127 was used.
    """

    listed: Tensor | None = None  # None: the method has no outliers
    inliers: Tensor = field(default_factory=lambda: torch.zeros(_CODES, dtype=torch.int64))
    outliers: Tensor = field(default_factory=lambda: torch.zeros(_CODES, dtype=torch.int64))


@dataclass(kw_only=True)
class Sample:
    """What `measure` found. snr_db: of layers' outputs against floating point, errors of the layers
    before included; infinite where there is none."""

    images: int = 0
    sites: dict[str, SiteSample] = field(default_factory=dict)
    snr_db: dict[str, float] = field(default_factory=dict)


def measure(
    gm: fx.GraphModule, batches: Iterable[Tensor], reference: fx.GraphModule | None = None
) -> Sample:
    """Run a quantized graph on batches (B, C, H, W) and keep what its sites and layers did.

    reference: the same model's normalised graph in floating point, with which outputs are compared;
    a layer whose residual was fused has no output of its own, and is not.
    """
    found = Sample()
    sums: dict[str, Tensor] = {}
    probe = _Probe(gm, found)
    expected = _Outputs(reference) if reference is not None else None
    with torch.no_grad():
        for batch in batches:
            if expected is not None:
                expected.values.clear()
                expected.run(batch)
            probe.values.clear()
            probe.run(batch)
            found.images += batch.shape[0]
            for name, (value, activation) in probe.values.items():
                wanted = expected.values.get(name) if expected is not None else None
                if wanted is None or wanted[0].shape != value.shape:
                    continue
                power = powers(ACTIVATIONS[activation](wanted[0].float()), value)
                sums[name] = sums.get(name, torch.zeros(2, dtype=torch.float64)) + power
    for name, (signal, noise) in sums.items():
        found.snr_db[name] = float(10 * torch.log10(signal / noise))
    for site in found.sites.values():
        if site.listed is not None:
            site.listed /= found.images
    return found


def time_nodes(gm: fx.GraphModule, images: Tensor, rounds: int = 5) -> dict[str, float]:
    """Milliseconds of every call, the fastest of some rounds, run one by one through PyTorch.

    A compiled model runs faster than the sum: it prepares its calls (docs/cpu.md).
    """
    timer = _Timer(gm)
    with torch.inference_mode():
        for _ in range(rounds + 1):  # the first builds kernels
            timer.run(images)
            timer.seconds = timer.seconds if timer.warm else {}
            timer.warm = True
    return {name: 1e3 * seconds for name, seconds in timer.seconds.items()}


class _Outputs(fx.Interpreter):
    """Keeps the outputs of layers, by name, each with the activation that was fused into it."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.layers = layer_names(gm)
        self.values: dict[str, tuple[Tensor, str]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        name = self.layers.get(n.name)
        if name is not None:
            output = value[3] if is_op(n, _CONV_QUANTIZE) else value
            if is_op(n, *_SCANS) and argument(n, "z") is not None:
                output = self._before_gate(n)
            fused = is_op(n, _LINEAR) and argument(n, "residual") is not None
            if isinstance(output, Tensor) and output.numel() and not fused:
                activation = argument(n, "activation") if is_op(n, _LINEAR) else "none"
                self.values[name] = output, activation
        return value

    def _before_gate(self, scan: fx.Node) -> Any:
        """A scan's output without its gate, which quantizers take over."""
        args, kwargs = self.fetch_args_kwargs_from_env(scan)
        target: Any = scan.target
        names = [one.name for one in target._schema.arguments]
        return target(**{**dict(zip(names, args, strict=False)), **kwargs, "z": None})


class _Probe(_Outputs):
    """And adds up what quantizers do."""

    def __init__(self, gm: fx.GraphModule, sample: Sample) -> None:
        super().__init__(gm)
        self.sample = sample

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if is_op(n, *QUANTIZERS):
            codes, _, start = value[:3]
            site = self.sample.sites.setdefault(site_of(n), SiteSample())
            listed = listed_mask(
                start, codes.shape[1], argument(n, "refresh_period"), argument(n, "reverse")
            )
            total = listed.sum(0, dtype=torch.float64)
            site.listed = total if site.listed is None else site.listed + total
            site.inliers += _count(codes[~listed])
            site.outliers += _count(codes[listed])
        elif is_op(n, _FAKE_QUANTIZE):
            args, _ = self.fetch_args_kwargs_from_env(n)
            x, scale, zero, bits = args[:4]
            if bits <= 8:
                if zero is None:
                    codes = quantize_symmetric(x.float(), scale.float(), bits)
                else:
                    codes = quantize_asymmetric(x.float(), scale.float(), zero.float(), bits)
                site = self.sample.sites.setdefault(site_of(n), SiteSample())
                site.inliers += _count(codes)
        return value


class _Timer(fx.Interpreter):
    """Keeps the least seconds of each call."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.seconds: dict[str, float] = {}
        self.warm = False

    def run_node(self, n: fx.Node) -> Any:
        start = time.perf_counter()
        value = super().run_node(n)
        spent = time.perf_counter() - start
        if n.op == "call_function":
            self.seconds[n.name] = min(spent, self.seconds.get(n.name, spent))
        return value


def _count(codes: Tensor) -> Tensor:
    return torch.bincount(codes.reshape(-1).to(torch.int64) + _CODES // 2, minlength=_CODES)
