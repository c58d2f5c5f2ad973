"""Settings of single recipes: fields of QuantConfig that the others do not read."""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Literal

from ouro_compiler.errors import UsageError

Decay = Literal["uniform", "plain", "calibrated"]
Grouping = Literal["contiguous", "kmeans"]


@dataclass(frozen=True, kw_only=True)
class Ptq4vmSpec:
    """PTQ4VM (METHODS 6). asymmetric: as published, simulated; else integer kernels run it.

    alpha: how much of an activation's range smoothing moves into the weight.
    """

    asymmetric: bool = True
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"alpha of ptq4vm must be in 0 .. 1, got {self.alpha}")


@dataclass(frozen=True, kw_only=True)
class QmambaSpec:
    """QMamba (METHODS 7). decay: how exp(Delta A) is coded.

    skewness: the median of exp(Delta A) above which LtSQ codes it; below, a uniform grid. groups:
    of time steps that share a scale of the hidden state. search_rounds: of the search for scales
    by the error of a block's output.
    """

    decay: Decay = "calibrated"
    skewness: float = 0.93
    groups: int = 8
    grouping: Grouping = "contiguous"
    search_rounds: int = 3

    def __post_init__(self) -> None:
        if self.decay not in typing.get_args(Decay):
            raise UsageError(f"decay of qmamba must be one of {_shown(Decay)}, got {self.decay!r}")
        if self.grouping not in typing.get_args(Grouping):
            options = _shown(Grouping)
            raise UsageError(f"grouping of qmamba must be one of {options}, got {self.grouping!r}")
        if self.groups < 1 or self.search_rounds < 0 or not 0 <= self.skewness <= 1:
            raise UsageError("qmamba takes groups >= 1, search_rounds >= 0 and skewness in 0 .. 1")


@dataclass(frozen=True, kw_only=True)
class KsqSpec:
    """k-scaled quantization with a reparameterized state (METHODS 8)."""

    clusters: int = 4
    power_of_two: bool = True
    search_rounds: int = 3
    reparameterize: bool = True

    def __post_init__(self) -> None:
        if self.clusters < 1 or self.search_rounds < 0:
            raise UsageError("ksq takes clusters >= 1 and search_rounds >= 0")


@dataclass(frozen=True, kw_only=True)
class QuambaSpec:
    """Quamba (METHODS 9). percentile: of |x| at which the scan's input is clipped."""

    percentile: float = 0.9995
    hadamard: bool = True

    def __post_init__(self) -> None:
        if not 0.5 <= self.percentile <= 1:
            raise UsageError(f"percentile of quamba must be in 0.5 .. 1, got {self.percentile}")


def _shown(literal: object) -> str:
    return ", ".join(typing.get_args(literal))
