"""The selective scan on quantized delta, B and C in C++: its arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ouro_compiler.kernels.cpp.launch import dtype_code, launch, spec_of, strides
from ouro_compiler.kernels.cpp.quantize import dequantizer, refuse_dequantize
from ouro_compiler.kernels.cpp.scan import refuse_scan, sequence, token_major
from ouro_compiler.kernels.spec import Template
from ouro_compiler.ops.library import empty_token_major
from ouro_compiler.ops.quantize import window_length
from ouro_compiler.ops.scan_dynamic_outlier import Parts, check


def refuse_scan_dynamic_outlier(
    u: Tensor,
    delta: Parts,
    A: Tensor,
    B: Parts,
    C: Parts,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    *_: Any,
) -> str | None:
    """Why no kernel runs this scan; None if one does."""
    operands = (delta, B, C)
    if len({None if parts[5] is None else parts[5].dtype for parts in operands}) > 1:
        return "the outliers of delta, B and C must share a dtype"
    for parts in operands:
        reason = refuse_dequantize(*parts)  # type: ignore[arg-type]
        if reason is not None:
            return reason
    return refuse_scan(u, u, A, u, u, D, z, delta_bias)  # dequantized operands are fp32


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
) -> Tensor:
    """`selective_scan_dynamic_outlier_ref` in C++; shapes as there."""
    operands = check(u, delta, A, B, C, D, z, delta_bias, static)
    inlier_bits, _, refresh_period, reverse = static
    batch, length, channels = operands[0].codes.shape
    u = sequence(u)
    z = None if z is None else token_major(z, "z")
    y = empty_token_major(u)
    step, b, _ = operands
    spec = spec_of(
        Template.SCAN_DYNAMIC_OUTLIER,
        STATES=A.shape[1],
        REVERSE=reverse,
        DTYPE_U=dtype_code(u),
        DTYPE_BC=0,  # what B and C are dequantized to
        DTYPE_X=dtype_code(step.x),
    )
    arguments = [
        *(u, *strides(u.movedim(1, -1))),
        *((None, 0, 0) if z is None else (z, z.stride(0), z.stride(2))),
        *(A.contiguous(), dtype_code(A)),
    ]
    for vector in (D, delta_bias):
        arguments += (None if vector is None else vector.contiguous(), dtype_code(vector))
    arguments.append(delta_softplus)
    for name, one in zip(("delta", "B", "C"), operands, strict=True):
        arguments += dequantizer(*one, name=f"{name}'s ")
    wide = step.outlier_start.dtype == torch.int32
    sizes = (batch, channels, b.codes.shape[2] // A.shape[1], length)
    launch(spec, *arguments, window_length(refresh_period, length), inlier_bits, wide, y, *sizes)
    return y
