"""Configuration: frozen dataclasses, presets, strict conversion to and from dictionaries."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeVar

from ouro_compiler.errors import UsageError
from ouro_compiler.precision_specs import BITS
from ouro_compiler.precision_specs import LayerBits as LayerBits
from ouro_compiler.precision_specs import MixedSpec as MixedSpec
from ouro_compiler.precision_specs import RefineSpec as RefineSpec
from ouro_compiler.recipe_specs import KsqSpec, Ptq4vmSpec, QmambaSpec, QuambaSpec

SsmCoverage = Literal["none", "params", "full"]
OutlierMode = Literal["none", "static", "dynamic"]
InlierScale = Literal["per_time_step", "per_tensor"]
Threshold = Literal["static_t", "scalar", "dynamic_full", "dynamic_residual"]
Trigger = Literal["gated", "always", "global_any"]
Target = Literal["cpu", "cuda"]
ActivationDtype = Literal["auto", "fp32", "fp16", "bf16"]
Features = Literal["alpha", "yp"]
HiddenWeights = Literal["normalised", "raw", "uniform"]
OutputLossName = Literal["mae", "ce", "none"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class WeightSpec:
    """Weights: symmetric, one scale an output channel, clipped by search (METHODS P4, P5)."""

    bits: int = 4

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise UsageError(f"weight bits must be one of {BITS}, got {self.bits}")


@dataclass(frozen=True, kw_only=True)
class DynamicOutlierSpec:
    """Activations: static inlier scales, dynamic outlier lists (METHODS 3).

    inlier_scale: one scale and threshold a time step, or one a site for all of them, which does not
    depend on the resolution of the images.
    threshold: calibrated per time step (static_t), calibrated, one a site (scalar), or computed
    from each token at run time, from all its channels (dynamic_full) or with the listed ones
    counted as 0 (dynamic_residual). trigger: when channels may join a list: at steps where an
    unlisted one leaves the inlier range (gated), at all steps (always), or whenever any sample's
    does (global_any: not batch invariant, to reproduce a published release). METHODS 3.4.
    """

    inlier_bits: int = 4
    outlier_bits: int = 8  # 16 keeps outliers in floating point
    refresh_period: int = 10  # tokens between resets of the outlier list
    outliers: OutlierMode = "dynamic"
    inlier_scale: InlierScale = "per_time_step"
    threshold: Threshold = "static_t"
    trigger: Trigger = "gated"
    kappa: float = 3.0  # outliers exceed mean + kappa standard deviations of a token
    kappa_delta: float = 4.0  # the same for the scan's delta before softplus

    def __post_init__(self) -> None:
        if self.inlier_bits not in BITS or self.outlier_bits not in (8, 16):
            raise UsageError(
                f"activations take inliers of {BITS} and outliers of 8 or 16 bits, "
                f"got {self.inlier_bits} and {self.outlier_bits}"
            )
        if self.refresh_period < 1:
            raise UsageError(f"refresh_period must be at least 1, got {self.refresh_period}")
        if not (0 <= self.kappa < float("inf") and 0 <= self.kappa_delta < float("inf")):
            raise UsageError("kappa and kappa_delta must be numbers of at least 0")
        for name, allowed in (
            ("outliers", OutlierMode),
            ("inlier_scale", InlierScale),
            ("threshold", Threshold),
            ("trigger", Trigger),
        ):
            _check_choice(name, getattr(self, name), allowed)


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """How a model is quantized. Layer names match `include` and none of `exclude` (fnmatch).

    head_bits: of the weights of classifier heads, whose arithmetic stays in floating point; None
    leaves them in fp16. activation_dtype: of what products hand to the kernels behind them (pass
    narrow_activations); auto is fp16 for CUDA and fp32 for a CPU.
    """

    weights: WeightSpec = field(default_factory=WeightSpec)
    activations: DynamicOutlierSpec = field(default_factory=DynamicOutlierSpec)
    ssm: SsmCoverage = "params"
    head_bits: int | None = None
    activation_dtype: ActivationDtype = "auto"
    recipe: str = "ouromamba"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    seed: int = 0
    overrides: tuple[LayerBits, ...] = ()  # mixed precision (docs/mixed_precision.md)
    refine: RefineSpec = field(default_factory=lambda: RefineSpec(epochs=0))
    ptq4vm: Ptq4vmSpec = field(default_factory=Ptq4vmSpec)
    qmamba: QmambaSpec = field(default_factory=QmambaSpec)
    ksq: KsqSpec = field(default_factory=KsqSpec)
    quamba: QuambaSpec = field(default_factory=QuambaSpec)

    def __post_init__(self) -> None:
        _check_choice("ssm", self.ssm, SsmCoverage)
        if self.head_bits is not None and self.head_bits not in BITS:
            raise UsageError(f"head_bits must be one of {BITS} or none, got {self.head_bits}")
        _check_choice("activation_dtype", self.activation_dtype, ActivationDtype)

    def for_target(self, target: Target) -> QuantConfig:
        """The configuration with what is left to the target decided."""
        if self.activation_dtype != "auto":
            return self
        return dataclasses.replace(self, activation_dtype="fp16" if target == "cuda" else "fp32")

    def for_layer(self, layer: str) -> QuantConfig:
        """The configuration as one layer sees it: the last of `overrides` that names it applied."""
        found = [one for one in self.overrides if fnmatchcase(layer, one.pattern)]
        if not found:
            return self
        return dataclasses.replace(
            self,
            weights=dataclasses.replace(self.weights, bits=found[-1].weights),
            activations=dataclasses.replace(self.activations, inlier_bits=found[-1].activations),
            overrides=(),
        )

    def selects(self, layer: str) -> bool:
        """Do `include` and `exclude` leave this layer in?"""
        included = any(fnmatchcase(layer, pattern) for pattern in self.include)
        return included and not any(fnmatchcase(layer, pattern) for pattern in self.exclude)

    def with_setting(self, setting: str) -> QuantConfig:
        """A copy with "name=value" applied; of a nested field "activations.trigger=always".

        Raises UsageError for a name that is none and a value that does not fit.
        """
        name, equals, value = setting.partition("=")
        if not equals:
            raise UsageError(f"a setting is written name=value, got {setting!r}")
        return _with(self, name.strip().split("."), value.strip(), name.strip())

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> QuantConfig:
        """Inverse of to_dict. Raises UsageError on unknown keys."""
        return _from_dict(QuantConfig, data)


def _check_choice(name: str, value: Any, allowed: Any) -> None:
    options = typing.get_args(allowed)
    if value not in options:
        raise UsageError(f"{name} must be one of {', '.join(options)}, got {value!r}")


def _with(config: T, path: list[str], value: str, full: str) -> T:
    hints = typing.get_type_hints(type(config))
    if path[0] not in hints:
        known = ", ".join(hints)
        raise UsageError(f"there is no setting {full}: {type(config).__name__} has {known}")
    kind, optional = _without_none(hints[path[0]])
    if optional and len(path) == 1 and value == "none":
        after: Any = None
    elif dataclasses.is_dataclass(kind):
        if len(path) == 1:
            inner = ", ".join(typing.get_type_hints(kind))
            raise UsageError(f"{full} has parts of its own: set {full}.NAME, one of {inner}")
        before = getattr(config, path[0])
        after = _with(
            typing.cast(type, kind)() if before is None else before, path[1:], value, full
        )
    elif len(path) > 1:
        raise UsageError(f"there is no setting {full}: {path[0]} is a single value")
    elif any(map(dataclasses.is_dataclass, typing.get_args(kind))):
        raise UsageError(f"{full} cannot be set as text: use --replay, or the Python interface")
    else:
        after = _parsed(kind, value, full)
    return dataclasses.replace(config, **{path[0]: after})  # type: ignore[type-var]


def _without_none(hint: Any) -> tuple[Any, bool]:
    """(int, True) for `int | None`, (int, False) for `int`."""
    options = typing.get_args(hint)
    if type(None) not in options:
        return hint, False
    (kind,) = (one for one in options if one is not type(None))
    return kind, True


def _parsed(kind: Any, value: str, name: str) -> Any:
    """A setting's text as the type that its field is declared with."""
    if kind is bool:
        if value.lower() not in ("true", "false"):
            raise UsageError(f"{name} must be true or false, got {value!r}")
        return value.lower() == "true"
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        return tuple(_parsed(item, one, name) for one in value.split(",") if one)
    if typing.get_origin(kind) is Literal:
        return value  # checked by the field's owner
    try:
        return kind(value)
    except ValueError:
        raise UsageError(f"{name} must be of type {kind.__name__}, got {value!r}") from None


def _from_dict(cls: type[T], data: Mapping[str, Any]) -> T:
    known = typing.get_type_hints(cls)
    if not isinstance(data, Mapping):
        raise UsageError(f"{cls.__name__} is read from names and values, got {data!r}")
    unknown = sorted(set(data) - set(known))
    if unknown:
        raise UsageError(f"{cls.__name__} has no field {', '.join(unknown)}")
    values: dict[str, Any] = {}
    for name, value in data.items():
        hint = known[name]
        if dataclasses.is_dataclass(hint):
            values[name] = _from_dict(typing.cast(type, hint), value)
        elif typing.get_origin(hint) is tuple and isinstance(value, (list, tuple)):
            inner: type = typing.get_args(hint)[0]
            is_nested = dataclasses.is_dataclass(inner)
            values[name] = tuple(_from_dict(inner, one) if is_nested else one for one in value)
        else:
            values[name] = value
    return cls(**values)


def _preset(weight_bits: int, inlier_bits: int, outlier_bits: int) -> QuantConfig:
    return QuantConfig(
        weights=WeightSpec(bits=weight_bits),
        activations=DynamicOutlierSpec(inlier_bits=inlier_bits, outlier_bits=outlier_bits),
    )


W4A4 = _preset(4, 4, 8)
W4A8 = _preset(4, 8, 16)
W6A6 = _preset(6, 6, 8)
W8A8 = _preset(8, 8, 16)
PRESETS: dict[str, QuantConfig] = {"w4a4": W4A4, "w4a8": W4A8, "w6a6": W6A6, "w8a8": W8A8}


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an image file becomes a model's input (timm's meaning of crop: size / resized side)."""

    size: int = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    crop: float = 0.875

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            raise UsageError("preprocessing needs a mean and a std for 1 or 3 channels")
        if self.size < 1 or not 0 < self.crop <= 1 or min(self.std) <= 0:
            raise UsageError("preprocessing needs size >= 1, 0 < crop <= 1 and std > 0")

    @property
    def channels(self) -> int:
        """Channels of the model's input: 1 (grey) or 3 (RGB)."""
        return len(self.mean)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Preprocessing:
        """Inverse of to_dict. Raises UsageError on unknown keys."""
        return _from_dict(Preprocessing, data)


@dataclass(frozen=True, kw_only=True)
class SynthesisSpec:
    """How calibration images are made from a model (METHODS 5.2).

    iterations, batch_size, variation_weight: None lets the size of the images and of the model
    decide.
    features: what patches are compared by: `alpha` (implicit attention, of `alpha_channels`
    channels of each scan, drawn anew each iteration) or `yp` (outputs).
    hidden: weights of the states averaged over a neighbourhood: Delta, summing to 1 (normalised) or
    not (raw), or the same for all (uniform). jitter: the shift of the first half of the iterations,
    of 224 pixels; the second half doubles it.
    """

    images: int = 128
    iterations: int | None = None
    batch_size: int | None = None
    features: Features = "yp"
    alpha_channels: int = 16
    patch: int = 5
    positives: int = 12
    temperature: float = 0.1
    hidden: HiddenWeights = "normalised"
    contrastive_weight: float = 1.0
    output_loss: OutputLossName = "ce"
    output_weight: float = 1.0
    variation_weight: float | None = None
    jitter: float = 15.0
    flip: bool = True
    learning_rate: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("images", "iterations", "batch_size", "positives", "alpha_channels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} of synthesis must be at least 1, got {value}")
        if self.patch < 3 or self.patch % 2 == 0:
            raise UsageError(f"patch must be an odd number of at least 3, got {self.patch}")
        for name, allowed in (
            ("features", Features),
            ("hidden", HiddenWeights),
            ("output_loss", OutputLossName),
        ):
            if getattr(self, name) not in typing.get_args(allowed):
                options = ", ".join(typing.get_args(allowed))
                raise UsageError(f"{name} must be one of {options}, got {getattr(self, name)!r}")
        for name in ("contrastive_weight", "output_weight", "variation_weight", "jitter"):
            if not 0 <= (getattr(self, name) or 0) < float("inf"):
                raise UsageError(f"{name} must be a number of at least 0")
        if not 0 < self.temperature < float("inf") or not 0 < self.learning_rate < float("inf"):
            raise UsageError("temperature and learning_rate of synthesis must be above 0")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> SynthesisSpec:
        """Inverse of to_dict. Raises UsageError on unknown keys."""
        return _from_dict(SynthesisSpec, data)
