"""The merge of a map's orders with norm and quantizer: the ops that it fuses, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ouro_compiler.kernels.cpp import norm as cpp
from ouro_compiler.kernels.launch import record_launches
from ouro_compiler.ops.fused import cross_merge_norm_quantize_ref
from tests.helpers import REPEATABLE, assert_batch_invariant, assert_close, assert_opcheck, randn
from tests.kernels.inputs import assert_equal

pytestmark = pytest.mark.usefixtures("poisoned")
ouro = torch.ops.ouro
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# What floats may differ by, as a share of the largest: one rounding of the dtype.
ROUNDING = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
Static = tuple[int, int, int, bool]


def orders(
    shape: tuple[int, int, int], back: tuple[bool, bool] = (True, True), **options: Any
) -> list[Tensor | None]:
    """rows, rows_back, columns, columns_back (B, K, L), token-major, with an outlier channel."""
    batch, channels, length = shape
    found: list[Tensor | None] = []
    for seed, wanted in enumerate((True, back[0], True, back[1])):
        tokens = randn(seed, batch, length, channels)
        tokens[..., channels // 2] *= 6
        found.append(tokens.to(**options).transpose(1, 2) if wanted else None)
    return found


def vectors(length: int) -> tuple[Tensor, Tensor]:
    return torch.linspace(0.2, 0.3, length), torch.linspace(1.6, 2.4, length)


def by_pixel(found: list[Tensor | None], height: int, width: int) -> Tensor:
    """(B, L, K): an oracle of the sum, pixel by pixel."""
    rows, rows_back, columns, columns_back = found
    assert rows is not None
    assert columns is not None
    tokens = []
    for h in range(height):
        for w in range(width):
            along, across = h * width + w, w * height + h
            a, b = rows[:, :, along], columns[:, :, across]
            a = a if rows_back is None else a + rows_back[:, :, along]
            b = b if columns_back is None else b + columns_back[:, :, across]
            tokens.append(a + b)
    return torch.stack(tokens, 1)


@settings(REPEATABLE, max_examples=25)
@given(
    sides=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    channels=st.sampled_from([1, 5, 16, 37]),
    dtype=st.sampled_from(DTYPES),
    back=st.tuples(st.booleans(), st.booleans()),
    options=st.tuples(st.booleans(), st.booleans()),
    static=st.tuples(
        st.sampled_from([4, 8]), st.sampled_from([8, 16]), st.sampled_from([3, 10]), st.booleans()
    ),
)
def test_what_it_fuses(
    sides: tuple[int, int],
    channels: int,
    dtype: torch.dtype,
    back: tuple[bool, bool],
    options: tuple[bool, bool],
    static: Static,
) -> None:
    """The reference is made of references; C++ of its C++ norm and quantizer."""
    height, width = sides
    rms, has_bias = options
    found = orders((2, channels, height * width), back, dtype=dtype)
    weight = randn(7, channels)
    bias = randn(8, channels).half() if has_bias else None
    args = (weight, bias, 1e-5, rms)
    scale, threshold = vectors(height * width)
    merged = by_pixel(found, height, width).contiguous()
    for form, norm in (
        (cross_merge_norm_quantize_ref, ouro.add_norm),
        (cpp.cross_merge_norm_quantize, cpp.add_norm),
    ):
        got = form(*found, height, width, *args, scale, threshold, *static, True)
        if norm is cpp.add_norm:
            value = norm(merged, None, *args, True)[0]
            assert_equal(got[3:], (value,))
        assert_close(got[3], reference_norm(merged, *args), ROUNDING[dtype])
        codes = ouro.quantize_dynamic_outlier(got[3], scale, None, threshold, *static)
        assert_equal(got[:3], codes)
        silent = form(*found, height, width, *args, scale, threshold, *static, False)
        assert silent[3].shape == (0,)
        assert_equal(silent[:3], got[:3])


def reference_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool) -> Tensor:
    """In double, by hand."""
    wide = x.double()
    wide = wide if rms else wide - wide.mean(-1, keepdim=True)
    y = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    return (y if bias is None else y + bias).to(x.dtype)


def call(found: list[Any], length: int, reverse: bool = False) -> Any:
    batch_free = (3, length // 3, randn(7, found[0].shape[1]), None, 1e-5, False)
    return ouro.cross_merge_norm_quantize(
        *found, *batch_free, *vectors(length), 4, 8, 5, reverse, True
    )


def test_batch_invariance_and_threads() -> None:
    found = orders((3, 100, 60))
    assert_batch_invariant(lambda *each: call(list(each), 60), *found)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(call(found, 60))
    finally:
        torch.set_num_threads(before)
    assert_equal(*results)


def test_only_what_is_not_token_major_is_copied() -> None:
    found = orders((2, 9, 12))
    assert found[2] is not None
    args = (3, 4, torch.ones(9), None, 1e-5, False, *vectors(12), 4, 8, 5, False, False)
    with record_launches() as straight:
        cpp.cross_merge_norm_quantize(*found, *args)
    found[2] = found[2].contiguous()
    with record_launches() as turned:
        cpp.cross_merge_norm_quantize(*found, *args)
    assert straight.copies == []
    assert turned.copies == ["columns is copied: it is not contiguous"]


@pytest.mark.parametrize("back", [(True, True), (False, True), (False, False)])
def test_opcheck(back: tuple[bool, bool]) -> None:
    args = (3, 4, torch.ones(9), torch.ones(9), 1e-5, False, *vectors(12), 4, 8, 5, True)
    for emit in (False, True):
        found = orders((2, 9, 12), back)
        assert_opcheck(ouro.cross_merge_norm_quantize.default, (*found, *args, emit))


def test_refusals() -> None:
    found = orders((2, 9, 12))
    assert found[3] is not None
    rest = (torch.ones(9), None, 1e-5, False, *vectors(12), 4, 8, 5, False, False)
    op = ouro.cross_merge_norm_quantize
    with pytest.raises(ValueError, match=r"12 tokens are no map of 5 x 3"):
        op(*found, 5, 3, *rest)
    with pytest.raises(ValueError, match=r"orders must share one shape \(B, K, L\) and dtype"):
        op(*found[:3], found[3][:1], 3, 4, *rest)
    with pytest.raises(ValueError, match=r"orders must share one shape \(B, K, L\) and dtype"):
        op(*found[:3], found[3].half(), 3, 4, *rest)
    with pytest.raises(ValueError, match=r"weight must have shape \(9,\)"):
        op(*found, 3, 4, torch.ones(8), *rest[1:])
    with pytest.raises(ValueError, match=r"scales are per time step: expected \(12,\)"):
        op(*found, 3, 4, *rest[:4], *vectors(9), *rest[6:])
