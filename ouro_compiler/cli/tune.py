"""`ouro tune`: an artefact's kernels timed on this GPU, and what was found, as a table and JSON."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ouro_compiler.errors import UsageError

if TYPE_CHECKING:
    from ouro_compiler.kernels.candidates import Choice
    from ouro_compiler.runtime.tune import TunedKernel, Tuning


@dataclass(frozen=True, kw_only=True)
class TuneRequest:
    """The command's options, as given."""

    model: str
    batches: str
    budget: float
    json: Path | None
    quiet: bool


def run(request: TuneRequest) -> None:
    """Do what the command says. Raises OuroError subclasses."""
    from ouro_compiler.cli.console import progress_bars, write_json
    from ouro_compiler.runtime.artifact import load
    from ouro_compiler.runtime.tune import tune, tuning_device

    batches = _parse_batches(request.batches)
    if request.json is not None and not request.json.absolute().parent.is_dir():
        raise UsageError(f"--json {request.json}: its folder does not exist")
    compiled = load(request.model, device=tuning_device())
    with progress_bars(request.quiet) as progress:
        found = tune(compiled, batches, request.budget, progress)
    if request.json is not None:
        write_json(request.json, tuning_data(found))
    if not request.quiet:
        _print_result(found)


def tuning_data(found: Tuning) -> dict[str, Any]:
    """What was found, as JSON."""
    return {
        "gpu": found.machine,
        "table": str(found.path),
        "seconds": found.seconds,
        "tried": found.new,
        "left": found.left,
        "kernels": [_kernel_data(one) for one in found.kernels],
    }


def _kernel_data(one: TunedKernel) -> dict[str, Any]:
    return {
        "kernel": one.label,
        "shape": one.row.shape,
        "batch": one.batch,
        "default": dict(one.default),
        "best": None if one.row.choice is None else dict(one.row.choice),
        "default_us": one.row.default_us,
        "ratio": one.row.ratio,
        "tried": len(one.row.tried),
        "refused": one.refused,
        "tried_now": one.new,
        "left": one.left,
    }


def _parse_batches(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(one) for one in text.split(","))
    except ValueError as error:
        raise UsageError(f"--batches {text}: give sizes with commas, such as 1,32") from error
    if any(one < 1 for one in found):
        raise UsageError(f"--batches {text}: a batch is one image or more")
    return found


def _print_result(found: Tuning) -> None:
    from rich.table import Table

    from ouro_compiler.cli.console import print_table

    if found.kernels:
        table = Table("kernel", "batch, shape", "default", "best", "ratio", "tried", "refused")
        for one in found.kernels:
            choice = one.row.choice
            time = f"{one.row.default_us:.1f} us" if one.row.tried else "not timed"
            refused = "; ".join(f"{count} {reason}" for reason, count in one.refused.items())
            tried = f"{len(one.row.tried)} of {len(one.row.tried) + one.left}"
            table.add_row(
                one.label,
                f"{one.batch}, {one.row.shape}",
                f"{time}: {short_choice(one.default)}",
                "the default" if choice is None else short_choice(choice),
                f"{one.row.ratio:.2f}" if one.row.tried else "-",
                tried,
                refused or "-",
            )
        print_table(table, piped_width=140)
    print(_sentence(found))
    print(found.path)


def _sentence(found: Tuning) -> str:
    if not found.kernels:
        return "No kernel of this model has candidates."
    if found.left:
        return f"{found.left} candidates are left: run it again to go on, or raise --budget."
    return "All candidates were tried." if found.new else "There was nothing to do."


def short_choice(choice: Choice) -> str:
    """(("BLOCK_M", 64), ("num_warps", 4)) -> 'M 64, warps 4'"""
    return ", ".join(
        f"{name.removeprefix('BLOCK_').removeprefix('num_')} {value}" for name, value in choice
    )
