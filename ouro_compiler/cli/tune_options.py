"""The options of `ouro tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ouro_compiler.cli import options


def tune_command(
    model: Annotated[str, typer.Argument(help="an artefact")],
    batches: Annotated[str, typer.Option(help="batch sizes to tune for, with commas")] = "1,32",
    budget: Annotated[float, typer.Option(help="seconds to spend; another run goes on")] = 60.0,
    json: Annotated[Path | None, typer.Option(help="write what was found as JSON")] = None,
    quiet: options.Quiet = False,
) -> None:
    """Time other block sizes for MODEL's kernels on this GPU, and keep the fastest in the cache."""
    from ouro_compiler.cli.tune import TuneRequest, run

    run(TuneRequest(model=model, batches=batches, budget=budget, json=json, quiet=quiet))
