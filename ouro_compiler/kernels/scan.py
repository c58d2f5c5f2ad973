"""Launches of the selective scan and of the causal convolution."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ouro_compiler.kernels.blocks import multiprocessors, next_power_of_2, scan_blocks
from ouro_compiler.kernels.launch import contiguous, launch, places
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
    *,
    form: Mapping[str, int] | None = None,
) -> Tensor:
    """`selective_scan_ref` by kernel; every matrix may have any strides.

    form: one of `scan_blocks`, by default the one for this batch and device. Bits are the same.
    """
    check_scan(u, delta, A, B, C, D, z, delta_bias)
    batch, channels, length = delta.shape
    B, C = (matrix[:, None] if matrix.dim() == 3 else matrix for matrix in (B, C))
    groups = B.shape[1]
    in_group = channels // groups
    y = empty_token_major(u)
    at = places(u.movedim(1, -1))
    of_u = (at.sample, at.channel, at.row, at.token)
    if form is None:
        shape = (in_group, A.shape[1], length)
        form = scan_blocks(*shape, batch * groups, multiprocessors(u.device))
    constants = {
        "LENGTH": length,
        "MAP_WIDTH": at.width,
        "CHANNELS": in_group,
        "GROUPS": groups,
        "STATES": A.shape[1],
        "REVERSE": reverse,
        "HAS_DELTA_BIAS": delta_bias is not None,
        "DELTA_SOFTPLUS": delta_softplus,
        **form,
    }
    delta_bias = None if delta_bias is None else contiguous(delta_bias, "delta_bias")
    grid = (batch, groups, -(-in_group // form["BLOCK_D"]))
    gathered: tuple[Tensor | None, Tensor | None] = (None, None)
    if form["SPLIT"]:
        grid = (batch, groups, grid[2] * (length // form["CHUNK"]))
        gathered = gather_chunks(
            *(Template.SCAN_CHUNKS, constants, grid, (u, delta, A, B, delta_bias)),
            (*A.stride(), *of_u, *delta.stride(), *B.stride()),
        )
    unit, matrix_strides = state_strides(B, C)
    spec = make_spec(
        Template.SCAN,
        {**constants, "HAS_D": D is not None, "HAS_Z": z is not None, "UNIT": unit},
        num_warps=1,
        num_stages=1,
    )
    skip = None if D is None else contiguous(D, "D")
    strides = (
        *A.stride(),
        *of_u,
        *delta.stride(),
        *((0, 0, 0) if z is None else z.stride()),
        *matrix_strides,
        channels,
    )
    launch(spec, grid, u, delta, A, B, C, skip, z, delta_bias, *gathered, y, *strides)
    return y


def gather_chunks(
    template: Template,
    constants: Mapping[str, int],
    grid: tuple[int, int, int],
    operands: tuple[Tensor | None, ...],
    strides: tuple[int | None, ...],
) -> tuple[Tensor, Tensor]:
    """Of every chunk the sum of delta (B, chunks, D) and the state (B, chunks, D, N), fp32.

    constants: those of the scan; operands: u (B, D, L) or (B, D, H, W) first.
    """
    u = operands[0]
    assert u is not None
    chunks = constants["LENGTH"] // constants["CHUNK"]
    elapsed = u.new_empty(u.shape[0], chunks, u.shape[1], dtype=torch.float32)
    state = u.new_empty(*elapsed.shape, constants["STATES"], dtype=torch.float32)
    unused = ("SHARE", "SPLIT")
    spec = make_spec(
        template,
        {name: value for name, value in constants.items() if name not in unused},
        num_warps=1,
        num_stages=1,
    )
    launch(spec, grid, *operands, elapsed, state, *strides)
    return elapsed, state


def state_strides(B: Tensor, C: Tensor) -> tuple[int, list[int]]:
    """(unit, strides of B and C (B, G, N, L), N's in elements and the others in units).

    Where four states lie together, and every column starts at a multiple of four, the unit is four:
    a column is then read four states at a time, if memory itself is aligned, which Triton checks.
    """
    strides = [*B.stride(), *C.stride()]
    others = [stride for index, stride in enumerate(strides) if index % 4 != 2]
    together = strides[2] == strides[6] == 1 and B.shape[2] > 2
    unit = 4 if together and not any(stride % 4 for stride in others) else 1
    return unit, [
        stride if index % 4 == 2 else stride // unit for index, stride in enumerate(strides)
    ]


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
