"""Quantizers in generated C++: codes, lists and scales are the references' bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ouro_compiler.kernels.cpp import quantize as kernels
from ouro_compiler.ops.linear import dequantize_weight_ref
from ouro_compiler.ops.packing import pack_int4_ref
from ouro_compiler.ops.quantize import (
    dequantize_dynamic_outlier_ref,
    listed_mask,
    quantize_dynamic_outlier_ref,
    quantize_static_outlier_ref,
)
from tests.helpers import REPEATABLE, assert_batch_invariant, generator, randn
from tests.kernels.inputs import SHAPES, activation, assert_equal

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Any, ...]:
    """Operands of quantize_dynamic_outlier: ties, zeros, thresholds below and beyond the range."""
    batch, length, columns = draw(
        st.sampled_from([(1, 1, 5), (2, 7, 16), (3, 23, 37), (1, 12, 130), (2, 9, 64)])
    )
    inlier_bits, outlier_bits = draw(st.integers(2, 8)), draw(st.sampled_from([2, 5, 8, 16]))
    made = generator(draw(st.integers(0, 2**31)))
    scale = 2.0 ** torch.randint(-3, 3, (length,), generator=made)
    if draw(st.booleans()):
        scale = scale * (0.5 + torch.rand(length, generator=made))
    steps = torch.randn(batch, length, columns, generator=made) * 2 ** (inlier_bits - 2)
    if draw(st.booleans()):  # halves of a step: ties, and values on a limit
        steps = steps.mul(2).round().div(2)
    heavy = torch.rand(steps.shape, generator=made) < draw(st.sampled_from([0.0, 0.02, 0.3, 1.0]))
    x = torch.where(heavy, 30 * steps, steps) * scale[:, None]
    threshold = scale * 2 ** (inlier_bits - 1) * draw(st.sampled_from([0.0, 0.5, 1.0, 2.0, 1e9]))
    zero = None
    if draw(st.booleans()):
        zero = torch.randint(0, 2**inlier_bits, (length,), generator=made)
        zero = zero.to(draw(st.sampled_from([torch.uint8, torch.int32, torch.float16])))
    stored = draw(st.sampled_from(DTYPES))
    period, reverse = draw(st.sampled_from([1, 3, 10, 400])), draw(st.booleans())
    vectors = (scale.to(stored), zero, threshold.to(stored))
    return (
        x.to(draw(st.sampled_from(DTYPES))),
        *vectors,
        inlier_bits,
        outlier_bits,
        period,
        reverse,
    )


@REPEATABLE
@given(problems())
def test_quantize_equals_the_reference(args: tuple[Any, ...]) -> None:
    assert_equal(kernels.quantize_dynamic_outlier(*args), quantize_dynamic_outlier_ref(*args))


@REPEATABLE
@given(problems(), st.booleans())
def test_dequantize_equals_the_reference(args: tuple[Any, ...], spare: bool) -> None:
    """With x only where it is read, or always."""
    x, scale, zero, _, bits, outlier_bits, *windows = args
    quantized = quantize_dynamic_outlier_ref(*args)
    kept = x if outlier_bits == 16 or spare else None
    back = (quantized[0], scale, zero, *quantized[1:], kept, bits, outlier_bits, *windows)
    assert_equal(
        (kernels.dequantize_dynamic_outlier(*back),), (dequantize_dynamic_outlier_ref(*back),)
    )


@REPEATABLE
@given(problems(), st.lists(st.integers(-5, 4), max_size=4))
def test_fixed_lists(args: tuple[Any, ...], channels: list[int]) -> None:
    x, scale, zero, _, *static = args
    args = (x.float(), scale, zero, torch.tensor(channels, dtype=torch.int64), *static)
    assert_equal(kernels.quantize_static_outlier(*args), quantize_static_outlier_ref(*args))


def test_a_channel_that_is_not_there_is_refused() -> None:
    x, scale, _ = activation(0, (1, 4, 8), 0)
    with pytest.raises(IndexError):
        kernels.quantize_static_outlier(x, scale, None, torch.tensor([8]), 4, 8, 10, False)


@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_outliers_that_enter_at_different_tokens(index: int) -> None:
    *shape, outliers = SHAPES[index]
    static = (
        (4, 6, 8)[index % 3],
        (8, 16)[index // 2 % 2],
        (10, 3, 400)[index % 3],
        index % 2 == 1,
    )
    x, scale, threshold = activation(index, tuple(shape), outliers, static[0])  # type: ignore[arg-type]
    args = (x, scale, None, threshold, *static)
    expected = quantize_dynamic_outlier_ref(*args)
    listed = listed_mask(expected[2], shape[1], *static[2:]).any(1).sum(1)
    assert bool((listed >= (shape[2] if outliers == "all" else int(outliers))).all())
    assert_equal(kernels.quantize_dynamic_outlier(*args), expected)


def test_windows_longer_than_a_byte_holds() -> None:
    x, scale, threshold = activation(2, (2, 300, 8), 2)
    args = (x, scale, None, threshold, 4, 8, 1000, False)
    found, expected = kernels.quantize_dynamic_outlier(*args), quantize_dynamic_outlier_ref(*args)
    assert expected[2].dtype == torch.int32
    assert_equal(found, expected)
    back = (found[0], scale, None, *found[1:], None, 4, 8, 1000, False)
    assert_equal(
        (kernels.dequantize_dynamic_outlier(*back),), (dequantize_dynamic_outlier_ref(*back),)
    )
    fixed = (x, scale, None, torch.tensor([1, 3]), 4, 8, 1000, True)
    assert_equal(kernels.quantize_static_outlier(*fixed), quantize_static_outlier_ref(*fixed))


@pytest.mark.parametrize("limit", [1e32, 1.0])
@pytest.mark.parametrize(
    "value", [0.5, 1.5, 2.5, -0.5, -2.5, 127.5, 1e30, -1e30, 1e-30, 0.0, float("inf")]
)
def test_rounding_of_ties_and_extremes(value: float, limit: float) -> None:
    x = torch.full((1, 2, 11), value)
    for zero in (None, torch.tensor([3, 250], dtype=torch.uint8)):
        args = (x, torch.ones(2), zero, torch.full((2,), limit), 8, 8, 10, False)
        assert_equal(kernels.quantize_dynamic_outlier(*args), quantize_dynamic_outlier_ref(*args))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero", [None, 100.0, 300.0, 7.5])
def test_rounding_next_to_the_middle_of_two_codes(bits: int, zero: float | None) -> None:
    """Where a product with the inverse of a scale, instead of a quotient, gives other codes."""
    length, top = 64, 2 ** (bits - 1)
    scale = torch.rand(length, generator=generator(bits)) + 1e-3
    scale[0], scale[1], scale[2] = 1e-38, 1e35, 1e-8
    middle = (torch.arange(-top - 2, top + 2) + 0.5) * scale[:, None]
    below, above = (middle.nextafter(torch.tensor(to)) for to in (float("-inf"), float("inf")))
    x = torch.cat([below, middle, above, above.nextafter(torch.tensor(float("inf")))], 1)[None]
    assert (x / scale[:, None] != x * (1 / scale)[:, None]).float().mean() > 0.1
    point = None if zero is None else torch.full((length,), zero)
    for threshold in (scale * 1e3, scale * 3):  # nothing is listed, or much
        args = (x, scale, point, threshold, bits, 8, 10, False)
        assert_equal(kernels.quantize_dynamic_outlier(*args), quantize_dynamic_outlier_ref(*args))


@pytest.mark.parametrize("layout", ["slice", "transposed", "expanded"])
def test_any_strides(layout: str) -> None:
    """As x_proj's B and C: rows are slices, neither contiguous nor aligned."""
    whole = randn(5, 2, 11, 44)
    x = {
        "slice": whole[:, :, 13:29],
        "transposed": whole.transpose(1, 2),
        "expanded": whole[:, :1].expand(2, 11, 44),
    }[layout]
    length = x.shape[1]
    vectors = (torch.full((2 * length,), 0.2)[::2], None, torch.full((length,), 2.0))
    args = (x, *vectors, 4, 16, 10, True)
    found, expected = kernels.quantize_dynamic_outlier(*args), quantize_dynamic_outlier_ref(*args)
    assert_equal(found, expected)
    back = (found[0].mT.contiguous().mT, *vectors[:2], *found[1:], x, *args[4:])
    assert_equal(
        (kernels.dequantize_dynamic_outlier(*back),), (dequantize_dynamic_outlier_ref(*back),)
    )


@pytest.mark.parametrize("columns", [1, 6, 7, 33])
@pytest.mark.parametrize("zero_dtype", [None, torch.uint8, torch.float16])
@pytest.mark.parametrize("packed", [False, True])
def test_weights(packed: bool, zero_dtype: torch.dtype | None, columns: int) -> None:
    codes = torch.randint(-8, 8, (5, columns), generator=generator(columns)).to(torch.int8)
    for size in (1, 5):
        scale = randn(size, size).abs().half()
        zero = None if zero_dtype is None else torch.arange(size).to(zero_dtype)
        args = (pack_int4_ref(codes) if packed else codes, scale, zero, 4, columns)
        assert_equal((kernels.dequantize_weight(*args),), (dequantize_weight_ref(*args),))
    with pytest.raises(ValueError, match="qweight has"):
        kernels.dequantize_weight(args[0], torch.ones(5), None, 4, columns + 2)
    with pytest.raises(ValueError, match="must be"):
        kernels.dequantize_weight(args[0], torch.ones(4), None, 4, columns)


def test_neither_threads_nor_other_samples_matter() -> None:
    """Enough work for two threads."""
    x, scale, threshold = activation(8, (3, 60, 384), 2)
    static = (4, 8, 10, False)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            codes = kernels.quantize_dynamic_outlier(x, scale, None, threshold, *static)
            back = kernels.dequantize_dynamic_outlier(
                codes[0], scale, None, *codes[1:], None, *static
            )
            results.append((*codes, back))
    finally:
        torch.set_num_threads(before)
    assert_equal(*results)
    assert_batch_invariant(
        lambda x: kernels.quantize_dynamic_outlier(x, scale, None, threshold, *static), x
    )


def test_what_does_not_fit_is_refused() -> None:
    """A kernel reads as far as these sizes say."""
    x, scale, threshold = activation(3, (2, 11, 24), 1)
    static = (4, 8, 10, False)
    quantize = kernels.quantize_dynamic_outlier
    for bits in ((1, 8, 10, False), (9, 8, 10, False), (4, 12, 10, False), (4, 8, 0, False)):
        with pytest.raises(ValueError, match="quantize_dynamic_outlier"):
            quantize(x, scale, None, threshold, *bits)
    for vectors in ((scale[1:], None, threshold), (scale, None, threshold[:1])):
        with pytest.raises(ValueError, match="per time step"):
            quantize(x, *vectors, *static)
    codes, dynamic, start = quantize(x, scale, None, threshold, *static)
    wrong: list[tuple[Tensor, Tensor]] = [
        (dynamic, start[:, :1]),
        (dynamic, start[..., :3]),
        (dynamic, start.int()),
        (dynamic[:, 1:], start),
    ]
    for scales, starts in wrong:
        with pytest.raises(ValueError, match="must be"):
            kernels.dequantize_dynamic_outlier(codes, scale, None, scales, starts, None, *static)


def test_dtypes_without_a_kernel() -> None:
    x, scale, threshold = activation(3, (2, 11, 24), 1)
    assert kernels.refuse_quantize(x, scale, None, threshold) is None
    for args in (
        (x.double(), scale, None, threshold),
        (x, scale.double(), None, threshold),
        (x, scale, torch.zeros(11, dtype=torch.int64), threshold),
    ):
        assert "kernels take" in str(kernels.refuse_quantize(*args))
    assert "int8 codes" in str(kernels.refuse_weight(torch.zeros(2, 2), scale, None))
