"""Single operators on a GPU against its ceilings: copies, fp16 and int8 matrix products.

A kernel takes less than its launch from Python: it is timed inside a CUDA graph of many launches.
Operands under the size of the L2 cache stay there between launches.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import checks
from benchmarks.ceilings import Work, ceiling_row, shortest_seconds
from benchmarks.gpu_probe import Probe
from benchmarks.kernel_cases import SAMPLES, Group, Kernel
from benchmarks.registry import Row
from benchmarks.resume import Rows
from benchmarks.subjects import sentence
from benchmarks.timing import Candidate, summary, take_turns
from ouro_compiler.kernels.dispatch import ReferenceWarning
from ouro_compiler.runtime.cuda_graphs import CudaGraphs

LAUNCHES = 20  # of a kernel in the CUDA graph that is timed
SIDE, COPIED = 8192, 1 << 30  # of square matrices; bytes of a copy's source
_NUMBERS = (
    *("ms", "ms_min", "ms_q1", "ms_q3", "ms_max", "calls", "bytes_per_second"),
    *("operations_per_second", "share", "bound_by", "vs_linear"),
)


def gpu_ceilings(device: torch.device, side: int = SIDE, copied: int = COPIED) -> list[Row]:
    """Rows (name, what, rate a second), the best of seven turns each, on random operands."""
    clock = Probe(device).clock
    source = torch.randint(255, (copied,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device, dtype=torch.float16) for _ in range(2))
    codes = [torch.randint(-127, 128, (side, side), device=device).to(torch.int8) for _ in "ab"]
    products = side**3
    every: list[tuple[str, str, float, Callable[[], Any]]] = [
        ("memory", "bytes read and written by copies", 2 * copied, lambda: target.copy_(source)),
        ("fma", "multiply-adds of fp16 matrix products", products, lambda: a @ b),
        (
            *("int8", "products of int8 matrix products (torch._int_mm)", products),
            lambda: torch._int_mm(codes[0], codes[1].t()),
        ),
    ]
    found = []
    for name, what, work, call in every:
        candidate = Candidate(name, call)
        take_turns([candidate], 7, clock)
        row = ceiling_row(name, what, work / min(candidate.seconds), None)
        found.append({"row": f"gpu/ceilings/{name}", "seed": None, **row})
    return found


def measure_gpu_kernels(
    rows: Rows,
    groups: Sequence[Group],
    *,
    rounds: int,
    device: str = "cuda",
    measure_ceilings: Callable[[torch.device], list[Row]] = gpu_ceilings,
) -> None:
    """Add the rows of groups that are not there, ceilings first; those that failed come last."""
    place = torch.device(device)
    ceilings: list[Row] = []
    for group in sorted(groups, key=lambda one: _state(rows, one) == "failed"):
        if _state(rows, group) == "there":
            continue
        if not ceilings:
            ceilings = measure_ceilings(place)
            for row in ceilings:
                rows.add(row)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", ReferenceWarning)
            for row in _measure_group(group, ceilings, rounds, place):
                rows.add(row)
        Probe(place).require_usable(group_name(group))


def group_name(group: Group) -> str:
    """What --filter is searched in; the rows' names continue it."""
    return f"gpu/kernels/b{group.batch}/{group.name}"


def _state(rows: Rows, group: Group) -> str:
    """Are a group's rows "there", "missing" or "failed"? They are made together."""
    prefix = group_name(group) + "/"
    found = [row["reason"] for row in rows.rows if row["row"].startswith(prefix)]
    return "missing" if not found else "there" if set(found) == {None} else "failed"


def _measure_group(
    group: Group, ceilings: list[Row], rounds: int, device: torch.device
) -> list[Row]:
    try:
        kernels, references = group.kernels(device), group.references()
    except Exception as error:  # as below
        row = {"row": f"{group_name(group)}/all", "seed": None, "kind": "kernel", "name": "all"}
        row |= {"group": group.name, "batch": group.batch, "check": None, "implementation": None}
        return [{**row, **dict.fromkeys(_NUMBERS), "reason": sentence(error)}]
    candidates, rows = [], []
    for name, kernel in kernels.items():
        row: Row = {
            "row": f"{group_name(group)}/{name}",
            "seed": None,
            "kind": "kernel",
            "name": name,
        }
        row |= {"group": group.name, "batch": group.batch, "check": None, "reason": None}
        row["blocks"] = "default"
        row |= {"implementation": kernel.implementation, **dict.fromkeys(_NUMBERS)}
        row["work"] = dataclasses.asdict(kernel.work)
        rows.append(row)
        try:
            row["check"] = check_kernel(kernel, references[_same(name)], group.batch)
            candidates.append(_candidate(name, kernel, device))
        except Exception as error:  # whatever a kernel raises is its row's reason
            row["reason"], row["check"] = sentence(error), None
    take_turns(candidates, rounds, Probe(device).clock)
    times = {one.name: summary(one.seconds) for one in candidates}
    linear = next((one["ms"] for name, one in times.items() if name.startswith("F.linear")), None)
    for row in rows:
        if row["name"] in times:
            row.update(times[row["name"]])
            _fill(row, Work(**row["work"]), ceilings, linear)
    return rows


def _same(name: str) -> str:
    """The name of a kernel among those of the CPU, where PyTorch's own product is in fp32."""
    return "F.linear fp32" if name.startswith("F.linear") else name


def _candidate(name: str, kernel: Kernel, device: torch.device) -> Candidate:
    if device.type != "cuda":
        return Candidate(name, kernel.call)

    def launches(_: Tensor) -> None:
        for _number in range(LAUNCHES):
            kernel.call()

    nothing = torch.zeros(1, device=device)
    replay = CudaGraphs(device).capture(launches, nothing)
    return Candidate(name, lambda: replay(nothing), repeats=LAUNCHES)


def check_kernel(kernel: Kernel, reference: Kernel, batch: int) -> str | None:
    """What a row says of results: those of two samples on the CPU, repeated. Raises WrongError."""
    results = kernel.call()
    results = results if isinstance(results, tuple | list) else (results,)
    different = min(batch, SAMPLES)
    if kernel.reference is None:
        expected = reference.call()
        return checks.check_half(results[0][:different].float().cpu(), expected, "fp16")
    first = tuple(one[:different].cpu() for one in results)
    assert reference.reference is not None
    checks.compare(kernel.name, first, reference.reference())
    for number, one in enumerate(results):
        repeated = torch.arange(len(one), device=one.device) % different
        if one.numel() and not torch.equal(one, one[repeated]):
            raise checks.WrongError(
                f"ouro::{kernel.name}: result {number} of a sample depends on its place in a batch"
            )
    return f"equals its reference, {batch} samples"


def _fill(row: Row, work: Work, ceilings: list[Row], linear: float | None) -> None:
    seconds = row["ms"] / 1e3
    row["bytes_per_second"] = work.moved / seconds
    row["operations_per_second"] = 2 * (work.integer or work.fma) / seconds
    row["vs_linear"] = linear / row["ms"] if linear else None
    bound = shortest_seconds(work, ceilings)
    if bound is not None:
        row["share"], row["bound_by"] = bound[0] / seconds, bound[1]
