"""Single operators at the shapes of Vim and VMamba, on arguments that all devices share.

Operators are called as a compiled model calls them: the registered kernel directly, else through
`torch.ops.ouro`. Samples repeat after the second: what a kernel must give is known from two.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import checks
from benchmarks.ceilings import Work
from ouro_compiler.kernels.cpp.linear import linear_spec
from ouro_compiler.kernels.dispatch import ReferenceWarning, function_on
from ouro_compiler.ops.packing import pack_int4_ref
from ouro_compiler.ops.quantize import symmetric_max

PERIOD = 10  # tokens of a window, as in every preset
# (weight bits, inlier bits, outlier bits) of the presets
_BITS = {"W4A4": (4, 4, 8), "W4A8": (4, 8, 16), "W8A8": (8, 8, 16)}
_VIM, _STATES = 197, 16  # tokens and states of Vim
_EMBED = {"Vim-T": 192, "Vim-S": 384, "Vim-B": 768}
SAMPLES = 2  # that differ
_SIDE, _DIRECTION = 56, 96  # of the map of VMamba-T's first stage, and its channels
_VMAMBA = _SIDE * _SIDE  # tokens of one order
_PRODUCTS = ("madd", "maddubs", "dpbusd")  # KIND in templates/products.h


@dataclass
class Kernel:
    """A call to time and what it must do; check raises WrongError.

    reference: what it must compute, if that is not by definition right. name: of the operator.
    """

    call: Callable[[], Any]
    work: Work
    implementation: str
    name: str = ""
    reference: Callable[[], Any] | None = None

    def check(self) -> str:
        """What a row says of its results. Raises WrongError."""
        if self.reference is None:
            return "the reference itself" if self.name else ""
        checks.compare(self.name, self.call(), self.reference())
        return "equals its reference"


@dataclass(frozen=True)
class Group:
    """Kernels that are timed in turns, since they do the same job."""

    name: str
    batch: int
    build: Callable[[Maker, int], Mapping[str, Kernel]]

    def kernels(self, device: torch.device) -> Mapping[str, Kernel]:
        """Its kernels, on a device, by name."""
        return self.build(Maker(device), self.batch)

    def references(self) -> Mapping[str, Kernel]:
        """The same on the CPU, for the samples that differ."""
        return self.build(Maker(torch.device("cpu")), min(self.batch, SAMPLES))


def chosen_groups(
    batches: Sequence[int], pattern: str, sizes: Sequence[str] = ("Vim-T",)
) -> list[Group]:
    """Groups with "kernels/bBATCH/GROUP" matching; nothing is built yet."""
    return [
        one
        for batch in batches
        for one in all_groups(batch, sizes)
        if re.search(pattern, f"kernels/b{one.batch}/{one.name}")
    ]


def all_groups(batch: int, sizes: Sequence[str]) -> Iterator[Group]:
    """Groups of Vims of these sizes and of VMamba-T; nothing is built yet."""
    for size in sizes:
        embed = _EMBED[size]
        inner, rank = 2 * embed, embed // 16
        build = partial(_scan, channels=inner, length=_VIM, states=_STATES)
        yield Group(f"scan {size}", batch, build)
        linears = {
            "in_proj": (embed, 2 * inner),
            "x_proj": (inner, rank + 2 * _STATES),
            "dt_proj": (rank, inner),
            "out_proj": (inner, embed),
        }
        for name, (inputs, outputs) in linears.items():
            build = partial(_linear, length=_VIM, inputs=inputs, outputs=outputs)
            yield Group(f"linear {size} {name}", batch, build)
        build = partial(_quantizers, length=_VIM, embed=embed, channels=inner)
        yield Group(f"quantizers {size}", batch, build)
    build = partial(_scan, channels=_DIRECTION, length=_VMAMBA, states=1)
    yield Group("scan VMamba-T", batch, build)
    build = partial(_linear, length=_VMAMBA, inputs=_DIRECTION, outputs=_DIRECTION)
    yield Group("linear VMamba-T in_proj", batch, build)
    build = partial(_quantizers, length=_VMAMBA, embed=_DIRECTION, channels=_DIRECTION)
    yield Group("quantizers VMamba-T", batch, build)
    yield Group("maps VMamba-T", batch, partial(_maps, side=_SIDE, channels=_DIRECTION))


@dataclass(frozen=True)
class Maker:
    """Makes kernels on a device of arguments on the CPU."""

    device: torch.device

    def operator(self, name: str, args: Sequence[Any], **work: Any) -> Kernel:
        """An operator on arguments; bytes are those of its tensors and results."""
        given = [one.to(self.device) if isinstance(one, Tensor) else one for one in args]
        on_gpu = self.device.type == "cuda"
        function = function_on(self.device.type.upper(), name) or getattr(torch.ops.ouro, name)
        with torch.no_grad(), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", ReferenceWarning)
            results = function(*given)
        refused = any(issubclass(one.category, ReferenceWarning) for one in said)
        known = checks.implementations(self.device).get(name)
        tensors = [*given, *(results if isinstance(results, tuple) else (results,))]
        moved = sum(one.numel() * one.element_size() for one in tensors if isinstance(one, Tensor))
        language = "Triton" if on_gpu else "C++"
        return Kernel(
            lambda: function(*given),
            Work(moved=moved, **work),
            language if known is not None and not refused else "reference",
            name,
            None if known is None else lambda: known.reference(*args),
        )

    def linear(self, x: Tensor, weight: Tensor, work: Work) -> Kernel:
        """PyTorch's own product, in fp32; on a GPU in fp16."""
        dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        x, weight = x.to(self.device, dtype), weight.to(self.device, dtype)
        work = dataclasses.replace(work, moved=work.moved * dtype.itemsize)
        return Kernel(lambda: F.linear(x, weight), work, "PyTorch")

    @property
    def linear_name(self) -> str:
        """What a row calls PyTorch's own product."""
        return f"F.linear {'fp16' if self.device.type == 'cuda' else 'fp32'}"

    def products(self, stored: torch.dtype, outlier_bits: int) -> str:
        """The ceiling of integer products with these weights."""
        if self.device.type == "cuda":
            return "int8"
        return _PRODUCTS[linear_spec(stored, outlier_bits, torch.float32)["KIND"]]


def _tokens(batch: int, channels: int, length: int, seed: int) -> Tensor:
    """Noise (B, D, L), in memory (B, L, D), a few channels six times as large."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(min(batch, SAMPLES), length, channels, generator=generator)
    x[..., ::48] *= 6
    return x[torch.arange(batch) % len(x)].transpose(1, 2)


def _scan(make: Maker, batch: int, channels: int, length: int, states: int) -> dict[str, Kernel]:
    u, delta, z = (_tokens(batch, channels, length, seed) for seed in range(3))
    B, C = (_tokens(batch, states, length, seed) for seed in (3, 4))
    A = -torch.arange(1, states + 1).float().repeat(channels, 1)
    ones = torch.ones(channels)
    elements = batch * channels * length
    # A state takes four multiply-adds and an exponential, softplus and its sum about ten.
    work = {"fma": elements * (4 * states + 10), "exp": elements * (states + 1)}
    gated = {"fma": work["fma"] + 2 * elements, "exp": work["exp"] + elements}
    args = (u, delta, A, B, C, ones)
    halves = [one.half() for one in args]
    return {
        "fp32": make.operator("selective_scan", (*args, None, ones, True, False), **work),
        "fp32 reverse": make.operator("selective_scan", (*args, None, ones, True, True), **work),
        "fp16": make.operator("selective_scan", (*halves, None, ones.half(), True, False), **work),
        "fp32, gate": make.operator("selective_scan", (*args, z, ones, True, False), **gated),
    }


def _static(x: Tensor, inlier_bits: int) -> tuple[Tensor, Tensor]:
    """(inlier_scale, threshold), both (L,), for x (B, L, K): ranges of 3 standard deviations."""
    spread = 3 * x[:SAMPLES].std(dim=(0, 2))
    return spread / symmetric_max(inlier_bits), spread


def _linear(make: Maker, batch: int, length: int, inputs: int, outputs: int) -> dict[str, Kernel]:
    x = _tokens(batch, inputs, length, 0).transpose(1, 2)
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1))
    products = batch * length * inputs * outputs
    elements = x.numel() + weight.numel() + batch * length * outputs
    work = Work(moved=elements, fma=products)
    found = {make.linear_name: make.linear(x, weight, work)}
    for name, (bits, inlier_bits, outlier_bits) in _BITS.items():
        scale, threshold = _static(x, inlier_bits)
        windows = (inlier_bits, outlier_bits, PERIOD, False)
        codes = torch.ops.ouro.quantize_dynamic_outlier(x, scale, None, threshold, *windows)
        top = symmetric_max(bits)
        weight_scale = weight.abs().amax(1) / top
        integers = (weight / weight_scale[:, None]).round().to(torch.int8)
        stored = pack_int4_ref(integers) if bits == 4 else integers
        found[name] = make.operator(
            "linear_dynamic_outlier",
            (
                *(codes[0], scale, *codes[1:], x if outlier_bits == 16 else None),
                *(stored, weight_scale, None, None, "none", *windows),
            ),
            integer=products,
            products=make.products(stored.dtype, outlier_bits),
        )
    return found


def _quantizers(
    make: Maker, batch: int, length: int, embed: int, channels: int
) -> dict[str, Kernel]:
    hidden = _tokens(batch, embed, length, 0).transpose(1, 2)
    residual = _tokens(batch, embed, length, 1).transpose(1, 2)
    x, y, z = (_tokens(batch, channels, length, seed) for seed in (2, 3, 4))
    taps = torch.randn(channels, 4, generator=torch.Generator().manual_seed(5)) / 2
    found: dict[str, Kernel] = {}
    for name, (inlier_bits, outlier_bits) in {"A4": (4, 8), "A8": (8, 16)}.items():
        windows = (inlier_bits, outlier_bits, PERIOD, False)
        emit = outlier_bits == 16  # the product then reads the values
        wide, inner = _static(hidden, inlier_bits), _static(x.transpose(1, 2), inlier_bits)
        found[f"quantize {name}"] = make.operator(
            "quantize_dynamic_outlier",
            (x.transpose(1, 2), inner[0], None, inner[1], *windows),
        )
        found[f"norm + quantize {name}"] = make.operator(
            "add_norm_quantize",
            (hidden, residual, torch.ones(embed), None, 1e-5, True, True, *wide, *windows, emit),
            fma=3 * hidden.numel(),
        )
        found[f"conv + quantize {name}"] = make.operator(
            "causal_conv1d_quantize",
            (x, taps, torch.zeros(channels), True, *inner, *windows),
            fma=4 * x.numel(),
            exp=x.numel(),
        )
        found[f"gate + quantize {name}"] = make.operator(
            "gate_sum_quantize",
            (x, y, z, 0.5, *inner, *windows, emit),
            fma=3 * x.numel(),
            exp=x.numel(),
        )
    return found


def _maps(make: Maker, batch: int, side: int, channels: int) -> dict[str, Kernel]:
    """What reads a map column by column, and the merge of the four orders."""
    orders = [_tokens(batch, channels, side * side, seed) for seed in range(4)]
    pixels = orders[0].unflatten(2, (side, side)).transpose(2, 3)
    state, ones = _tokens(batch, 1, side * side, 4), torch.ones(channels)
    elements = orders[0].numel()
    scanned = (pixels, orders[1], -torch.ones(channels, 1), state, state, ones, None, ones)
    found = {
        "scan of columns": make.operator(
            "selective_scan", (*scanned, True, False), fma=14 * elements, exp=2 * elements
        )
    }
    for name, (inlier_bits, outlier_bits) in {"A4": (4, 8), "A8": (8, 16)}.items():
        scale, threshold = _static(orders[0].transpose(1, 2), inlier_bits)
        windows = (inlier_bits, outlier_bits, PERIOD, False)
        found[f"quantize columns {name}"] = make.operator(
            "quantize_dynamic_outlier",
            (pixels.movedim(1, -1), scale, None, threshold, *windows),
        )
        sides = (orders[0], orders[2], orders[1], orders[3], side, side)
        norm = (ones, ones, 1e-5, False, scale, threshold)
        found[f"merge + norm + quantize {name}"] = make.operator(
            "cross_merge_norm_quantize",
            (*sides, *norm, *windows, outlier_bits == 16),
            fma=6 * elements,
        )
    return found
