"""Single operators on a CPU, against the machine's ceilings. Each is checked before it is timed."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence

import torch

from benchmarks import checks
from benchmarks.ceilings import Work, shortest_seconds
from benchmarks.kernel_cases import Group
from benchmarks.registry import Row
from benchmarks.timing import Candidate, summary, take_turns
from ouro_compiler.kernels.dispatch import ReferenceWarning


def measure_kernels(
    groups: Sequence[Group],
    ceilings: list[Row],
    *,
    rounds: int,
    report: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """A row for each kernel of each group."""
    rows: list[Row] = []
    for group in groups:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", ReferenceWarning)
            found = _measure_group(group, ceilings, rounds)
        for row in found:
            report(row)
        rows += found
    return rows


def _measure_group(group: Group, ceilings: list[Row], rounds: int) -> list[Row]:
    candidates: list[Candidate] = []
    rows: list[Row] = []
    kernels = group.kernels(torch.device("cpu"))
    for name, kernel in kernels.items():
        row: Row = {"kind": "kernel", "group": group.name, "batch": group.batch, "name": name}
        row |= {"implementation": kernel.implementation, "reason": None, "check": None}
        rows.append(row)
        try:
            row["check"] = kernel.check() or None
        except checks.WrongError as error:
            row["reason"] = str(error)
            continue
        candidates.append(Candidate(name, kernel.call))
    take_turns(candidates, rounds)
    times = {one.name: summary(one.seconds) for one in candidates}
    for row in rows:
        row.update(times.get(row["name"], {}))
        row.setdefault("ms", None)
        row["work"] = dataclasses.asdict(kernels[row["name"]].work)
        linear = times.get("F.linear fp32")
        row["vs_linear"] = linear["ms"] / row["ms"] if linear and row["ms"] else None
    set_shares(rows, ceilings)
    return rows


def set_shares(rows: Sequence[Row], ceilings: list[Row]) -> None:
    """Fill in how long each kernel would take at the ceilings, and its share of them."""
    for row in rows:
        bound = shortest_seconds(Work(**row["work"]), ceilings)
        row["bound_ms"], row["bound_by"] = (1e3 * bound[0], bound[1]) if bound else (None, None)
        row["share"] = row["bound_ms"] / row["ms"] if bound and row["ms"] else None
