"""Suites by name: a suite takes the command's options, prints rows as it goes, returns them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
Suite = Callable[..., list[Row]]
SUITES: dict[str, Suite] = {}


def suite(name: str) -> Callable[[Suite], Suite]:
    """Register a suite; `python -m benchmarks.run --suite NAME` runs it."""

    def register(run: Suite) -> Suite:
        if name in SUITES:
            raise ValueError(f"there is a suite {name} already")
        SUITES[name] = run
        return run

    return register
