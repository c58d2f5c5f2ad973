"""Launching kernels, or recording what would be launched; operands as kernels read them."""

from __future__ import annotations

import contextvars
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ouro_compiler.kernels.cache import load_kernel
from ouro_compiler.kernels.spec import KernelSpec


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One kernel launch: args are the parameters that are no constants, in order."""

    spec: KernelSpec
    grid: tuple[int, int, int]
    args: tuple[Any, ...]


@dataclass(kw_only=True)
class Recording:
    """What an operator would have launched, and the copies it would have made."""

    launches: list[Launch] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)


_RECORDING: contextvars.ContextVar[Recording | None] = contextvars.ContextVar(
    "ouro_recording", default=None
)


@contextmanager
def record_launches() -> Iterator[Recording]:
    """Inside, launches and copies are recorded and nothing runs: fake tensors will do."""
    recording = Recording()
    token = _RECORDING.set(recording)
    try:
        yield recording
    finally:
        _RECORDING.reset(token)


def current_recording() -> Recording | None:
    """What is being recorded, if anything is."""
    return _RECORDING.get()


def note_copy(name: str, reason: str) -> None:
    """Record that an operand is copied before a kernel can read it."""
    recording = _RECORDING.get()
    if recording is not None:
        recording.copies.append(f"{name} is copied: {reason}")


def launch(spec: KernelSpec, grid: tuple[int, int, int], *args: Any) -> None:
    """Launch on the current stream of the first tensor's device, or record; as it was tuned there.

    The batch goes into the grid's first dimension: the others end at 65,535.
    """
    one = _tuning()(spec, grid, args) or Launch(spec=spec, grid=grid, args=args)
    recording = _RECORDING.get()
    if recording is not None:
        recording.launches.append(one)
    else:
        start(one)


def start(launch: Launch) -> Any:
    """Launch just this; returns the compiled kernel, None where nothing runs or Triton interprets.

    A group's launch too (`grouping.py`).
    """
    if 0 in launch.grid:
        return None
    with _on_device(launch.args[0]):
        kernel = load_kernel(launch.spec)[launch.grid]
        return kernel(*launch.args, **launch_options(launch.spec))


@functools.cache
def _tuning() -> Callable[..., Launch | None]:
    from ouro_compiler.kernels.tuned import tuned_launch  # it needs this module

    return tuned_launch


def launch_options(spec: KernelSpec) -> dict[str, Any]:
    """Compile options in Triton's names.

    The compiler fuses no a * b + c: codes are the reference's bit for bit, and a launch gives the
    same bits alone, in a group and in a chain.
    """
    return {
        "num_warps": spec.num_warps,
        "num_stages": spec.num_stages,
        "enable_fp_fusion": False,
    }


def contiguous(tensor: Tensor, name: str) -> Tensor:
    """A contiguous form of an operand; a copy is recorded."""
    if tensor.is_contiguous():
        return tensor
    note_copy(name, "it is not contiguous")
    return tensor.contiguous()


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where tokens lie: strides in elements, and the columns of a map (row None, width 0: none)."""

    sample: int
    row: int | None
    token: int
    channel: int
    width: int


def places(x: Tensor) -> Places:
    """Of tokens (B, L, K), or of a map (B, H, W, K)."""
    sample, *rows, token, channel = x.stride()
    row, width = (rows[0], x.shape[2]) if rows else (None, 0)
    return Places(sample=sample, row=row, token=token, channel=channel, width=width)


def as_tokens(tensor: Tensor, name: str, like: Tensor | None = None) -> Tensor:
    """Rows (..., K) seen as some (B, L, K), of any strides; where only a copy is, it is recorded.

    like: what such a form of another operand is; its B and L are taken.
    """
    *leading, columns = (1, 1, *tensor.shape)[-max(3, tensor.dim()) :]
    splits = range(1, len(leading))
    shapes = [(math.prod(leading[:one]), math.prod(leading[one:]), columns) for one in splits]
    if like is not None:
        shapes = [(like.shape[0], like.shape[1], columns)]
    for shape in shapes:
        with suppress(RuntimeError):  # no strides describe it so
            return tensor.view(shape)
    return contiguous(tensor, name).view(shapes[0])


def row_strides(tokens: Tensor | None) -> tuple[int, ...]:
    """Strides of (B, L, K); zeros without a tensor."""
    return (0, 0, 0) if tokens is None else tokens.stride()


def _on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@functools.cache
def interpreting() -> bool:
    """Does Triton interpret (TRITON_INTERPRET=1 when it was imported)? No inline assembly then."""
    import triton

    return bool(triton.knobs.runtime.interpret)
