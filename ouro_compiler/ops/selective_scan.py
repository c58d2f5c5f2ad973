"""`ouro::selective_scan`: the recurrence of Mamba-1, for one direction (METHODS 0).

    Delta_t = softplus(delta_t + delta_bias)        (either part optional)
    h_t     = exp(Delta_t A) * h_{t-1} + Delta_t B_t u_t
    y_t     = (C_t . h_t + D u_t) * silu(z_t)       (D and z optional)

Shapes and names are those of `mamba_ssm.selective_scan_fn`: u, delta, z are (B, D, L); A is (D, N);
B and C are (B, N, L) or (B, G, N, L) with D a multiple of G; D and delta_bias are (D,). Everything
is computed in fp32 and returned in u's dtype, in memory laid out as (B, L, D). With `reverse` time
runs from the last token to the first; nothing is flipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ouro_compiler.ops.activations import silu, softplus
from ouro_compiler.ops.library import (
    LIBRARY,
    as_token_major,
    define_op,
    empty_token_major,
    reject,
)

NAME = "selective_scan"
# States are produced for a chunk of time steps at once; a chunk this size stays in a core's cache.
_CHUNK_ELEMENTS = 1 << 17


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
    _check(u, delta, A, B, C, D, z, delta_bias)
    batch, channels, length = u.shape
    step = delta.float()
    if delta_bias is not None:
        step = step + delta_bias.float()[:, None]
    if delta_softplus:
        step = softplus(step)
    x = u.float()
    b, c = (_per_channel(t, channels) for t in (B, C))
    h = x.new_zeros(batch, channels, A.shape[1])
    y = torch.zeros_like(x)
    for t in reversed(range(length)) if reverse else range(length):
        decay = torch.exp(step[:, :, t, None] * A.float())
        h = decay * h + (step[:, :, t] * x[:, :, t])[..., None] * b[..., t]
        y[:, :, t] = (h * c[..., t]).sum(-1)
    if D is not None:
        y = y + x * D.float()[:, None]
    if z is not None:
        y = y * silu(z.float())
    return as_token_major(y.to(u.dtype))


def _per_channel(matrix: Tensor, channels: int) -> Tensor:
    """(B, N, L) or (B, G, N, L) -> (B, D, N, L) in fp32."""
    grouped = matrix[:, None] if matrix.dim() == 3 else matrix
    return grouped.float().repeat_interleave(channels // grouped.shape[1], dim=1)


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    if u.dim() != 3 or delta.shape != u.shape or (z is not None and z.shape != u.shape):
        reject(NAME, f"u, delta and z must share one shape (B, D, L), got u {tuple(u.shape)}")
    if A.dim() != 2 or A.shape[0] != u.shape[1] or A.is_complex():
        reject(NAME, f"A must be real, of shape (D, N), got {tuple(A.shape)} for D = {u.shape[1]}")
    outer = (u.shape[0], A.shape[1], u.shape[2])
    for name, matrix in (("B", B), ("C", C)):
        if matrix.dim() not in (3, 4) or (matrix.shape[0], *matrix.shape[-2:]) != outer:
            reject(NAME, f"{name} must be (B, N, L) or (B, G, N, L), got {tuple(matrix.shape)}")
        if _groups(matrix) != _groups(B) or u.shape[1] % _groups(matrix):
            reject(
                NAME,
                f"B and C need the same number of groups, a divisor of D = {u.shape[1]}, "
                f"got {_groups(B)} and {_groups(C)}",
            )
    for name, vector in (("D", D), ("delta_bias", delta_bias)):
        if vector is not None and vector.shape != u.shape[1:2]:
            reject(NAME, f"{name} must have shape (D,), got {tuple(vector.shape)}")


def _groups(matrix: Tensor) -> int:
    return 1 if matrix.dim() == 3 else matrix.shape[1]


# --- the chunked form: the same recurrence, all elementwise work vectorised over a chunk of time


class _Operands:
    """The inputs, time first and in groups: u, step (L, B, G, d); A (G, d, N); B, C (L, B, G, N)."""

    def __init__(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        delta_bias: Tensor | None,
        delta_softplus: bool,
        reverse: bool,
    ) -> None:
        batch, channels, length = u.shape
        self.groups = _groups(B)
        self.shape = (length, batch, self.groups, channels // self.groups)
        self.reverse = reverse
        self.raw_step = self.time_first(delta)
        if delta_bias is not None:
            self.raw_step = self.raw_step + delta_bias.float().view(self.shape[2:])
        self.step = softplus(self.raw_step) if delta_softplus else self.raw_step
        self.u = self.time_first(u)
        self.A = A.float().view(*self.shape[2:], -1)
        self.B, self.C = (
            (m[:, None] if m.dim() == 3 else m).permute(3, 0, 1, 2).float() for m in (B, C)
        )

    def time_first(self, x: Tensor) -> Tensor:
        """(B, D, L) -> (L, B, G, d) in fp32."""
        return x.permute(2, 0, 1).float().reshape(self.shape)

    def zero_state(self) -> Tensor:
        return self.u.new_zeros((*self.shape[1:], self.A.shape[-1]))

    def chunks(self) -> list[slice]:
        """Slices of time, in scan order."""
        length = self.shape[0]
        size = max(1, min(length, _CHUNK_ELEMENTS // max(1, self.zero_state().numel())))
        found = [slice(start, min(start + size, length)) for start in range(0, length, size)]
        return found[::-1] if self.reverse else found

    def order(self, chunk: slice) -> range:
        """Time steps inside a chunk, counted from its start, in scan order."""
        size = chunk.stop - chunk.start
        return range(size - 1, -1, -1) if self.reverse else range(size)

    def states(self, chunk: slice, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """decay and states (T, B, G, d, N) of a chunk entered with state h, and the last state."""
        decay = torch.exp(self.step[chunk][..., None] * self.A)
        states = (self.step[chunk] * self.u[chunk])[..., None] * self.B[chunk][:, :, :, None]
        for t in self.order(chunk):
            h = states[t].addcmul_(decay[t], h)
        return decay, states, h.clone()


def _scan(operands: _Operands) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Walk the chunks in scan order: (chunk, state at entry, states, C . h)."""
    h = operands.zero_state()
    for chunk in operands.chunks():
        entry = h
        _, states, h = operands.states(chunk, h)
        yield chunk, entry, states, (states @ operands.C[chunk][..., None]).squeeze(-1)


def _channels_last(x: Tensor) -> Tensor:
    """(L, B, G, d) -> (B, D, L), memory (B, L, D)."""
    return as_token_major(x.flatten(2).permute(1, 2, 0))


def selective_scan_chunked(
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
    """`selective_scan_ref` with one in-place multiply-add per step of time."""
    _check(u, delta, A, B, C, D, z, delta_bias)
    operands = _Operands(u, delta, A, B, C, delta_bias, delta_softplus, reverse)
    y = torch.empty_like(operands.u)
    for chunk, _, _, product in _scan(operands):
        y[chunk] = product
    if D is not None:
        y = y + operands.u * D.float().view(operands.shape[2:])
    if z is not None:
        y = y * silu(operands.time_first(z))
    return _channels_last(y.to(u.dtype))


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (u, delta, A, B, C, D, z, delta_bias); an absent input's gradient is empty.

    States are recomputed chunk by chunk, from the state at each chunk's entry.
    """
    operands = _Operands(u, delta, A, B, C, delta_bias, delta_softplus, reverse)
    grad_y = operands.time_first(grad)
    grad_z = grad.new_empty(0)
    walk = [(chunk, entry) for chunk, entry, _, _ in _scan(operands)] if z is None else []
    skip = None if D is None else D.float().view(operands.shape[2:])
    if z is not None:
        y = torch.empty_like(operands.u)
        for chunk, entry, _, product in _scan(operands):
            walk.append((chunk, entry))
            y[chunk] = product
        if skip is not None:
            y = y + operands.u * skip
        gate = operands.time_first(z)
        sigmoid = torch.sigmoid(gate)
        grad_z = _channels_last((grad_y * y * sigmoid * (1 + gate * (1 - sigmoid))).to(z.dtype))
        grad_y = grad_y * gate * sigmoid

    grad_u, grad_step = torch.zeros_like(operands.u), torch.zeros_like(operands.u)
    grad_A, grad_B, grad_C = (torch.zeros_like(m) for m in (operands.A, operands.B, operands.C))
    carry = operands.zero_state()
    for chunk, entry in reversed(walk):
        decay, states, _ = operands.states(chunk, entry)
        order = operands.order(chunk)
        grad_h = grad_y[chunk][..., None] * operands.C[chunk][:, :, :, None]
        for t in reversed(order):
            carry = grad_h[t].add_(carry) * decay[t]
        if reverse:
            previous = torch.cat([states[1:], entry[None]])
        else:
            previous = torch.cat([entry[None], states[:-1]])
        step, x = operands.step[chunk], operands.u[chunk]
        grad_B[chunk] = ((step * x)[..., None, :] @ grad_h).squeeze(-2)
        grad_C[chunk] = (grad_y[chunk][..., None, :] @ states).squeeze(-2)
        grad_input = (grad_h @ operands.B[chunk][..., None]).squeeze(-1)
        grad_exponent = grad_h.mul_(previous).mul_(decay)
        grad_step[chunk] = (grad_exponent * operands.A).sum(-1) + grad_input * x
        grad_A += grad_exponent.mul_(step[..., None]).sum((0, 1))
        grad_u[chunk] = grad_input * step

    grad_D = grad.new_empty(0)
    if D is not None and skip is not None:
        grad_D = (grad_y * operands.u).sum((0, 1)).flatten().to(D.dtype)
        grad_u = grad_u + grad_y * skip
    if delta_softplus:
        grad_step = grad_step * torch.sigmoid(operands.raw_step)
    grad_bias = grad.new_empty(0)
    if delta_bias is not None:
        grad_bias = grad_step.sum((0, 1)).flatten().to(delta_bias.dtype)
    grad_B, grad_C = (
        m.permute(1, 2, 3, 0).reshape(like.shape).contiguous().to(like.dtype)
        for m, like in ((grad_B, B), (grad_C, C))
    )
    return (
        _channels_last(grad_u.to(u.dtype)),
        _channels_last(grad_step.to(delta.dtype)),
        grad_A.view(A.shape).to(A.dtype).contiguous(),
        grad_B,
        grad_C,
        grad_D,
        grad_z,
        grad_bias,
    )


_ARGUMENTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D{}, Tensor? z{}, "
    "Tensor? delta_bias{}, bool delta_softplus{}, bool reverse{}"
)


def _fake(u: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    return empty_token_major(u)


def _fake_backward(
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
    grads = torch.ops.ouro.selective_scan_backward(grad, *ctx.saved_tensors, *ctx.flags)
    found = [
        g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=False)
    ]
    return (*found, None, None)


define_op(
    f"{NAME}({_ARGUMENTS.format('=None', '=None', '=None', '=False', '=False')}) -> Tensor",
    implementation=selective_scan_chunked,
    fake=_fake,
)
define_op(
    f"{NAME}_backward(Tensor grad, {_ARGUMENTS.format('', '', '', '', '')}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    implementation=selective_scan_backward,
    fake=_fake_backward,
)
torch.library.register_autograd(
    f"ouro::{NAME}", _backward, setup_context=_setup_context, lib=LIBRARY
)
