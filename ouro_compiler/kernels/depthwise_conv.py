"""Launch of the depthwise convolution."""

from __future__ import annotations

from torch import Tensor

from ouro_compiler.kernels.blocks import next_power_of_2
from ouro_compiler.kernels.launch import contiguous, launch
from ouro_compiler.kernels.spec import Template, make_spec
from ouro_compiler.ops.depthwise_conv import check
from ouro_compiler.ops.library import empty_channels_last

_MAX_TAPS = 64  # each is a load of its own, written out


def refuse_depthwise_conv(weight: Tensor) -> str | None:
    """Why no kernel runs this convolution; None if one does."""
    taps = weight[0].numel() if len(weight) else 0
    return None if taps <= _MAX_TAPS else f"kernels take at most {_MAX_TAPS} taps, got {taps}"


def depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, silu: bool = False
) -> Tensor:
    """`depthwise_conv_ref` by kernel; x may have any strides."""
    check(x, weight, bias)
    y = empty_channels_last(x)
    maps = as_maps(x)
    batch, height, width, channels = maps.shape
    block_c = min(128, next_power_of_2(channels))
    block_l = 16
    spec = make_spec(
        Template.DEPTHWISE_CONV,
        {
            "HEIGHT": height,
            "WIDTH": width,
            "CHANNELS": channels,
            "TAPS_H": weight.shape[-2] if weight.dim() == 4 else 1,
            "TAPS_W": weight.shape[-1],
            "HAS_BIAS": bias is not None,
            "SILU": silu,
            "BLOCK_L": block_l,
            "BLOCK_C": block_c,
        },
        num_stages=1,
    )
    grid = (batch, -(-height * width // block_l), -(-channels // block_c))
    launch(spec, grid, maps, contiguous(weight, "weight"), bias, y, *maps.stride())
    return y


def as_maps(x: Tensor) -> Tensor:
    """x (B, C, L) or (B, C, H, W) seen as (B, H, W, C); tokens are a map of one row."""
    return (x.unsqueeze(2) if x.dim() == 3 else x).permute(0, 2, 3, 1)
