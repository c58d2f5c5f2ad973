"""Rows of the report: what became of every layer and site. A leaf that every package may fill."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

SCHEMA_VERSION = 1

LayerKind = Literal["linear", "conv", "scan"]
LayerStatus = Literal["quantized", "simulated", "skipped"]


@dataclass(kw_only=True)
class LayerRow:
    """One linear, convolution or scan of the model.

    status: "quantized" runs on integer codes; "simulated" runs in floating point on quantized and
    dequantized operands; "skipped" stays in floating point, for `reason`. `selected` says whether
    the recipe wanted it quantized.
    """

    name: str
    kind: LayerKind
    status: LayerStatus
    selected: bool
    reason: str | None = None
    weight_bits: int | None = None
    activation_bits: int | None = None
    kernel: str | None = None  # what runs it on the target; None in floating point


@dataclass(kw_only=True)
class KernelRow:
    """What runs one operator on the target, at `nodes` places of the graph.

    kernel: a generated kernel's label, or "reference" with the reason why.
    """

    op: str
    kernel: str
    nodes: int
    reason: str | None = None


@dataclass(kw_only=True)
class SiteRow:
    """One quantized activation: its inlier scales over time, and the share of outliers measured."""

    name: str
    bits: int
    outlier_bits: int | None  # None: the method has no outliers
    reverse: bool
    scale_min: float
    scale_median: float
    scale_max: float
    outlier_share: float | None = None


@dataclass(kw_only=True)
class CalibrationRow:
    """What calibrated: how many images of what; of synthesised ones how they were made."""

    description: str
    images: int
    synthesis: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class RefineRow:
    """One block whose scales were learned: 1 - cosine of its outputs before and after, as used.

    used: "learned", or "searched" where what was learned was no better on the calibration images
    and the scales of the search stay. seconds: of learning, on the run that did it.
    """

    block: str
    layers: int
    epochs: int
    loss_before: float
    loss_after: float
    used: Literal["learned", "searched"]
    seconds: float


@dataclass(kw_only=True)
class RefineReport:
    """Learned scales: a row a block; bytes_kept: the most held of values between blocks."""

    rows: list[RefineRow]
    images: int
    bytes_kept: int

    def to_dict(self, *, timing: bool) -> dict[str, Any]:
        """Without `timing` it is deterministic."""
        found = dataclasses.asdict(self)
        if not timing:
            for row in found["rows"]:
                del row["seconds"]
        return found


@dataclass(kw_only=True)
class MixedRow:
    """Layers that share their bits, and what was measured of each choice for them alone.

    options: dictionaries of weights, activations (bits), bytes, block_snr_db, logits_snr_db (null
    where there is no difference). chosen: the number of the option that was taken.
    """

    layers: list[str]
    options: list[dict[str, Any]]
    chosen: int


@dataclass(kw_only=True)
class MixedReport:
    """The search for bits: what was asked for, what it foresaw, and its measurements.

    snr_db, drop: of the choice, simulated before the model was compiled, null without a target.
    """

    budget_bytes: int | None
    min_snr_db: float | None
    max_drop: float | None
    smallest_bytes: int
    bytes: int
    snr_db: float | None
    drop: float | None
    met: bool
    rows: list[MixedRow]


@dataclass(kw_only=True)
class Report:
    """Everything `--report` writes. Fractions for accuracy, decibels for SNR, bytes, seconds."""

    config: dict[str, Any]
    calibration: CalibrationRow | None = None
    layers: list[LayerRow] = field(default_factory=list)
    sites: list[SiteRow] = field(default_factory=list)
    kernels: list[KernelRow] = field(default_factory=list)
    bytes_fp16: int = 0
    bytes_stored: int = 0
    bytes_by_part: dict[str, dict[str, int]] = field(default_factory=dict)
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    logits_snr_db: float | None = None
    snr_data: str | None = None  # what logits_snr_db and outlier_share were measured on
    outlier_share: float | None = None
    refine: RefineReport | None = None  # None: scales are those of the search
    mixed: MixedReport | None = None  # None: no search for bits
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def quantized(self) -> list[LayerRow]:
        """Layers that are quantized, simulated ones included."""
        return [row for row in self.layers if row.status != "skipped"]

    @property
    def skipped(self) -> list[LayerRow]:
        """Layers left in floating point."""
        return [row for row in self.layers if row.status == "skipped"]

    def fill_bytes(self, before: dict[str, int], stored: dict[str, int]) -> None:
        """Note sizes by part of the model: all parameters at 2 bytes, and as they are stored."""
        self.bytes_by_part = {
            part: {"fp16": before.get(part, 0), "stored": stored.get(part, 0)}
            for part in sorted(before.keys() | stored.keys())
        }
        self.bytes_fp16, self.bytes_stored = sum(before.values()), sum(stored.values())

    def to_dict(self, *, timing: bool = True) -> dict[str, Any]:
        """The documented JSON form (docs/report.md).

        Without `timing` it is deterministic, and says what was compiled and not how that was found.
        """
        found: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "config": self.config,
            "calibration": dataclasses.asdict(self.calibration) if self.calibration else None,
            "accuracy": {"before": self.accuracy_before, "after": self.accuracy_after},
            "logits_snr_db": _finite(self.logits_snr_db),
            "snr_data": self.snr_data,
            "layers": {
                "total": len(self.layers),
                "quantized": len(self.quantized),
                "simulated": sum(row.status == "simulated" for row in self.layers),
                "skipped": [
                    {"name": row.name, "reason": row.reason, "selected": row.selected}
                    for row in self.skipped
                ],
                "rows": [dataclasses.asdict(row) for row in self.layers],
            },
            "sites": [dataclasses.asdict(row) for row in self.sites],
            "kernels": [dataclasses.asdict(row) for row in self.kernels],
            "bytes": {
                "fp16": self.bytes_fp16,
                "stored": self.bytes_stored,
                "by_part": self.bytes_by_part,
            },
            "outlier_share": self.outlier_share,
            "refine": self.refine.to_dict(timing=timing) if self.refine else None,
            "notes": self.notes,
        }
        if timing:
            found["seconds"] = self.seconds
            found["mixed"] = dataclasses.asdict(self.mixed) if self.mixed else None
        return found


def _finite(value: float | None) -> float | None:
    """JSON has no infinity: an SNR without noise is null."""
    return value if value is not None and math.isfinite(value) else None
