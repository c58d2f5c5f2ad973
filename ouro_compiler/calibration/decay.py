"""Codes of a scan's decay a = exp(Delta A), most of it close to 1 (METHODS 7.2).

LtSQ codes 1 - a in powers of two: q = clip(round(-r log2((1 - a) / s)), 0, 2^b - 1), and 1 - a is
s 2^(-q/r). Plain, r = s = 1: the rate at which a state is forgotten is then off by half an octave
at most. Calibrated, r and s are those of the grid with the least mean squared error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ouro_compiler.calibration.search import LOGARITHMIC_STEPS, round_to_half

LIMITS = 15  # of s, equally far apart from 0.3 to 1 of the largest 1 - a
LEAST_DECAY = 2.0**-126  # 1 - a of a state that is never forgotten, as log2 sees it


@dataclass(frozen=True, kw_only=True)
class DecayCode:
    """A decay's quantizer: logarithmic with steps r > 0, else uniform with a scale (METHODS 7.2).

    error: mean squared, on what it was fitted to.
    """

    bits: int
    limit: float = 0.0
    steps: int = 0
    scale: float | None = None
    error: float = 0.0

    def decoded(self, decay: Tensor) -> Tensor:
        """1 - a-hat of a, in fp64: near 1 it has more digits than a-hat."""
        top = 2**self.bits - 1
        if self.scale is not None:
            return 1 - torch.round(decay.double() / self.scale).clamp(0, top) * self.scale
        return _logarithmic(1 - decay.double(), self.limit, self.steps, top)


def _logarithmic(delta: Tensor, limit: float, steps: int, top: int) -> Tensor:
    exponent = torch.log2(delta.clamp(min=LEAST_DECAY) / limit)
    code = torch.round(-steps * exponent).clamp(0, top)
    return limit * torch.exp2(-code / steps)


def fit_decay(
    decay: Tensor, least: float, bits: int, *, kind: str = "calibrated", skewness: float = 0.93
) -> DecayCode:
    """The code of a sample (n,) of decays; least: the smallest of all decays.

    kind: uniform, plain or calibrated. Uniform too where the median does not exceed `skewness`:
    LtSQ pays only where most of the mass is close to 1.
    """
    if kind == "uniform" or float(decay.median()) <= skewness:
        return fit_uniform(decay, bits)
    if kind == "plain":
        return _with_error(DecayCode(bits=bits, limit=1.0, steps=1), decay)
    return fit_logarithmic(decay, least, bits)


def fit_uniform(decay: Tensor, bits: int) -> DecayCode:
    """Codes 0 .. 2^b - 1 from 0 to the largest decay."""
    peak = float(decay.max()) or 1.0
    scale = float(round_to_half(torch.tensor(peak / (2**bits - 1))))
    return _with_error(DecayCode(bits=bits, scale=scale), decay)


def fit_logarithmic(decay: Tensor, least: float, bits: int) -> DecayCode:
    """The grid's r and s with the least mean squared error; ties go to the smaller r."""
    delta = 1 - decay.double()
    top = 2**bits - 1
    span = max(1 - least, LEAST_DECAY)
    octaves = torch.log2(delta.clamp(min=LEAST_DECAY))
    best = DecayCode(bits=bits, limit=span, steps=1, error=float("inf"))
    for share in torch.linspace(0.3, 1.0, LIMITS, dtype=torch.float64).tolist():
        limit = share * span
        exponent = octaves - torch.log2(torch.tensor(limit, dtype=torch.float64))
        for steps in LOGARITHMIC_STEPS:
            code = torch.round(-steps * exponent).clamp(0, top)
            error = float((limit * torch.exp2(-code / steps) - delta).square().mean())
            if error < best.error:
                best = DecayCode(bits=bits, limit=limit, steps=steps, error=error)
    return best


def _with_error(code: DecayCode, decay: Tensor) -> DecayCode:
    error = float((code.decoded(decay) - (1 - decay.double())).square().mean())
    return DecayCode(
        bits=code.bits, limit=code.limit, steps=code.steps, scale=code.scale, error=error
    )
