"""Observers: what one site's activations look like, streamed in two rounds (METHODS 3.2).

Round 1 collects, per time step, the range of the inliers and, per token, mean and deviation of the
magnitudes; round 2 a histogram a time step over that range. Memory is that of L x BINS counts a
site,
whatever the number of images. A magnitude is |x|; at asymmetric sites it is the distance from the
token's mean, since there zero is no special value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ouro_compiler.calibration.search import (
    BINS,
    asymmetric_from_histogram,
    round_to_half,
    symmetric_from_histogram,
)
from ouro_compiler.config import DynamicOutlierSpec
from ouro_compiler.graph import QParams, Site
from ouro_compiler.ops.quantize import inlier_interval

# A threshold this much above the inlier limit makes the gated list a plain prefix-OR (METHODS 3.5).
THRESHOLD_MARGIN = 1 + 1e-3
# Channels of the static list per input feature (METHODS 3.4 row 19).
STATIC_SHARE = 64 / 1536


def windowed_or(mask: Tensor, period: int, reverse: bool) -> Tensor:
    """Running OR of a mask (B, L, K) inside each window of `period` tokens, in scan order."""
    length = mask.shape[1]
    ordered = mask.flip(1) if reverse else mask
    padded = torch.nn.functional.pad(ordered, (0, 0, 0, -length % period))
    windows = padded.unflatten(1, (-1, period)).to(torch.uint8)
    running = windows.cummax(2).values.flatten(1, 2)[:, :length].bool()
    return running.flip(1) if reverse else running


class SiteObserver:
    """Collects one site and turns it into QParams. Feed every batch to both rounds, in order."""

    def __init__(self, site: Site, spec: DynamicOutlierSpec) -> None:
        self.site, self.spec = site, spec
        self.outliers = spec.outliers if site.split else "none"
        self.pooled = spec.inlier_scale == "per_tensor"
        self.low = self.high = torch.empty(0)  # (L, K) in round 1, (L,) once ranges are frozen
        self.means: list[Tensor] = []
        self.deviations: list[Tensor] = []
        self.channels: Tensor | None = None
        self.histogram = torch.empty(0)

    def observe_range(self, x: Tensor) -> None:
        """Round 1: x (B, L, K) fp32."""
        listed = self._listed(x, keep=True)
        infinity = float("inf")
        low = (x if listed is None else x.masked_fill(listed, infinity)).amin(0)
        high = (x if listed is None else x.masked_fill(listed, -infinity)).amax(0)
        first = self.low.numel() == 0
        self.low = low if first else torch.minimum(self.low, low)
        self.high = high if first else torch.maximum(self.high, high)

    def freeze_range(self) -> None:
        """Between the rounds: fix the static list and the histograms' ranges."""
        if self.outliers == "static":
            columns = self.low.shape[1]
            count = max(1, round(columns * STATIC_SHARE))
            peak = torch.maximum(self.low.abs(), self.high.abs()).amax(0)
            self.channels = peak.topk(count).indices.sort().values
            self.low[:, self.channels] = float("inf")
            self.high[:, self.channels] = -float("inf")
        low, high = self.low.amin(1), self.high.amax(1)
        if self.pooled:
            low, high = low.amin().expand_as(low), high.amax().expand_as(high)
        empty = low > high  # every entry of the step was an outlier
        self.low, self.high = low.masked_fill(empty, 0.0), high.masked_fill(empty, 0.0)
        if not self.site.asymmetric:
            self.high = torch.maximum(self.low.abs(), self.high.abs())
            self.low = torch.zeros_like(self.high)
        self.histogram = torch.zeros(self.low.shape[0], BINS)

    def observe_histogram(self, x: Tensor) -> None:
        """Round 2: x (B, L, K) fp32."""
        listed = self._listed(x, keep=False)
        values = x if self.site.asymmetric else x.abs()
        width = ((self.high - self.low) / BINS).clamp(min=1e-30)
        index = ((values - self.low[:, None]) / width[:, None]).long().clamp(0, BINS - 1)
        index += torch.arange(x.shape[1])[:, None] * BINS
        if listed is not None:
            index = index[~listed]
        counts = torch.bincount(index.flatten(), minlength=self.histogram.numel())
        self.histogram += counts.view_as(self.histogram)

    def qparams(self) -> QParams:
        """Scales by clipping search; thresholds by median of mean + kappa deviations.

        One for all time steps: of all their values, and the median of their thresholds. That
        median is also the threshold of the `scalar` rule, raised where a step's range is wider.
        """
        bits, zero_point = self.site.bits, None
        histogram, low, high = self.histogram, self.low, self.high
        if self.pooled:  # the steps share one range
            histogram, low, high = histogram.sum(0, keepdim=True), low[:1], high[:1]
        if self.site.asymmetric:
            scale, zero_point = asymmetric_from_histogram(histogram, low, high, bits)
            zero_point = zero_point.expand_as(self.low).clone()
        else:
            scale = symmetric_from_histogram(histogram, high, bits)
        scale = scale.expand_as(self.low).clone()
        middle, limit = inlier_interval(scale, zero_point, bits)
        threshold = torch.full_like(limit, float("inf"))
        if self.means:
            means, deviations = torch.cat(self.means), torch.cat(self.deviations)
            centre = means if middle is None else (means - middle).abs()
            bound = (centre + self.site.kappa * deviations).median(0).values
            if self.pooled or self.spec.threshold == "scalar":
                bound = bound.median()
            threshold = round_to_half(torch.maximum(bound, THRESHOLD_MARGIN * limit))
        return QParams(
            scale=scale, zero_point=zero_point, threshold=threshold, channels=self.channels
        )

    def _listed(self, x: Tensor, *, keep: bool) -> Tensor | None:
        """Calibration's outlier mask (B, L, K): ungated, by the statistics of each whole token."""
        if self.outliers == "static" and self.channels is not None:
            mask = torch.zeros(x.shape[-1], dtype=torch.bool)
            mask[self.channels] = True
            return mask.expand_as(x)
        if self.outliers != "dynamic" or x.shape[-1] < 2:  # one channel stands out of nothing
            return None
        values = x if self.site.asymmetric else x.abs()
        deviation, mean = torch.std_mean(values, dim=-1)
        if keep:
            self.means.append(mean)
            self.deviations.append(deviation)
        distance = (values - mean[..., None]).abs() if self.site.asymmetric else values
        bound = self.site.kappa * deviation
        if not self.site.asymmetric:
            bound = mean + bound
        period = min(self.spec.refresh_period, x.shape[1])
        return windowed_or(distance > bound[..., None], period, self.site.reverse)
