"""CUDA implementations of `torch.ops.ouro.*`: importing this module registers them.

An operator's arguments either have a kernel or a reason why not; then the reference runs and a
warning says so. `IMPLEMENTATIONS` is what lowering asks the same question ahead of time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ouro_compiler.kernels import linear, quantize, scan
from ouro_compiler.ops import fused
from ouro_compiler.ops.causal_conv1d import causal_conv1d_ref
from ouro_compiler.ops.library import LIBRARY
from ouro_compiler.ops.linear import linear_dynamic_outlier_ref
from ouro_compiler.ops.quantize import (
    dequantize_dynamic_outlier_ref,
    quantize_dynamic_outlier_ref,
)
from ouro_compiler.ops.selective_scan import selective_scan_implementation


@dataclass(frozen=True)
class Implementation:
    """A kernel, the reference it replaces, and why it would not take some arguments (or None)."""

    kernel: Callable[..., Any]
    reference: Callable[..., Any]
    refuse: Callable[..., str | None]


def _refuse_rows(x: Tensor, *_args: Any) -> str | None:
    return quantize.refuse_row(x, x.shape[2])


def _refuse_channels(x: Tensor, *_args: Any) -> str | None:
    return quantize.refuse_row(x, x.shape[1])


def _refuse_conv(x: Tensor, *_args: Any) -> str | None:
    return quantize.refuse_row(x, 1)


def _refuse_dequantize(*args: Any) -> str | None:
    return None if args[5] is None else quantize.refuse_row(args[5], 1)


def _refuse_linear(*args: Any, dtype: torch.dtype | None = None) -> str | None:
    return linear.refuse(args[0], args[4], args[5], dtype or torch.float32)


def _refuse_scan(*args: Any) -> str | None:
    return scan.refuse_scan(*args[:5])


IMPLEMENTATIONS: dict[str, Implementation] = {
    "quantize_dynamic_outlier": Implementation(
        quantize.quantize_dynamic_outlier, quantize_dynamic_outlier_ref, _refuse_rows
    ),
    "dequantize_dynamic_outlier": Implementation(
        quantize.dequantize_dynamic_outlier, dequantize_dynamic_outlier_ref, _refuse_dequantize
    ),
    "add_norm_quantize": Implementation(
        quantize.add_norm_quantize, fused.add_norm_quantize_ref, _refuse_rows
    ),
    "causal_conv1d_quantize": Implementation(
        quantize.causal_conv1d_quantize, fused.causal_conv1d_quantize_ref, _refuse_channels
    ),
    "gate_sum_quantize": Implementation(
        quantize.gate_sum_quantize, fused.gate_sum_quantize_ref, _refuse_channels
    ),
    "linear_dynamic_outlier": Implementation(
        linear.linear_dynamic_outlier, linear_dynamic_outlier_ref, _refuse_linear
    ),
    "causal_conv1d": Implementation(scan.causal_conv1d, causal_conv1d_ref, _refuse_conv),
    "selective_scan": Implementation(
        scan.selective_scan, selective_scan_implementation, _refuse_scan
    ),
}


class ReferenceWarning(UserWarning):
    """An operator ran its reference on a GPU, for the reason given."""


def _dispatching(name: str, found: Implementation) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        reason = found.refuse(*args, **kwargs)
        if reason is None:
            return found.kernel(*args, **kwargs)
        warnings.warn(f"ouro::{name} runs its reference: {reason}", ReferenceWarning, stacklevel=2)
        return found.reference(*args, **kwargs)

    return run


def register(device: str, library: torch.library.Library = LIBRARY) -> None:
    """Register every implementation for a dispatch key ("CUDA"; "CPU" where Triton interprets)."""
    for name, found in IMPLEMENTATIONS.items():
        library.impl(name, _dispatching(name, found), device)


register("CUDA")
