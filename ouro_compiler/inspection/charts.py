"""Heat maps and histograms of activations as plain data, small enough for a page of hundreds."""

from __future__ import annotations

import base64
from typing import Any

import torch
from torch import Tensor

from ouro_compiler.inspection.probe import Sample, SiteSample

_STEPS, _CHANNELS = 48, 96  # cells of a heat map at most


def site_charts(sample: Sample) -> list[dict[str, Any]]:
    """Of each activation: name, shape [L, K], bins, heat (bytes, base64, 255 = listed in every
    image), inliers and outliers [code of the first bar, [count, ...]]; absent where there are none.
    """
    return [{"name": name, **_chart(site)} for name, site in sample.sites.items()]


def _chart(site: SiteSample) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if site.listed is not None:
        cells = heat_cells(site.listed)
        found = {"shape": list(site.listed.shape), "bins": list(cells.shape)}
        if cells.any():
            found["heat"] = base64.b64encode(bytes(cells.flatten().tolist())).decode()
    for key, counts in (("inliers", site.inliers), ("outliers", site.outliers)):
        bars = code_bars(counts)
        if bars is not None:
            found[key] = bars
    return found


def heat_cells(listed: Tensor) -> Tensor:
    """(L, K) shares -> uint8 of at most (48, 96), each the largest share of what it covers."""
    size = (min(_STEPS, listed.shape[0]), min(_CHANNELS, listed.shape[1]))
    pooled = torch.nn.functional.adaptive_max_pool2d(listed[None], size)[0]
    return torch.ceil(255 * pooled).to(torch.uint8)  # what ever happened is seen


def code_bars(counts: Tensor) -> list[Any] | None:
    """(256,) counts of codes from -128 -> [first code, counts].

    None if nothing was counted. The first code is that of the first count that is not 0.
    """
    used = counts.nonzero().flatten()
    if not len(used):
        return None
    first, last = int(used[0]), int(used[-1])
    found = counts[first : last + 1]
    return [first - len(counts) // 2, found.tolist()]
