"""The section of docs/accuracy.md that the suite "fidelity" fills."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from benchmarks.registry import Row

INTRO = """## Full size, random weights

SNR in dB against floating point, of the logits and of the outputs of quantized layers (errors of
the layers before included; median and lowest). Noise of 224 x 224 pixels, random weights:
it shows which layers err and how errors grow, not what accuracy a trained model would lose.
Scans of `ksq` are not compared: their gate is behind them.
"""


def fidelity_section(rows: Sequence[Row]) -> str:
    """A line a model, preset and recipe."""
    own = [row for row in rows if row["row"].startswith("fidelity/") and row["reason"] is None]
    if not own:
        return ""
    lines = [
        "| model | preset | recipe | logits | linears | scans | lowest layer | equal predictions |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in own:
        _, model, bits, recipe = row["row"].split("/")
        kinds = [
            [
                one["snr_db"]
                for one in row["layers"]
                if one["kind"] == kind and one["snr_db"] is not None
            ]
            for kind in ("linear", "scan")
        ]
        shown = [f"{median(found):.1f}" if found else "-" for found in kinds]
        differing = [one for one in row["layers"] if one["snr_db"] is not None]
        lowest = min(differing, key=lambda one: one["snr_db"], default=None)
        worst = f"`{lowest['layer']}` {lowest['snr_db']:.1f}" if lowest else "-"
        logits = "-" if row["logits_snr_db"] is None else f"{row['logits_snr_db']:.1f}"
        equal = f"{round(row['agreement'] * row['images'])} of {row['images']}"
        lines.append(
            f"| {model} | {bits.upper()} | {recipe} | {logits} | {' | '.join(shown)} | {worst} | "
            f"{equal} |"
        )
    return "\n".join([INTRO, *lines, ""])
