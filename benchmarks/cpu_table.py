"""Markdown tables of suite "cpu": python -m benchmarks.cpu_table FILE.json"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.registry import Row

_MODELS = (
    "| variant | ms | quartiles | min - max | images/s | vs mamba_ssm reference | "
    "vs torch.compile fp32 | vs ONNX Runtime | check, how |"
)
_KERNELS = (
    "| operator | ms | quartiles | vs F.linear fp32 | share of the ceiling | bound by | runs | "
    "check |"
)
_CEILINGS = "| ceiling | what | a second |"


def line(row: Row) -> str:
    """A row on one line, as the suite prints it."""
    where = {
        "model": lambda: f"{row['model']} b{row['batch']}: {_model(row)}",
        "kernel": lambda: f"b{row['batch']} {row['group']}: {_kernel(row)}",
        "ceiling": lambda: ceiling(row),
    }
    return where[row["kind"]]()


def tables(rows: Iterable[Row]) -> str:
    """Markdown: the machine, its ceilings, a table a group of kernels, one a model and batch."""
    rows = list(rows)
    parts = [_machine(row) for row in rows if row["kind"] == "machine"]
    parts += ceilings(rows)
    kernels: dict[str, list[str]] = {}
    models: dict[str, list[str]] = {}
    for row in rows:
        if row["kind"] == "kernel":
            title = f"{row['group']}, batch {row['batch']}"
            kernels.setdefault(title, []).append(_kernel(row))
        elif row["kind"] == "model":
            title = f"{row['model']}, batch {row['batch']}"
            models.setdefault(title, []).append(_model(row))
    parts += [f"### {title}\n\n{table(_KERNELS, found)}" for title, found in kernels.items()]
    parts += [f"### {title}\n\n{table(_MODELS, found)}" for title, found in models.items()]
    return "\n\n".join(parts) + "\n"


def ceilings(rows: Iterable[Row]) -> list[str]:
    """The table of ceilings, if there are any."""
    found = [ceiling(row) for row in rows if row["kind"] == "ceiling"]
    return [table(_CEILINGS, found)] if found else []


def table(head: str, lines: list[str]) -> str:
    """Lines under a head."""
    return "\n".join([head, "|" + "---|" * (head.count("|") - 1), *lines])


def _machine(row: Row) -> str:
    packages = ", ".join(f"{name} {found}" for name, found in row["packages"].items() if found)
    load = (
        f"load {row['load_at_start'][0]:.1f} at the start, {row['load_at_end'][0]:.1f} at the end"
    )
    return (
        f"{row['processor']}, {row['threads']} threads on {row['cores']} cores, "
        f"{', '.join(row['features'])}; {row['compiler']}; torch {row['torch']}, {packages}; "
        f"{load}. Times are medians of calls in turns; ratios say how many times as fast."
    )


def ceiling(row: Row) -> str:
    """A ceiling's line."""
    rate = row["per_second"]
    return f"| {row['name']} | {row['what']} | {row['reason'] if rate is None else giga(rate)} |"


def giga(rate: float) -> str:
    """A rate in billions."""
    return f"{rate / 1e9:.1f} G"


def _kernel(row: Row) -> str:
    shown = [row["name"], *times(row)[:2], ratio(row["vs_linear"])]
    share = "" if row["share"] is None else f"{row['share']:.0%}"
    shown += [share, row["bound_by"] or "", row["implementation"], row["check"] or ""]
    return cells(shown)


def _model(row: Row) -> str:
    each = row["images_per_second"]
    shown = [row["variant"], *times(row), "" if each is None else f"{each:.1f}"]
    shown += [ratio(row[key]) for key in ("vs_mamba", "vs_compile", "vs_onnx")]
    shown.append("; ".join(one for one in (row["check"], row["note"]) if one))
    return cells(shown)


def times(row: Row) -> list[str]:
    """Median, quartiles, extremes; the reason where there is no time."""
    if row["ms"] is None:
        return [f"no time: {row['reason']}", "", ""]
    return [
        digits(row["ms"]),
        f"{digits(row['ms_q1'])} - {digits(row['ms_q3'])}",
        f"{digits(row['ms_min'])} - {digits(row['ms_max'])}",
    ]


def digits(value: float) -> str:
    """Milliseconds, as many digits as they are worth."""
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def ratio(value: float | None) -> str:
    """A ratio, if there is one."""
    return "" if value is None else f"{value:.2f}"


def cells(cells: list[str]) -> str:
    """A line of a table."""
    return "| " + " | ".join(one.replace("|", "/") for one in cells) + " |"


if __name__ == "__main__":
    print(tables(json.loads(Path(sys.argv[1]).read_text())["rows"]), end="")
