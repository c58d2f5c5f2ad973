"""Suite "offline": every kernel compiled for GPUs that need not be here, and what it takes.

Shapes are those of Vim-T, S and B at 224 x 224 (197 tokens) and of VMamba's scan (one state).
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.registry import Row, suite
from ouro_compiler.kernels import linear, quantize, quantized_scan, scan, scan_dynamic_outlier
from ouro_compiler.kernels.candidates import as_choice, current_choice, offered_on
from ouro_compiler.kernels.grouping import join
from ouro_compiler.kernels.launch import Launch, record_launches
from ouro_compiler.kernels.offline import compile_ahead, parse_architectures
from ouro_compiler.kernels.retile import retile

BATCH, LENGTH, PERIOD = 32, 197, 10
WINDOWS = -(-LENGTH // PERIOD)
HALF, FULL = torch.float16, torch.float32


def _tokens(channels: int, dtype: torch.dtype = HALF) -> Tensor:
    """(B, D, L), memory as (B, L, D)."""
    return torch.empty(BATCH, LENGTH, channels, dtype=dtype).transpose(1, 2)


def _scales() -> tuple[Tensor, Tensor]:
    return torch.empty(LENGTH, dtype=HALF), torch.empty(LENGTH, dtype=HALF)


def linear_case(
    inputs: int,
    outputs: int,
    *,
    packed: bool,
    outlier_bits: int,
    activation: str = "none",
    residual: bool = False,
    dtype: torch.dtype = HALF,
) -> None:
    """Launch a product (fake tensors will do)."""
    stored = (inputs + 1) // 2 if packed else inputs
    linear.linear_dynamic_outlier(
        torch.empty(BATCH, LENGTH, inputs, dtype=torch.int8),
        _scales()[0],
        torch.empty(BATCH, LENGTH),
        torch.empty(BATCH, WINDOWS, inputs, dtype=torch.uint8),
        torch.empty(BATCH, LENGTH, inputs, dtype=dtype) if outlier_bits == 16 else None,
        torch.empty(outputs, stored, dtype=torch.uint8 if packed else torch.int8),
        torch.empty(outputs, dtype=HALF),
        torch.empty(outputs, dtype=HALF),
        torch.empty(BATCH, LENGTH, outputs, dtype=dtype) if residual else None,
        activation,
        4,
        outlier_bits,
        PERIOD,
        False,
        dtype=dtype,
    )


def scan_case(
    channels: int,
    states: int,
    *,
    dtype: torch.dtype = HALF,
    whole: bool = False,
    groups: int = 1,
    reverse: bool = False,
) -> None:
    """Launch a scan; `whole` adds softplus, delta's bias and the gate."""
    matrices = [
        torch.empty(BATCH, LENGTH, groups * states).transpose(1, 2).unflatten(1, (groups, states))
        for _ in range(2)
    ]
    scan.selective_scan(
        _tokens(channels, dtype),
        _tokens(channels, dtype),
        torch.empty(channels, states),
        *matrices,
        torch.empty(channels),
        _tokens(channels, dtype) if whole else None,
        torch.empty(channels) if whole else None,
        whole,
        reverse,
    )


def scan_dynamic_outlier_case(
    channels: int, states: int, *, outlier_bits: int = 8, whole: bool = False
) -> None:
    """Launch a scan on quantized operands; `whole` adds softplus, delta's bias and the gate."""

    def operand(columns: int, zero: bool) -> list[Tensor | None]:
        return [
            torch.empty(BATCH, LENGTH, columns, dtype=torch.int8),
            _scales()[0],
            torch.empty(LENGTH, dtype=torch.uint8) if zero else None,
            torch.empty(BATCH, LENGTH),
            torch.empty(BATCH, WINDOWS, columns, dtype=torch.uint8),
            torch.empty(BATCH, LENGTH, columns) if outlier_bits == 16 else None,
        ]

    scan_dynamic_outlier.selective_scan_dynamic_outlier(
        *(_tokens(channels, FULL), operand(channels, True), torch.empty(channels, states)),
        *(operand(states, False), operand(states, False), torch.empty(channels)),
        _tokens(channels, FULL) if whole else None,
        torch.empty(channels) if whole else None,
        *(whole, 4, outlier_bits, PERIOD, False),
    )


def quantized_scan_case(
    channels: int,
    states: int,
    *,
    dtype: torch.dtype = FULL,
    logarithmic: bool = False,
    outlier_bits: int = 8,
    factor: bool = False,
) -> None:
    """Launch a scan with a quantized recurrence, its gate included."""
    B, C = (torch.empty(BATCH, LENGTH, states, dtype=dtype).transpose(1, 2) for _ in range(2))
    quantized_scan.quantized_selective_scan(
        *(_tokens(channels, dtype), _tokens(channels, dtype), torch.empty(channels, states)),
        *(B, C, torch.empty(channels), _tokens(channels, dtype)),
        None if logarithmic else _scales()[0],
        *_scales(),
        *_scales(),
        torch.empty(channels, states) if factor else None,
        *(0.5, 2) if logarithmic else (0.0, 0),
        *(4, outlier_bits, PERIOD, False, False),
    )


def quantizer_cases(channels: int) -> None:
    """Launch every quantizer on rows of `channels`, and the dequantizer."""
    static = (4, 8, PERIOD, False)
    x = _tokens(channels).transpose(1, 2)
    vector = torch.empty(channels)
    codes, scale, start = quantize.quantize_dynamic_outlier(
        x, _scales()[0], None, _scales()[1], *static
    )
    zero = torch.empty(LENGTH, dtype=torch.uint8)
    quantize.quantize_dynamic_outlier(x, _scales()[0], zero, _scales()[1], *static)
    quantize.dequantize_dynamic_outlier(codes, _scales()[0], None, scale, start, None, *static)
    quantize.add_norm_quantize(
        x, x, vector, None, 1e-5, True, True, *_scales(), *static, emit=False
    )
    taps = torch.empty(channels, 4)
    quantize.causal_conv1d_quantize(_tokens(channels), taps, vector, True, *_scales(), *static)
    tokens = [_tokens(channels) for _ in range(3)]
    quantize.gate_sum_quantize(*tokens, 0.5, *_scales(), *static, emit=False)


def conv_case(channels: int) -> None:
    """Launch the convolution alone."""
    scan.causal_conv1d(_tokens(channels), torch.empty(channels, 4), torch.empty(channels), True)


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """(name, function that launches) for every row of the suite."""
    for inputs, outputs, what in (
        (192, 768, "Vim-T in_proj"),
        (384, 44, "Vim-T x_proj"),
        (12, 384, "Vim-T dt_proj"),
        (768, 3072, "Vim-B in_proj"),
        (1536, 768, "Vim-B out_proj"),
    ):
        for packed in (True, False):
            for outlier_bits in (8, 16):
                options = {"packed": packed, "outlier_bits": outlier_bits}
                yield what, _bind(linear_case, inputs, outputs, **options)
    every = {"packed": True, "outlier_bits": 8, "activation": "silu", "residual": True}
    yield "all epilogues", _bind(linear_case, 768, 3072, **every)
    full = {"packed": True, "outlier_bits": 16, "dtype": FULL, "activation": "softplus"}
    yield "fp32 outliers", _bind(linear_case, 384, 768, **full)
    for states in (16, 8, 1):
        for dtype in (HALF, torch.bfloat16, FULL):
            yield f"scan N={states} {_short(dtype)}", _bind(scan_case, 384, states, dtype=dtype)
    yield "scan N=16 gate, softplus", _bind(scan_case, 384, 16, whole=True)
    yield "scan N=16 reverse", _bind(scan_case, 384, 16, reverse=True)
    yield "scan N=1 4 groups", _bind(scan_case, 384, 1, groups=4)
    for states in (16, 8, 1):
        yield f"scan N={states} on codes", _bind(scan_dynamic_outlier_case, 384, states)
    yield "scan N=16 codes, fp", _bind(scan_dynamic_outlier_case, 384, 16, outlier_bits=16)
    yield "scan N=16 codes, whole", _bind(scan_dynamic_outlier_case, 384, 16, whole=True)
    for states in (16, 8, 1):
        yield f"scan N={states} quantized", _bind(quantized_scan_case, 384, states)
    yield "scan N=16 log2", _bind(quantized_scan_case, 384, 16, logarithmic=True)
    yield "scan N=16 fp outliers", _bind(quantized_scan_case, 384, 16, outlier_bits=16)
    for channels in (192, 384, 768, 1536):
        yield f"K={channels}", _bind(quantizer_cases, channels)
    yield "conv", _bind(conv_case, 384)


def group_cases() -> Iterator[tuple[str, Launch]]:
    """Groups as a layer of Vim-T has them: both directions, and the quantizers of dt, B and C."""
    for name, run in (
        ("x_proj, both directions", _bind(linear_case, 384, 44, packed=True, outlier_bits=8)),
        ("dt_proj, both directions", _bind(linear_case, 12, 384, packed=True, outlier_bits=8)),
        ("scan, both directions", _bind(scan_case, 384, 16)),
    ):
        (launch,) = recorded(run)
        yield name, join([launch, other_direction(launch)])
    convolution = recorded(_bind(quantizer_cases, 384))[4]
    yield "conv, both directions", join([convolution, other_direction(convolution)])
    widths = [recorded(_bind(quantizer_cases, channels))[0] for channels in (12, 16, 16)]
    yield "dt, B, C, both directions", join([*widths, *map(other_direction, widths)])


def nibble_cases() -> Iterator[tuple[str, Launch]]:
    """Products on INT4 tensor cores, of GPUs that have them: what tuning may choose."""
    for name, inputs, outputs in (
        ("Vim-T in_proj", 192, 768),
        ("Vim-T x_proj", 384, 44),
        ("Vim-B in_proj", 768, 3072),
        ("Vim-B out_proj", 1536, 768),
    ):
        (one,) = recorded(_bind(linear_case, inputs, outputs, packed=True, outlier_bits=8))
        choice = {**dict(current_choice(one.spec)), "MATRIX_BITS": 4}
        yield name, retile(one, as_choice(choice))


def other_direction(launch: Launch) -> Launch:
    """The same launch the other way through time."""
    constants = {**dict(launch.spec.constants), "REVERSE": 1 - launch.spec["REVERSE"]}
    spec = dataclasses.replace(launch.spec, constants=tuple(sorted(constants.items())))
    return dataclasses.replace(launch, spec=spec)


def recorded(run: Callable[[], None]) -> list[Launch]:
    """What a case launches, recorded on fake tensors."""
    with FakeTensorMode(), record_launches() as recording:
        run()
    return recording.launches


@suite("offline")
def offline(options: argparse.Namespace) -> list[Row]:
    """Compile every case for every architecture, in an empty cache; print and return rows."""
    architectures = parse_architectures(options.arch)
    rows: list[Row] = []
    columns = "kernel                                  case                      arch  regs stack"
    print(f"{columns} spills  smem instr  loops  seconds  matrix instruction")
    with _empty_triton_cache():
        single = ((name, launch) for name, run in cases() for launch in recorded(run))
        for name, launch in chain(single, group_cases(), nibble_cases()):
            for architecture in architectures:
                if not offered_on(f"GPU sm_{architecture}", current_choice(launch.spec)):
                    continue
                found = compile_ahead(launch, architecture)
                row = {"kernel": launch.spec.label, "case": name, **dataclasses.asdict(found)}
                rows.append(row)
                print(_line(row), flush=True)
    return rows


def _line(row: Row) -> str:
    loops = "/".join(map(str, row["loops"])) or "-"
    matrix = (row["matrix"] or "-").replace(".sync.aligned", "").replace(".row.col.satfinite", "")
    return (
        f"{row['kernel']:39s} {row['case']:25s} sm_{row['arch']} {row['registers']:4d} "
        f"{row['stack_bytes']:5d} {row['spills']:6d} {row['shared_bytes']:5d} "
        f"{row['instructions']:5d}  {loops:>8s} {row['seconds']:7.2f}  {matrix}"
    )


def _bind(function: Callable[..., None], *args: Any, **kwargs: Any) -> Callable[[], None]:
    return lambda: function(*args, **kwargs)


def _short(dtype: torch.dtype) -> str:
    return {HALF: "fp16", torch.bfloat16: "bf16", FULL: "fp32"}[dtype]


def _empty_triton_cache() -> Any:
    from contextlib import ExitStack

    import triton

    stack = ExitStack()
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    stack.enter_context(triton.knobs.cache.scope())
    triton.knobs.cache.dir = folder
    return stack
