"""Launches of the selective scan on quantized operands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ouro_compiler.kernels.blocks import multiprocessors, scan_blocks
from ouro_compiler.kernels.launch import contiguous, launch, places
from ouro_compiler.kernels.quantize import FLOATS, dequantize_dynamic_outlier
from ouro_compiler.kernels.scan import gather_chunks, refuse_scan, state_strides
from ouro_compiler.kernels.spec import Template, make_spec
from ouro_compiler.ops.library import empty_token_major
from ouro_compiler.ops.quantize import window_length
from ouro_compiler.ops.scan_dynamic_outlier import Parts, check, matrix


def refuse_scan_dynamic_outlier(
    u: Tensor, delta: Parts, A: Tensor, B: Parts, C: Parts, *_: Any
) -> str | None:
    """Why no kernel runs this scan; None if one does."""
    for parts in (delta, B, C):
        x = parts[5]
        if x is not None and x.dtype not in FLOATS:
            return f"kernels keep outliers in fp16, bf16 and fp32, got {x.dtype}"
    return refuse_scan(u, u, A, u, u)  # dequantized operands are fp32


def selective_scan_dynamic_outlier(
    u: Tensor,
    delta: Parts,
    A: Tensor,
    B: Parts,
    C: Parts,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    *static: Any,
    form: Mapping[str, int] | None = None,
) -> Tensor:
    """`selective_scan_dynamic_outlier_ref` by kernels: B and C, then the scan (`form` as there)."""
    step, *both = check(u, delta, A, B, C, D, z, delta_bias, static)
    b, c = (matrix(dequantize_dynamic_outlier(*one, *static), A) for one in both)
    inlier_bits, outlier_bits, refresh_period, reverse = static
    batch, length, channels = step.codes.shape
    groups = b.shape[1]
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
        "WINDOW": window_length(refresh_period, length),
        "INLIER_BITS": inlier_bits,
        "OUTLIER_BITS": outlier_bits,
        "ASYMMETRIC": step.zero_point is not None,
        "REVERSE": reverse,
        "HAS_DELTA_BIAS": delta_bias is not None,
        "DELTA_SOFTPLUS": delta_softplus,
        **form,
    }
    quantized = (
        contiguous(step.codes, "delta's codes"),
        *(step.inlier_scale, step.zero_point),
        contiguous(step.outlier_scale, "delta's outlier_scale"),
        contiguous(step.outlier_start, "delta's outlier_start"),
        step.x,
    )
    delta_bias = None if delta_bias is None else contiguous(delta_bias, "delta_bias")
    strides = (*A.stride(), *of_u, *((0, 0, 0) if step.x is None else step.x.stride()))
    grid = (batch, groups, -(-in_group // form["BLOCK_D"]))
    gathered: tuple[Tensor | None, Tensor | None] = (None, None)
    if form["SPLIT"]:
        grid = (batch, groups, grid[2] * (length // form["CHUNK"]))
        gathered = gather_chunks(
            *(Template.SCAN_DYNAMIC_OUTLIER_CHUNKS, constants, grid),
            *((u, *quantized, A, b, delta_bias), (*strides, *b.stride())),
        )
    unit, matrix_strides = state_strides(b, c)
    spec = make_spec(
        Template.SCAN_DYNAMIC_OUTLIER,
        {**constants, "HAS_D": D is not None, "HAS_Z": z is not None, "UNIT": unit},
        num_warps=1,
        num_stages=1,
    )
    skip = None if D is None else contiguous(D, "D")
    strides += (*((0, 0, 0) if z is None else z.stride()), *matrix_strides, channels)
    launch(
        *(spec, grid, u, *quantized, A, b, c, skip, z, delta_bias, *gathered, y),
        *strides,
    )
    return y
