"""The scan with a quantized recurrence in C++: its arguments."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ouro_compiler.kernels.cpp.launch import dtype_code, launch, refuse_dtypes, spec_of
from ouro_compiler.kernels.cpp.scan import token_major
from ouro_compiler.kernels.spec import Template
from ouro_compiler.ops.library import empty_token_major
from ouro_compiler.ops.quantized_scan import check, log2_offset

_MAX_STATES = 128  # a step of a task's channels, all their states, stays in the first cache


def refuse_quantized_scan(*args: Any) -> str | None:
    """Why no kernel runs this scan; None if one does."""
    u, _, A, B, C, _, z = args[:7]
    if A.shape[-1] > _MAX_STATES:
        return f"{A.shape[-1]} states a channel do not fit the first cache"
    if B.dtype != C.dtype or (z is not None and z.dtype != u.dtype):
        return "B and C, and u and z, must share a dtype"
    return refuse_dtypes(*args[:13])


def quantized_selective_scan(
    u: Tensor,
    step: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    decay_scale: Tensor | None,
    input_scale: Tensor | None,
    input_threshold: Tensor | None,
    state_scale: Tensor | None,
    state_threshold: Tensor | None,
    state_factor: Tensor | None,
    decay_limit: float,
    decay_steps: int,
    bits: int,
    outlier_bits: int,
    refresh_period: int,
    output_before_rounding: bool,
    reverse: bool,
) -> Tensor:
    """`quantized_selective_scan_ref` in C++; shapes as there."""
    check(
        *(u, step, A, B, C, D, z, decay_scale, input_scale, input_threshold, state_scale),
        *(state_threshold, state_factor, decay_limit, decay_steps, bits, outlier_bits),
        refresh_period,
    )
    batch, channels, length = u.shape
    u, step = token_major(u, "u"), token_major(step, "step")
    z = None if z is None else token_major(z, "z")
    B, C = (matrix[:, None] if matrix.dim() == 3 else matrix for matrix in (B, C))
    y = empty_token_major(u)
    spec = spec_of(
        Template.QUANTIZED_SCAN,
        STATES=A.shape[1],
        DECAY=2 if decay_steps else 0 if decay_scale is None else 1,
        DTYPE_U=dtype_code(u),
        DTYPE_STEP=dtype_code(step),
        DTYPE_BC=dtype_code(B),
    )
    A = A.contiguous()
    matrices = [
        *(u, u.stride(0), u.stride(2)),
        *(step, step.stride(0), step.stride(2)),
        *((None, 0, 0) if z is None else (z, z.stride(0), z.stride(2))),
        *(A, dtype_code(A)),
        *(B, *B.stride()),
        *(C, *C.stride()),
    ]
    vectors = [
        part
        for vector in (
            *(D, decay_scale, input_scale, input_threshold),
            *(state_scale, state_threshold, state_factor),
        )
        for part in (None if vector is None else vector.contiguous(), dtype_code(vector))
    ]
    static = (
        *(log2_offset(decay_limit, decay_steps), decay_steps, bits, outlier_bits, refresh_period),
        *(output_before_rounding, reverse),
    )
    sizes = (batch, channels, B.shape[1], length)
    launch(spec, *matrices, *vectors, *static, y, *sizes)
    return y
