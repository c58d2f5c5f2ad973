"""`torch.ops.ouro.*`: importing this package registers every op."""

import torch

from ouro_compiler.ops import (  # noqa: F401  (imported for registration)
    causal_conv1d,
    cross_scan,
    depthwise_conv,
    fake_quantize,
    fused,
    linear,
    norm,
    outlier_rules,
    packing,
    patched_scan,
    quantize,
    quantized_scan,
    scan_dynamic_outlier,
    selective_scan,
)

# Every op whose first three results are (codes, outlier_scale, outlier_start).
QUANTIZERS = (
    torch.ops.ouro.quantize_dynamic_outlier.default,
    torch.ops.ouro.quantize_static_outlier.default,
    torch.ops.ouro.quantize_dynamic_outlier_variant.default,
    torch.ops.ouro.add_norm_quantize.default,
    torch.ops.ouro.cross_merge_norm_quantize.default,
    torch.ops.ouro.causal_conv1d_quantize.default,
    torch.ops.ouro.gate_sum_quantize.default,
)
