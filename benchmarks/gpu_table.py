"""Markdown tables of suite "gpu": python -m benchmarks.gpu_table FILE.json"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.cpu_table import ceilings, cells, giga, ratio, table, times
from benchmarks.gpu_models import COMPILED, EAGER
from benchmarks.registry import Row
from ouro_compiler.cli.tune import short_choice
from ouro_compiler.kernels.candidates import as_choice

_MODELS = (
    "| variant | ms | quartiles | images/s | vs torch.compile | vs eager, CUDA graph | "
    "peak MB | weights MB | kernels | check, how |"
)
_TUNING = "| kernel | batch, shape | default us | ratio | fastest | tried | refused |"
_KERNELS = (
    "| operator | ms | quartiles | bytes/s | operations/s | share of the ceiling | bound by | "
    "vs F.linear fp16 | runs | check |"
)


def tables(rows: Iterable[Row]) -> str:
    """Markdown: machine, ceilings, tables of groups of kernels, models and batches, and tuning."""
    rows = list(rows)
    parts = [_machine(row) for row in rows if row["kind"] == "machine"]
    parts += ceilings(rows)
    kernels: dict[tuple[str, int], list[Row]] = {}
    models: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if row["kind"] == "kernel":
            kernels.setdefault((row["group"], row["batch"]), []).append(row)
        elif row["kind"] == "model":
            models.setdefault((row["model"], row["batch"]), []).append(row)
    for (name, batch), found in kernels.items():
        lines = table(_KERNELS, [_kernel(row) for row in found])
        parts.append(f"### {name}, batch {batch}\n\n{lines}")
    for (name, batch), found in models.items():
        lines = table(_MODELS, [_model(row, found) for row in found])
        parts.append(f"### {name}, batch {batch}\n\n{lines}")
    for row in rows:
        if row["kind"] == "tuning":
            parts.append(f"### {row['model']}, {row['variant']}: tuning\n\n{_tuning(row)}")
    return "\n\n".join(parts) + "\n"


def _machine(row: Row) -> str:
    packages = ", ".join(f"{name} {found}" for name, found in row["packages"].items() if found)
    return (
        f"{row['gpu']} (sm_{row['capability'].replace('.', '')}, "
        f"{row['memory_bytes'] / 1e9:.0f} GB); torch {row['torch']}, CUDA {row['cuda']}, "
        f"{packages}. Times are medians by CUDA events, launches included; ratios say how many "
        "times as fast."
    )


def _tuning(row: Row) -> str:
    if row["reason"] is not None:
        return f"Not tuned: {row['reason']}"
    lines = []
    for one in row["kernels"]:
        best = "the default" if one["best"] is None else short_choice(as_choice(one["best"]))
        numbers = [f"{one['default_us']:.1f}", f"{one['ratio']:.2f}", best]
        lines.append(
            cells(
                [
                    *(one["kernel"], f"{one['batch']}, {one['shape']}"),
                    *(numbers if one["tried"] else ("", "", "")),
                    f"{one['tried']} of {one['tried'] + one['left']}",
                    "; ".join(f"{count} {reason}" for reason, count in one["refused"].items()),
                ]
            )
        )
    return table(_TUNING, lines)


def _kernel(row: Row) -> str:
    rates = [row["bytes_per_second"], row["operations_per_second"]]
    share = "" if row["share"] is None else f"{row['share']:.0%}"
    shown = [row["name"], *times(row)[:2], *("" if one is None else giga(one) for one in rates)]
    shown += [share, row["bound_by"] or "", ratio(row["vs_linear"])]
    return cells([*shown, row["implementation"] or "", row["check"] or ""])


def _model(row: Row, others: list[Row]) -> str:
    each = row["images_per_second"]
    shown = [row["variant"], *times(row)[:2], "" if each is None else f"{each:.0f}"]
    shown += [_against(row, others, name) for name in (COMPILED, f"{EAGER}, CUDA graph")]
    shown += ["" if row[key] is None else f"{row[key] / 1e6:.1f}" for key in _BYTES]
    shown.append("" if row["launches"] is None else str(row["launches"]))
    return cells([*shown, "; ".join(one for one in (row["check"], row["note"]) if one)])


_BYTES = ("peak_bytes", "weights_bytes")


def _against(row: Row, others: list[Row], name: str) -> str:
    theirs = next((one["ms"] for one in others if one["variant"] == name), None)
    return ratio(theirs / row["ms"] if theirs and row["ms"] else None)


if __name__ == "__main__":
    print(tables(json.loads(Path(sys.argv[1]).read_text())["rows"]), end="")
