"""Registration of `torch.ops.ouro.*`: one call per op, schema + reference + fake + autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from ouro_compiler.ops.maps import sequence_shape

LIBRARY = torch.library.Library("ouro", "DEF")


def define_op(schema: str, *, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define `ouro::<schema>` with an implementation for every device and its fake.

    The implementation is registered as CompositeExplicitAutograd: a kernel registered later for
    one device ("CPU", "CUDA") takes precedence there and leaves the reference everywhere else.
    """
    name = LIBRARY.define(schema)
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ouro::{name}", fake, lib=LIBRARY)


def differentiate_by_reference(name: str, reference: Callable[..., Any]) -> None:
    """Give `ouro::<name>` a backward that recomputes the reference and differentiates it.

    Nothing but the inputs is saved, so memory stays that of the inputs.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        del output
        ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]
        ctx.constants = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        args = list(ctx.constants)
        wanted: list[int] = []
        with torch.enable_grad():
            for index, is_tensor in enumerate(ctx.is_tensor):
                if is_tensor:
                    tensor = next(saved).detach()
                    if ctx.needs_input_grad[index]:
                        tensor.requires_grad_()
                        wanted.append(index)
                    args[index] = tensor
            outputs = reference(*args)
            if isinstance(outputs, Tensor):
                outputs = (outputs,)
            pairs = [
                (out, grad)
                for out, grad in zip(outputs, grads, strict=True)
                if grad is not None and out.requires_grad
            ]
            found = torch.autograd.grad(
                [out for out, _ in pairs],
                [args[index] for index in wanted],
                [grad for _, grad in pairs],
                allow_unused=True,
            )
        result: list[Tensor | None] = [None] * len(args)
        for index, grad in zip(wanted, found, strict=True):
            result[index] = grad
        return tuple(result)

    torch.library.register_autograd(
        f"ouro::{name}", backward, setup_context=setup_context, lib=LIBRARY
    )


def empty_token_major(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised (B, D, L) tensor whose memory is laid out as (B, L, D).

    like: (B, D, L), or a map (B, D, H, W).
    """
    shape = sequence_shape(like)
    assert shape is not None
    batch, channels, length = shape
    return like.new_empty((batch, length, channels), dtype=dtype).transpose(1, 2)


def empty_channels_last(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor like (B, D, L) or (B, D, H, W) with channels last in memory."""
    batch, channels, *places = like.shape
    return like.new_empty((batch, *places, channels), dtype=dtype).movedim(-1, 1)


def as_token_major(x: Tensor) -> Tensor:
    """Values of `x` (B, D, ...) in memory laid out as (B, ..., D): a copy only where needed."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def computing_dtype(x: Tensor) -> torch.dtype:
    """What an op computes in: fp32, or double where its main operand is double."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def reject(name: str, problem: str) -> NoReturn:
    """Raise the ValueError every op raises for inputs it does not take."""
    raise ValueError(f"ouro::{name}: {problem}")
