"""What a suite measured, as a file."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import torch

from benchmarks.registry import Row


def write_rows(path: Path, suite: str, rows: list[Row]) -> None:
    """The rows as JSON with what they were made with, through a temporary name."""
    content = {"suite": suite, "machine": machine(), "rows": rows}
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    os.replace(partial, path)


def machine() -> dict[str, str]:
    """What the numbers were made with."""
    try:
        from triton import __version__ as triton_version
    except ImportError:
        triton_version = "none"
    return {
        "processor": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
    }
