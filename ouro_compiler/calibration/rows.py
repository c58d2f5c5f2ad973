"""The report's rows of calibrated sites."""

from __future__ import annotations

from collections.abc import Sequence

from ouro_compiler.config import QuantConfig
from ouro_compiler.graph import CalibrationTable, Site
from ouro_compiler.report import SiteRow


def site_rows(
    sites: Sequence[Site], table: CalibrationTable, config: QuantConfig, shares: dict[str, float]
) -> list[SiteRow]:
    """A row a site, in graph order. shares: measured outlier shares by site."""
    rows: dict[str, SiteRow] = {}
    for site in sites:
        scale = table[site.name].scale
        rows[site.name] = SiteRow(
            name=site.name,
            bits=site.bits,
            outlier_bits=config.activations.outlier_bits,
            reverse=site.reverse,
            scale_min=float(scale.min()),
            scale_median=float(scale.median()),
            scale_max=float(scale.max()),
            outlier_share=shares.get(site.name),
        )
    return list(rows.values())
