"""Settings of learned scales and of mixed precision: fields of QuantConfig."""

from __future__ import annotations

from dataclasses import dataclass

from ouro_compiler.errors import UsageError

BITS = (4, 6, 8)


@dataclass(frozen=True, kw_only=True)
class LayerBits:
    """Bits of the layers whose names match a pattern (fnmatch), in place of the configuration's."""

    pattern: str
    weights: int
    activations: int

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str) or not self.pattern:
            raise UsageError(f"an override names layers by a pattern, got {self.pattern!r}")
        if self.weights not in BITS or self.activations not in BITS:
            raise UsageError(
                f"the override of {self.pattern} takes bits of {BITS}, "
                f"got {self.weights} for weights and {self.activations} for activations"
            )


@dataclass(frozen=True, kw_only=True)
class RefineSpec:
    """Learning of scales after calibration, block by block (METHODS 3.2.8); 0 epochs: none.

    learning_rate: of AdamW on the logarithms of weight and activation scales, so a step is relative
    (published code: 5e-4 on scales as they are, which on weights is as much); smoothing_rate: on
    those of smoothing vectors, where a recipe has any (0 leaves them). batch_size: images a step.
    """

    epochs: int = 10
    learning_rate: float = 5e-3
    smoothing_rate: float = 1e-2
    batch_size: int = 16
    clip: float = 2.0

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.batch_size < 1:
            raise UsageError("refine takes epochs >= 0 and batch_size >= 1")
        rates = (self.learning_rate, self.smoothing_rate)
        if not all(0 <= rate < float("inf") for rate in rates) or not self.clip > 0:
            raise UsageError("refine takes rates of at least 0 and clip above 0")


@dataclass(frozen=True, kw_only=True)
class MixedSpec:
    """What the bits of every layer are chosen for; at least one of the three.

    budget_mb: megabytes (10^6 bytes) that all stored parameters and scales may take. min_snr: of
    the logits, in decibels. max_drop: of the accuracy on images with labels, in points.
    """

    budget_mb: float | None = None
    min_snr: float | None = None
    max_drop: float | None = None

    def __post_init__(self) -> None:
        given = [one for one in (self.budget_mb, self.min_snr, self.max_drop) if one is not None]
        if not given:
            raise UsageError(
                "mixed precision needs something to aim at: a budget in megabytes, an SNR of the "
                "logits or a drop of the accuracy (--budget-mb, --min-snr, --max-drop)"
            )
        if not all(abs(one) < float("inf") for one in given):
            raise UsageError("the targets of mixed precision must be finite numbers")
        if (self.budget_mb is not None and self.budget_mb <= 0) or (
            self.max_drop is not None and self.max_drop < 0
        ):
            raise UsageError("mixed precision takes a budget above 0 and a drop of at least 0")
