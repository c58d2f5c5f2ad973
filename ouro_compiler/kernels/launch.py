"""Launching kernels, or recording what would be launched; block sizes for each kernel by default.

Defaults follow from shapes, so that a model's kernels can be compiled ahead and nothing needs
tuning. Only a scan's depend on the batch, and on the GPU: none of its forms changes a bit. What was
tuned on a GPU (`tuned.py`) takes their place.
"""

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

_LONGEST_GRID = 65_535  # in the second and third dimension


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
    """Compile options in Triton's names."""
    return {
        "num_warps": spec.num_warps,
        "num_stages": spec.num_stages,
        "enable_fp_fusion": spec.fp_fusion,
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


def next_power_of_2(value: int) -> int:
    """The smallest power of two that is at least `value`, a positive integer."""
    return 1 << (value - 1).bit_length()


def quantizer_warps(columns: int) -> int:
    """Warps for a row: eight columns a lane at most, where there are enough warps."""
    return max(1, min(8, next_power_of_2(columns) // 256))


def linear_blocks(rows_of_weight: int, bytes_a_row: int, *, fp32_outliers: bool) -> dict[str, int]:
    """BLOCK_M/N/K of a product with a weight of (rows, bytes).

    64 rows: more make the lists of a tile longer, since windows are some 10 tokens. Outliers in
    fp32 are multiplied without tensor cores: wider tiles spill.
    """
    block_n = max(16, min(64 if fp32_outliers else 128, next_power_of_2(rows_of_weight)))
    for block_k in (64, 32):
        if bytes_a_row % block_k == 0:
            return {"BLOCK_M": 64, "BLOCK_N": block_n, "BLOCK_K": block_k}
    return {
        "BLOCK_M": 64,
        "BLOCK_N": block_n,
        "BLOCK_K": max(32, min(64, next_power_of_2(bytes_a_row))),
    }


def scan_channels(channels: int) -> int:
    """Channels a program of a scan: one a lane."""
    return min(32, next_power_of_2(channels))


def scan_blocks(
    channels: int, states: int, length: int, scans: int, multiprocessors: int
) -> dict[str, int]:
    """The form of a scan of (scans, channels, length): constants that no bit depends on but CHUNK.

    A lane has a channel, where that keeps the GPU busy: two programs a multiprocessor, since two
    directions are one launch and a multiprocessor has four schedulers. Else, and beyond 32 states,
    four lanes share a channel's states (SHARE): four times the programs, each token in half the
    instructions.
    STEPS is how many tokens' operands are held: four, to wait for none of them; one where a lane
    has many states, whose registers are many and whose tokens take long enough.
    CHUNK is `scan_chunk`'s. SPLIT gives each chunk its programs, in a launch more that reads u,
    delta and B once more: worth it while the GPU is idle otherwise. Four directions are one launch:
    beyond half a program a multiprocessor, memory takes longer than a scan's tokens do.
    """
    lanes = min(4, next_power_of_2(states))
    block_d = scan_channels(channels)
    blocks = -(-channels // block_d)
    chunk = scan_chunk(length, states)
    alone = chunk == length and (scans * blocks < 2 * multiprocessors or states > 32)
    share = lanes if alone else 1
    steps = min(4 if states <= 4 * share else 1, length)
    if chunk < length:
        steps = math.gcd(4, chunk)
    split = chunk < length and 2 * scans * blocks < multiprocessors
    return {
        "LANES": lanes,
        "SHARE": share,
        "STEPS": steps,
        "BLOCK_D": block_d if share == 1 else 32 // share,
        "CHUNK": chunk,
        "SPLIT": int(split and blocks * (length // chunk) <= _LONGEST_GRID),
    }


@functools.cache
def scan_chunk(length: int, states: int) -> int:
    """Tokens of a chunk: a divisor of `length`, or all of it; from the shape alone.

    Long scans of few states, as VMamba's first stages have them: beside four states' exponentials a
    second state costs little. A program walks chunk tokens twice, and what the chunks before it
    left, length / chunk pairs that take a third of a token each: sqrt(length / 6) is the best.
    """
    if states > 4 or length < 256:
        return length
    least = math.isqrt(length // 6)
    fits = [one for one in range(max(2, least), length // 4 + 1) if length % one == 0]
    return min(fits, key=lambda one: (one % 4 != 0, one), default=length)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; of an H100 where that is not known, as when kernels are compiled ahead.

    An interpreter is one: its programs run one after the other.
    """
    if interpreting():
        return 1
    if device.type != "cuda" or not torch.cuda.is_available():
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
