"""What a person sees: progress on stderr, tables on stdout, JSON files."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ouro_compiler.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

Progress = Callable[[str, int, int], None]


@contextmanager
def progress_bars(quiet: bool) -> Iterator[Progress | None]:
    """A Progress that draws one bar a stage on stderr; None where stderr is no terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    tasks: dict[str, Any] = {}

    def update(stage: str, done: int, total: int) -> None:
        name = stage.partition(": loss ")[0]  # the loss changes, the bar is one
        if name not in tasks:
            tasks[name] = bars.add_task(stage, total=total)
        bars.update(tasks[name], description=stage, completed=done)

    with bars:
        yield update


def print_table(table: Table, *, piped_width: int = 100) -> None:
    """Print a rich table on stdout: `piped_width` columns where stdout is no terminal."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else piped_width
    Console(width=width, highlight=False).print(table)


def table_text(table: Table, width: int) -> str:
    """A rich table as plain text of `width` columns."""
    from rich.console import Console

    buffer = io.StringIO()
    Console(file=buffer, width=width, highlight=False).print(table)
    return buffer.getvalue()


def write_json(path: Path, data: Any) -> None:
    """Write JSON through a temporary name. Raises UsageError if the place cannot be written."""
    write_text(path, json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 through a temporary name. Raises UsageError if the place cannot be written."""
    partial = path.parent / f"{path.name}.{os.getpid()}.partial"
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UsageError(f"cannot write {path}: {error.strerror}") from error


def human_bytes(count: int) -> str:
    """1234567 -> '1.23 MB'."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"
