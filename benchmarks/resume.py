"""Rows that are kept in a file as they come, so that a run that was cut off goes on."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

from benchmarks.output import write_rows
from benchmarks.registry import Row


class Rows:
    """The rows of one file, those of earlier runs too; what failed then is made again."""

    def __init__(self, path: Path | None, suite: str, pattern: str = "") -> None:
        self.path, self.suite, self.pattern = path, suite, pattern
        self.rows: list[Row] = []
        self._lock = threading.Lock()
        if path is not None and path.exists():
            found = json.loads(path.read_text())
            if found.get("suite") != suite:
                raise SystemExit(f"{path} holds rows of suite {found.get('suite')}, not {suite}")
            self.rows = found["rows"]

    def wants(self, name: str, seed: int | None) -> bool:
        """Is this row still to be made? --filter is searched in its name."""
        return (name, seed) not in self.done() and re.search(self.pattern, name) is not None

    def failed(self, name: str, seed: int | None) -> bool:
        """Is there a row with a reason instead of numbers?"""
        return any(_key(row) == (name, seed) and row["reason"] is not None for row in self.rows)

    def add(self, row: Row) -> None:
        """Keep a row, print it and write the file."""
        with self._lock:
            self.rows = [one for one in self.rows if _key(one) != _key(row)] + [row]
            print(json.dumps(row), flush=True)
            if self.path is not None:
                write_rows(self.path, self.suite, self.rows)

    def done(self) -> list[tuple[str, int | None]]:
        """Names and seeds of the rows that are there and did not fail."""
        return [_key(row) for row in self.rows if row["reason"] is None]


def _key(row: Row) -> tuple[str, int | None]:
    return row["row"], row["seed"]


def parse_rows(lines: Iterator[str]) -> Iterator[Row]:
    """The rows among what a process of a suite prints."""
    for line in lines:
        if line.startswith("{"):
            yield json.loads(line)
