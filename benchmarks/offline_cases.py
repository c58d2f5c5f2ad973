"""Launches of every kernel, recorded without a GPU: the cases of suite "offline" and of tests.

Shapes are those of Vim-T, S and B at 224 x 224 (197 tokens), of VMamba's scan (one state) and maps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ouro_compiler.kernels import (
    cross_merge,
    depthwise_conv,
    linear,
    norm,
    quantize,
    quantized_scan,
    scan,
    scan_dynamic_outlier,
)
from ouro_compiler.kernels.candidates import as_choice, current_choice
from ouro_compiler.kernels.grouping import join
from ouro_compiler.kernels.launch import Launch, record_launches
from ouro_compiler.kernels.quantizing_linear import quantizing_linear
from ouro_compiler.kernels.retile import retile

BATCH, LENGTH, PERIOD = 32, 197, 10
SIDE = 14  # of a map, in tokens
WINDOWS = -(-LENGTH // PERIOD)
HALF, FULL = torch.float16, torch.float32
SHORT = {HALF: "fp16", torch.bfloat16: "bf16", FULL: "fp32"}


def _tokens(
    channels: int, dtype: torch.dtype = HALF, batch: int = BATCH, length: int = LENGTH
) -> Tensor:
    """(B, D, L), memory as (B, L, D)."""
    return torch.empty(batch, length, channels, dtype=dtype).transpose(1, 2)


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
    batch: int = BATCH,
    length: int = LENGTH,
) -> None:
    """Launch a scan; `whole` adds softplus, delta's bias and the gate."""
    matrices = [
        torch.empty(batch, length, groups * states).transpose(1, 2).unflatten(1, (groups, states))
        for _ in range(2)
    ]
    scan.selective_scan(
        _tokens(channels, dtype, batch, length),
        _tokens(channels, dtype, batch, length),
        torch.empty(channels, states),
        *matrices,
        torch.empty(channels),
        _tokens(channels, dtype, batch, length) if whole else None,
        torch.empty(channels) if whole else None,
        whole,
        reverse,
    )


def scan_dynamic_outlier_case(
    channels: int,
    states: int,
    *,
    outlier_bits: int = 8,
    whole: bool = False,
    batch: int = BATCH,
    length: int = LENGTH,
) -> None:
    """Launch a scan on quantized operands; `whole` adds softplus, delta's bias and the gate."""

    def operand(columns: int, zero: bool) -> list[Tensor | None]:
        return [
            torch.empty(batch, length, columns, dtype=torch.int8),
            torch.empty(length, dtype=HALF),
            torch.empty(length, dtype=torch.uint8) if zero else None,
            torch.empty(batch, length),
            torch.empty(batch, -(-length // PERIOD), columns, dtype=torch.uint8),
            torch.empty(batch, length, columns) if outlier_bits == 16 else None,
        ]

    scan_dynamic_outlier.selective_scan_dynamic_outlier(
        *(
            _tokens(channels, FULL, batch, length),
            operand(channels, True),
            torch.empty(channels, states),
        ),
        *(operand(states, False), operand(states, False), torch.empty(channels)),
        _tokens(channels, FULL, batch, length) if whole else None,
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
    norm = (vector, None, 1e-5, True, True)
    quantize.add_norm_quantize(x, x, *norm, *_scales(), *static, emit=False)
    taps = torch.empty(channels, 4)
    quantize.causal_conv1d_quantize(_tokens(channels), taps, vector, True, *_scales(), *static)
    tokens = [_tokens(channels) for _ in range(3)]
    quantize.gate_sum_quantize(*tokens, 0.5, *_scales(), *static, emit=False)


def map_cases(channels: int) -> None:
    """Launch what reads a map column by column: quantizer, scan of one state, merge with norm."""
    pixels = torch.empty(BATCH, SIDE, SIDE, channels).transpose(1, 2)
    orders = [torch.empty(BATCH, SIDE * SIDE, channels).transpose(1, 2) for _ in range(4)]
    scale, threshold = (torch.empty(SIDE * SIDE, dtype=HALF) for _ in range(2))
    state, vector = torch.empty(BATCH, 1, SIDE * SIDE), torch.empty(channels)
    static = (4, 8, PERIOD, False)
    quantize.quantize_dynamic_outlier(pixels, scale, None, threshold, *static)
    operands = (orders[0], torch.empty(channels, 1), state, state, vector)
    scan.selective_scan(pixels.movedim(-1, 1), *operands, None, None, True)
    norm = (SIDE, SIDE, vector, vector, 1e-5, False, scale, threshold, *static, False)
    cross_merge.cross_merge_norm_quantize(*orders, *norm)


def norm_case(channels: int) -> None:
    """Launch residual addition and layer norm alone."""
    x = torch.empty(BATCH, LENGTH, channels)
    norm.add_norm(x, x, torch.empty(channels), torch.empty(channels), 1e-5, False, True)


def conv_case(channels: int) -> None:
    """Launch the convolution alone."""
    scan.causal_conv1d(_tokens(channels), torch.empty(channels, 4), torch.empty(channels), True)


def depthwise_case(channels: int, *places: int) -> None:
    """Launch a depthwise convolution of three taps a side, with SiLU, on tokens or maps."""
    x = torch.empty(BATCH, *places, channels).movedim(-1, 1)
    weight = torch.empty(channels, 1, *(3,) * len(places))
    depthwise_conv.depthwise_conv(x, weight, torch.empty(channels), True)


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
            yield f"scan N={states} {SHORT[dtype]}", _bind(scan_case, 384, states, dtype=dtype)
    yield "scan N=16 gate, softplus", _bind(scan_case, 384, 16, whole=True)
    yield "scan N=16 reverse", _bind(scan_case, 384, 16, reverse=True)
    for dtype in (HALF, FULL):
        small = {"dtype": dtype, "batch": 1}
        yield f"scan N=16 {SHORT[dtype]} batch 1", _bind(scan_case, 384, 16, **small)
    yield "scan N=8 fp32 batch 1", _bind(scan_case, 384, 8, dtype=FULL, batch=1)
    for batch in (1, BATCH):
        chunks = {"dtype": FULL, "length": 3136, "batch": batch}
        yield f"scan N=1 in chunks batch {batch}", _bind(scan_case, 96, 1, **chunks)
    yield "scan N=1 4 groups", _bind(scan_case, 384, 1, groups=4)
    for states in (16, 8, 1):
        yield f"scan N={states} on codes", _bind(scan_dynamic_outlier_case, 384, states)
    yield "scan N=16 on codes batch 1", _bind(scan_dynamic_outlier_case, 384, 16, batch=1)
    codes = {"length": 3136, "batch": 1}
    yield "scan N=1 codes in chunks", _bind(scan_dynamic_outlier_case, 96, 1, **codes)
    yield "scan N=16 codes, fp", _bind(scan_dynamic_outlier_case, 384, 16, outlier_bits=16)
    yield "scan N=16 codes, whole", _bind(scan_dynamic_outlier_case, 384, 16, whole=True)
    for states in (16, 8, 1):
        yield f"scan N={states} quantized", _bind(quantized_scan_case, 384, states)
    yield "scan N=16 log2", _bind(quantized_scan_case, 384, 16, logarithmic=True)
    yield "scan N=16 fp outliers", _bind(quantized_scan_case, 384, 16, outlier_bits=16)
    for channels in (192, 384, 768, 1536):
        yield f"K={channels}", _bind(quantizer_cases, channels)
    for channels in (96, 768):
        yield f"map K={channels}", _bind(map_cases, channels)
    yield "conv", _bind(conv_case, 384)
    for channels in (96, 768):
        yield f"norm K={channels}", _bind(norm_case, channels)
    yield "conv VMamba-T", _bind(depthwise_case, 96, 56, 56)
    yield "conv MambaVision-T", _bind(depthwise_case, 160, 196)


def group_cases() -> Iterator[tuple[str, Launch]]:
    """Groups as a layer of Vim-T has them: both directions, and the quantizers of dt, B and C.

    And dt_proj with its own quantizer, as a layer has it.
    """
    for name, run in (
        ("x_proj, both directions", _bind(linear_case, 384, 44, packed=True, outlier_bits=8)),
        ("dt_proj, both directions", _bind(linear_case, 12, 384, packed=True, outlier_bits=8)),
        ("scan, both directions", _bind(scan_case, 384, 16)),
        ("scan, both directions b1", _bind(scan_case, 384, 16, batch=1)),
    ):
        (launch,) = recorded(run)
        yield name, join([launch, other_direction(launch)])
    convolution = recorded(_bind(quantizer_cases, 384))[4]
    yield "conv, both directions", join([convolution, other_direction(convolution)])
    widths = [recorded(_bind(quantizer_cases, channels))[0] for channels in (12, 16, 16)]
    yield "dt, B, C, both directions", join([*widths, *map(other_direction, widths)])
    for name, inputs, outputs in (("T", 12, 384), ("S", 24, 768), ("B", 48, 1536)):
        chained = chain_case(inputs, outputs)
        yield f"Vim-{name} dt_proj", chained
        yield f"Vim-{name} dt_proj, both", join([chained, other_direction(chained)])


def chain_case(inputs: int, outputs: int) -> Launch:
    """A quantizer of few features and dt_proj behind it as one launch; fp16, 4-bit weights."""
    static = (4, 8, PERIOD, False)
    with FakeTensorMode(), record_launches() as recording:
        x = torch.empty(BATCH, LENGTH, inputs, dtype=HALF)
        scale, threshold = _scales()
        codes, outlier, start = quantize.quantize_dynamic_outlier(
            x, scale, None, threshold, *static
        )
        linear.linear_dynamic_outlier(
            *(codes, scale, outlier, start, None),
            torch.empty(outputs, (inputs + 1) // 2, dtype=torch.uint8),
            *(torch.empty(outputs, dtype=HALF) for _ in range(2)),
            *(None, "softplus", *static),
            dtype=HALF,
        )
    chained = quantizing_linear(*recording.launches, lambda one, other: one is other)
    assert chained is not None
    return chained


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


def _bind(function: Callable[..., None], *args: Any, **kwargs: Any) -> Callable[[], None]:
    return lambda: function(*args, **kwargs)
