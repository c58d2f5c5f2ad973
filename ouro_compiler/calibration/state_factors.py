"""Reparameterization of a scan's state (METHODS 8.4, 8.5): h' = h / (r_C r_L(t) r_D).

It changes nothing in exact arithmetic and evens out the state's magnitudes over channels, time and
states. As h is quantized with one step S(t) a time step, `quantized_selective_scan` does the same
with steps S(t) r_L(t) and `state_factor` r_C r_D: what is rounded is h / (r_C r_D S(t) r_L(t)).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ouro_compiler.calibration.scan_states import ScanInputs
from ouro_compiler.calibration.search import round_to_half
from ouro_compiler.ops.selective_scan import per_channel

# A channel, step or state whose mean magnitude is this share of the largest one's counts as that
# large: it may be silent on calibration images, and a factor near 0 would leave it no range.
_FLOOR = 1e-4


@dataclass(frozen=True, kw_only=True)
class StateFactors:
    """Positive: channel r_C (D,), time r_L (L,) by token, state r_D (N,)."""

    channel: Tensor
    time: Tensor
    state: Tensor

    @property
    def static(self) -> Tensor:
        """r_C r_D (D, N): what does not depend on time."""
        return self.channel[:, None] * self.state


class StateStatistics:
    """The state's mean magnitudes, and then, given factors, the ranges of h' and of y'."""

    def __init__(self) -> None:
        self.images = 0
        self.sums: Tensor | None = None  # |h| over the images: by channel, by time, by state
        self.shapes = (0, 0, 0)
        self.state_peak = self.output_peak = self.output_sum = torch.empty(0)  # (L,)

    def observe_means(self, scan: ScanInputs) -> None:
        """Round 1."""
        channels, states = scan.A.shape
        if self.sums is None:
            self.shapes = (channels, scan.length, states)
            self.sums = torch.zeros(sum(self.shapes))
        by_channel, by_time, by_state = self.sums.split(self.shapes)  # views
        for t, h in scan.states():
            magnitude = h.abs().sum(0)
            by_channel += magnitude.sum(1)
            by_state += magnitude.sum(0)
            by_time[t] += magnitude.sum()
        self.images += len(scan.u)

    def factors(self) -> StateFactors:
        """By round 1: each mean to the power of its share of the dispersion."""
        assert self.sums is not None
        channels, length, states = self.shapes
        sums = self.sums.split(self.shapes)
        counts = (length * states, channels * states, channels * length)
        means = [one / (count * self.images) for one, count in zip(sums, counts, strict=True)]
        return state_factors(*means)

    def observe_ranges(self, scan: ScanInputs, factors: StateFactors) -> None:
        """Round 2: of |h'| and, before D u is added, of |y'| = |y / r_C|, by token."""
        c = per_channel(scan.C, scan.u.shape[1])
        state, output, total = (torch.zeros(scan.length) for _ in range(3))
        for t, h in scan.states():
            state[t] = (h / factors.static).abs().max() / factors.time[t]
            y = ((h * c[..., t]).sum(-1) / factors.channel).abs()
            output[t], total[t] = y.max(), y.sum()
        if self.state_peak.numel():
            state = torch.maximum(state, self.state_peak)
            output = torch.maximum(output, self.output_peak)
            total = total + self.output_sum
        self.state_peak, self.output_peak, self.output_sum = state, output, total


def state_factors(channel: Tensor, time: Tensor, state: Tensor) -> StateFactors:
    """Factors from mean magnitudes (D,), (L,), (N,): r = mean^p, p in proportion to its deviation.

    Means that are all alike have no power, and a factor of 1.
    """
    means = [one.clamp(min=float(one.max()) * _FLOOR) for one in (channel, time, state)]
    deviations = torch.stack([one.std(correction=0) for one in means])
    powers = deviations / deviations.sum().clamp(min=1e-30)
    found = [round_to_half(one**power + 1e-15) for one, power in zip(means, powers, strict=True)]
    return StateFactors(channel=found[0], time=found[1], state=found[2])


def no_factors(channels: int, length: int, states: int) -> StateFactors:
    """Factors of 1."""
    return StateFactors(
        channel=torch.ones(channels), time=torch.ones(length), state=torch.ones(states)
    )


def fold_into_projection(weight: Tensor, state: Tensor) -> Tensor:
    """An x_proj's weight (R + 2N, K) that projects to B / r_D and C r_D; state: r_D (N,).

    A scan with this weight runs on h / r_D and gives the same y, so that r_D costs nothing at run
    time (METHODS 8.5). Rows are those of delta's R, of B and of C.
    """
    states = len(state)
    rank = len(weight) - 2 * states
    rows = torch.cat([torch.ones(rank), 1 / state, state]).to(weight.dtype)
    return weight * rows[:, None]
