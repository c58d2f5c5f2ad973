"""The scan on quantized operands in generated C++: bit for bit the dequantizers and the scan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given as examples
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from ouro_compiler.kernels.cpp.quantize import dequantize_dynamic_outlier
from ouro_compiler.kernels.cpp.scan import selective_scan
from ouro_compiler.kernels.cpp.scan_dynamic_outlier import (
    refuse_scan_dynamic_outlier,
    selective_scan_dynamic_outlier,
)
from ouro_compiler.kernels.launch import record_launches
from ouro_compiler.ops.scan_dynamic_outlier import matrix, selective_scan_dynamic_outlier_ref
from tests.helpers import assert_batch_invariant, assert_close
from tests.scan_dynamic_outlier_inputs import OPERANDS, dynamic_outlier_operands, in_turn


def apart(given: dict[str, Any]) -> Tensor:
    """The same by a kernel for each operand and one for the scan."""
    static = tuple(given.values())[-4:]
    delta, B, C = (dequantize_dynamic_outlier(*given[name], *static) for name in OPERANDS)
    operands = (delta.transpose(1, 2), given["A"], matrix(B, given["A"]), matrix(C, given["A"]))
    vectors = (given["D"], given["z"], given["delta_bias"])
    return selective_scan(given["u"], *operands, *vectors, given["delta_softplus"], static[3])


def check(given: dict[str, Any]) -> None:
    found = selective_scan_dynamic_outlier(*given.values())
    assert found.dtype == given["u"].dtype
    assert torch.equal(found, apart(given))
    tolerance = 1e-6 if found.dtype == torch.float32 else 8e-3
    assert_close(found, selective_scan_dynamic_outlier_ref(*given.values()), tolerance)


@pytest.mark.parametrize("outlier_bits", [8, 16])
@pytest.mark.parametrize(
    ("states", "groups", "reverse", "dtype"),
    [(16, 1, False, torch.float32), (1, 1, True, torch.float32), (5, 2, True, torch.bfloat16)],
)
def test_equals_the_kernels_that_it_replaces(
    states: int, groups: int, reverse: bool, dtype: torch.dtype, outlier_bits: int
) -> None:
    """197 tokens: tiles and windows end at different places; 38 channels fill no vector."""
    options = {"groups": groups, "dtype": dtype, "reverse": reverse, "outlier_bits": outlier_bits}
    check(dynamic_outlier_operands((2, 38, 197), states, **options))


@settings(max_examples=15, deadline=None, derandomize=True)
@examples(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 130)),
    groups=st.integers(1, 3),
    bits=st.sampled_from([4, 8]),
    outlier_bits=st.sampled_from([8, 16]),
    period=st.integers(1, 150),
    asymmetric=st.booleans(),
    reverse=st.booleans(),
    absent=st.sets(st.sampled_from(["D", "z"])),
    seed=st.integers(0, 5),
)
def test_every_combination(
    shape: tuple[int, int, int],
    groups: int,
    absent: set[str],
    **options: Any,
) -> None:
    batch, width, length = shape
    given = dynamic_outlier_operands((batch, width * groups, length), 5, groups=groups, **options)
    check({**given, **dict.fromkeys(absent)})


def test_windows_of_more_than_255_tokens() -> None:
    """outlier_start is int32 there."""
    check(dynamic_outlier_operands((1, 9, 300), 5, period=280, reverse=True))


def test_nothing_listed_and_everything_listed() -> None:
    for outlier_bits in (8, 16):
        given = dynamic_outlier_operands((2, 20, 40), 5, outlier_bits=outlier_bits)
        for start in (0, 255):
            for name in OPERANDS:
                given[name][4].fill_(start)
            check(given)


def test_bias_of_delta() -> None:
    given = dynamic_outlier_operands((2, 20, 40), 5)
    check({**given, "delta_bias": torch.linspace(-1, 1, 20), "delta_softplus": True})


def test_does_not_depend_on_threads_or_on_the_batch() -> None:
    given = dynamic_outlier_operands((3, 100, 70), 5, outlier_bits=16)
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(selective_scan_dynamic_outlier(*given.values()))
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    function, batched = in_turn(selective_scan_dynamic_outlier, given)
    assert_batch_invariant(function, *batched)


def test_what_it_copies_and_refuses() -> None:
    given = dynamic_outlier_operands((2, 8, 12), 3, outlier_bits=16)
    expected = selective_scan_dynamic_outlier(*given.values())
    B = list(given["B"])
    B[5] = B[5].transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(selective_scan_dynamic_outlier(*{**given, "B": B}.values()), expected)
    with record_launches() as recording:
        selective_scan_dynamic_outlier(*{**given, "B": B}.values())
    assert recording.copies == [
        "B's x is copied: its channels are not next to each other in memory"
    ]

    assert refuse_scan_dynamic_outlier(*given.values()) is None
    B[5] = B[5].half()
    reason = refuse_scan_dynamic_outlier(*{**given, "B": B}.values())
    assert reason == "the outliers of delta, B and C must share a dtype"
    C = list(given["C"])
    C[0] = C[0].int()
    reason = refuse_scan_dynamic_outlier(*{**given, "C": C}.values())
    assert reason is not None
    assert "int8 codes" in reason
