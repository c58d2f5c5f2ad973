"""Reparameterized states (METHODS 8.4 to 8.6, T18, T20)."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ouro_compiler.ops  # noqa: F401  (registers torch.ops.ouro)
from ouro_compiler.calibration.scan_states import ScanInputs, quantized_scan
from ouro_compiler.calibration.state_factors import (
    StateFactors,
    StateStatistics,
    fold_into_projection,
    state_factors,
)
from ouro_compiler.graph import STATE, StepParams
from tests.helpers import REPEATABLE, assert_close, generator, mamba_selective_scan_ref, randn

CHANNELS, STATES, LENGTH = 6, 4, 11
DIRECTIONS = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


def scan(reverse: bool = False, seed: int = 0) -> ScanInputs:
    return ScanInputs(
        u=randn(seed, 2, CHANNELS, LENGTH),
        step=randn(seed + 1, 2, CHANNELS, LENGTH).abs() * 0.3,
        A=-1 - 3 * torch.rand(CHANNELS, STATES, generator=generator(seed + 2)),
        B=randn(seed + 3, 2, STATES, LENGTH),
        C=randn(seed + 4, 2, STATES, LENGTH),
        D=None,
        z=None,
        reverse=reverse,
    )


def factors(seed: int = 0) -> StateFactors:
    """Any positive ones, three orders of magnitude apart."""

    def drawn(shift: int, size: int) -> Tensor:
        return torch.exp(2 * randn(seed + shift, size)).half().float()

    return StateFactors(channel=drawn(5, CHANNELS), time=drawn(6, LENGTH), state=drawn(7, STATES))


def reparameterized(
    given_scan: ScanInputs, r: StateFactors, scale: np.ndarray | None, bits: int = 8
) -> np.ndarray:
    """METHODS 8.4 and 8.6 as written, one step after the other in fp64: y (B, D, L).

    With steps `scale` (L,) h' is rounded for the next step, and y reads it before.
    """
    u, step, A, B, C = (
        getattr(given_scan, name).double().numpy() for name in ("u", "step", "A", "B", "C")
    )
    channel, time, state = (
        getattr(r, name).double().numpy() for name in ("channel", "time", "state")
    )
    order = range(LENGTH)[::-1] if given_scan.reverse else range(LENGTH)
    h, before, y = np.zeros((2, CHANNELS, STATES)), 1.0, np.zeros(u.shape)
    for t in order:
        decay = np.exp(step[:, :, t, None] * A) * before / time[t]
        arriving = step[:, :, t, None] * B[:, None, :, t] * u[:, :, t, None]
        h = decay * h + arriving / (channel[:, None] * time[t] * state)
        readout = C[:, None, :, t] * state * time[t]
        y[:, :, t] = channel * (h * readout).sum(-1)
        if scale is not None:
            most = 2 ** (bits - 1) - 1
            h = np.clip(np.rint(h / scale[t]), -most, most) * scale[t]
        before = time[t]
    return y


def mamba(given_scan: ScanInputs) -> Tensor:
    """mamba_ssm's own reference; reversed by flipping time."""
    names = ("u", "step", "A", "B", "C")
    u, step, A, B, C = (getattr(given_scan, name) for name in names)
    if given_scan.reverse:
        u, step, B, C = (one.flip(-1) for one in (u, step, B, C))
    y = mamba_selective_scan_ref()(u, step, A, B, C)
    return y.flip(-1) if given_scan.reverse else y


@DIRECTIONS
def test_without_quantizers_nothing_changes(reverse: bool) -> None:
    """T18: any positive factors; mamba_ssm's scan is the plain one."""
    made = scan(reverse)
    assert_close(
        torch.from_numpy(reparameterized(made, factors(), None)), mamba(made).double(), 1e-5
    )
    ones = StateFactors(
        channel=torch.ones(CHANNELS), time=torch.ones(LENGTH), state=torch.ones(STATES)
    )
    exact = reparameterized(made, ones, None)
    error = np.abs(reparameterized(made, factors(), None) - exact).max()
    assert error <= 1e-12 * np.abs(exact).max()


@DIRECTIONS
@pytest.mark.parametrize("bits", [4, 8])
def test_steps_and_a_static_factor_are_the_reparameterization(reverse: bool, bits: int) -> None:
    """T18: the op on h, with S(t) r_L(t) and r_C r_D, against METHODS 8.6 on h'."""
    made, r = scan(reverse), factors(1)
    peak = StateStatistics()
    peak.observe_ranges(made, r)
    scale = (peak.state_peak / 2 ** (bits - 1)).double().numpy()
    expected = torch.from_numpy(reparameterized(made, r, scale, bits)).float()
    state = StepParams(
        scale=torch.from_numpy(scale).float() * r.time, factor=r.static, before_rounding=True
    )
    found = quantized_scan(made, {STATE: state}, bits)
    assert_close(found, expected, 1e-4)
    plain = mamba(made)
    assert (plain - expected).abs().max() > 1e-3 * plain.abs().max()  # rounding shows


@settings(REPEATABLE, max_examples=10)
@given(st.integers(0, 2**16))
def test_folding_the_states_factor(seed: int) -> None:
    """T18: x_proj's rows over r_D and times r_D make B' and C', and y stays as it is."""
    rank, width = 3, 5
    weight, x = randn(seed, rank + 2 * STATES, width), randn(seed + 1, 2, LENGTH, width)
    r = factors(seed)
    folded = fold_into_projection(weight, r.state)
    assert torch.equal(folded[:rank], weight[:rank])

    def projected(weight: Tensor) -> ScanInputs:
        _, B, C = (x @ weight.T).split([rank, STATES, STATES], -1)
        B, C = B.transpose(1, 2).contiguous(), C.transpose(1, 2).contiguous()
        return dataclasses.replace(scan(seed=seed), B=B, C=C)

    assert_close(mamba(projected(folded)), mamba(projected(weight)), 1e-5)
    # r_D is then no factor of the rounded state any more.
    ones = torch.ones(STATES)
    scale = torch.full((LENGTH,), 0.02)
    before = {STATE: StepParams(scale=scale, factor=r.channel[:, None] * r.state)}
    after = {STATE: StepParams(scale=scale, factor=r.channel[:, None] * ones)}
    wanted = quantized_scan(projected(weight), before, 8)
    difference = quantized_scan(projected(folded), after, 8) - wanted
    assert difference.abs().median() <= 1e-5 * wanted.abs().max()


def test_rank_one_magnitudes_are_evened_out() -> None:
    """T20."""
    r = factors(3)
    noise = torch.rand(CHANNELS, LENGTH, STATES, generator=generator(4)) + 0.5
    h = r.channel[:, None, None] * r.time[:, None] * r.state * noise
    means = (h.mean((1, 2)), h.mean((0, 2)), h.mean((0, 1)))
    found = state_factors(*means)
    evened = h / (found.channel[:, None, None] * found.time[:, None] * found.state)
    assert evened.max() / evened.mean() < 0.5 * h.max() / h.mean()


def test_factors_of_equal_means_are_one() -> None:
    found = state_factors(torch.full((4,), 3.0), torch.full((5,), 3.0), torch.full((1,), 3.0))
    for one in (found.channel, found.time, found.state):
        assert torch.equal(one, torch.ones_like(one))


def test_silent_channels_keep_a_range() -> None:
    """A mean of 0 would make a factor of 1e-15, and clip whatever such a channel ever holds."""
    found = state_factors(torch.tensor([0.0, 1.0, 9.0]), torch.ones(4), torch.ones(2))
    assert found.channel.min() >= 1e-4


@DIRECTIONS
def test_statistics_are_those_of_the_states(reverse: bool) -> None:
    """Streamed over two batches; states by mamba's scan, one at a time."""
    batches = [scan(reverse, seed=seed) for seed in (0, 50)]
    statistics = StateStatistics()
    for one in batches:
        statistics.observe_means(one)
    states = torch.cat([_states(one) for one in batches])  # (B, D, N, L)
    magnitude = states.abs()
    expected = state_factors(
        magnitude.mean((0, 2, 3)), magnitude.mean((0, 1, 2)), magnitude.mean((0, 1, 3))
    )
    found = statistics.factors()
    for name in ("channel", "time", "state"):
        assert_close(getattr(found, name), getattr(expected, name), 2e-3)  # to fp16
    r = factors(9)
    for one in batches:
        statistics.observe_ranges(one, r)
    peak = (states / r.static[..., None] / r.time).abs().amax((0, 1, 2))
    assert_close(statistics.state_peak, peak, 1e-5)
    y = torch.cat([mamba(one) for one in batches]) / r.channel[:, None]
    assert_close(statistics.output_peak, y.abs().amax((0, 1)), 1e-5)
    assert_close(statistics.output_sum, y.abs().sum((0, 1)), 1e-5)


def _states(given_scan: ScanInputs) -> Tensor:
    found = []
    for n in range(STATES):
        C = torch.zeros_like(given_scan.C)
        C[:, n] = 1
        found.append(mamba(dataclasses.replace(given_scan, C=C)))
    return torch.stack(found, 2)
