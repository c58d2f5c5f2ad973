"""The report's rows of calibrated sites, and of quantizers inside scans."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ouro_compiler.config import QuantConfig
from ouro_compiler.graph import Calibration, QParams, ScanParams, Site, SiteParams, StepParams
from ouro_compiler.report import SiteRow


def site_rows(
    sites: Sequence[Site],
    calibration: Calibration,
    config: QuantConfig,
    shares: dict[str, float],
) -> list[SiteRow]:
    """A row a site, in graph order, then those of scans. shares: measured outliers by site."""
    rows: dict[str, SiteRow] = {}
    for site in sites:
        params = calibration.sites[site.name]
        scale = params.scale
        rows[site.name] = SiteRow(
            name=site.name,
            bits=site.bits,
            outlier_bits=config.activations.outlier_bits if _has_outliers(params) else None,
            reverse=site.reverse,
            scale_min=float(scale.min()),
            scale_median=float(scale.median()),
            scale_max=float(scale.max()),
            outlier_share=shares.get(site.name),
        )
    inside = [row for name, scan in calibration.scans.items() for row in _scan_rows(name, scan)]
    return [*rows.values(), *inside]


def _has_outliers(params: SiteParams) -> bool:
    if isinstance(params, StepParams):
        return params.threshold is not None
    return isinstance(params, QParams)


def _scan_rows(layer: str, params: ScanParams) -> Iterator[SiteRow]:
    """Of a logarithmic decay the scale is its largest step, s of s 2^(-q/r)."""
    decay = torch.tensor([params.decay_limit]) if params.decay_steps else params.decay_scale
    found: list[tuple[str, Tensor | None, Tensor | None]] = [
        ("decay", decay, None),
        ("input", params.input_scale, params.input_threshold),
        ("state", params.state_scale, params.state_threshold),
    ]
    for name in ("step", "output", "gate"):
        uniform = getattr(params, name)
        found.append((name, None if uniform is None else uniform.scale, None))
    for name, scale, threshold in found:
        if scale is not None:
            yield SiteRow(
                name=f"{layer}.{name}",
                bits=params.bits,
                outlier_bits=None if threshold is None else params.outlier_bits,
                reverse=layer.rpartition(".")[2].startswith("selective_scan_reverse"),
                scale_min=float(scale.min()),
                scale_median=float(scale.median()),
                scale_max=float(scale.max()),
            )
