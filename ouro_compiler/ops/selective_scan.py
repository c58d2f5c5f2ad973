"""`ouro::selective_scan`: the recurrence of Mamba-1, for one direction (METHODS 0).

    Delta_t = softplus(delta_t + delta_bias)        (either part optional)
    h_t     = exp(Delta_t A) * h_{t-1} + Delta_t B_t u_t
    y_t     = (C_t . h_t + D u_t) * silu(z_t)       (D and z optional)

Shapes and names are those of `mamba_ssm.selective_scan_fn`: u, delta, z are (B, D, L); A is (D, N);
B and C are (B, N, L) or (B, G, N, L) with D a multiple of G; D and delta_bias are (D,). Everything
is computed in fp32 (in double where u is double) and returned in u's dtype, in memory laid out as
(B, L, D). With `reverse` time runs from the last token to the first; nothing is flipped. u may be a
map (B, D, H, W) of any strides: its tokens h * W + w.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ouro_compiler.ops.activations import silu, softplus
from ouro_compiler.ops.chunked_scan import (
    groups_of,
    selective_scan_backward,
    selective_scan_chunked,
)
from ouro_compiler.ops.library import (
    LIBRARY,
    as_token_major,
    computing_dtype,
    define_op,
    empty_token_major,
    reject,
)
from ouro_compiler.ops.maps import as_sequence, sequence_shape

NAME = "selective_scan"


def selective_scan_ref(
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
    """The definition: one step of time after another. Shapes as in the module docstring."""
    check(u, delta, A, B, C, D, z, delta_bias)
    u = as_sequence(u)
    batch, channels, length = u.shape
    dtype = computing_dtype(u)
    step = delta.to(dtype)
    if delta_bias is not None:
        step = step + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        step = softplus(step)
    x = u.to(dtype)
    b, c = (per_channel(t.to(dtype), channels) for t in (B, C))
    h = x.new_zeros(batch, channels, A.shape[1])
    y = torch.zeros_like(x)
    for t in reversed(range(length)) if reverse else range(length):
        decay = torch.exp(step[:, :, t, None] * A.to(dtype))
        h = decay * h + (step[:, :, t] * x[:, :, t])[..., None] * b[..., t]
        y[:, :, t] = (h * c[..., t]).sum(-1)
    if D is not None:
        y = y + x * D.to(dtype)[:, None]
    if z is not None:
        y = y * silu(z.to(dtype))
    return as_token_major(y.to(u.dtype))


def per_channel(matrix: Tensor, channels: int) -> Tensor:
    """(B, N, L) or (B, G, N, L) -> (B, D, N, L)."""
    grouped = matrix[:, None] if matrix.dim() == 3 else matrix
    return grouped.repeat_interleave(channels // grouped.shape[1], dim=1)


def check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    """Raise ValueError for operands that do not fit each other."""
    shape = sequence_shape(u)
    if shape is None or any(t is not None and tuple(t.shape) != shape for t in (delta, z)):
        reject(NAME, f"u, delta and z must share one shape (B, D, L), got u {tuple(u.shape)}")
    batch, channels, length = shape
    if A.dim() != 2 or A.shape[0] != channels or A.is_complex():
        reject(NAME, f"A must be real, of shape (D, N), got {tuple(A.shape)} for D = {channels}")
    outer = (batch, A.shape[1], length)
    for name, matrix in (("B", B), ("C", C)):
        if matrix.dim() not in (3, 4) or (matrix.shape[0], *matrix.shape[-2:]) != outer:
            reject(NAME, f"{name} must be (B, N, L) or (B, G, N, L), got {tuple(matrix.shape)}")
        if groups_of(matrix) != groups_of(B) or channels % groups_of(matrix):
            reject(
                NAME,
                f"B and C need the same number of groups, a divisor of D = {channels}, "
                f"got {groups_of(B)} and {groups_of(C)}",
            )
    for name, vector in (("D", D), ("delta_bias", delta_bias)):
        if vector is not None and tuple(vector.shape) != (channels,):
            reject(NAME, f"{name} must have shape (D,), got {tuple(vector.shape)}")


_ARGUMENTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D{}, Tensor? z{}, "
    "Tensor? delta_bias{}, bool delta_softplus{}, bool reverse{}"
)


def selective_scan_implementation(
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
    """The chunked form, on every device without a kernel. Shapes as in the module docstring."""
    check(u, delta, A, B, C, D, z, delta_bias)
    u = as_sequence(u)
    return selective_scan_chunked(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)


def _fake(u: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    return empty_token_major(u)


def empty_gradients(
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
    """The outputs of the backward, uninitialised; an absent operand's has no elements."""

    def like(tensor: Tensor | None) -> Tensor:
        return grad.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)

    grad_z = grad.new_empty(0) if z is None else empty_token_major(z)
    return (
        empty_token_major(u),
        empty_token_major(delta),
        *map(like, (A, B, C, D)),
        grad_z,
        like(delta_bias),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs[:8])
    ctx.flags = inputs[8:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    u, *others = ctx.saved_tensors
    grads = torch.ops.ouro.selective_scan_backward(grad, as_sequence(u), *others, *ctx.flags)
    if u.dim() == 4:
        grads = (grads[0].unflatten(2, u.shape[2:]), *grads[1:])
    found = [g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=False)]
    return (*found, None, None)


define_op(
    f"{NAME}({_ARGUMENTS.format('=None', '=None', '=None', '=False', '=False')}) -> Tensor",
    implementation=selective_scan_implementation,
    fake=_fake,
)
define_op(
    f"{NAME}_backward(Tensor grad, {_ARGUMENTS.format('', '', '', '', '')}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    implementation=selective_scan_backward,
    fake=empty_gradients,
)
torch.library.register_autograd(
    f"ouro::{NAME}", _backward, setup_context=_setup_context, lib=LIBRARY
)
