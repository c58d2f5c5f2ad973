"""docs/accuracy.md from rows: python -m benchmarks.accuracy_table FILE... > docs/accuracy.md

FILEs are what the suites "accuracy", "outliers" and "fidelity" wrote; the page has nothing else.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.fidelity_table import fidelity_section
from benchmarks.published import ABLATION, IMAGENET
from benchmarks.registry import Row

INTRO = """# Accuracy of the recipes

Everything below was measured on the trained examples (examples/README.md): micro models and 1,000
held-out images of handwritten digits, in %, with the SNR of the logits in dB; mean ± deviation over
seeds, each with 128 training images of its own. They are easy images and small models: what a
recipe loses here says little of what it loses on ImageNet, and differences under about 0.5 points
(5 images) mean nothing. This page is made by `python -m benchmarks.accuracy_table` from
{files}; the commands that measure are in `benchmarks/accuracy.py`.
"""
PUBLISHED = """## Published, not reproduced

ImageNet top-1 in % as OuroMamba (arXiv 2503.10959) prints it. These models and images are not here:
nothing in this table was measured with this compiler. (QMamba's 80.49 is as printed.)
"""


def page(files: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """The whole page. files: names, and what they hold."""
    rows = [row for _, content in files for row in content["rows"]]
    rows.sort(key=lambda row: part(row, 1))  # models that ran side by side come mixed
    machines = {json.dumps(content["machine"], sort_keys=True) for _, content in files}
    parts = [INTRO.format(files=", ".join(f"`{name}`" for name, _ in files))]
    about = [", ".join(f"{k} {v}" for k, v in json.loads(one).items()) for one in sorted(machines)]
    parts.append(f"Made with {'; '.join(about)}.\n")
    sections = (
        recipe_section,
        synthetic_section,
        ablation_section,
        injected_section,
        batch_section,
        speed_section,
        fidelity_section,
        failure_section,
    )
    parts += [text for text in (section(rows) for section in sections) if text]
    parts.append(published_section())
    return "\n".join(parts)


def recipe_section(rows: Sequence[Row]) -> str:
    """Accuracy and SNR of every recipe and preset on real images, a table a model."""
    own = [row for row in of_kind(rows, "accuracy") if row["row"].endswith("/real")]
    if not own:
        return ""
    parts = ["## Recipes, calibrated on real images\n"]
    for model in in_order(own, 1):
        here = [row for row in own if part(row, 1) == model]
        parts += [f"### {model}{_reference(rows, f'fp32/{model}')}\n", *_grid(here, 3, 2), ""]
    return "\n".join(parts)


def synthetic_section(rows: Sequence[Row]) -> str:
    """Real against synthetic images."""
    own = of_kind(rows, "accuracy")
    made = {row["row"].rpartition("/")[0] for row in own if row["row"].endswith("/synthetic")}
    here = [row for row in own if row["row"].rpartition("/")[0] in made]
    if not here:
        return ""
    lines = ["| model | recipe | real | synthetic |", "|---|---|---|---|"]
    for name in dict.fromkeys(row["row"].rpartition("/")[0] for row in here):
        sources = [
            [row for row in here if row["row"] == f"{name}/{source}"]
            for source in ("real", "synthetic")
        ]
        _, model, bits, recipe = name.split("/")
        lines.append(f"| {model} {bits.upper()} | {recipe} | {' | '.join(map(cell, sources))} |")
    return "\n".join(["## Real and synthetic images\n", *lines, ""])


def ablation_section(rows: Sequence[Row]) -> str:
    """Ways to find outliers, on the models as they are."""
    own = of_kind(rows, "ablation")
    if not own:
        return ""
    lines = _ablation(own, [1], 2, 3)
    return "\n".join(["## Outlier detection, default recipe\n", *lines, ""])


def injected_section(rows: Sequence[Row]) -> str:
    """The same on models that were given outliers."""
    own = [row for row in of_kind(rows, "outliers") if row["row"].count("/") == 4]
    if not own:
        return ""
    differences = [row["injection_difference"] for row in rows if "injection_difference" in row]
    text = (
        "4 channels of every norm's output made 10 times as large, with the linear behind it\n"
        "divided (`scripts/inject_outliers.py`): channels whose size is alike at all tokens "
        "(`even`)\nor stands out at a few (`uneven`); `none` is the model as it is. In floating "
        f"point the logits\nmoved by {max(differences, default=0.0):.0e} of the largest at most. "
        "W8A4: weights of 8 bits, which do not feel the smaller\ncolumns. `trained`: other "
        "weights, trained on until each token had a channel far above the others, and\nnot always "
        "the same (`scripts/train_outliers.py`).\n"
    )
    lines = _ablation(own, [1, 2], 3, 4)
    return "\n".join(["## Outlier detection with injected outliers\n", text, *lines, ""])


def batch_section(rows: Sequence[Row]) -> str:
    """Of a batch against its images alone."""
    own = [row for row in of_kind(rows, "accuracy") if row.get("batch")]
    if not own:
        return ""
    text = (
        f"Logits of a batch of {own[0]['batch']['images']} against those of its images alone: the "
        "largest difference as a\nshare of the largest logit, over presets and models, and how "
        "many images changed their class.\nQuantizers look at one sample at a time; ATen's own "
        "operators differ in the last bits by batch size,\nand a code may flip on them.\n"
    )
    lines = ["| recipe | largest difference | classes changed | of images |", "|---|---|---|---|"]
    for recipe in in_order(own, 3):
        found = [row["batch"] for row in own if part(row, 3) == recipe]
        largest = max(one["difference"] for one in found)
        changed, images = (sum(one[key] for one in found) for key in ("classes", "images"))
        lines.append(f"| {recipe} | {largest:.1e} | {changed} | {images} |")
    return "\n".join(["## Batch invariance\n", text, *lines, ""])


def speed_section(rows: Sequence[Row]) -> str:
    """Seconds of calibration and compilation, images a second, size."""
    own = [
        row
        for row in of_kind(rows, "accuracy")
        if row["row"].endswith("/real") and row["reason"] is None
    ]
    if not own:
        return ""
    lines = [
        "| model | recipe | preset | calibration s | all of compiling s | images/s "
        "| layers (simulated) | MB, fp16 -> stored |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["row"] for row in own):
        found = [row for row in own if row["row"] == name]
        _, model, bits, recipe, _ = name.split("/")
        seconds = [spread(found, key, 1, 1) for key in ("calibration_seconds", "compile_seconds")]
        rate, one = spread(found, "images_per_second", 1, 0), found[0]
        layers = f"{one['layers_quantized']} of {one['layers']} ({one['layers_simulated']})"
        size = f"{one['bytes_fp16'] / 1e6:.3f} -> {one['bytes_stored'] / 1e6:.3f}"
        lines.append(
            f"| {model} | {recipe} | {bits.upper()} | {' | '.join(seconds)} | {rate} | {layers} | "
            f"{size} |"
        )
    text = (
        "Seconds and images a second are of a machine that may have done other work: their order\n"
        "means more than their size.\n"
    )
    return "\n".join(["## Time and size\n", text, *lines, ""])


def failure_section(rows: Sequence[Row]) -> str:
    """Rows that could not be made, a line a reason."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["reason"] is not None:
            reasons.setdefault(row["reason"], []).append(row["row"])
    if not reasons:
        return ""
    lines = []
    for reason, names in reasons.items():
        shown = ", ".join(f"`{name}`" for name in dict.fromkeys(names))
        lines.append(f"- {reason} ({shown})")
    return "\n".join(["## What could not be run\n", *lines, ""])


def published_section() -> str:
    """Other people's numbers."""
    bits = ("w8a8", "w4a8", "w6a6", "w4a4")
    lines = [
        "| model (published) | floating point | method | calibrated on | "
        + " | ".join(one.upper() for one in bits) + " |",
        "|---|---|---|---|" + "---|" * len(bits),
    ]  # fmt: skip
    for model, before, method, images, found in IMAGENET:
        cells = " | ".join(_number(found.get(one)) for one in bits)
        lines.append(f"| {model} | {before:.2f} | {method} | {images} | {cells} |")
    lines += [
        "",
        "| Vim-B (published) | none | static, 64 channels | dynamic |",
        "|---|---|---|---|",
    ]
    for preset, found in ABLATION.items():
        cells = " | ".join(_number(found[mode]) for mode in ("none", "static", "dynamic"))
        lines.append(f"| {preset.upper()} | {cells} |")
    return "\n".join([PUBLISHED, *lines, ""])


def _grid(rows: Sequence[Row], line: int, column: int) -> list[str]:
    """A line and a column a part of the rows' names, cells of accuracy and SNR."""
    columns = in_order(rows, column)
    title = " | ".join(one.upper() for one in columns)
    lines = [f"| recipe | {title} |", "|---|" + "---|" * len(columns)]
    for name in in_order(rows, line):
        own = [row for row in rows if part(row, line) == name]
        cells = [cell([row for row in own if part(row, column) == one]) for one in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _ablation(rows: Sequence[Row], labels: Sequence[int], bits: int, mode: int) -> list[str]:
    modes = in_order(rows, mode)
    lines = [
        f"| model | {'injected | ' if len(labels) > 1 else ''}preset | {' | '.join(modes)} |",
        "|---|" + "---|" * (len(modes) + len(labels)),
    ]
    for name in dict.fromkeys(row["row"].rpartition("/")[0] for row in rows):
        own = [row for row in rows if row["row"].rpartition("/")[0] == name]
        cells = [cell([row for row in own if part(row, mode) == one]) for one in modes]
        titles = [part(own[0], place) for place in labels] + [part(own[0], bits).upper()]
        lines.append(f"| {' | '.join([*titles, *cells])} |")
    return lines


def of_kind(rows: Sequence[Row], kind: str) -> list[Row]:
    """Rows whose name starts so."""
    return [row for row in rows if part(row, 0) == kind]


def part(row: Row, place: int) -> str:
    """A part of a row's name."""
    return str(row["row"].split("/")[place])


def in_order(rows: Sequence[Row], place: int) -> list[str]:
    """The values of a part of the names, in order of appearance."""
    return list(dict.fromkeys(part(row, place) for row in rows))


def cell(rows: Sequence[Row]) -> str:
    """Accuracy and SNR, mean and deviation over seeds; "failed" where there is none."""
    done = [row for row in rows if row["reason"] is None]
    if not done:
        return "failed" if rows else "-"
    return f"{spread(done, 'top1', 100, 2)} / {spread(done, 'logits_snr_db', 1, 1)}"


def spread(rows: Sequence[Row], key: str, scale: float, digits: int) -> str:
    """Mean ± deviation of what rows have."""
    values = [scale * row[key] for row in rows if row[key] is not None]
    if not values:
        return "-"
    shown = f"{mean(values):.{digits}f}"
    return shown if len(values) == 1 else f"{shown} ± {stdev(values):.{digits}f}"


def _reference(rows: Sequence[Row], name: str) -> str:
    found = [row for row in rows if row["row"] == name]
    return f" (floating point {100 * found[0]['top1']:.1f})" if found else ""


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def main() -> None:
    """Read the files, print the page."""
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    files = [(Path(name).name, json.loads(Path(name).read_text())) for name in sys.argv[1:]]
    print(page(files), end="")


if __name__ == "__main__":
    main()
