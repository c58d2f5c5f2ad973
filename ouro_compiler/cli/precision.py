"""Of `ouro compile`: bits of layers and learned scales, verdicts on them, and their tables."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from ouro_compiler.cli.console import human_bytes, print_table
from ouro_compiler.config import QuantConfig
from ouro_compiler.errors import OuroError, UsageError, VerificationError


def replayed(path: Path, options: QuantConfig) -> QuantConfig:
    """The configuration in a report. options: the command's, which must be left at their defaults.

    The seed stays the command's. Raises UsageError for a file that is no report, and for options
    that the report decides.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        config = QuantConfig.from_dict(found["config"])
    except OSError as error:
        raise UsageError(f"--replay {path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, UsageError) as error:
        raise UsageError(f"--replay {path}: no report with a configuration ({error})") from error
    default = QuantConfig(seed=options.seed)
    given = [
        field.name
        for field in dataclasses.fields(QuantConfig)
        if getattr(options, field.name) != getattr(default, field.name)
    ]
    if given:
        raise UsageError(
            f"--replay takes the configuration from the report: leave out options of {given[0]}"
        )
    return dataclasses.replace(config, seed=options.seed)


def verdict(max_drop: float | None, report: dict[str, Any]) -> OuroError | None:
    """Why verification failed, None if it did not."""
    before, after = report["accuracy"]["before"], report["accuracy"]["after"]
    if max_drop is not None and before is not None:
        drop = 100 * (before - after)
        if drop > max_drop + 1e-9:
            return VerificationError(
                f"accuracy fell by {drop:.2f} points, {max_drop:g} are allowed: "
                "no artefact was written"
            )
    mixed = report["mixed"]
    if mixed is None:
        return None
    size, budget = report["bytes"]["stored"], mixed["budget_bytes"]
    if budget is not None and size > budget:
        return VerificationError(
            f"parameters and scales take {size / 1e6:.6g} MB, {budget / 1e6:g} are allowed: "
            "no artefact was written"
        )
    wanted, snr = mixed["min_snr_db"], report["logits_snr_db"]
    if wanted is not None and snr is not None and snr < wanted:
        return VerificationError(
            f"the SNR of the logits is {snr:.2f} dB, {wanted:g} are wanted: no artefact was written"
        )
    return None


def print_refined(found: dict[str, Any] | None) -> None:
    """A line a block whose scales were learned."""
    if found is None:
        return
    from rich.table import Table

    title = (
        f"1 - cosine of the outputs on {found['images']} images, before and after learning; "
        f"{human_bytes(found['bytes_kept'])} of values kept"
    )
    table = Table("block", "layers", "before", "after", "scales used", "time", title=title)
    for row in found["rows"]:
        table.add_row(
            row["block"],
            str(row["layers"]),
            f"{row['loss_before']:.5f}",
            f"{row['loss_after']:.5f}",
            row["used"],
            f"{row['seconds']:.1f} s" if "seconds" in row else "",
        )
    print_table(table)


def print_mixed(found: dict[str, Any] | None) -> None:
    """A line a unit of layers: the SNR of its block and of the logits at each choice of bits."""
    if found is None:
        return
    from rich.table import Table

    first = found["rows"][0]["options"] if found["rows"] else []
    bits = [f"W{one['weights']}A{one['activations']}" for one in first]
    columns = [f"{kind} {one}" for one in bits for kind in ("block", "logits")]
    title = "SNR in dB of each layer alone, the rest in floating point"
    table = Table("layer", *columns, "chosen", title=title)
    for row in found["rows"]:
        cells = [
            _decibels(one[key])
            for one in row["options"]
            for key in ("block_snr_db", "logits_snr_db")
        ]
        table.add_row("\n".join(row["layers"]), *cells, bits[row["chosen"]])
    print_table(table, piped_width=140)
    table = Table(show_header=False)
    for label, value in (
        ("smallest possible", human_bytes(found["smallest_bytes"])),
        ("chosen", human_bytes(found["bytes"])),
        ("budget", None if found["budget_bytes"] is None else human_bytes(found["budget_bytes"])),
        ("SNR foreseen", None if found["snr_db"] is None else f"{found['snr_db']:.2f} dB"),
        ("drop foreseen", None if found["drop"] is None else f"{found['drop']:.2f} points"),
    ):
        if value is not None:
            table.add_row(label, value)
    print_table(table)


def _decibels(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
