"""The rows of `ouro compare` as tables: Markdown, CSV and on a terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from rich.table import Table

Row = dict[str, Any]
CSV_COLUMNS = ("recipe", "bits", "seed", "reason")  # and what is measured, between seed and reason


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of the tables: `scale` times the value of `key`, with so many digits."""

    title: str
    key: str
    scale: float
    digits: int


def columns(top_k: int) -> list[Column]:
    """What is shown of a row."""
    return [
        Column(title="top-1 %", key="top1", scale=100, digits=2),
        Column(title=f"top-{top_k} %", key="top5", scale=100, digits=2),
        Column(title="drop", key="drop", scale=1, digits=2),
        Column(title="equal %", key="agreement", scale=100, digits=2),
        Column(title="SNR dB", key="logits_snr_db", scale=1, digits=1),
        Column(title="stored MB", key="bytes_stored", scale=1e-6, digits=3),
        Column(title="outliers %", key="outlier_share", scale=100, digits=2),
        Column(title="calibration s", key="calibration_seconds", scale=1, digits=1),
        Column(title="images/s", key="images_per_second", scale=1, digits=1),
    ]


def groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that differ by their seed alone, together, in order of their first one."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["recipe"], row["bits"]), []).append(row)
    return list(found.values())


def table_cells(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Titles and lines: floating point, then every recipe and preset, mean and deviation."""
    shown = columns(result["top_k"])
    lines = [["floating point", "-", "-", *(_cell([result["floating_point"]], c) for c in shown)]]
    for group in groups(result["rows"]):
        done = [row for row in group if row["reason"] is None]
        count = str(len(done)) if len(done) == len(group) else f"{len(done)} of {len(group)}"
        cells = [_cell(done, column) for column in shown]
        lines.append([group[0]["recipe"], group[0]["bits"].upper(), count, *cells])
    return ["recipe", "bits", "runs", *(column.title for column in shown)], lines


def failures(rows: Sequence[Row]) -> list[str]:
    """A line for each row that failed."""
    return [
        f"{row['recipe']} {row['bits'].upper()}, seed {row['seed']}: {row['reason']}"
        for row in rows
        if row["reason"] is not None
    ]


def heading(result: dict[str, Any]) -> str:
    """What was compared on what."""
    made = result["made"]
    return (
        f"{made['model']} on {made['data']}; calibrated on {made['calibration_images']} images, "
        f"{made['calibration']}; on {made['device']}, batches of {made['batch_size']}"
    )


def markdown(result: dict[str, Any]) -> str:
    """A page: heading, table, failures."""
    titles, lines = table_cells(result)
    parts = [heading(result), "", _line(titles), "|" + "---|" * len(titles)]
    parts += [_line(line) for line in lines]
    failed = failures(result["rows"])
    if failed:
        parts += ["", "Failed:", "", *(f"- {_escaped(line)}" for line in failed)]
    return "\n".join(parts) + "\n"


def csv_text(result: dict[str, Any], measured: Sequence[str]) -> str:
    """A line a run, numbers in full, empty where there is none."""
    buffer = io.StringIO()
    names = [*CSV_COLUMNS[:-1], *measured, CSV_COLUMNS[-1]]
    writer = csv.DictWriter(buffer, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    first = {"recipe": "floating point", "bits": "fp32", **result["floating_point"]}
    for row in (first, *result["rows"]):
        writer.writerow(row)
    return buffer.getvalue()


def terminal_table(result: dict[str, Any]) -> Table:
    """The table for a person."""
    titles, lines = table_cells(result)
    table = Table(*titles, title=heading(result))
    for line in lines:
        table.add_row(*line)
    return table


def _cell(rows: Sequence[Row], column: Column) -> str:
    values = [column.scale * row[column.key] for row in rows if row.get(column.key) is not None]
    if not values:
        return "-"
    text = f"{mean(values):.{column.digits}f}"
    return text if len(values) == 1 else f"{text} ± {stdev(values):.{column.digits}f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(_escaped(cell) for cell in cells)} |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
