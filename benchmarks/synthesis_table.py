"""Tables of the suite "synthesis" in Markdown: python -m benchmarks.synthesis_table FILE..."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev

from benchmarks.registry import Row

SOURCES = ("real", "synthetic", "noise")


def calibration_table(rows: Sequence[Row]) -> list[str]:
    """Accuracy and SNR by setting and source, mean and deviation over seeds."""
    lines = [
        "| model | preset | `--outliers` | " + " | ".join(SOURCES) + " |",
        "|---|---|---|" + "---|" * len(SOURCES),
    ]
    for name in _in_order(rows, lambda row: row["row"]):
        _, model, preset, outliers = name.split("/")
        cells = [
            _cell([row for row in rows if row["row"] == name and row["source"] == source])
            for source in SOURCES
        ]
        lines.append(f"| {model} | {preset.upper()} | {outliers} | {' | '.join(cells)} |")
    return lines


def ablation_table(rows: Sequence[Row]) -> list[str]:
    """The same by variant of the losses and setting."""
    settings = _in_order(rows, lambda row: row["setting"])
    lines = [
        "| model | losses | seeds | " + " | ".join(settings) + " |",
        "|---|---|---|" + "---|" * len(settings),
    ]
    for name in _in_order(rows, lambda row: row["row"]):
        own = [row for row in rows if row["row"] == name]
        cells = [_cell([row for row in own if row["setting"] == one]) for one in settings]
        seeds = len({row["seed"] for row in own})
        _, model, variant = name.split("/")
        lines.append(f"| {model} | {variant} | {seeds} | {' | '.join(cells)} |")
    return lines


def scales_table(rows: Sequence[Row]) -> list[str]:
    """Inlier scales over those of real images: quantiles over sites and time steps."""
    lines = ["| model | images | 10 % | median | 90 % |", "|---|---|---|---|---|"]
    for row in rows:
        values = " | ".join(f"{row[key]:.2f}" for key in ("low", "median", "high"))
        lines.append(f"| {row['row'].split('/')[1]} | {row['source']} | {values} |")
    return lines


def speed_table(rows: Sequence[Row]) -> list[str]:
    """Seconds an iteration and memory."""
    lines = [
        "| model | images | ms an iteration | of these without L^C | ms an image | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        whole, alone = (1000 * row[key] for key in ("seconds_per_iteration", "without_contrastive"))
        lines.append(
            f"| {row['row'].split('/')[1]} | {row['batch']} | {whole:.0f} | {alone:.0f} | "
            f"{whole / row['batch']:.1f} | {row['peak_mb']} MB |"
        )
    return lines


def _in_order(rows: Sequence[Row], key: Callable[[Row], str]) -> list[str]:
    return list(dict.fromkeys(key(row) for row in rows))


def _cell(rows: Sequence[Row]) -> str:
    return " / ".join(_spread([row[key] for row in rows], key) for key in ("accuracy", "snr_db"))


def _spread(values: Sequence[float], key: str) -> str:
    digits = 2 if key == "accuracy" else 1
    if not values:
        return "-"
    shown = f"{mean(values):.{digits}f}"
    return shown if len(values) == 1 else f"{shown} ± {stdev(values):.{digits}f}"


TABLES = {
    "calibration": calibration_table,
    "ablation": ablation_table,
    "scales": scales_table,
    "speed": speed_table,
}


def main() -> None:
    """Every kind of row found in the files, a table each."""
    rows = [row for path in sys.argv[1:] for row in json.loads(Path(path).read_text())["rows"]]
    for kind, table in TABLES.items():
        own = [row for row in rows if row["kind"] == kind]
        if own:
            print("\n".join(table(own)), end="\n\n")


if __name__ == "__main__":
    main()
