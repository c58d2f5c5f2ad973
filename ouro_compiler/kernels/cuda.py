"""CUDA implementations of `torch.ops.ouro.*`: importing this module registers them.

`IMPLEMENTATIONS` is what lowering asks ahead of time which kernel runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ouro_compiler.kernels import (
    cross_merge,
    depthwise_conv,
    linear,
    norm,
    quantize,
    quantized_scan,
    scan,
    scan_dynamic_outlier,
)
from ouro_compiler.kernels.dispatch import Implementation, register
from ouro_compiler.ops import fused
from ouro_compiler.ops.causal_conv1d import causal_conv1d_ref
from ouro_compiler.ops.depthwise_conv import depthwise_conv_ref
from ouro_compiler.ops.linear import linear_dynamic_outlier_ref
from ouro_compiler.ops.norm import add_norm_ref
from ouro_compiler.ops.quantize import (
    dequantize_dynamic_outlier_ref,
    quantize_dynamic_outlier_ref,
)
from ouro_compiler.ops.quantized_scan import quantized_selective_scan_ref
from ouro_compiler.ops.scan_dynamic_outlier import selective_scan_dynamic_outlier_implementation
from ouro_compiler.ops.selective_scan import selective_scan_implementation


def _refuse_rows(x: Tensor, *_args: Any) -> str | None:
    return quantize.refuse_row(x, x.shape[-1])


def _refuse_channels(x: Tensor, *_args: Any) -> str | None:
    return quantize.refuse_row(x, x.shape[1])


def _refuse_conv(x: Tensor, *_args: Any) -> str | None:
    return quantize.refuse_row(x, 1)


def _refuse_depthwise(x: Tensor, weight: Tensor, *_args: Any) -> str | None:
    return quantize.refuse_row(x, 1) or depthwise_conv.refuse_depthwise_conv(weight)


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
    "add_norm": Implementation(norm.add_norm, add_norm_ref, _refuse_rows),
    "add_norm_quantize": Implementation(
        quantize.add_norm_quantize, fused.add_norm_quantize_ref, _refuse_rows
    ),
    "cross_merge_norm_quantize": Implementation(
        cross_merge.cross_merge_norm_quantize,
        fused.cross_merge_norm_quantize_ref,
        _refuse_channels,
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
    "depthwise_conv": Implementation(
        depthwise_conv.depthwise_conv, depthwise_conv_ref, _refuse_depthwise
    ),
    "selective_scan": Implementation(
        scan.selective_scan, selective_scan_implementation, _refuse_scan
    ),
    "selective_scan_dynamic_outlier": Implementation(
        scan_dynamic_outlier.selective_scan_dynamic_outlier,
        selective_scan_dynamic_outlier_implementation,
        scan_dynamic_outlier.refuse_scan_dynamic_outlier,
    ),
    "quantized_selective_scan": Implementation(
        quantized_scan.quantized_selective_scan,
        quantized_selective_scan_ref,
        quantized_scan.refuse_quantized_scan,
    ),
}


register("CUDA", IMPLEMENTATIONS)
