"""What happens inside selective scans on calibration images: Delta, exp(Delta A), Delta B, h."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ouro_compiler.calibration.clusters import group_peaks
from ouro_compiler.calibration.search import BINS, symmetric_from_histogram
from ouro_compiler.graph import DECAY, INPUT, STATE, StepParams
from ouro_compiler.ops.activations import softplus
from ouro_compiler.ops.selective_scan import per_channel

SAMPLE = 1 << 15  # decays that one batch adds to the sample


@dataclass(frozen=True, kw_only=True)
class ScanInputs:
    """Operands of a `selective_scan` in fp32, delta already a step.

    u and step are (B, D, L), B and C (B, N, L) or (B, G, N, L); A (D, N), all as the op has them.
    """

    u: Tensor
    step: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    reverse: bool

    @staticmethod
    def of(arguments: list[Any]) -> ScanInputs:
        """From the values of the op's ten arguments."""
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse = arguments
        step = delta.float()
        if delta_bias is not None:
            step = step + delta_bias.float()[:, None]
        step = softplus(step) if delta_softplus else step
        return ScanInputs(
            u=u.float(),
            step=step,
            A=A.float(),
            B=B.float(),
            C=C.float(),
            D=D,
            z=z,
            reverse=bool(reverse),
        )

    @property
    def length(self) -> int:
        """Time steps L."""
        return self.u.shape[2]

    def first(self, count: int) -> ScanInputs:
        """The same of the first samples."""
        some = slice(count)
        return dataclasses.replace(
            self,
            u=self.u[some],
            step=self.step[some],
            B=self.B[some],
            C=self.C[some],
            z=None if self.z is None else self.z[some],
        )

    def arriving(self, t: int) -> Tensor:
        """Delta B (B, D, N) of token t."""
        b = per_channel(self.B[..., t : t + 1], self.u.shape[1])[..., 0]
        return self.step[:, :, t, None] * b

    def states(self) -> Iterator[tuple[int, Tensor]]:
        """(token, h (B, D, N) after it) in scan order."""
        h = self.u.new_zeros(self.u.shape[0], *self.A.shape)
        order = range(self.length)
        for t in reversed(order) if self.reverse else order:
            decay = torch.exp(self.step[:, :, t, None] * self.A)
            h = decay * h + self.arriving(t) * self.u[:, :, t, None]
            yield t, h


def quantized_scan(scan: ScanInputs, inside: Mapping[int, StepParams], bits: int) -> Tensor:
    """y (B, D, L) of a scan with quantizers inside: those of DECAY, INPUT and STATE given."""
    decay, arriving, state = (inside.get(index) for index in (DECAY, INPUT, STATE))
    steps = 0 if decay is None else decay.steps
    uniform = None if decay is None or steps else decay.scale
    found: Tensor = torch.ops.ouro.quantized_selective_scan(
        *(scan.u, scan.step, scan.A, scan.B, scan.C, scan.D, scan.z, uniform),
        *(None if arriving is None else arriving.scale, None),
        *(None if state is None else state.scale, None, None if state is None else state.factor),
        *(float(decay.scale) if decay is not None and steps else 0.0, steps, bits, 8, 1),
        *(state is not None and state.before_rounding, scan.reverse),
    )
    return found


class ScanObserver:
    """Ranges, histograms and a sample of what one scan quantizes (METHODS 7).

    Feed every batch to `observe_range`, call `group`, then feed every batch to `observe_histogram`.
    Memory is that of groups x BINS counts and of a sample, which grows by SAMPLE numbers a batch.
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.decays: list[Tensor] = []
        self.least_decay = 1.0
        self.input_peak = self.state_peak = torch.empty(0)  # (L,), by token
        self.groups = torch.empty(0, dtype=torch.int64)  # (L,)
        self.input_histogram = self.state_histogram = torch.empty(0)

    def observe_range(self, scan: ScanInputs) -> None:
        """Round 1."""
        self._sample(scan)
        least = torch.exp(scan.step.amax((0, 2)) * scan.A.amin(1)).min()
        self.least_decay = min(self.least_decay, float(least))
        inputs, states = torch.zeros(scan.length), torch.zeros(scan.length)
        for t, h in scan.states():
            inputs[t], states[t] = scan.arriving(t).abs().max(), h.abs().max()
        if self.input_peak.numel():
            inputs = torch.maximum(inputs, self.input_peak)
            states = torch.maximum(states, self.state_peak)
        self.input_peak, self.state_peak = inputs, states

    def group(self, ids: Tensor) -> None:
        """Between the rounds: the group (L,) of each token, 0 .. G - 1."""
        self.groups = ids
        count = int(ids.max()) + 1
        self.input_histogram = torch.zeros(count, BINS)
        self.state_histogram = torch.zeros(count, BINS)

    def observe_histogram(self, scan: ScanInputs) -> None:
        """Round 2."""
        input_peak = group_peaks(self.input_peak, self.groups)
        state_peak = group_peaks(self.state_peak, self.groups)
        for t, h in scan.states():
            g = int(self.groups[t])
            for histogram, values, peak in (
                (self.input_histogram, scan.arriving(t), input_peak[g]),
                (self.state_histogram, h, state_peak[g]),
            ):
                if peak > 0:
                    histogram[g] += torch.histc(values.abs(), BINS, 0.0, float(peak))

    def decay_sample(self) -> Tensor:
        """Decays (n,) drawn from all samples, channels, states and time steps."""
        return torch.cat(self.decays)

    def scales(self, bits: int) -> tuple[Tensor, Tensor]:
        """Scales (L,) of Delta B and of the state, one a group, by clipping search (METHODS P4)."""
        found = []
        for histogram, peak in (
            (self.input_histogram, self.input_peak),
            (self.state_histogram, self.state_peak),
        ):
            scale = symmetric_from_histogram(histogram, group_peaks(peak, self.groups), bits)
            found.append(scale[self.groups])
        return found[0], found[1]

    def _sample(self, scan: ScanInputs) -> None:
        batch, channels, length = scan.step.shape
        count = min(SAMPLE, scan.step.numel() * scan.A.shape[1])

        def drawn(size: int) -> Tensor:
            return torch.randint(size, (count,), generator=self.generator)

        e = drawn(channels)
        step = scan.step[drawn(batch), e, drawn(length)]
        self.decays.append(torch.exp(step * scan.A[e, drawn(scan.A.shape[1])]))
