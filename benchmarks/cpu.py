"""Suite "cpu": models and kernels on this machine's cores, against others and against its ceilings.

    python -m benchmarks.run --suite cpu --json FILE [--filter REGEX] [--models A,B]
        [--batches 1,8] [--rounds 9] [--images 2] [--artefacts FOLDER]
    python -m benchmarks.cpu_table FILE

--filter is searched in "ceilings", "kernels/bBATCH/GROUP/NAME" and "MODEL/bBATCH/VARIANT". A row
without a time has the reason: what computes something else gets no time.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks.ceilings import best, measure_ceilings
from benchmarks.cpu_kernels import measure_kernels, set_shares
from benchmarks.cpu_models import measure_model
from benchmarks.cpu_table import line
from benchmarks.kernel_cases import chosen_groups
from benchmarks.output import write_rows
from benchmarks.registry import Row, suite
from ouro_compiler.kernels.cpp.toolchain import cpu_features, find_toolchain

DEFAULT = "vim_tiny,vim_small,vmamba_tiny_s1l8,mambavision_tiny"
_SHOWN_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni")


@suite("cpu")
def cpu(options: argparse.Namespace) -> list[Row]:
    """Rows of kind machine, ceiling, kernel and model; prints them as they come."""
    load = os.getloadavg()
    batches = [int(one) for one in (options.batches or "1,8").split(",")]
    pattern = options.filter or ""
    groups = chosen_groups(batches, pattern)
    ceilings = measure_ceilings() if groups or re.search(pattern, "ceilings") else []
    rows: list[Row] = []

    def about() -> Row:
        loads = {"load_at_start": load, "load_at_end": os.getloadavg()}
        return {"kind": "machine", **machine(), **loads}

    def save() -> None:
        if options.json is not None:
            write_rows(options.json, "cpu", [about(), *ceilings, *rows])

    def report(row: Row) -> None:
        print(line(row), flush=True)

    for row in ceilings:
        report(row)
    if ceilings:
        rows += measure_kernels(groups, ceilings, rounds=options.rounds, report=report)
        ceilings = best(ceilings, measure_ceilings())
        set_shares(rows, ceilings)
    for name in (options.models or DEFAULT).split(","):
        rows += measure_model(
            name,
            batches,
            images=options.images,
            rounds=options.rounds,
            pattern=pattern,
            report=report,
            artefacts=options.artefacts,
        )
        save()  # a run takes long: what it has so far is in the file
    return [about(), *ceilings, *rows]


def machine() -> dict[str, Any]:
    """What the numbers were made with: no paths, no host names."""
    toolchain = find_toolchain()
    version = None
    if toolchain is not None:
        said = subprocess.run([toolchain.command[0], "--version"], capture_output=True, text=True)
        version = (said.stdout.splitlines() or [""])[0]
    features = cpu_features()
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "features": [one for one in _SHOWN_FEATURES if one in features],
        "compiler": version,
        "torch": torch.__version__,
        "packages": versions("onnxruntime", "onnx", "torchao", "mamba_ssm"),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "system": platform.system(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [one.partition(":")[2].strip() for one in lines if one.startswith("model name")]
    return names[0] if names else platform.machine()


def versions(*names: str) -> dict[str, str | None]:
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
