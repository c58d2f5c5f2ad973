"""Markdown tables of suite "launches": python -m benchmarks.launches_table FILE.json"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from benchmarks.cpu_table import cells, table
from benchmarks.registry import Row
from benchmarks.roofline import GPUS

_SHORT = {
    "vim_tiny": "Vim-T",
    "vim_small": "Vim-S",
    "vim_base": "Vim-B",
    "vmamba_tiny_s1l8": "VMamba-T",
    "vmamba_base_s1l20": "VMamba-B",
    "mambavision_tiny": "MambaVision-T",
}


def tables(rows: Iterable[Row]) -> str:
    """Markdown: what every kind of block launches and calls, then the estimates."""
    rows = list(rows)
    blocks = [row for row in rows if row["kind"] == "layer"]
    first = min((row["batch"] for row in blocks), default=0)
    counts = [_count(row) for row in blocks if row["batch"] == first]
    heading = "| a block, W4A4 | ssm | blocks | launches | one by one | calls without a kernel |"
    gpus = " | ".join(GPUS)
    estimates = f"| estimate, microseconds a block | ssm | batch | MB | {gpus} |"
    models = f"| estimate, ms of all blocks | ssm | batch | launches | calls | {gpus} |"
    return "\n\n".join(
        [
            table(heading, counts),
            table(estimates, [_estimate(row) for row in blocks]),
            table(models, [_total(row) for row in rows if row["kind"] == "model"]),
        ]
    )


def _name(row: Row) -> str:
    return _SHORT.get(row["model"], row["model"])


def _block(row: Row) -> str:
    return f"{_name(row)}, {row['block']}"


def _count(row: Row) -> str:
    found = Counter(one.split(".")[1] for one in row["calls"])
    calls = ", ".join(name if many == 1 else f"{many} {name}" for name, many in found.items())
    counts = [str(row[field]) for field in ("layers", "launches", "launches_alone")]
    return cells([_block(row), row["ssm"], *counts, calls or "none"])


def _estimate(row: Row) -> str:
    times = [f"{row['estimate_us'][name]:.1f}" for name in GPUS]
    size = f"{row['bytes'] / 1e6:.1f}"
    return cells([_block(row), row["ssm"], str(row["batch"]), size, *times])


def _total(row: Row) -> str:
    times = [f"{row['estimate_us'][name] / 1e3:.2f}" for name in GPUS]
    counts = [str(row[field]) for field in ("batch", "launches", "calls")]
    return cells([_name(row), row["ssm"], *counts, *times])


if __name__ == "__main__":
    print(tables(json.loads(Path(sys.argv[1]).read_text())["rows"]))
