"""Calibration inside a scan: decays, inputs and states of the floating-point recurrence.

They are B x L x N x D numbers that no node of the graph holds. A scan's observer recomputes them
from the scan's operands, some samples at a time, and sees each twice as other observers do: for
ranges and outliers (METHODS 3.2, on the largest magnitude of a channel's states), then for
histograms. Ranges and thresholds are of every number; histograms of every k-th channel, in turn, so
that a time step has some 2^18 entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ouro_compiler.calibration.observers import SiteObserver
from ouro_compiler.calibration.search import BINS, logarithmic_from_histogram, unsigned_scale
from ouro_compiler.config import DynamicOutlierSpec
from ouro_compiler.graph import DECAY, STATE, Site, StepParams
from ouro_compiler.ops.chunked_scan import Operands

_ELEMENTS_AT_ONCE = 1 << 22
_ENTRIES_A_STEP = 1 << 18
# A decay whose median is above this gets logarithmic codes (METHODS 7.2).
LOGARITHMIC_ABOVE = 0.93
# Of 1 - a: bins of 1/64 octave from 1 down to 2^-24.
OCTAVES, BINS_AN_OCTAVE = 24, 64


@dataclass(frozen=True)
class _Samples:
    """Some samples of a scan, token by token whatever the direction: (L, b, G, N, d).

    Channels come last: they are many and the states few, so that the largest state of a channel is
    found at the speed of memory.
    """

    decay: Tensor
    input: Tensor
    state: Tensor
    input_peak: Tensor  # (L, b, G, d): the largest magnitude of a channel's inputs


class RecurrenceObserver:
    """Collects a scan's sites of index DECAY, INPUT and STATE; feed it the scan's arguments."""

    def __init__(self, sites: Sequence[Site], spec: DynamicOutlierSpec, total: int) -> None:
        self.total = total
        self.decays = [_DecayObserver(one, spec) for one in sites if one.index == DECAY]
        self.operands = [_StepObserver(one, spec) for one in sites if one.index != DECAY]
        self.seen = 0

    def observe_range(self, arguments: Sequence[Any]) -> None:
        """Round 1: the arguments of `ouro::selective_scan`."""
        for samples in recurrence(arguments):
            for one in self.operands:
                one.observe_range(one.peaks(samples))

    def freeze_range(self) -> None:
        """Between the rounds."""
        for one in self.operands:
            one.freeze_range()

    def observe_histogram(self, arguments: Sequence[Any]) -> None:
        """Round 2: the same arguments in the same order."""
        for samples in recurrence(arguments):
            groups, states, channels = samples.decay.shape[2:]
            entries = groups * states * channels * self.total
            every = min(channels, max(1, entries // _ENTRIES_A_STEP))
            chosen = slice(self.seen % every, None, every)
            self.seen += 1
            for one in self.operands:
                one.observe_values(samples, chosen)
            for decay in self.decays:
                decay.observe(samples.decay[..., chosen])

    def params(self) -> dict[str, StepParams]:
        """Parameters by site."""
        found = {one.site.name: one.step_params() for one in self.operands}
        return found | {one.site.name: one.params() for one in self.decays}


def recurrence(arguments: Sequence[Any]) -> Iterator[_Samples]:
    """The recurrence of a scan in fp32, some samples at a time."""
    u, delta, A, B, C, _, _, delta_bias, delta_softplus, reverse = arguments
    size = max(1, _ELEMENTS_AT_ONCE // (A.numel() * u.shape[2]))
    for first in range(0, len(u), size):
        part = slice(first, first + size)
        given = Operands(
            u[part].float(), delta[part], A, B[part], C[part], delta_bias, delta_softplus, reverse
        )
        step = given.step[:, :, :, None]  # (L, b, G, 1, d)
        decay = torch.exp(step * given.A.transpose(1, 2))
        arriving = step * given.B[..., None]
        state = arriving * given.u[:, :, :, None]
        h = torch.zeros_like(state[0])
        for t in given.order(slice(0, len(state))):
            h = state[t].addcmul_(decay[t], h)
        # Rounding keeps the order of products, so the largest one is that of the largest B.
        peak = given.step.abs() * given.B.abs().amax(-1, keepdim=True)
        yield _Samples(decay, arriving, state, peak)


class _StepObserver(SiteObserver):
    """An input or a state: a channel is judged by its largest state."""

    def __init__(self, site: Site, spec: DynamicOutlierSpec) -> None:
        super().__init__(site, spec)
        # A fixed list of channels has no place inside the recurrence.
        self.outliers = "dynamic" if spec.outliers == "dynamic" else "none"

    def peaks(self, samples: _Samples) -> Tensor:
        """(b, L, D): the largest magnitude of each channel's states."""
        inside = self.site.index == STATE
        peaks = samples.state.abs().amax(-2) if inside else samples.input_peak
        return peaks.flatten(2).transpose(0, 1)

    def observe_values(self, samples: _Samples, chosen: slice) -> None:
        """Round 2; of each group's channels some are counted."""
        values = samples.state if self.site.index == STATE else samples.input
        length, groups = len(values), values.shape[2]
        counted = values[..., chosen].abs()
        width = (self.high / BINS).clamp(min=1e-30).view(-1, 1, 1, 1, 1)
        index = (counted / width).int().clamp_(0, BINS - 1)
        index += (torch.arange(length) * BINS).int().view(-1, 1, 1, 1, 1)
        listed = self._listed(self.peaks(samples), keep=False)
        if listed is not None:  # they are counted behind the last bin
            mask = listed.transpose(0, 1).unflatten(2, (groups, 1, -1))[..., chosen]
            index.masked_fill_(mask, length * BINS)
        counts = torch.bincount(index.flatten(), minlength=length * BINS + 1)
        self.histogram += counts[:-1].view_as(self.histogram)

    def step_params(self) -> StepParams:
        """Scales and thresholds as of any other symmetric site."""
        found = self.qparams()
        return StepParams(scale=found.scale, threshold=found.threshold if self.means else None)


class _DecayObserver:
    """exp(step A), in (0, 1]: a histogram a time step, and one of the logarithms of 1 - a."""

    def __init__(self, site: Site, spec: DynamicOutlierSpec) -> None:
        self.site, self.pooled = site, spec.inlier_scale == "per_tensor"
        self.histogram = torch.empty(0)
        self.logarithms = torch.zeros(OCTAVES * BINS_AN_OCTAVE)

    def observe(self, decay: Tensor) -> None:
        """Round 2: decays (L, b, G, N, K)."""
        length = len(decay)
        if not self.histogram.numel():
            self.histogram = torch.zeros(length, BINS)
        index = (decay * BINS).int().clamp_(0, BINS - 1)
        index += (torch.arange(length) * BINS).int().view(-1, 1, 1, 1, 1)
        counts = torch.bincount(index.flatten(), minlength=length * BINS)
        self.histogram += counts.view(length, BINS)
        octaves = -torch.log2((1 - decay).clamp(min=2.0**-OCTAVES, max=1.0))
        place = (octaves * BINS_AN_OCTAVE).int().clamp_(0, len(self.logarithms) - 1)
        self.logarithms += torch.bincount(place.flatten(), minlength=len(self.logarithms))

    def params(self) -> StepParams:
        """Logarithmic codes where most decays are near one (METHODS 7.2), else uniform ones."""
        pooled = self.histogram.sum(0)
        below = pooled.cumsum(0) / pooled.sum()
        median = (int((below < 0.5).sum()) + 0.5) / BINS
        if median > LOGARITHMIC_ABOVE:
            middles = torch.arange(len(self.logarithms), dtype=torch.float64) + 0.5
            deltas = torch.exp2(-middles / BINS_AN_OCTAVE)
            limit, steps = logarithmic_from_histogram(self.logarithms, deltas, self.site.bits)
            return StepParams(scale=torch.tensor([limit]), steps=steps)
        length = len(self.histogram)
        histogram = pooled.expand(length, BINS) if self.pooled else self.histogram
        return StepParams(scale=unsigned_scale(histogram, torch.ones(length), self.site.bits))
