"""Suite "offline": every kernel compiled for GPUs that need not be here, and what it takes.

python -m benchmarks.run --suite offline [--arch sm_80,sm_89,sm_90] [--json FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from itertools import chain
from typing import Any

from benchmarks.offline_cases import cases, group_cases, nibble_cases, recorded
from benchmarks.registry import Row, suite
from ouro_compiler.kernels.candidates import current_choice, offered_on
from ouro_compiler.kernels.offline import compile_ahead, parse_architectures


@suite("offline")
def offline(options: argparse.Namespace) -> list[Row]:
    """Compile every case for every architecture, in an empty cache; print and return rows."""
    architectures = parse_architectures(options.arch)
    rows: list[Row] = []
    columns = "kernel                                  case                      arch  regs stack"
    print(f"{columns} spills  smem instr  loops  seconds  matrix instruction")
    with _empty_triton_cache():
        single = ((name, launch) for name, run in cases() for launch in recorded(run))
        for name, launch in chain(single, group_cases(), nibble_cases()):
            for architecture in architectures:
                if not offered_on(f"GPU sm_{architecture}", current_choice(launch.spec)):
                    continue
                found = compile_ahead(launch, architecture)
                row = {"kernel": launch.spec.label, "case": name, **dataclasses.asdict(found)}
                rows.append(row)
                print(_line(row), flush=True)
    return rows


def _line(row: Row) -> str:
    loops = "/".join(map(str, row["loops"])) or "-"
    matrix = (row["matrix"] or "-").replace(".sync.aligned", "").replace(".row.col.satfinite", "")
    return (
        f"{row['kernel']:39s} {row['case']:25s} sm_{row['arch']} {row['registers']:4d} "
        f"{row['stack_bytes']:5d} {row['spills']:6d} {row['shared_bytes']:5d} "
        f"{row['instructions']:5d}  {loops:>8s} {row['seconds']:7.2f}  {matrix}"
    )


def _empty_triton_cache() -> Any:
    from contextlib import ExitStack

    import triton

    stack = ExitStack()
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    stack.enter_context(triton.knobs.cache.scope())
    triton.knobs.cache.dir = folder
    return stack
