"""Quantizers and scans on maps of any strides: what they give on tokens one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ouro_compiler.kernels.cpp import quantize as cpp_quantize
from ouro_compiler.kernels.cpp import scan as cpp_scan
from ouro_compiler.kernels.cpp import scan_dynamic_outlier as cpp_codes
from ouro_compiler.kernels.launch import record_launches
from ouro_compiler.ops.quantize import quantize_dynamic_outlier_ref
from ouro_compiler.ops.scan_dynamic_outlier import (
    selective_scan_dynamic_outlier_implementation,
    selective_scan_dynamic_outlier_ref,
)
from ouro_compiler.ops.selective_scan import selective_scan_implementation, selective_scan_ref
from tests.helpers import REPEATABLE, assert_batch_invariant, assert_opcheck, randn
from tests.kernels.inputs import assert_equal
from tests.maps import LAYOUTS, columns, in_order, map_in
from tests.scan_dynamic_outlier_inputs import dynamic_outlier_operands

pytestmark = pytest.mark.usefixtures("poisoned")
ouro = torch.ops.ouro
shapes = st.tuples(
    st.integers(1, 2), st.sampled_from([1, 5, 19]), st.integers(1, 6), st.integers(1, 6)
)
maps = st.tuples(st.sampled_from(LAYOUTS), shapes, st.booleans())


def made(layout: tuple[int, ...], shape: tuple[int, int, int, int], turned: bool) -> Tensor:
    x = map_in(layout, shape)
    return columns(x) if turned else x


def quantizer(length: int, asymmetric: bool, reverse: bool) -> tuple[Any, ...]:
    scale = torch.linspace(0.2, 0.3, length)
    zero = torch.full((length,), 7, dtype=torch.uint8) if asymmetric else None
    return scale, zero, scale * 9, 4, 8, 5, reverse


@settings(REPEATABLE, max_examples=30)
@given(maps, st.booleans(), st.booleans())
def test_quantizers(found: Any, asymmetric: bool, reverse: bool) -> None:
    x = made(*found) * 2
    tokens = in_order(x).transpose(1, 2).contiguous()
    args = quantizer(tokens.shape[1], asymmetric, reverse)
    expected = quantize_dynamic_outlier_ref(tokens, *args)
    for form in (quantize_dynamic_outlier_ref, cpp_quantize.quantize_dynamic_outlier):
        assert_equal(form(x.movedim(1, -1), *args), expected)


def operands(u: Tensor, states: int, reverse: bool) -> dict[str, Any]:
    batch, channels, height, width = u.shape
    length = height * width
    return {
        "delta": randn(1, batch, length, channels).transpose(1, 2) - 1,
        "A": -randn(2, channels, states).abs(),
        "B": randn(3, batch, length, states).transpose(1, 2),
        "C": randn(4, batch, length, states).transpose(1, 2),
        "D": randn(5, channels),
        "z": randn(6, batch, length, channels).transpose(1, 2),
        "delta_bias": randn(7, channels),
        "delta_softplus": True,
        "reverse": reverse,
    }


@settings(REPEATABLE, max_examples=30)
@given(maps, st.sampled_from([1, 3]), st.booleans())
def test_scans(found: Any, states: int, reverse: bool) -> None:
    u = made(*found)
    given = operands(u, states, reverse)
    row = in_order(u).transpose(1, 2).contiguous().transpose(1, 2)
    for form in (selective_scan_ref, selective_scan_implementation, cpp_scan.selective_scan):
        assert torch.equal(form(u, **given), form(row, **given))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scans_over_several_tiles(layout: tuple[int, ...], reverse: bool) -> None:
    """Rows that begin and end inside a tile of 64 tokens, rows longer than one."""
    for sides in ((11, 13), (3, 70), (70, 2)):
        u = columns(map_in(layout, (2, 9, *sides)))
        given = operands(u, 2, reverse)
        expected = cpp_scan.selective_scan(in_order(u), **given)
        assert torch.equal(cpp_scan.selective_scan(u, **given), expected)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scans_on_codes(layout: tuple[int, ...], reverse: bool) -> None:
    given = dynamic_outlier_operands((2, 12, 15), 3, reverse=reverse)
    u = columns(map_in(layout, (2, 12, 5, 3)))
    row = in_order(u).transpose(1, 2).contiguous().transpose(1, 2)
    for form in (
        selective_scan_dynamic_outlier_ref,
        selective_scan_dynamic_outlier_implementation,
        cpp_codes.selective_scan_dynamic_outlier,
    ):
        expected = form(*{**given, "u": row}.values())
        assert torch.equal(form(*{**given, "u": u}.values()), expected)


def test_what_the_host_copies() -> None:
    """Nothing where channels lie next to each other, and one operand where they do not."""
    together, apart = (columns(map_in(layout, (2, 9, 4, 5))) for layout in ((1, 2, 0), (0, 1, 2)))
    for x, count in ((together, 0), (apart, 1)):
        with record_launches() as quantized:
            args = quantizer(20, False, False)
            cpp_quantize.quantize_dynamic_outlier(x.movedim(1, -1), *args)
        with record_launches() as scanned:
            cpp_scan.selective_scan(x, **operands(x, 1, False))
        assert [len(one.copies) for one in (quantized, scanned)] == [count, count]


def test_gradients() -> None:
    u = columns(map_in((1, 2, 0), (2, 3, 4, 2))).detach().requires_grad_()
    given = operands(u, 2, True)
    grad = randn(9, 2, 3, 8)
    ouro.selective_scan(u, **given).backward(grad)
    row = in_order(u.detach()).requires_grad_()
    selective_scan_ref(row, **given).backward(grad)
    assert u.grad is not None
    assert row.grad is not None
    torch.testing.assert_close(in_order(u.grad), row.grad, rtol=1e-5, atol=1e-6)


def test_opcheck() -> None:
    x = columns(map_in((1, 2, 0), (2, 6, 4, 3)))
    args = quantizer(12, True, True)
    assert_opcheck(ouro.quantize_dynamic_outlier.default, (x.movedim(1, -1), *args))
    assert_opcheck(
        ouro.selective_scan.default,
        (x.detach().requires_grad_(), *operands(x, 2, True).values()),
    )
    given = dynamic_outlier_operands((2, 6, 12), 3)
    args = tuple({**given, "u": x}.values())
    assert_opcheck(ouro.selective_scan_dynamic_outlier.default, args)


def test_batch_invariance() -> None:
    x = columns(map_in((1, 2, 0), (3, 20, 7, 5)))
    args = quantizer(35, False, True)
    assert_batch_invariant(
        lambda one: ouro.quantize_dynamic_outlier(one.movedim(1, -1), *args), x * 3
    )
    given = operands(x, 3, True)
    batched = [given.pop(name) for name in ("delta", "B", "C", "z")]

    def scan(u: Tensor, delta: Tensor, B: Tensor, C: Tensor, z: Tensor) -> Tensor:
        return ouro.selective_scan(u, **given, delta=delta, B=B, C=C, z=z)

    assert_batch_invariant(scan, x, *batched)


FORMS: dict[str, Callable[[], Any]] = {
    "scales of 12 tokens": lambda: ouro.quantize_dynamic_outlier(
        randn(0, 2, 3, 5, 4), *quantizer(12, False, False)
    ),
    "five dimensions": lambda: ouro.quantize_dynamic_outlier(
        randn(0, 2, 3, 5, 4, 1), *quantizer(15, False, False)
    ),
    "a static list": lambda: ouro.quantize_static_outlier(
        randn(0, 2, 3, 5, 4), torch.ones(15), None, torch.tensor([1]), 4, 8, 5, False
    ),
    "delta as a map": lambda: ouro.selective_scan(
        randn(0, 2, 4, 3, 5), randn(0, 2, 4, 3, 5), *([-torch.ones(4, 1)] * 3)
    ),
    "delta of other tokens": lambda: ouro.selective_scan(
        randn(0, 2, 4, 3, 5), randn(0, 2, 4, 12), *([-torch.ones(4, 1)] * 3)
    ),
}


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("scales of 12 tokens", r"expected \(15,\)"),
        ("five dimensions", r"x must be \(B, L, K\) or \(B, H, W, K\), got"),
        ("a static list", r"x must be \(B, L, K\), got \(2, 3, 5, 4\)"),
        ("delta as a map", r"share one shape \(B, D, L\)"),
        ("delta of other tokens", r"share one shape \(B, D, L\)"),
    ],
)
def test_refusals(name: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        FORMS[name]()
