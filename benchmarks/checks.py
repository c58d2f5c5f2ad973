"""When a measured number may be shown: what it computes must be right, in the same run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ouro_compiler.evaluation import snr_db
from ouro_compiler.graph import argument, is_op
from ouro_compiler.kernels import cpu, cuda
from ouro_compiler.kernels.dispatch import Implementation

FP32_TOLERANCE = 1e-3  # of the largest logit
HALF_TOLERANCE = {"fp16": 0.01, "bf16": 0.05}  # relative L2 error
SAME_ARTEFACT_DB = 10.0  # between devices: codes flip on ties, and later layers see it
_FLOAT_TOLERANCE = 1e-4  # of an operator's largest value
# A fused operator rounds its values before it quantizes them: a code may flip on a tie.
_FLIPS = 2e-3
_EXACT = ("linear_dynamic_outlier", "quantize_dynamic_outlier", "dequantize_dynamic_outlier")


class WrongError(Exception):
    """A variant that computes something else; the message says how far off it is."""


def check_fp32(found: Tensor, expected: Tensor) -> str:
    """What a row says of an fp32 variant. Raises WrongError."""
    _check_finite(found, expected)
    error = float((found - expected).abs().max() / expected.abs().max())
    if error > FP32_TOLERANCE:
        raise WrongError(
            f"logits are off by {error:.1e} of the largest, allowed are {FP32_TOLERANCE}"
        )
    return f"within {error:.0e} of the largest logit"


def check_half(found: Tensor, expected: Tensor, kind: str) -> str:
    """What a row says of a variant in "fp16" or "bf16". Raises WrongError."""
    _check_finite(found, expected)
    error = float((found - expected).norm() / expected.norm())
    if error > HALF_TOLERANCE[kind]:
        raise WrongError(f"relative L2 error {error:.1%}, allowed are {HALF_TOLERANCE[kind]:.0%}")
    return f"relative L2 error {error:.1%}"


def check_integer(found: Tensor, again: Tensor, expected: Tensor) -> str:
    """What a row says of a quantized variant, run twice. Raises WrongError."""
    _check_finite(found, expected)
    if not torch.equal(found, again):
        raise WrongError("a second run gives other bits")
    quality = snr_db(expected, found)
    if quality < 0:
        raise WrongError(f"logits have more noise than signal ({quality:.1f} dB)")
    return f"repeats bit for bit, SNR {quality:.1f} dB"


def check_same_artefact(found: Tensor, on_cpu: Tensor) -> str:
    """What a row says of an artefact's logits and those it has on a CPU. Raises WrongError."""
    _check_finite(found, on_cpu)
    quality = snr_db(on_cpu, found)
    if quality < SAME_ARTEFACT_DB:
        raise WrongError(f"its logits are not those of the CPU ({quality:.1f} dB)")
    return f"{quality:.1f} dB to the CPU's"


def implementations(device: torch.device) -> Mapping[str, Implementation]:
    """The operators with kernels on a device."""
    return cuda.IMPLEMENTATIONS if device.type == "cuda" else cpu.IMPLEMENTATIONS


def check_operators(module: fx.GraphModule, images: Tensor) -> str:
    """Kernels of a graph against their references, on the input of the first node of a kind.

    Raises WrongError, naming the operator.
    """
    checker = _Operators(module, implementations(images.device))
    with torch.inference_mode():
        checker.run(images)
    return f"{len(checker.seen)} kinds of operators equal their references"


class _Operators(fx.Interpreter):
    def __init__(
        self, module: fx.GraphModule, implementations: Mapping[str, Implementation]
    ) -> None:
        super().__init__(module)
        self.implementations = implementations
        self.seen: set[tuple[Any, ...]] = set()

    def run_node(self, n: fx.Node) -> Any:
        name = self._operator(n)
        if name is None:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        keys = ("inlier_bits", "outlier_bits", "reverse")
        kind = (name, args[0].dim(), *(_static(n, key) for key in keys))  # 4: a map
        if kind in self.seen:
            return super().run_node(n)
        self.seen.add(kind)
        found = super().run_node(n)
        compare(name, found, self.implementations[name].reference(*args, **kwargs))
        return found

    def _operator(self, node: fx.Node) -> str | None:
        known = self.implementations
        return next(
            (key for key in known if is_op(node, getattr(torch.ops.ouro, key).default)), None
        )


def _static(node: fx.Node, name: str) -> Any:
    try:
        return argument(node, name)
    except KeyError:  # this operator has no such argument
        return None


def compare(name: str, found: Any, expected: Any) -> None:
    """Results of `ouro::<name>` against its reference's. Raises WrongError."""
    found, expected = (
        one if isinstance(one, tuple | list) else (one,) for one in (found, expected)
    )
    scan = name in ("selective_scan", "selective_scan_dynamic_outlier")
    allowed = 0.0 if name in _EXACT or scan else _FLIPS
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            raise WrongError(f"ouro::{name}: result {number} has another shape or dtype")
        share = _share_off(ours, theirs)
        if share > allowed:
            raise WrongError(f"ouro::{name}: {share:.1e} of result {number} is not the reference's")


def _share_off(found: Tensor, expected: Tensor) -> float:
    if found.numel() == 0:
        return 0.0
    if not expected.is_floating_point():
        return float((found != expected).double().mean())
    error = (found.double() - expected.double()).abs()
    tolerance = max(_FLOAT_TOLERANCE, 4 * torch.finfo(expected.dtype).eps)  # halves round coarsely
    limit = tolerance * float(expected.abs().max())
    return float((~(error <= limit)).double().mean())


def _check_finite(found: Tensor, expected: Tensor) -> None:
    if found.shape != expected.shape:
        raise WrongError(f"logits are {tuple(found.shape)}, expected {tuple(expected.shape)}")
    if not bool(found.isfinite().all()):
        raise WrongError("logits are not finite")
