"""`torch.ops.ouro.*`: importing this package registers every op."""

from ouro_compiler.ops import (  # noqa: F401  (imported for registration)
    causal_conv1d,
    fused,
    linear,
    norm,
    packing,
    quantize,
    selective_scan,
)
