"""LtSQ and its alternatives (METHODS 7.2, T14, T15, T17)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import ouro_compiler.ops  # noqa: F401  (registers torch.ops.ouro)
from ouro_compiler.calibration.decay import (
    DecayCode,
    fit_decay,
    fit_logarithmic,
    fit_uniform,
)
from tests.helpers import generator

BITS = pytest.mark.parametrize("bits", [4, 6, 8])


def decays(mean: float, seed: int = 0) -> Tensor:
    """exp(-Delta n), n = 1 .. 16, of lognormal Delta around `mean`."""
    delta = mean * torch.exp(torch.randn(4000, generator=generator(seed)))
    return torch.exp(-delta[:, None] * torch.arange(1, 17)).flatten()


def uniform_error(decay: Tensor, bits: int) -> float:
    """Mean squared error of the grid from the least to the largest value: numpy, fp64."""
    values = decay.double().numpy()
    step = (values.max() - values.min()) / (2**bits - 1)
    codes = np.clip(np.rint((values - values.min()) / step), 0, 2**bits - 1)
    return float(np.square(codes * step + values.min() - values).mean())


def error(code: DecayCode, decay: Tensor) -> float:
    return float((code.decoded(decay) - (1 - decay.double())).square().mean())


@BITS
def test_plain_is_half_an_octave_off_at_most(bits: int) -> None:
    """T14. Decays this close to 1 exist only as 1 - a; fp32 ends at 2^-126."""
    code = DecayCode(bits=bits, limit=1.0, steps=1)
    octaves = min(2**bits - 1, 50)
    delta = torch.exp2(-torch.linspace(0, octaves, 20_001, dtype=torch.float64))
    found = code.decoded(1 - delta)
    exact = 1 - (1 - delta)  # what 1 - a keeps of delta in fp64
    kept = exact > 0
    assert float(torch.log2(found / exact)[kept].abs().max()) <= 0.5 + 1e-6
    assert bool((found.diff() <= 0).all())  # monotone


@BITS
def test_the_ends_of_plain(bits: int) -> None:
    """T14: a state that is lost stays lost; one that is kept still fades, by the least step."""
    found = DecayCode(bits=bits, limit=1.0, steps=1).decoded(torch.tensor([0.0, 1.0]))
    assert float(1 - found[0]) == 0.0
    assert 0 < float(found[1]) == max(2.0 ** -(2**bits - 1), 2.0**-126)


@pytest.mark.parametrize("mean", [1e-4, 1e-3])
def test_plain_beats_uniform_near_one_at_four_bits(mean: float) -> None:
    """T15."""
    decay = decays(mean)
    assert decay.median() >= 0.99
    code = fit_decay(decay, float(decay.min()), 4, kind="plain")
    assert (code.steps, code.limit) == (1, 1.0)
    assert error(code, decay) < uniform_error(decay, 4)


@BITS
@pytest.mark.parametrize("mean", [1e-4, 1e-3])
def test_calibrated_beats_uniform_near_one(bits: int, mean: float) -> None:
    """T15."""
    decay = decays(mean)
    code = fit_logarithmic(decay, float(decay.min()), bits)
    assert code.error == pytest.approx(error(code, decay))
    assert code.error < uniform_error(decay, bits)


def test_calibrated_is_no_worse_than_uniform_from_95_percent_on() -> None:
    """T15."""
    decay = decays(5e-3)
    assert 0.95 <= decay.median() < 0.97
    code = fit_logarithmic(decay, float(decay.min()), 4)
    assert code.error <= 1.05 * uniform_error(decay, 4)


def test_calibrated_is_the_best_of_its_grid() -> None:
    """Against every (s, r) tried one by one."""
    decay = decays(1e-2)[:500]
    found = fit_logarithmic(decay, float(decay.min()), 4)
    span = 1 - float(decay.min())
    grid = [
        DecayCode(bits=4, limit=span * share, steps=steps)
        for share in np.linspace(0.3, 1, 15)
        for steps in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
    ]
    assert found.error == pytest.approx(min(error(code, decay) for code in grid), rel=1e-9)


def test_the_gate() -> None:
    """T17: flat decays get a uniform grid, those close to 1 a logarithmic one."""
    flat = torch.rand(5000, generator=generator(3))
    assert fit_decay(flat, 0.0, 8).scale is not None
    near = torch.exp(-1e-3 * torch.exp(torch.randn(5000, generator=generator(4))))
    assert fit_decay(near, float(near.min()), 8).steps > 0
    assert fit_decay(near, float(near.min()), 8, kind="uniform").scale is not None
    assert fit_decay(near, float(near.min()), 8, skewness=1.0).scale is not None


@BITS
@pytest.mark.parametrize("kind", ["uniform", "plain", "calibrated"])
def test_a_code_decodes_as_the_scan_does(bits: int, kind: str) -> None:
    """h_1 = 1 and u_2 = 0, so that y_2 is the decay of step 2."""
    decay = torch.cat([decays(1e-2)[:200], decays(0.3)[:200]])
    code = {
        "uniform": fit_uniform(decay, bits),
        "plain": DecayCode(bits=bits, limit=1.0, steps=1),
        "calibrated": fit_logarithmic(decay, float(decay.min()), bits),
    }[kind]
    count = len(decay)
    u = torch.tensor([1.0, 0.0]).expand(1, count, 2)
    step = torch.stack([torch.ones(count), -decay.log()], -1)[None]
    scale = None if code.scale is None else torch.full((2,), code.scale)
    ones = torch.ones(1, 1, 2)
    y = torch.ops.ouro.quantized_selective_scan(
        *(u, step, -torch.ones(count, 1), ones, ones, None, None, scale),
        *(None, None, None, None, None, code.limit, code.steps, bits, 8, 10, False, False),
    )
    arriving = y[0, :, 0]  # 1: Delta B u
    assert torch.equal(arriving, torch.ones(count))
    # The op's decay is exp(-(-log a)): some lie on the other side of a code's edge.
    close = (y[0, :, 1].double() - (1 - code.decoded(decay))).abs() < 1e-6
    assert close.double().mean() > 0.99
