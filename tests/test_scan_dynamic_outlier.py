"""selective_scan_dynamic_outlier: dequantizers and a scan, and the operands it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ouro_compiler.ops  # noqa: F401  (registers torch.ops.ouro)
from ouro_compiler.ops.scan_dynamic_outlier import selective_scan_dynamic_outlier_ref
from ouro_compiler.ops.selective_scan import selective_scan_ref
from tests.helpers import assert_close, assert_opcheck, assert_token_major
from tests.scan_dynamic_outlier_inputs import dynamic_outlier_operands

op = torch.ops.ouro.selective_scan_dynamic_outlier


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("groups", "outlier_bits", "asymmetric"), [(1, 8, True), (3, 8, False), (1, 16, True)]
)
def test_definition(groups: int, outlier_bits: int, asymmetric: bool, reverse: bool) -> None:
    """Written out with plain PyTorch: a value is listed from its channel's start in its window."""
    given = dynamic_outlier_operands(
        (2, 12, 23),
        4,
        groups=groups,
        outlier_bits=outlier_bits,
        asymmetric=asymmetric,
        reverse=reverse,
    )

    def value(name: str) -> torch.Tensor:
        codes, scale, zero, outlier_scale, start, x = given[name]
        found, count = torch.empty(codes.shape), 0
        for t in range(23):
            step = 22 - t if reverse else t
            listed = start[:, step // 10] <= step % 10
            count += int(listed.sum())
            shift = 8 - float(zero[t]) if zero is not None else 0.0
            outlier = x[:, t] if x is not None else codes[:, t] * outlier_scale[:, t, None]
            found[:, t] = torch.where(listed, outlier, (codes[:, t] + shift) * scale[t].float())
        assert 0.01 < count / codes.numel() < 0.9, "lists that are full or empty test nothing"
        return found

    matrices = (value(name).transpose(1, 2).unflatten(1, (groups, 4)) for name in ("B", "C"))
    rest = (given["D"], given["z"], None, True, reverse)
    expected = selective_scan_ref(
        given["u"], value("delta").transpose(1, 2), given["A"], *matrices, *rest
    )
    found = selective_scan_dynamic_outlier_ref(*given.values())
    assert torch.equal(found, expected)
    assert_token_major(found)
    assert_close(op(*given.values()), expected, 1e-6)


def test_opcheck() -> None:
    for outlier_bits in (8, 16):
        given = dynamic_outlier_operands((2, 6, 11), 3, outlier_bits=outlier_bits)
        assert_opcheck(op, tuple(given.values()))


def with_part(given: dict[str, Any], name: str, index: int, value: Any) -> dict[str, Any]:
    parts = list(given[name])
    parts[index] = value
    return {**given, name: parts}


@pytest.mark.parametrize(
    ("name", "index", "shape", "said"),
    [
        ("delta", 0, (2, 11, 5), "u, delta and z must share one shape"),
        ("B", 0, (2, 10, 3), "B's codes must be"),
        ("C", 1, (10,), "scales are per time step"),
        ("B", 3, (2, 10), "B's outlier_scale must be"),
        ("C", 4, (2, 1, 3), "C's outlier_start must be"),
        ("B", 5, None, "reads x"),
        ("delta", 3, None, "delta must be a list of codes, inlier_scale"),
    ],
)
def test_refusals(name: str, index: int, shape: Any, said: str) -> None:
    given = dynamic_outlier_operands((2, 6, 11), 3, outlier_bits=16)
    before = given[name][index]
    value = None if shape is None else before.new_zeros(shape)
    wrong = with_part(given, name, index, value)
    if name == "delta" and index == 0:
        wrong = with_part(wrong, name, 4, before.new_zeros((2, 2, 5), dtype=torch.uint8))
        wrong = with_part(wrong, name, 5, torch.zeros(shape))
    if name == "B" and index == 0:
        wrong = with_part(wrong, name, 1, torch.ones(10))
    with pytest.raises(ValueError, match=said):
        selective_scan_dynamic_outlier_ref(*wrong.values())


def test_states_that_do_not_divide_the_columns_are_refused() -> None:
    given = dynamic_outlier_operands((2, 6, 11), 3)
    with pytest.raises(ValueError, match="B must be"):
        selective_scan_dynamic_outlier_ref(*{**given, "A": -torch.ones(6, 2)}.values())
    wider = dynamic_outlier_operands((2, 6, 11), 3, groups=2)
    with pytest.raises(ValueError, match="same number of groups"):
        selective_scan_dynamic_outlier_ref(*{**given, "C": wider["C"]}.values())
