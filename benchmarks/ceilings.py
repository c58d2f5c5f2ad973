"""The machine's ceilings, measured: copies, fp32 multiply-adds, int8 products, exponentials.

Each is the best of several calls of a loop of independent operations on all threads
(ceilings.cpp), built as kernels are.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import ouro_compiler.kernels.cpp as cpp
from benchmarks.registry import Row
from ouro_compiler.kernels.cpp.toolchain import BuildError, build, find_toolchain

CACHED_BYTES = 256 * 1024  # of a copy, both sides, per thread: inside the second cache
MEMORY_BYTES = 512 * 1024 * 1024  # beyond the caches
_CHAINS = 12
# name: (function, operations a lane of 32 bits does in a step, what is counted)
_LOOPS = {
    "fma": ("multiply_add", 1, "fp32 multiply-adds"),
    "exp": ("exponentials", 1, "fp32 exponentials"),
    "maddubs": ("products_maddubs", 4, "8-bit products, sums of pairs in 16 bits"),
    "madd": ("products_madd", 2, "16-bit products, sums in 32 bits"),
    "dpbusd": ("products_dpbusd", 4, "8-bit products, sums in 32 bits"),
}


@dataclass(frozen=True)
class Work:
    """What a call must do: bytes read and written, multiply-adds, exponentials, int8 products.

    products: which loop of the ceilings the products run on, by the weights' bits.
    """

    moved: float = 0
    fma: float = 0
    exp: float = 0
    integer: float = 0
    products: str = "madd"


def measure_ceilings(seconds: float = 0.05, times: int = 7) -> list[Row]:
    """Rows (name, what, rate a second); a row without a rate has the reason."""
    toolchain = find_toolchain()
    if toolchain is None:
        return [ceiling_row("all", "every ceiling", None, "no C++ compiler was found")]
    here = Path(__file__).with_name("ceilings.cpp").read_text()
    header = (Path(cpp.__file__).parent / "templates" / "vector.h").read_text()
    try:
        library = ctypes.CDLL(str(build(header.replace("#pragma once\n", "") + here, toolchain)))
    except (BuildError, OSError) as error:
        return [ceiling_row("all", "every ceiling", None, str(error))]
    threads = torch.get_num_threads()
    library.lanes.restype = ctypes.c_int64
    lanes, sums = library.lanes(), torch.zeros(threads)
    rows = [
        _copy(library, "cache", CACHED_BYTES * threads, seconds, times),
        _copy(library, "memory", MEMORY_BYTES, seconds, times),
    ]
    for name, (function, in_lane, what) in _LOOPS.items():
        loop = getattr(library, function, None)
        if loop is None:
            rows.append(ceiling_row(name, what, None, "this processor has no such instruction"))
            continue

        def run(count: int, loop: Callable[..., None] = loop) -> None:
            loop(ctypes.c_void_p(sums.data_ptr()), ctypes.c_int64(count), ctypes.c_int64(threads))

        steps = _steps_a_second(run, seconds, times)
        rows.append(ceiling_row(name, what, steps * _CHAINS * lanes * in_lane * threads, None))
    return rows


def _copy(library: ctypes.CDLL, name: str, size: int, seconds: float, times: int) -> Row:
    source, target = (torch.ones(size // 8) for _ in range(2))

    def run(count: int) -> None:
        library.copy(
            ctypes.c_void_p(source.data_ptr()),
            ctypes.c_void_p(target.data_ptr()),
            ctypes.c_int64(source.numel()),
            ctypes.c_int64(count),
            ctypes.c_int64(torch.get_num_threads()),
        )

    what = f"bytes read and written by copies in {'caches' if name == 'cache' else 'memory'}"
    return ceiling_row(name, what, _steps_a_second(run, seconds, times) * size, None)


def _steps_a_second(run: Callable[[int], None], seconds: float, times: int) -> float:
    count = 1
    while (taken := _seconds(run, count)) < seconds / 4 and count < 1 << 40:
        count *= 4
    count = max(1, int(count * seconds / taken))
    return count / min(_seconds(run, count) for _ in range(times))


def _seconds(run: Callable[[int], None], count: int) -> float:
    start = time.perf_counter()
    run(count)
    return time.perf_counter() - start


def ceiling_row(name: str, what: str, rate: float | None, reason: str | None) -> Row:
    """A ceiling, or the reason why there is none."""
    return {"kind": "ceiling", "name": name, "what": what, "per_second": rate, "reason": reason}


def best(first: list[Row], second: list[Row]) -> list[Row]:
    """The higher rate of two measurements of every ceiling, and both."""
    rows = []
    for one, other in zip(first, second, strict=True):
        rates = [row["per_second"] for row in (one, other)]
        high = None if None in rates else max(rates)
        rows.append({**one, "per_second": high, "at_start": rates[0], "at_end": rates[1]})
    return rows


def shortest_seconds(work: Work, ceilings: list[Row]) -> tuple[float, str] | None:
    """(seconds below which no call can be, what binds it); None without ceilings.

    Multiply-adds and exponentials use the same units, so their times add up; bytes and int8
    products are bounds of their own. Operands that fit the caches are counted as copies there. What
    has no ceiling (a GPU's exponentials and caches) is no bound.
    """
    rates = {row["name"]: row["per_second"] for row in ceilings}
    if "fma" not in rates or rates.get(work.products) is None:
        return None
    place = "cache" if work.moved < 4 * 1024 * 1024 and "cache" in rates else "memory"
    exponentials = work.exp / rates["exp"] if "exp" in rates else 0.0
    bounds = {
        f"bytes ({place})": work.moved / rates[place],
        "multiply-adds, exponentials": work.fma / rates["fma"] + exponentials,
        f"int8 products ({work.products})": work.integer / rates[work.products],
    }
    name = max(bounds, key=bounds.__getitem__)
    return bounds[name], name
