"""CPU implementations of `torch.ops.ouro.*` in generated C++: importing this module registers them.

`IMPLEMENTATIONS` is what lowering asks ahead of time which kernel runs.
"""

from __future__ import annotations

from ouro_compiler.kernels.cpp import linear, scan
from ouro_compiler.kernels.dispatch import Implementation, register
from ouro_compiler.ops.linear import linear_dynamic_outlier_ref
from ouro_compiler.ops.selective_scan import selective_scan_implementation

IMPLEMENTATIONS: dict[str, Implementation] = {
    "linear_dynamic_outlier": Implementation(
        linear.linear_dynamic_outlier, linear_dynamic_outlier_ref, linear.refuse_linear
    ),
    "selective_scan": Implementation(
        scan.selective_scan, selective_scan_implementation, scan.refuse_scan
    ),
}

register("CPU", IMPLEMENTATIONS)
