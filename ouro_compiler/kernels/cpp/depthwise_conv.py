"""The depthwise convolution in C++: its arguments."""

from __future__ import annotations

from torch import Tensor

from ouro_compiler.kernels.cpp.launch import dtype_code, launch, refuse_dtypes, spec_of
from ouro_compiler.kernels.cpp.quantize import vector
from ouro_compiler.kernels.depthwise_conv import as_maps
from ouro_compiler.kernels.launch import note_copy
from ouro_compiler.kernels.spec import Template
from ouro_compiler.ops.depthwise_conv import check
from ouro_compiler.ops.library import empty_channels_last

_MAX_TAPS = 16  # along a side: the inputs of four pixels live in registers


def refuse_depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, silu: bool = False
) -> str | None:
    """Why no kernel runs this convolution; None if one does."""
    most = max(weight.shape[2:], default=1)
    if not 1 <= most <= _MAX_TAPS:
        return f"kernels take filters of 1 to {_MAX_TAPS} taps along a side, got {most}"
    return refuse_dtypes(x, weight, bias)


def depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, silu: bool = False
) -> Tensor:
    """`depthwise_conv_ref` in C++; shapes as there."""
    check(x, weight, bias)
    y = empty_channels_last(x)
    maps = as_maps(x)
    if maps.stride(3) != 1 and maps.shape[3] != 1:
        note_copy("x", "its channels are not next to each other in memory")
        maps = maps.contiguous()
    spec = spec_of(
        Template.DEPTHWISE_CONV,
        DTYPE=dtype_code(x),
        TAPS_H=weight.shape[-2] if weight.dim() == 4 else 1,
        TAPS_W=weight.shape[-1],
    )
    launch(
        spec,
        *(maps, *maps.stride()[:3]),
        *(*vector(weight, "weight"), *vector(bias, "bias")),
        *(silu, y, *maps.shape),
    )
    return y
