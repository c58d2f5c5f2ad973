"""`ouro::patched_scan`: the hidden states of a scan, mixed over the tokens around each patch.

    h_t = exp(delta_t A) * h_{t-1} + delta_t B_t u_t
    y_p = C_a . sum_k weights_pk h_{neighbours_pk}      (a: the token of anchor p)

u and delta (positive: bias and softplus are outside) are (B, E, L); A is (E, N); B and C are
(B, N, L) or (B, G, N, L) with E a multiple of G; the time of h runs as in `ouro::selective_scan`.
anchors (W, P) and neighbours (W, P, K) are int64 tokens, -1 for none; sample b has those of window
b % W, and its weights (B, P, K). y is (B, P, E) in u's dtype, with zeros for missing anchors.
Everything is computed in fp32 (in double where u is double).

Images are optimised through this op (calibration without data), so u, delta, B and C have
gradients. A is a frozen parameter, and weights are constants by definition: theirs are None.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ouro_compiler.ops.chunked_scan import Operands, channels_last, time_last
from ouro_compiler.ops.library import (
    LIBRARY,
    computing_dtype,
    define_op,
    empty_token_major,
    reject,
)
from ouro_compiler.ops.selective_scan import check as check_scan
from ouro_compiler.ops.selective_scan import per_channel

NAME = "patched_scan"


def patched_scan_ref(
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
    """The definition: one step of time after another, then one anchor after another."""
    check(u, delta, A, B, C, weights, anchors, neighbours)
    batch, channels, length = u.shape
    dtype = computing_dtype(u)
    step, x = delta.to(dtype), u.to(dtype)
    b, c = (per_channel(t.to(dtype), channels) for t in (B, C))
    h = x.new_zeros(batch, channels, A.shape[1])
    states = [h] * length
    for t in reversed(range(length)) if reverse else range(length):
        decay = torch.exp(step[:, :, t, None] * A.to(dtype))
        h = decay * h + (step[:, :, t] * x[:, :, t])[..., None] * b[..., t]
        states[t] = h
    hidden, sample = torch.stack(states, 1), torch.arange(batch, device=u.device)
    anchors, neighbours = (t[sample % len(t)] for t in (anchors, neighbours))
    y = []
    for p in range(anchors.shape[1]):
        anchor, around = anchors[:, p], neighbours[:, p]
        weight = (weights[:, p].to(dtype) * (around >= 0))[:, :, None, None]
        mixed = (weight * hidden[sample[:, None], around.clamp(min=0)]).sum(1)
        read = c[sample, :, :, anchor.clamp(min=0)]
        y.append((mixed * read).sum(-1) * (anchor >= 0)[:, None])
    return torch.stack(y, 1).to(u.dtype)


def check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    weights: Tensor,
    anchors: Tensor,
    neighbours: Tensor,
) -> None:
    """Raise ValueError for operands that do not fit each other."""
    check_scan(u, delta, A, B, C, None, None, None)
    if anchors.dim() != 2 or 0 in anchors.shape or neighbours.shape[:-1] != anchors.shape:
        reject(
            NAME,
            "anchors must be (W, P) and neighbours (W, P, K), "
            f"got {tuple(anchors.shape)} and {tuple(neighbours.shape)}",
        )
    for name, tokens in (("anchors", anchors), ("neighbours", neighbours)):
        if tokens.dtype != torch.int64:
            reject(NAME, f"{name} must be int64, got {tokens.dtype}")
    if weights.shape != (u.shape[0], *neighbours.shape[1:]):
        reject(
            NAME,
            f"weights must be (B, P, K), got {tuple(weights.shape)} for B = {u.shape[0]} "
            f"and neighbours {tuple(neighbours.shape)}",
        )


class _Patches:
    """Anchors and neighbours of every sample, beside the operands of a chunked scan."""

    def __init__(
        self, operands: Operands, weights: Tensor, anchors: Tensor, neighbours: Tensor
    ) -> None:
        window = torch.arange(weights.shape[0], device=weights.device) % len(anchors)
        anchor, self.neighbours = anchors[window], neighbours[window]
        self.weights = weights.to(operands.dtype) * (anchor >= 0)[..., None]
        # (B, G, P, N): which rows of C are read, and what they hold
        shape = (*operands.shape[1:3], anchor.shape[1], operands.A.shape[-1])
        self.token = anchor.clamp(min=0)[:, None, :, None].expand(shape)
        self.read = operands.C.permute(1, 2, 0, 3).gather(2, self.token)

    def spread(self, chunk: slice) -> Tensor:
        """(B, P, T): the weight of each of a chunk's tokens in each patch."""
        inside = (self.neighbours >= chunk.start) & (self.neighbours < chunk.stop)
        index = (self.neighbours - chunk.start).where(inside, 0)
        found = self.weights.new_zeros(*index.shape[:2], chunk.stop - chunk.start)
        return found.scatter_add_(2, index, self.weights * inside)

    def reading(self, chunk: slice) -> Tensor:
        """(B, G, P, T * N): what each state of a chunk counts in each patch's output."""
        return (self.spread(chunk)[:, None, ..., None] * self.read[:, :, :, None]).flatten(3)


def _states_first(states: Tensor) -> Tensor:
    """(T, B, G, d, N) -> (B, G, T * N, d)."""
    return states.permute(1, 2, 0, 4, 3).flatten(2, 3)


def patched_scan_implementation(
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
    """In chunks of time, each a product with all patches; on every device without a kernel."""
    check(u, delta, A, B, C, weights, anchors, neighbours)
    operands = Operands(u, delta, A, B, C, None, False, reverse)
    patches = _Patches(operands, weights, anchors, neighbours)
    y = operands.u.new_zeros(*patches.read.shape[:3], operands.shape[-1])
    h = operands.zero_state()
    for chunk in operands.chunks():
        _, states, h = operands.states(chunk, h)
        y += patches.reading(chunk) @ _states_first(states)
    return y.transpose(1, 2).flatten(2).contiguous().to(u.dtype)


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
    """Gradients of (u, delta, B, C); states are recomputed from those at each chunk's entry."""
    check(u, delta, A, B, C, weights, anchors, neighbours)
    operands = Operands(u, delta, A, B, C, None, False, reverse)
    patches = _Patches(operands, weights, anchors, neighbours)
    walk, h = [], operands.zero_state()
    for chunk in operands.chunks():
        walk.append((chunk, h))
        h = operands.states(chunk, h)[2]
    grad_y = grad.to(operands.dtype).unflatten(2, operands.shape[2:]).transpose(1, 2)
    grad_u, grad_step = torch.zeros_like(operands.u), torch.zeros_like(operands.u)
    grad_B, grad_read = torch.zeros_like(operands.B), torch.zeros_like(patches.read)
    carry = operands.zero_state()
    for chunk, entry in reversed(walk):
        decay, states, _ = operands.states(chunk, entry)
        terms = (grad_y @ _states_first(states).transpose(-1, -2)).unflatten(3, (len(states), -1))
        grad_read += (terms * patches.spread(chunk)[:, None, ..., None]).sum(3)
        grad_h = patches.reading(chunk).transpose(-1, -2) @ grad_y
        grad_h = grad_h.unflatten(2, (len(states), -1)).permute(2, 0, 1, 4, 3).contiguous()
        grad_u[chunk], grad_step[chunk], grad_B[chunk], _, carry = operands.pull_back(
            chunk, entry, decay, states, grad_h, carry
        )
    grad_C = torch.zeros_like(operands.C).permute(1, 2, 0, 3)
    grad_C = grad_C.scatter_add(2, patches.token, grad_read).permute(2, 0, 1, 3)
    return (
        channels_last(grad_u.to(u.dtype)),
        channels_last(grad_step.to(delta.dtype)),
        time_last(grad_B, B),
        time_last(grad_C, C),
    )


_ARGUMENTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor weights, Tensor anchors, "
    "Tensor neighbours, bool reverse"
)


def empty_output(u: Tensor, anchors: Tensor) -> Tensor:
    """(B, P, E), uninitialised."""
    return u.new_empty((u.shape[0], anchors.shape[1], u.shape[1]))


def empty_gradients(
    u: Tensor, delta: Tensor, B: Tensor, C: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The outputs of the backward, uninitialised."""
    grad_B, grad_C = (m.new_empty(m.shape) for m in (B, C))
    return empty_token_major(u), empty_token_major(delta), grad_B, grad_C


def _fake(u: Tensor, *args: Any) -> Tensor:
    return empty_output(u, args[5])


def _fake_backward(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    del grad
    return empty_gradients(args[0], args[1], args[3], args[4])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs[:8])
    ctx.reverse = inputs[8]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    found = torch.ops.ouro.patched_scan_backward(grad, *ctx.saved_tensors, ctx.reverse)
    needed = [ctx.needs_input_grad[index] for index in (0, 1, 3, 4)]
    u, delta, B, C = (g if wanted else None for g, wanted in zip(found, needed, strict=True))
    return u, delta, None, B, C, None, None, None, None


define_op(f"{NAME}({_ARGUMENTS}) -> Tensor", implementation=patched_scan_implementation, fake=_fake)
define_op(
    f"{NAME}_backward(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    implementation=patched_scan_backward,
    fake=_fake_backward,
)
torch.library.register_autograd(
    f"ouro::{NAME}", _backward, setup_context=_setup_context, lib=LIBRARY
)
