"""The scan on quantized operands by kernels: what the kernels that it replaces compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ouro_compiler.kernels.blocks import scan_blocks
from ouro_compiler.kernels.quantize import dequantize_dynamic_outlier
from ouro_compiler.kernels.scan import selective_scan
from ouro_compiler.kernels.scan_dynamic_outlier import selective_scan_dynamic_outlier
from ouro_compiler.ops.scan_dynamic_outlier import matrix, selective_scan_dynamic_outlier_ref
from tests.helpers import assert_close, assert_token_major
from tests.kernels.inputs import on
from tests.scan_dynamic_outlier_inputs import OPERANDS, dynamic_outlier_operands

pytestmark = pytest.mark.usefixtures("poisoned")
# (shape, states, options); channels that fill no block, states that are no power of two.
CASES: list[tuple[tuple[int, int, int], int, dict[str, Any]]] = [
    ((2, 16, 13), 16, {}),
    ((2, 20, 13), 5, {"groups": 2, "outlier_bits": 16, "reverse": True, "period": 4}),
    ((1, 40, 11), 1, {"asymmetric": False, "reverse": True, "dtype": torch.float16}),
    ((2, 33, 9), 3, {"bits": 8, "outlier_bits": 16, "period": 99}),
    ((1, 3, 257), 1, {"period": 257}),  # outlier_start is int32
]


@pytest.mark.parametrize("index", range(len(CASES)))
def test_scan_dynamic_outlier(index: int, device: str) -> None:
    shape, states, options = CASES[index]
    given = dynamic_outlier_operands(shape, states, **options)
    if index % 2:
        given |= {"D": None, "delta_bias": torch.linspace(-1, 1, shape[1])}
    else:
        given |= {"z": None}
    expected = selective_scan_dynamic_outlier_ref(*given.values())
    moved = {
        name: on(device, *one) if isinstance(one, list) else on(device, one)[0]
        for name, one in given.items()
    }
    blocks = (shape[1] // options.get("groups", 1), states, shape[2])
    found, other = (
        selective_scan_dynamic_outlier(*moved.values(), form=scan_blocks(*blocks, 1, count))
        for count in (index % 2 * 1000, 1000 - index % 2 * 1000)
    )
    assert torch.equal(found, other), "a GPU with more to do"
    assert_token_major(found)
    assert_close(found.cpu(), expected, 1e-5 if found.dtype == torch.float32 else 1e-3)

    static = tuple(moved.values())[-4:]
    delta, B, C = (dequantize_dynamic_outlier(*moved[name], *static) for name in OPERANDS)
    A, vectors = moved["A"], (moved["D"], moved["z"], moved["delta_bias"], True, static[3])
    operands = (delta.transpose(1, 2), A, matrix(B, A), matrix(C, A))
    assert torch.equal(found, selective_scan(moved["u"], *operands, *vectors))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("index", range(2))
def test_chunks_of_a_scan_dynamic_outlier(index: int, reverse: bool, device: str) -> None:
    """Windows of five tokens in chunks of four and six: the bits of the scan that it replaces."""
    states, groups, chunk, steps = ((1, 2, 4, 4), (3, 1, 6, 2))[index]
    options: dict[str, Any] = {"groups": groups, "reverse": reverse, "period": 5}
    given = dynamic_outlier_operands(
        (1, 5 * groups, 12), states, outlier_bits=16 if index else 8, **options
    )
    moved = {
        name: on(device, *one) if isinstance(one, list) else on(device, one)[0]
        for name, one in given.items()
    }
    static = tuple(moved.values())[-4:]
    delta, B, C = (dequantize_dynamic_outlier(*moved[name], *static) for name in OPERANDS)
    A, vectors = moved["A"], (moved["D"], moved["z"], None, True, reverse)
    operands = (delta.transpose(1, 2), A, matrix(B, A), matrix(C, A))
    form = {**scan_blocks(5, states, 12, 1, 0), "CHUNK": chunk, "STEPS": steps}
    expected = selective_scan(moved["u"], *operands, *vectors, form=form)
    assert_close(expected.cpu(), selective_scan_dynamic_outlier_ref(*given.values()), 1e-5)
    for split in (0, 1):
        found = selective_scan_dynamic_outlier(*moved.values(), form={**form, "SPLIT": split})
        assert torch.equal(found, expected)
