"""Single operators on a CPU at the shapes of Vim-T and VMamba, against the machine's ceilings.

Operators are called as a compiled model calls them: the registered kernel directly, else through
`torch.ops.ouro`. Each is compared with its reference before it is timed.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import checks
from benchmarks.ceilings import Work, shortest_seconds
from benchmarks.registry import Row
from benchmarks.timing import Candidate, summary, take_turns
from ouro_compiler.kernels.cpp.linear import linear_spec
from ouro_compiler.kernels.cpu import IMPLEMENTATIONS
from ouro_compiler.kernels.dispatch import ReferenceWarning, function_on
from ouro_compiler.ops.packing import pack_int4_ref
from ouro_compiler.ops.quantize import symmetric_max

PERIOD = 10  # tokens of a window, as in every preset
# (weight bits, inlier bits, outlier bits) of the presets
_BITS = {"W4A4": (4, 4, 8), "W4A8": (4, 8, 16), "W8A8": (8, 8, 16)}
_VIM, _CHANNELS, _STATES = 197, 384, 16  # tokens, inner channels, states of Vim-T
_VMAMBA, _DIRECTION = 3136, 96  # tokens and channels of one order of VMamba-T's first stage
_LINEARS = {
    "in_proj": (192, 768),
    "x_proj": (384, 44),
    "dt_proj": (12, 384),
    "out_proj": (384, 192),
}
_PRODUCTS = ("madd", "maddubs", "dpbusd")  # KIND in templates/products.h


@dataclass
class Kernel:
    """A call to time and what it must do; check raises WrongError."""

    call: Callable[[], Any]
    work: Work
    check: Callable[[], str]
    implementation: str


@dataclass(frozen=True)
class Group:
    """Kernels that are timed in turns, since they do the same job."""

    name: str
    batch: int
    build: Callable[[], Mapping[str, Kernel]]


def chosen_groups(batches: Sequence[int], pattern: str) -> list[Group]:
    """Groups with "kernels/bBATCH/GROUP" matching; nothing is built yet."""
    return [
        one
        for batch in batches
        for one in _groups(batch)
        if re.search(pattern, f"kernels/b{one.batch}/{one.name}")
    ]


def _groups(batch: int) -> Iterator[Group]:
    yield Group("scan Vim-T", batch, lambda: _scan(batch, _CHANNELS, _VIM, _STATES))
    yield Group("scan VMamba-T", batch, lambda: _scan(batch, _DIRECTION, _VMAMBA, 1))
    for name, (inputs, outputs) in _LINEARS.items():
        yield Group(
            f"linear Vim-T {name}",
            batch,
            lambda inputs=inputs, outputs=outputs: _linear(batch, _VIM, inputs, outputs),  # type: ignore[misc]
        )
    yield Group("linear VMamba-T in_proj", batch, lambda: _linear(batch, _VMAMBA, 96, 96))
    yield Group("quantizers Vim-T", batch, lambda: _quantizers(batch, _VIM, 192, _CHANNELS))
    yield Group("quantizers VMamba-T", batch, lambda: _quantizers(batch, _VMAMBA, 96, _DIRECTION))


def operator(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None, **work: Any
) -> Kernel:
    """An operator on arguments; bytes are those of its tensors and results."""
    given = dict(kwargs or {})
    overload = getattr(torch.ops.ouro, name)
    function = function_on("CPU", name) or overload
    with torch.no_grad(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", ReferenceWarning)
        results = function(*args, **given)
    refused = any(issubclass(one.category, ReferenceWarning) for one in said)
    known = IMPLEMENTATIONS.get(name)
    tensors = [*args, *(results if isinstance(results, tuple) else (results,))]
    moved = sum(one.numel() * one.element_size() for one in tensors if isinstance(one, Tensor))

    def check() -> str:
        if known is None:
            return "the reference itself"
        checks.compare(name, function(*args, **given), known.reference(*args, **given))
        return "equals its reference"

    kernel = known is not None and not refused
    call = lambda: function(*args, **given)  # noqa: E731
    return Kernel(call, Work(moved=moved, **work), check, "C++" if kernel else "reference")


def _tokens(batch: int, channels: int, length: int, seed: int) -> Tensor:
    """Noise (B, D, L), in memory (B, L, D), a few channels six times as large."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, channels, generator=generator)
    x[..., ::48] *= 6
    return x.transpose(1, 2)


def _scan(batch: int, channels: int, length: int, states: int) -> dict[str, Kernel]:
    u, delta, z = (_tokens(batch, channels, length, seed) for seed in range(3))
    B, C = (_tokens(batch, states, length, seed) for seed in (3, 4))
    A = -torch.arange(1, states + 1).float().repeat(channels, 1)
    ones = torch.ones(channels)
    elements = batch * channels * length
    # A state takes four multiply-adds and an exponential, softplus and its sum about ten.
    work = {"fma": elements * (4 * states + 10), "exp": elements * (states + 1)}
    gated = {"fma": work["fma"] + 2 * elements, "exp": work["exp"] + elements}
    args = (u, delta, A, B, C, ones)
    return {
        "fp32": operator("selective_scan", (*args, None, ones, True, False), **work),
        "fp32 reverse": operator("selective_scan", (*args, None, ones, True, True), **work),
        "fp32, gate": operator("selective_scan", (*args, z, ones, True, False), **gated),
    }


def _static(x: Tensor, inlier_bits: int) -> tuple[Tensor, Tensor]:
    """(inlier_scale, threshold), both (L,), for x (B, L, K): ranges of 3 standard deviations."""
    spread = 3 * x.std(dim=(0, 2))
    return spread / symmetric_max(inlier_bits), spread


def _linear(batch: int, length: int, inputs: int, outputs: int) -> dict[str, Kernel]:
    x = _tokens(batch, inputs, length, 0).transpose(1, 2)
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1))
    products = batch * length * inputs * outputs
    size = 4 * (x.numel() + weight.numel() + batch * length * outputs)
    work = Work(moved=size, fma=products)
    found = {"F.linear fp32": Kernel(lambda: F.linear(x, weight), work, lambda: "", "PyTorch")}
    for name, (bits, inlier_bits, outlier_bits) in _BITS.items():
        scale, threshold = _static(x, inlier_bits)
        windows = (inlier_bits, outlier_bits, PERIOD, False)
        codes = torch.ops.ouro.quantize_dynamic_outlier(x, scale, None, threshold, *windows)
        top = symmetric_max(bits)
        weight_scale = weight.abs().amax(1) / top
        integers = (weight / weight_scale[:, None]).round().to(torch.int8)
        stored = pack_int4_ref(integers) if bits == 4 else integers
        kind = linear_spec(stored.dtype, outlier_bits, torch.float32)["KIND"]
        found[name] = operator(
            "linear_dynamic_outlier",
            (
                *(codes[0], scale, *codes[1:], x if outlier_bits == 16 else None),
                *(stored, weight_scale, None, None, "none", *windows),
            ),
            integer=products,
            products=_PRODUCTS[kind],
        )
    return found


def _quantizers(batch: int, length: int, embed: int, channels: int) -> dict[str, Kernel]:
    hidden = _tokens(batch, embed, length, 0).transpose(1, 2)
    residual = _tokens(batch, embed, length, 1).transpose(1, 2)
    x, y, z = (_tokens(batch, channels, length, seed) for seed in (2, 3, 4))
    taps = torch.randn(channels, 4, generator=torch.Generator().manual_seed(5)) / 2
    found: dict[str, Kernel] = {}
    for name, (inlier_bits, outlier_bits) in {"A4": (4, 8), "A8": (8, 16)}.items():
        windows = (inlier_bits, outlier_bits, PERIOD, False)
        emit = outlier_bits == 16  # the product then reads the values
        wide, inner = _static(hidden, inlier_bits), _static(x.transpose(1, 2), inlier_bits)
        found[f"quantize {name}"] = operator(
            "quantize_dynamic_outlier",
            (x.transpose(1, 2), inner[0], None, inner[1], *windows),
        )
        found[f"norm + quantize {name}"] = operator(
            "add_norm_quantize",
            (hidden, residual, torch.ones(embed), None, 1e-5, True, True, *wide, *windows, emit),
            fma=3 * hidden.numel(),
        )
        found[f"conv + quantize {name}"] = operator(
            "causal_conv1d_quantize",
            (x, taps, torch.zeros(channels), True, *inner, *windows),
            fma=4 * x.numel(),
            exp=x.numel(),
        )
        found[f"gate + quantize {name}"] = operator(
            "gate_sum_quantize",
            (x, y, z, 0.5, *inner, *windows, emit),
            fma=3 * x.numel(),
            exp=x.numel(),
        )
    return found


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
    kernels = group.build()
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
