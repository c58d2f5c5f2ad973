"""Products of nibbles on the INT4 tensor cores of Ampere and Ada, which Triton does not use.

A template packs codes as weights are packed, two a byte, by the instruction `ouro.pair.s4`, and
multiplies them as if they were bytes. Triton then plans everything (copies, shared memory, which
thread holds what) for `mma.m16n8k32` of s8, and writes PTX, in which each of those instructions
becomes the `mma.m16n8k64` of s4. That takes the same registers: in both a thread holds the same
bytes of A and of B, in the same order, and the same sums (PTX ISA, "Matrix Fragments for
mma.m16n8k32" and "mma.m16n8k64"). A byte is two neighbours of K; their order is free, as long as A
and B agree.

Which products those are follows from registers: the ones whose four registers of A come from
`ouro.pair.s4`. If such a register goes anywhere else, the kernel is refused; and ptxas refuses the
instruction, so that no kernel runs that was not rewritten.
"""

from __future__ import annotations

import functools
import hashlib
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ouro_compiler.kernels.spec import KernelSpec, Template

_PAIR = re.compile(r"\bouro\.pair\.s4 (%r\d+), (%r\d+), (%r\d+);")
_AS_INSTRUCTIONS = (  # 0xE4: bits of the first operand where the third has ones, else of the second
    r"{ .reg .b32 high; shl.b32 high, \3, 4; lop3.b32 \1, \2, high, 0x0F0F0F0F, 0xE4; }"
)
_PRODUCT = re.compile(
    r"\bmma\.sync\.aligned\.m16n8k32\.row\.col(\.satfinite)?\.s32\.s8\.s8\.s32"
    r"(\s*\{[^}]*\},\s*\{([^}]*)\})"  # the sums, A
)
_REWRITING = threading.RLock()  # Triton has one hook for all threads
_REGISTER = re.compile(r"%r\d+\b")


def multiplies_nibbles(spec: KernelSpec) -> bool:
    """Is a kernel, or a member of a group, written for `use_nibbles`?"""
    return spec.template is Template.LINEAR and any(
        one["MATRIX_BITS"] == 4 and one["INLINE_ASM"] for one in spec.members
    )


def use_nibbles(ptx: str) -> str:
    """PTX with products of what `ouro.pair.s4` returns as products of nibbles.

    Raises ValueError where what it returns goes elsewhere: to another matrix instruction, say.
    """
    pairs = [one[0] for one in _PAIR.findall(ptx)]
    uses: Counter[str] = Counter()

    def product(match: re.Match[str]) -> str:
        saturates, operands, a = match.groups()
        registers = _REGISTER.findall(a)
        packed = [one for one in registers if one in pairs]
        if not packed:
            return match.group(0)
        if packed != registers:
            raise ValueError(f"a product has bytes and nibbles: {match.group(0)}")
        uses.update(packed)
        name = f"mma.sync.aligned.m16n8k64.row.col{saturates or ''}.s32.s4.s4.s32"
        return name + operands

    found = _PRODUCT.sub(product, ptx)
    everywhere = Counter(_REGISTER.findall(ptx))
    wrong = [one for one in pairs if not uses[one] or everywhere[one] != uses[one] + 1]
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(pairs)} registers of nibbles are not, or not only, A of an "
            "mma.m16n8k32 of s8: there is no product of nibbles with this tile on this GPU"
        )
    return _PAIR.sub(_AS_INSTRUCTIONS, found)


class NibbleKernel:
    """A `triton.jit` function whose PTX is always rewritten."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        """A launcher for a grid."""
        return functools.partial(self._call, self._kernel[grid])

    def warmup(self, *args: Any, **options: Any) -> Any:
        """Compile without a launch."""
        return self._call(self._kernel.warmup, *args, **options)

    def _call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        with _REWRITING, _rewriting():
            return function(*args, **options)


@functools.cache
def _pipeline() -> str:
    """What is in the keys of Triton's caches: this file, so that what it once made is not found."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


@contextmanager
def _rewriting() -> Iterator[None]:
    """Inside, Triton rewrites the PTX that it makes, and its caches know.

    What else is compiled meanwhile, in another thread, has no pairs and stays as it is.
    """
    from triton import knobs

    before = knobs.runtime.add_stages_inspection_hook

    def hook(*args: Any) -> tuple[str, str] | None:
        if not args:
            key, digest = before() if before is not None else ("", "")
            return key + _pipeline(), hashlib.sha256((digest + _pipeline()).encode()).hexdigest()
        if before is not None:
            before(*args)
        stages = args[1]
        make_ptx = stages["ptx"]
        stages["ptx"] = lambda source, metadata: use_nibbles(make_ptx(source, metadata))
        return None

    knobs.runtime.add_stages_inspection_hook = hook
    try:
        yield
    finally:
        knobs.runtime.add_stages_inspection_hook = before
