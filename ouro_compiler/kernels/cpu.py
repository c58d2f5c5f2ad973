"""CPU implementations of `torch.ops.ouro.*` in generated C++: importing this module registers them.

`IMPLEMENTATIONS` is what lowering asks ahead of time which kernel runs.
"""

from __future__ import annotations

from ouro_compiler.kernels.cpp import conv_backward, linear, scan, scan_backward
from ouro_compiler.kernels.dispatch import Implementation, register
from ouro_compiler.ops.causal_conv1d import causal_conv1d_backward_ref
from ouro_compiler.ops.chunked_scan import selective_scan_backward
from ouro_compiler.ops.linear import linear_dynamic_outlier_ref
from ouro_compiler.ops.selective_scan import selective_scan_implementation

IMPLEMENTATIONS: dict[str, Implementation] = {
    "linear_dynamic_outlier": Implementation(
        linear.linear_dynamic_outlier, linear_dynamic_outlier_ref, linear.refuse_linear
    ),
    "selective_scan": Implementation(
        scan.selective_scan, selective_scan_implementation, scan.refuse_scan
    ),
    "selective_scan_backward": Implementation(
        scan_backward.selective_scan_backward,
        selective_scan_backward,
        scan_backward.refuse_scan_backward,
    ),
    "causal_conv1d_backward": Implementation(
        conv_backward.causal_conv1d_backward,
        causal_conv1d_backward_ref,
        conv_backward.refuse_conv_backward,
    ),
}

register("CPU", IMPLEMENTATIONS)
