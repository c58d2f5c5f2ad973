"""KernelSpec: which kernel, in enums and integers; everything generated follows from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum


class Template(str, Enum):
    """Files of `kernels/templates` (Triton, `<value>_kernel`) and `kernels/cpp/templates` (C++)."""

    QUANTIZE = "quantize_dynamic_outlier"
    DEQUANTIZE = "dequantize_dynamic_outlier"
    ADD_NORM = "add_norm"
    ADD_NORM_QUANTIZE = "add_norm_quantize"
    CROSS_MERGE_QUANTIZE = "cross_merge_norm_quantize"
    CONV_QUANTIZE = "causal_conv1d_quantize"
    GATE_SUM_QUANTIZE = "gate_sum_quantize"
    LINEAR = "linear_dynamic_outlier"
    CONV = "causal_conv1d"
    DEPTHWISE_CONV = "depthwise_conv"
    SCAN = "selective_scan"
    SCAN_CHUNKS = "selective_scan_chunks"
    SCAN_DYNAMIC_OUTLIER = "selective_scan_dynamic_outlier"
    SCAN_DYNAMIC_OUTLIER_CHUNKS = "selective_scan_dynamic_outlier_chunks"
    QUANTIZED_SCAN = "quantized_selective_scan"
    QUANTIZING_LINEAR = "quantizing_linear"  # two launches as one
    # C++ only
    QUANTIZE_STATIC = "quantize_static_outlier"
    CROSS_SCAN = "cross_scan"
    CROSS_MERGE = "cross_merge"
    DEQUANTIZE_WEIGHT = "dequantize_weight"
    SCAN_BACKWARD = "selective_scan_backward"
    CONV_BACKWARD = "causal_conv1d_backward"
    PATCHED_SCAN = "patched_scan"
    PATCHED_SCAN_BACKWARD = "patched_scan_backward"


class Epilogue(str, Enum):
    """What a product's tile goes through before it is stored, in the order given."""

    BIAS = "bias"
    SILU = "silu"
    SOFTPLUS = "softplus"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    RESIDUAL = "residual"


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """A kernel to generate.

    constants: a value for every constexpr parameter of the template, sorted by name.
    others: kernels of the same template that one launch computes besides (`grouping.py`).
    """

    template: Template
    constants: tuple[tuple[str, int], ...]
    epilogue: tuple[Epilogue, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    others: tuple[KernelSpec, ...] = ()

    def __post_init__(self) -> None:
        if list(self.constants) != sorted(self.constants):
            raise ValueError("constants must be sorted by name")
        if any(type(value) is not int for _, value in self.constants):
            raise ValueError(f"constants must be integers, got {self.constants}")

    def __getitem__(self, name: str) -> int:
        """The value of a constant. Raises KeyError."""
        return dict(self.constants)[name]

    @property
    def digest(self) -> str:
        """sha256 of everything in the spec, in hexadecimal."""
        content = {
            "template": self.template.value,
            "constants": self.constants,
            "epilogue": [one.value for one in self.epilogue],
            "options": [self.num_warps, self.num_stages],
        }
        if self.others:
            content["others"] = [one.digest for one in self.others]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def members(self) -> tuple[KernelSpec, ...]:
        """The kernels of a group, each by itself; of any other spec itself alone."""
        return (replace(self, others=()), *self.others)

    @property
    def label(self) -> str:
        """What reports and graphs call it: template, bits and epilogue; "2 of", where grouped."""
        if self.others:
            return f"{len(self.members)} of {self.members[0].label}"
        constants = dict(self.constants)
        parts = [self.template.value]
        if self.template is Template.LINEAR:
            parts += ["int4" if constants["PACKED"] else "int8", f"o{constants['OUTLIER_BITS']}"]
            parts += ["int4 cores"] if constants.get("MATRIX_BITS") == 4 else []
        elif "INLIER_BITS" in constants:
            parts.append(f"{constants['INLIER_BITS']}/{constants['OUTLIER_BITS']}")
        if constants.get("ASYMMETRIC"):
            parts.append("asymmetric")
        if constants.get("REVERSE"):
            parts.append("reverse")
        return " ".join([*parts, *(one.value for one in self.epilogue)])


def make_spec(
    template: Template,
    constants: Mapping[str, int],
    *,
    epilogue: tuple[Epilogue, ...] = (),
    num_warps: int = 4,
    num_stages: int = 3,
) -> KernelSpec:
    """A KernelSpec from constants by name; booleans become 0 and 1."""
    return KernelSpec(
        template=template,
        constants=tuple(sorted((name, int(value)) for name, value in constants.items())),
        epilogue=epilogue,
        num_warps=num_warps,
        num_stages=num_stages,
    )
