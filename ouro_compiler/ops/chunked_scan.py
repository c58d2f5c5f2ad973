"""The selective scan in chunks of time: all elementwise work vectorised, one multiply-add a step.

`selective_scan_chunked` computes what `selective_scan.selective_scan_ref` defines;
`selective_scan_backward` its gradients. Nothing is flipped for the reversed direction.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ouro_compiler.ops.activations import silu, softplus
from ouro_compiler.ops.library import as_token_major, computing_dtype

# States are produced for a chunk of time steps at once; a chunk this size stays in a core's cache.
_CHUNK_ELEMENTS = 1 << 17


def groups_of(matrix: Tensor) -> int:
    """Groups of B or C: (B, N, L) has one, (B, G, N, L) G."""
    return 1 if matrix.dim() == 3 else matrix.shape[1]


class Operands:
    """The inputs, time first, in groups: u, step (L, B, G, d); A (G, d, N); B, C (L, B, G, N)."""

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
        self.groups = groups_of(B)
        self.shape = (length, batch, self.groups, channels // self.groups)
        self.reverse = reverse
        self.dtype = computing_dtype(u)
        self.raw_step = self.time_first(delta)
        if delta_bias is not None:
            self.raw_step = self.raw_step + delta_bias.to(self.dtype).view(self.shape[2:])
        self.step = softplus(self.raw_step) if delta_softplus else self.raw_step
        self.u = self.time_first(u)
        self.A = A.to(self.dtype).view(*self.shape[2:], -1)
        self.B, self.C = (
            (m[:, None] if m.dim() == 3 else m).permute(3, 0, 1, 2).to(self.dtype) for m in (B, C)
        )

    def time_first(self, x: Tensor) -> Tensor:
        """(B, D, L) -> (L, B, G, d) in the dtype of the computation."""
        return x.permute(2, 0, 1).to(self.dtype).reshape(self.shape)

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

    def pull_back(
        self, chunk: slice, entry: Tensor, decay: Tensor, states: Tensor, grad_h: Tensor, h: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients of u, step and B in a chunk, of its exponents, and of the state at its entry.

        grad_h: the gradient of each state by itself, overwritten; h: of the state at the end.
        """
        for t in reversed(self.order(chunk)):
            h = grad_h[t].add_(h) * decay[t]
        if self.reverse:
            previous = torch.cat([states[1:], entry[None]])
        else:
            previous = torch.cat([entry[None], states[:-1]])
        step, x = self.step[chunk], self.u[chunk]
        grad_B = ((step * x)[..., None, :] @ grad_h).squeeze(-2)
        grad_input = (grad_h @ self.B[chunk][..., None]).squeeze(-1)
        grad_exponent = grad_h.mul_(previous).mul_(decay)
        grad_step = (grad_exponent * self.A).sum(-1) + grad_input * x
        return grad_input * step, grad_step, grad_B, grad_exponent, h


def _scan(operands: Operands) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Walk the chunks in scan order: (chunk, state at entry, states, C . h)."""
    h = operands.zero_state()
    for chunk in operands.chunks():
        entry = h
        _, states, h = operands.states(chunk, h)
        yield chunk, entry, states, (states @ operands.C[chunk][..., None]).squeeze(-1)


def channels_last(x: Tensor) -> Tensor:
    """(L, B, G, d) -> (B, D, L), memory (B, L, D)."""
    return as_token_major(x.flatten(2).permute(1, 2, 0))


def time_last(m: Tensor, like: Tensor) -> Tensor:
    """(L, B, G, N) -> the shape and dtype of B or C."""
    return m.permute(1, 2, 3, 0).reshape(like.shape).contiguous().to(like.dtype)


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
    operands = Operands(u, delta, A, B, C, delta_bias, delta_softplus, reverse)
    y = torch.empty_like(operands.u)
    for chunk, _, _, product in _scan(operands):
        y[chunk] = product
    if D is not None:
        y = y + operands.u * D.to(operands.dtype).view(operands.shape[2:])
    if z is not None:
        y = y * silu(operands.time_first(z))
    return channels_last(y.to(u.dtype))


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
    operands = Operands(u, delta, A, B, C, delta_bias, delta_softplus, reverse)
    grad_y = operands.time_first(grad)
    grad_z = grad.new_empty(0)
    walk = [(chunk, entry) for chunk, entry, _, _ in _scan(operands)] if z is None else []
    skip = None if D is None else D.to(operands.dtype).view(operands.shape[2:])
    if z is not None:
        y = torch.empty_like(operands.u)
        for chunk, entry, _, product in _scan(operands):
            walk.append((chunk, entry))
            y[chunk] = product
        if skip is not None:
            y = y + operands.u * skip
        gate = operands.time_first(z)
        sigmoid = torch.sigmoid(gate)
        grad_z = channels_last((grad_y * y * sigmoid * (1 + gate * (1 - sigmoid))).to(z.dtype))
        grad_y = grad_y * gate * sigmoid

    grad_u, grad_step = torch.zeros_like(operands.u), torch.zeros_like(operands.u)
    grad_A, grad_B, grad_C = (torch.zeros_like(m) for m in (operands.A, operands.B, operands.C))
    carry = operands.zero_state()
    for chunk, entry in reversed(walk):
        decay, states, _ = operands.states(chunk, entry)
        grad_h = grad_y[chunk][..., None] * operands.C[chunk][:, :, :, None]
        grad_C[chunk] = (grad_y[chunk][..., None, :] @ states).squeeze(-2)
        grad_u[chunk], grad_step[chunk], grad_B[chunk], grad_exponent, carry = operands.pull_back(
            chunk, entry, decay, states, grad_h, carry
        )
        grad_A += grad_exponent.mul_(operands.step[chunk][..., None]).sum((0, 1))

    grad_D = grad.new_empty(0)
    if D is not None and skip is not None:
        grad_D = (grad_y * operands.u).sum((0, 1)).flatten().to(D.dtype)
        grad_u = grad_u + grad_y * skip
    if delta_softplus:
        grad_step = grad_step * torch.sigmoid(operands.raw_step)
    grad_bias = grad.new_empty(0)
    if delta_bias is not None:
        grad_bias = grad_step.sum((0, 1)).flatten().to(delta_bias.dtype)
    grad_B, grad_C = (time_last(m, like) for m, like in ((grad_B, B), (grad_C, C)))
    return (
        channels_last(grad_u.to(u.dtype)),
        channels_last(grad_step.to(delta.dtype)),
        grad_A.view(A.shape).to(A.dtype).contiguous(),
        grad_B,
        grad_C,
        grad_D,
        grad_z,
        grad_bias,
    )
