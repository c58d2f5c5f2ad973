"""The gradients of the selective scan in C++: their arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ouro_compiler.kernels.cpp.launch import dtype_code, launch, spec_of
from ouro_compiler.kernels.cpp.scan import refuse_scan, token_major
from ouro_compiler.kernels.spec import Template
from ouro_compiler.ops.selective_scan import check as check_scan
from ouro_compiler.ops.selective_scan import empty_gradients

_SLAB = 64  # channels whose sums over channels are kept together; a multiple of any vector's


def refuse_scan_backward(grad: Tensor, u: Tensor, *others: Any) -> str | None:
    """Why no kernel computes these gradients; None if one does."""
    if grad.dtype != u.dtype:
        return "the output's gradient and u must share a dtype"
    return refuse_scan(u, *others)


def selective_scan_backward(
    grad: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, ...]:
    """`chunked_scan.selective_scan_backward` in C++; shapes as there."""
    check_scan(u, delta, A, B, C, D, z, delta_bias)
    batch, channels, length = u.shape
    gradients = empty_gradients(grad, u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)
    grad, u, delta = (
        token_major(x, name) for x, name in ((grad, "grad"), (u, "u"), (delta, "delta"))
    )
    z = None if z is None else token_major(z, "z")
    A = A.contiguous()
    B, C = (matrix[:, None] if matrix.dim() == 3 else matrix for matrix in (B, C))
    groups, states = B.shape[1], A.shape[1]
    slabs = -(-(channels // groups) // _SLAB)
    spec = spec_of(
        Template.SCAN_BACKWARD,
        STATES=states,
        SLAB=_SLAB,
        REVERSE=reverse,
        DTYPE_U=dtype_code(u),
        DTYPE_DELTA=dtype_code(delta),
        DTYPE_BC=dtype_code(B),
    )
    matrices = [
        *(grad, grad.stride(0), grad.stride(2)),
        *(u, u.stride(0), u.stride(2)),
        *(delta, delta.stride(0), delta.stride(2)),
        *((None, 0, 0) if z is None else (z, z.stride(0), z.stride(2))),
        *(A, dtype_code(A)),
        *(B, *B.stride()),
        *(C, *C.stride()),
    ]
    vectors = [
        part
        for vector in (D, delta_bias)
        for part in (None if vector is None else vector.contiguous(), dtype_code(vector))
    ]
    slab_rows = u.new_empty((2, batch, groups, slabs, length, states), dtype=torch.float32)
    sums = u.new_empty((batch, channels, states + 2), dtype=torch.float32)
    sizes = [batch, channels, groups, length]
    launch(spec, *matrices, *vectors, delta_softplus, *gradients, slab_rows, sums, *sizes)
    return gradients
