"""A table of one scale a site, calibrated at one resolution, for the graph of another."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from ouro_compiler.errors import UsageError
from ouro_compiler.graph import CalibrationTable, QParams, Site, value_of


def expand_table(table: CalibrationTable, sites: Sequence[Site]) -> dict[str, QParams]:
    """The table with vectors (L,) of each site's own number of tokens L.

    table: one value a site, in vectors of any length. Raises UsageError if it is of other sites.
    """
    names = {site.name for site in sites}
    if names != table.keys():
        other = min(names ^ table.keys())
        raise UsageError(
            f"the model has other layers at the calibration images' resolution ({other} is only in "
            "one of the two): calibrate on images of the resolution it is compiled for"
        )
    return {site.name: _expanded(table[site.name], _tokens(site)) for site in sites}


def _tokens(site: Site) -> int:
    shape = value_of(site.source).shape
    return int(shape[-1] if site.transpose else shape[1])


def _expanded(found: QParams, length: int) -> QParams:
    def repeated(vector: Tensor) -> Tensor:
        return vector[:1].expand(length).clone()

    zero_point = None if found.zero_point is None else repeated(found.zero_point)
    return dataclasses.replace(
        found,
        scale=repeated(found.scale),
        threshold=repeated(found.threshold),
        zero_point=zero_point,
    )
