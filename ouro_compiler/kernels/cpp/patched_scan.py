"""The patched scan and its gradients in C++: their arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ouro_compiler.kernels.cpp.launch import dtype_code, launch, spec_of
from ouro_compiler.kernels.cpp.scan import refuse_scan, token_major
from ouro_compiler.kernels.spec import KernelSpec, Template
from ouro_compiler.ops.library import reject
from ouro_compiler.ops.patched_scan import NAME, check, empty_gradients, empty_output

_SLAB = 64  # channels of a task; a multiple of any vector's
_MAX_ENTRIES = 2**31 - 1  # of a sample's lists, counted in 32 bits


def refuse_patched_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    weights: Tensor,
    anchors: Tensor,
    neighbours: Tensor,
    reverse: bool,
) -> str | None:
    """Why no kernel runs this patched scan; None if one does."""
    del anchors, reverse
    if reason := refuse_scan(u, delta, A, B, C):
        return reason
    if weights.dtype != torch.float32:
        return f"weights must be fp32, got {weights.dtype}"
    if neighbours[:1].numel() > _MAX_ENTRIES:
        return "a window has too many neighbours for 32 bits"
    return None


def refuse_patched_scan_backward(grad: Tensor, u: Tensor, *others: Any) -> str | None:
    """Why no kernel computes these gradients; None if one does."""
    if grad.dtype != u.dtype:
        return "the output's gradient and u must share a dtype"
    return refuse_patched_scan(u, *others)


def patched_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    weights: Tensor,
    anchors: Tensor,
    neighbours: Tensor,
    reverse: bool,
) -> Tensor:
    """`patched_scan_ref` in C++; shapes as there."""
    check(u, delta, A, B, C, weights, anchors, neighbours)
    y = empty_output(u, anchors)
    spec = _spec(Template.PATCHED_SCAN, u, delta, A, B, reverse)
    args = _arguments(u, delta, A, B, C, weights, anchors, neighbours)
    launch(spec, *args, y, *_sizes(u, B))
    return y


def patched_scan_backward(
    grad: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    weights: Tensor,
    anchors: Tensor,
    neighbours: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`ops.patched_scan.patched_scan_backward` in C++; shapes as there."""
    check(u, delta, A, B, C, weights, anchors, neighbours)
    if grad.shape != (u.shape[0], anchors.shape[1], u.shape[1]):
        reject(f"{NAME}_backward", f"grad must be (B, P, E), got {tuple(grad.shape)}")
    gradients = empty_gradients(u, delta, B, C)
    batch, channels, groups, length = _sizes(u, B)
    grad = token_major(grad.transpose(1, 2), "grad")
    rows = (batch, groups, -(-(channels // groups) // _SLAB), length + anchors.shape[1], A.shape[1])
    spec = _spec(Template.PATCHED_SCAN_BACKWARD, u, delta, A, B, reverse)
    launch(
        spec,
        *(grad, grad.stride(0), grad.stride(2)),
        *_arguments(u, delta, A, B, C, weights, anchors, neighbours),
        *gradients,
        u.new_empty(rows, dtype=torch.float32),
        *(batch, channels, groups, length),
    )
    return gradients


def _spec(
    template: Template, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, reverse: bool
) -> KernelSpec:
    return spec_of(
        template,
        STATES=A.shape[1],
        SLAB=_SLAB,
        REVERSE=reverse,
        DTYPE_U=dtype_code(u),
        DTYPE_DELTA=dtype_code(delta),
        DTYPE_BC=dtype_code(B),
    )


def _sizes(u: Tensor, B: Tensor) -> tuple[int, int, int, int]:
    """Batch, channels, groups, length."""
    return u.shape[0], u.shape[1], 1 if B.dim() == 3 else B.shape[1], u.shape[2]


def _arguments(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    weights: Tensor,
    anchors: Tensor,
    neighbours: Tensor,
) -> list[Any]:
    for name, tokens in (("anchors", anchors), ("neighbours", neighbours)):
        if tokens.numel() and int(tokens.max()) >= u.shape[2]:
            reject(NAME, f"{name} must be tokens below L = {u.shape[2]}, got {int(tokens.max())}")
    u, delta = token_major(u, "u"), token_major(delta, "delta")
    A = A.contiguous()
    B, C = (matrix[:, None] if matrix.dim() == 3 else matrix for matrix in (B, C))
    return [
        *(u, u.stride(0), u.stride(2)),
        *(delta, delta.stride(0), delta.stride(2)),
        *(A, dtype_code(A)),
        *(B, *B.stride()),
        *(C, *C.stride()),
        *(weights.contiguous(), anchors.contiguous(), neighbours.contiguous()),
        *(len(anchors), *neighbours.shape[1:]),
    ]
