"""Launches of the selective scan and of the causal convolution."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ouro_compiler.kernels.launch import (
    contiguous,
    launch,
    next_power_of_2,
    places,
    scan_channels,
)
from ouro_compiler.kernels.quantize import FLOATS
from ouro_compiler.kernels.spec import Template, make_spec
from ouro_compiler.ops.causal_conv1d import check as check_conv
from ouro_compiler.ops.library import empty_token_major
from ouro_compiler.ops.selective_scan import check as check_scan

_MAX_STATES = 64  # a channel's states live in one lane's registers


def refuse_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> str | None:
    """Why no kernel runs this scan; None if one does."""
    for tensor in (u, delta, A, B, C):
        if tensor.dtype not in FLOATS:
            return f"kernels scan fp16, bf16 and fp32, got {tensor.dtype}"
    if A.shape[-1] > _MAX_STATES:
        return f"{A.shape[-1]} states a channel do not fit a lane's registers"
    return None


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
) -> Tensor:
    """`selective_scan_ref` by kernel; every matrix may have any strides."""
    check_scan(u, delta, A, B, C, D, z, delta_bias)
    batch, channels, length = delta.shape
    B, C = (matrix[:, None] if matrix.dim() == 3 else matrix for matrix in (B, C))
    groups = B.shape[1]
    in_group = channels // groups
    y = empty_token_major(u)
    at = places(u.movedim(1, -1))
    block_d = scan_channels(in_group)
    spec = make_spec(
        Template.SCAN,
        {
            "LENGTH": length,
            "MAP_WIDTH": at.width,
            "CHANNELS": in_group,
            "STATES": A.shape[1],
            "REVERSE": reverse,
            "HAS_D": D is not None,
            "HAS_Z": z is not None,
            "HAS_DELTA_BIAS": delta_bias is not None,
            "DELTA_SOFTPLUS": delta_softplus,
            "BLOCK_N": next_power_of_2(A.shape[1]),
            "BLOCK_D": block_d,
        },
        num_warps=1,
        num_stages=1,
    )
    vectors = (
        None if D is None else contiguous(D, "D"),
        z,
        None if delta_bias is None else contiguous(delta_bias, "delta_bias"),
    )
    strides = (
        *A.stride(),
        *(at.sample, at.channel, at.row, at.token),
        *delta.stride(),
        *((0, 0, 0) if z is None else z.stride()),
        *B.stride(),
        *C.stride(),
        channels,
    )
    grid = (batch, groups, -(-in_group // block_d))
    launch(spec, grid, u, delta, A, B, C, *vectors, y, *strides)
    return y


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, silu: bool = False, reverse: bool = False
) -> Tensor:
    """`causal_conv1d_ref` by kernel; x (B, D, L) may have any strides."""
    check_conv(x, weight, bias)
    batch, channels, length = x.shape
    y = empty_token_major(x)
    constants = {
        "LENGTH": length,
        "CHANNELS": channels,
        "TAPS": weight.shape[1],
        "REVERSE": reverse,
        "HAS_BIAS": bias is not None,
        "SILU": silu,
        "BLOCK_L": 16,
        "BLOCK_D": min(128, next_power_of_2(channels)),
    }
    spec = make_spec(Template.CONV, constants, num_warps=4, num_stages=1)
    grid = conv_grid(batch, constants)
    launch(spec, grid, x, contiguous(weight, "weight"), bias, y, *x.stride())
    return y


def conv_grid(batch: int, constants: Mapping[str, int]) -> tuple[int, int, int]:
    """Programs of a convolution of a batch with these constants."""
    tiles = -(-constants["CHANNELS"] // constants["BLOCK_D"])
    return (batch, -(-constants["LENGTH"] // constants["BLOCK_L"]), tiles)
