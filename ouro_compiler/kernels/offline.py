"""Compiling kernels for GPUs that are not here, and reading what came out.

Triton's own launch path compiles for a stand-in of its driver, so that its cache entries are those
that a launch on such a GPU will look up.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ouro_compiler.errors import UsageError
from ouro_compiler.kernels.cache import load_kernel
from ouro_compiler.kernels.launch import Launch, interpreting, launch_options

ARCHITECTURES = (80, 86, 87, 89, 90)


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one kernel takes on one architecture.

    seconds: of compiling; near zero where Triton's cache had it. spills: local loads and stores.
    loops: instructions in each innermost loop. matrix: the first matrix instruction in PTX, None
    without one; machine_matrix: those of the machine code, each with how many there are.
    """

    arch: int
    seconds: float
    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int
    instructions: int
    loops: tuple[int, ...]
    matrix: str | None
    machine_matrix: dict[str, int]
    exact_division: bool
    approximate_division: bool


def parse_architectures(text: str) -> tuple[int, ...]:
    """ "sm_80,sm_90" -> (80, 90). Raises UsageError on anything else."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"sm_(\d+)", part.strip())
        if match is None or int(match.group(1)) not in ARCHITECTURES:
            known = ", ".join(f"sm_{arch}" for arch in ARCHITECTURES)
            raise UsageError(f"{part.strip() or 'an empty name'} is no architecture of: {known}")
        found.append(int(match.group(1)))
    return tuple(dict.fromkeys(found))


def compile_ahead(launch: Launch, arch: int) -> Resources:
    """Compile a recorded launch for an architecture (80 is sm_80), into Triton's cache.

    Raises UsageError where Triton interprets.
    """
    start = time.perf_counter()
    compiled = _compile(launch, arch)
    return _resources(compiled, arch, time.perf_counter() - start)


def instructions_of(launch: Launch, arch: int) -> list[tuple[int, str, str]]:
    """(address, instruction, operands) of what `compile_ahead` compiles."""
    return parse_sass(_disassemble(_compile(launch, arch).asm["cubin"]))


def _compile(launch: Launch, arch: int) -> Any:
    if interpreting():
        raise UsageError("TRITON_INTERPRET is set: kernels are interpreted, not compiled")
    kernel = load_kernel(launch.spec)
    args = [arg.dtype if isinstance(arg, Tensor) else arg for arg in launch.args]
    with _driver_for(arch):
        return kernel.warmup(*args, grid=launch.grid, **launch_options(launch.spec))


class _Driver:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return -int(self.target.arch)  # no real device's kernels are kept under it

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def _driver_for(arch: int) -> Iterator[None]:
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    before = driver._active
    driver.set_active(_Driver(GPUTarget("cuda", arch, 32)))
    try:
        yield
    finally:
        driver._active = before


def _resources(compiled: Any, arch: int, seconds: float) -> Resources:
    ptx = compiled.asm["ptx"]
    text = _disassemble(compiled.asm["cubin"])
    instructions = parse_sass(text)
    names = Counter(name.split(".")[0] for _, name, _ in instructions)
    matrix = re.search(r"\b(?:wgmma\.mma_async|mma)\.sync\.aligned\.[\w.]+", ptx)
    return Resources(
        arch=arch,
        seconds=round(seconds, 3),
        registers=_figure(text, "REG"),
        stack_bytes=_figure(text, "STACK"),
        spills=names["STL"] + names["LDL"],
        shared_bytes=int(compiled.metadata.shared),
        instructions=len(instructions),
        loops=innermost_loops(instructions),
        matrix=matrix.group(0) if matrix else None,
        machine_matrix=_matrix_instructions(instructions),
        exact_division="div.rn.f32" in ptx,
        approximate_division="div.full.f32" in ptx or "div.approx" in ptx,
    )


def _matrix_instructions(instructions: list[tuple[int, str, str]]) -> dict[str, int]:
    names = [name for _, name, _ in instructions if re.match(r"[A-Z]+MMA\b", name)]
    return dict(sorted(Counter(names).items()))


def _disassemble(cubin: bytes) -> str:
    """Resource usage and SASS, from the tool inside the triton package."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__path__[0]) / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _figure(text: str, name: str) -> int:
    match = re.search(rf"\b{name}:(\d+)", text)
    if match is None:
        raise RuntimeError(f"cuobjdump says nothing of {name}: {text[:500]}")
    return int(match.group(1))


_INSTRUCTION = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)([^\n]*)", re.MULTILINE
)


def parse_sass(sass: str) -> list[tuple[int, str, str]]:
    """(address, instruction, operands) of a disassembly, in order."""
    return [(int(at, 16), name, rest) for at, name, rest in _INSTRUCTION.findall(sass)]


def innermost_loops(instructions: list[tuple[int, str, str]]) -> tuple[int, ...]:
    """Instruction counts of the loops that hold no other loop."""
    return tuple(
        sum(first <= at <= last for at, _, _ in instructions)
        for first, last in loop_spans(instructions)
    )


def loop_spans(instructions: list[tuple[int, str, str]]) -> list[tuple[int, int]]:
    """(first, last) address of the loops that hold no other loop, by their backward branches."""
    spans = set()
    for address, name, rest in instructions:
        target = re.search(r"0x([0-9a-f]+)", rest)
        # The branch to itself that ends every kernel is no loop.
        if name.startswith("BRA") and target and int(target.group(1), 16) < address:
            spans.add((int(target.group(1), 16), address))
    inner = [
        one
        for one in spans
        if not any(o != one and one[0] <= o[0] and o[1] <= one[1] for o in spans)
    ]
    return sorted(inner)
