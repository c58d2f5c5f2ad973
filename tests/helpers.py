"""What several test modules share: opcheck, tolerances, mamba's own scan, a quantizer oracle."""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import Tensor
from torch.testing._internal import optests

# Hypothesis without randomness, a clock or a database: the same examples on every run.
REPEATABLE = settings(derandomize=True, deadline=None, database=None, max_examples=60)

OpCheckError = optests.OpCheckError  # what torch.library.opcheck raises

MAMBA_MISSING = (
    "mamba_ssm cannot be imported, and these tests compare with its own reference scan. Install it"
    " (no CUDA needed) with: pip install einops && MAMBA_SKIP_CUDA_BUILD=TRUE"
    " MAMBA_FORCE_BUILD=TRUE pip install --no-build-isolation --no-deps mamba-ssm==2.3.2.post1"
)


def generator(seed: int) -> torch.Generator:
    """A CPU generator with this seed."""
    return torch.Generator().manual_seed(seed)


def randn(seed: int, *shape: int) -> Tensor:
    """Standard normal fp32 values, the same for the same seed and shape."""
    return torch.randn(*shape, generator=generator(seed))


def assert_opcheck(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
    """Schema, autograd registration, fake against real (strides too) and AOTAutograd all agree."""
    results = torch.library.opcheck(op, args, kwargs or {})
    expected = {
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    }
    assert set(results) == expected
    assert all(outcome == "SUCCESS" for outcome in results.values()), results


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Same shape and dtype; errors at most `tolerance` of the largest expected magnitude."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert actual.dtype == expected.dtype, (actual.dtype, expected.dtype)
    assert bool(actual.isfinite().all())
    if expected.numel() == 0:
        return
    scale = max(expected.double().abs().max().item(), 1e-6)
    error = (actual.double() - expected.double()).abs().max().item()
    assert error <= tolerance * scale, f"error {error:.3g} at magnitude {scale:.3g}"


def assert_token_major(y: Tensor) -> None:
    """y (B, D, L) lies in memory as (B, L, D); the stride of a dimension of size 1 is free."""
    _, channels, length = y.shape
    expected = (length * channels, 1, channels)
    for size, stride, wanted in zip(y.shape, y.stride(), expected, strict=True):
        assert size == 1 or stride == wanted, (y.shape, y.stride())


def assert_batch_invariant(function: Callable[..., Any], *batched: Tensor | None) -> None:
    """`function` gives each sample, bit for bit, what it gives that sample alone (METHODS P7)."""
    size = next(tensor.shape[0] for tensor in batched if tensor is not None)
    together = function(*batched)
    together = together if isinstance(together, tuple) else (together,)
    for sample in range(size):
        one = slice(sample, sample + 1)
        alone = function(*(None if tensor is None else tensor[one] for tensor in batched))
        alone = alone if isinstance(alone, tuple) else (alone,)
        for index, (many, single) in enumerate(zip(together, alone, strict=True)):
            assert torch.equal(many[one], single), f"output {index} of sample {sample} differs"


def shares_memory(a: Tensor, b: Tensor) -> bool:
    """Do two tensors live in one storage."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


# --- mamba_ssm's own reference


def _belongs_to_mamba(name: str) -> bool:
    return name.split(".")[0] in ("mamba_ssm", "selective_scan_cuda")


@contextmanager
def _stubbed_mamba(folders: Sequence[str]) -> Iterator[None]:
    """An empty package `mamba_ssm` over the installed folders, and an empty CUDA extension."""
    saved = {name: module for name, module in sys.modules.items() if _belongs_to_mamba(name)}
    package, extension = types.ModuleType("mamba_ssm"), types.ModuleType("selective_scan_cuda")
    package.__path__ = list(folders)
    package.__spec__ = importlib.machinery.ModuleSpec("mamba_ssm", None, is_package=True)
    package.__spec__.submodule_search_locations = list(folders)
    extension.__spec__ = importlib.machinery.ModuleSpec("selective_scan_cuda", None)
    _forget_mamba()
    sys.modules.update({"mamba_ssm": package, "selective_scan_cuda": extension})
    try:
        yield
    finally:
        _forget_mamba()
        sys.modules.update(saved)


def _forget_mamba() -> None:
    for name in [name for name in sys.modules if _belongs_to_mamba(name)]:
        del sys.modules[name]


def _installed_mamba() -> list[str]:
    """Folders of the installed package; whatever stands in for it in sys.modules is ignored."""
    hidden = sys.modules.pop("mamba_ssm", None)
    try:
        spec = importlib.util.find_spec("mamba_ssm")
    finally:
        if hidden is not None:
            sys.modules["mamba_ssm"] = hidden
    return list(spec.submodule_search_locations or []) if spec else []


@functools.cache
def mamba_selective_scan_ref() -> Callable[..., Tensor]:
    """`mamba_ssm.ops.selective_scan_interface.selective_scan_ref`, without CUDA or the package."""
    folders = _installed_mamba()
    if not folders:
        pytest.fail(MAMBA_MISSING, pytrace=False)
    with _stubbed_mamba(folders):
        try:
            module = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
        except ImportError as error:
            pytest.fail(f"{MAMBA_MISSING}\n(the import said: {error})", pytrace=False)
    return module.selective_scan_ref


# --- the dynamic-outlier quantizer, one token and one channel after the other


class Quantized(NamedTuple):
    """Everything the oracle decides, as numpy arrays; `listed` is (B, L, K), `fired` (B, L)."""

    codes: np.ndarray
    outlier_scale: np.ndarray
    outlier_start: np.ndarray
    listed: np.ndarray
    fired: np.ndarray
    dequantized: np.ndarray


def _divide_and_round(value: np.float32, scale: np.float32) -> int:
    """round(value / scale) in fp32, half to even."""
    return int(np.rint(np.float32(value) / np.float32(scale)))


def quantizer_oracle(
    x: np.ndarray,
    inlier_scale: np.ndarray,
    zero_point: np.ndarray | None,
    threshold: np.ndarray | None,
    inlier_bits: int,
    outlier_bits: int,
    refresh_period: int,
    reverse: bool,
    channels: Sequence[int] | None = None,
) -> Quantized:
    """Algorithm of METHODS 3.1 and 3.3 with a Python set as the list; `channels` fixes the list.

    All arithmetic is in numpy's fp32 scalars, so integer codes must match bit for bit.
    """
    f32 = np.float32
    batch, length, width = x.shape
    window = min(refresh_period, length)
    never = 255 if window <= 255 else 2**31 - 1
    top = (1 << inlier_bits) - 1 if zero_point is not None else (1 << (inlier_bits - 1)) - 1
    half_range = 1 << (inlier_bits - 1)
    outlier_top = (1 << (outlier_bits - 1)) - 1
    codes = np.zeros(x.shape, np.int64)
    out = np.zeros(x.shape, f32)
    listed = np.zeros(x.shape, bool)
    scales = np.ones((batch, length), f32)
    fired = np.zeros((batch, length), bool)
    start = np.full((batch, (length + window - 1) // window, width), never, np.int64)
    for b in range(batch):
        members: set[int] = set()
        for step in range(length):
            t = length - 1 - step if reverse else step
            s = f32(inlier_scale[t])
            row = [f32(v) for v in x[b, t]]
            if step % window == 0:
                members = set()
                if channels is not None:
                    members = {int(c) for c in channels}
                    for c in members:
                        start[b, step // window, c] = 0
            if channels is None:
                if zero_point is None:
                    distance, limit = [abs(v) for v in row], s * f32(top)
                else:
                    middle = s * (f32(top) / f32(2) - f32(zero_point[t]))
                    distance, limit = [abs(v - middle) for v in row], s * (f32(top) / f32(2))
                outside = [c for c in range(width) if c not in members and distance[c] > limit]
                fired[b, t] = bool(outside)
                if outside:
                    for c in range(width):
                        if c not in members and distance[c] >= f32(threshold[t]):
                            members.add(c)
                            start[b, step // window, c] = step % window
            listed[b, t, sorted(members)] = True
            if members and outlier_bits != 16:
                peak = max(abs(row[c]) for c in members)
                scales[b, t] = max(f32(peak / f32(outlier_top)), f32(1e-8))
            for c in range(width):
                if c in members and outlier_bits == 16:
                    out[b, t, c] = row[c]
                elif c in members:
                    code = _divide_and_round(row[c], scales[b, t])
                    codes[b, t, c] = max(-outlier_top, min(outlier_top, code))
                    out[b, t, c] = f32(codes[b, t, c]) * scales[b, t]
                elif zero_point is None:
                    codes[b, t, c] = max(-top, min(top, _divide_and_round(row[c], s)))
                    out[b, t, c] = f32(codes[b, t, c]) * s
                else:
                    zero = int(zero_point[t])
                    unsigned = max(0, min(top, _divide_and_round(row[c], s) + zero))
                    codes[b, t, c] = unsigned - half_range
                    out[b, t, c] = f32(unsigned - zero) * s
    return Quantized(codes, scales, start, listed, fired, out)
