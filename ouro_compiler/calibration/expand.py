"""A table of one scale a site, calibrated at one resolution, for the graph of another."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from ouro_compiler.errors import UsageError
from ouro_compiler.graph import Calibration, Site, SiteParams, StepParams, UniformParams, value_of


def expand(found: Calibration, sites: Sequence[Site]) -> Calibration:
    """The same parameters with vectors (L,) of each site's own number of tokens L.

    found: one value a site, in vectors of any length. Raises UsageError if it is of other sites.
    """
    names = {site.name for site in sites}
    if names != found.sites.keys():
        other = min(names ^ found.sites.keys())
        raise UsageError(
            f"the model has other layers at the calibration images' resolution ({other} is only in "
            "one of the two): calibrate on images of the resolution it is compiled for"
        )
    expanded = {site.name: _expanded(found.sites[site.name], _tokens(site)) for site in sites}
    return dataclasses.replace(found, sites=expanded)


def _tokens(site: Site) -> int:
    shape = value_of(site.source).shape
    return int(shape[-1] if site.transpose else shape[1])


def _expanded(found: SiteParams, length: int) -> SiteParams:
    if isinstance(found, UniformParams):  # one scale for all tokens, or it could not be expanded
        return found

    def repeated(vector: Tensor) -> Tensor:
        return vector[:1].expand(length).clone()

    if isinstance(found, StepParams):
        if found.steps:
            return found
        threshold = None if found.threshold is None else repeated(found.threshold)
        return dataclasses.replace(found, scale=repeated(found.scale), threshold=threshold)
    zero_point = None if found.zero_point is None else repeated(found.zero_point)
    return dataclasses.replace(
        found,
        scale=repeated(found.scale),
        threshold=repeated(found.threshold),
        zero_point=zero_point,
    )
