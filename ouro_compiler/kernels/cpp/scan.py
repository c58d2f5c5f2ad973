"""The selective scan in C++: its arguments."""

from __future__ import annotations

from torch import Tensor

from ouro_compiler.kernels.cpp.launch import dtype_code, launch, refuse_dtypes, spec_of, strides
from ouro_compiler.kernels.launch import note_copy
from ouro_compiler.kernels.spec import Template
from ouro_compiler.ops.library import as_token_major, empty_token_major
from ouro_compiler.ops.selective_scan import check as check_scan

_MAX_STATES = 256  # the states of a tile's channels stay in the first cache


def refuse_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *_flags: bool,
) -> str | None:
    """Why no kernel runs this scan; None if one does."""
    if A.shape[-1] > _MAX_STATES:
        return f"{A.shape[-1]} states a channel do not fit the first cache"
    if B.dtype != C.dtype or (z is not None and z.dtype != u.dtype):
        return "B and C, and u and z, must share a dtype"
    return refuse_dtypes(u, delta, A, B, C, D, z, delta_bias)


def token_major(x: Tensor, name: str) -> Tensor:
    """x (B, D, L) with channels next to each other in memory; a copy is recorded."""
    if x.stride(1) == 1 or x.shape[1] == 1:
        return x
    note_copy(name, "its channels are not next to each other in memory")
    return as_token_major(x)


def sequence(u: Tensor) -> Tensor:
    """u (B, D, L) or (B, D, H, W) with channels next to each other; a copy is recorded."""
    if u.dim() == 3 or u.stride(1) == 1 or u.shape[1] == 1:
        return u if u.dim() == 4 else token_major(u, "u")
    note_copy("u", "its channels are not next to each other in memory")
    return u.movedim(1, -1).contiguous().movedim(-1, 1)


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
    """`selective_scan_ref` in C++; shapes as there."""
    check_scan(u, delta, A, B, C, D, z, delta_bias)
    batch, channels, length = delta.shape
    u, delta = sequence(u), token_major(delta, "delta")
    z = None if z is None else token_major(z, "z")
    A = A.contiguous()
    B, C = (matrix[:, None] if matrix.dim() == 3 else matrix for matrix in (B, C))
    y = empty_token_major(u)
    spec = spec_of(
        Template.SCAN,
        STATES=A.shape[1],
        REVERSE=reverse,
        DTYPE_U=dtype_code(u),
        DTYPE_DELTA=dtype_code(delta),
        DTYPE_BC=dtype_code(B),
    )
    matrices = [
        *(u, *strides(u.movedim(1, -1))),
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
    launch(spec, *matrices, *vectors, delta_softplus, y, batch, channels, B.shape[1], length)
    return y
