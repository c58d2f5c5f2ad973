"""CPU implementations of `torch.ops.ouro.*` in generated C++: importing this module registers them.

`IMPLEMENTATIONS` is what lowering asks ahead of time which kernel runs.
"""

from __future__ import annotations

from ouro_compiler.kernels.cpp import (
    conv,
    conv_backward,
    depthwise_conv,
    layout,
    linear,
    norm,
    patched_scan,
    quantize,
    quantized_scan,
    scan,
    scan_backward,
    scan_dynamic_outlier,
)
from ouro_compiler.kernels.dispatch import Implementation, register
from ouro_compiler.ops import cross_scan, fused
from ouro_compiler.ops.causal_conv1d import causal_conv1d_backward_ref, causal_conv1d_ref
from ouro_compiler.ops.chunked_scan import selective_scan_backward
from ouro_compiler.ops.depthwise_conv import depthwise_conv_ref
from ouro_compiler.ops.linear import dequantize_weight_ref, linear_dynamic_outlier_ref
from ouro_compiler.ops.norm import add_norm_ref
from ouro_compiler.ops.patched_scan import patched_scan_backward, patched_scan_implementation
from ouro_compiler.ops.quantize import (
    dequantize_dynamic_outlier_ref,
    quantize_dynamic_outlier_ref,
    quantize_static_outlier_ref,
)
from ouro_compiler.ops.quantized_scan import quantized_selective_scan_ref
from ouro_compiler.ops.scan_dynamic_outlier import selective_scan_dynamic_outlier_implementation
from ouro_compiler.ops.selective_scan import selective_scan_implementation

IMPLEMENTATIONS: dict[str, Implementation] = {
    "quantize_dynamic_outlier": Implementation(
        quantize.quantize_dynamic_outlier, quantize_dynamic_outlier_ref, quantize.refuse_quantize
    ),
    "quantize_static_outlier": Implementation(
        quantize.quantize_static_outlier, quantize_static_outlier_ref, quantize.refuse_static
    ),
    "dequantize_dynamic_outlier": Implementation(
        quantize.dequantize_dynamic_outlier,
        dequantize_dynamic_outlier_ref,
        quantize.refuse_dequantize,
    ),
    "dequantize_weight": Implementation(
        quantize.dequantize_weight, dequantize_weight_ref, quantize.refuse_weight
    ),
    "add_norm": Implementation(norm.add_norm, add_norm_ref, norm.refuse_norm),
    "add_norm_quantize": Implementation(
        norm.add_norm_quantize, fused.add_norm_quantize_ref, norm.refuse_norm
    ),
    "cross_merge_norm_quantize": Implementation(
        norm.cross_merge_norm_quantize,
        fused.cross_merge_norm_quantize_ref,
        norm.refuse_cross_merge,
    ),
    "causal_conv1d": Implementation(conv.causal_conv1d, causal_conv1d_ref, conv.refuse_conv),
    "causal_conv1d_quantize": Implementation(
        conv.causal_conv1d_quantize, fused.causal_conv1d_quantize_ref, conv.refuse_conv
    ),
    "depthwise_conv": Implementation(
        depthwise_conv.depthwise_conv, depthwise_conv_ref, depthwise_conv.refuse_depthwise_conv
    ),
    "gate_sum_quantize": Implementation(
        quantize.gate_sum_quantize, fused.gate_sum_quantize_ref, quantize.refuse_gate_sum
    ),
    "cross_scan": Implementation(
        layout.cross_scan, cross_scan.cross_scan_ref, layout.refuse_cross_scan
    ),
    "cross_merge": Implementation(
        layout.cross_merge, cross_scan.cross_merge_ref, layout.refuse_cross_merge
    ),
    "linear_dynamic_outlier": Implementation(
        linear.linear_dynamic_outlier, linear_dynamic_outlier_ref, linear.refuse_linear
    ),
    "selective_scan": Implementation(
        scan.selective_scan, selective_scan_implementation, scan.refuse_scan
    ),
    "selective_scan_dynamic_outlier": Implementation(
        scan_dynamic_outlier.selective_scan_dynamic_outlier,
        selective_scan_dynamic_outlier_implementation,
        scan_dynamic_outlier.refuse_scan_dynamic_outlier,
    ),
    "selective_scan_backward": Implementation(
        scan_backward.selective_scan_backward,
        selective_scan_backward,
        scan_backward.refuse_scan_backward,
    ),
    "quantized_selective_scan": Implementation(
        quantized_scan.quantized_selective_scan,
        quantized_selective_scan_ref,
        quantized_scan.refuse_quantized_scan,
    ),
    "patched_scan": Implementation(
        patched_scan.patched_scan, patched_scan_implementation, patched_scan.refuse_patched_scan
    ),
    "patched_scan_backward": Implementation(
        patched_scan.patched_scan_backward,
        patched_scan_backward,
        patched_scan.refuse_patched_scan_backward,
    ),
    "causal_conv1d_backward": Implementation(
        conv_backward.causal_conv1d_backward,
        causal_conv1d_backward_ref,
        conv_backward.refuse_conv_backward,
    ),
}

register("CPU", IMPLEMENTATIONS)
