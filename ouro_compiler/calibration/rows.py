"""The report's rows of calibrated sites."""

from __future__ import annotations

from collections.abc import Sequence

from ouro_compiler.config import QuantConfig
from ouro_compiler.graph import QParams, Site, SiteParams, SiteTable, StepParams
from ouro_compiler.report import SiteRow


def site_rows(
    sites: Sequence[Site], table: SiteTable, config: QuantConfig, shares: dict[str, float]
) -> list[SiteRow]:
    """A row a site, in graph order. shares: measured outlier shares by site."""
    rows: dict[str, SiteRow] = {}
    for site in sites:
        params = table[site.name]
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
    return list(rows.values())


def _has_outliers(params: SiteParams) -> bool:
    if isinstance(params, StepParams):
        return params.threshold is not None
    return isinstance(params, QParams)
