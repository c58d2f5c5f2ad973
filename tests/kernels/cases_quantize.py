"""Quantizing and dequantizing kernels against their references: codes bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ouro_compiler.kernels import norm
from ouro_compiler.kernels import quantize as kernels
from ouro_compiler.ops import fused
from ouro_compiler.ops.norm import add_norm_ref
from ouro_compiler.ops.quantize import (
    dequantize_dynamic_outlier_ref,
    listed_mask,
    quantize_dynamic_outlier_ref,
)
from tests.helpers import assert_close, generator, randn
from tests.kernels.inputs import SHAPES, activation, assert_equal, on

pytestmark = pytest.mark.usefixtures("poisoned")
ONCE_IS_ENOUGH = 16  # 591 tokens: interpreted for the quantizer alone
FUSED = [index for index in range(len(SHAPES)) if index != ONCE_IS_ENOUGH]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# What floats may differ by, as a share of the largest: one rounding of the dtype.
ROUNDING = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def static(index: int) -> tuple[int, int, int, bool]:
    """(inlier bits, outlier bits, refresh period, reverse), a different one for each case."""
    return ((4, 6, 8)[index % 3], (8, 16)[index // 2 % 2], (10, 3, 400)[index % 3], index % 2 == 1)


@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_quantize(index: int, device: str) -> None:
    *shape, outliers = SHAPES[index]
    ints = static(index)
    x, scale, threshold = activation(index, tuple(shape), outliers, ints[0])  # type: ignore[arg-type]
    x = x.to(DTYPES[index % 3])
    expected = quantize_dynamic_outlier_ref(x, scale, None, threshold, *ints)
    listed = listed_mask(expected[2], shape[1], *ints[2:]).any(1).sum(1)
    assert outliers == "all" or bool((listed >= int(outliers)).all())
    assert outliers != "all" or bool((listed == shape[2]).all())
    assert_equal(
        kernels.quantize_dynamic_outlier(*on(device, x, scale, None, threshold), *ints), expected
    )


@pytest.mark.parametrize("index", range(0, len(SHAPES), 2))
def test_quantize_asymmetric(index: int, device: str) -> None:
    *shape, outliers = SHAPES[index]
    bits, outlier_bits, period, reverse = static(index)
    x, scale, threshold = activation(index, tuple(shape), outliers, bits)  # type: ignore[arg-type]
    zero = torch.randint(0, 2**bits, (shape[1],), generator=generator(index)).to(torch.uint8)
    args = (x - 0.7, scale.half(), zero, threshold, bits, outlier_bits, period, reverse)
    assert_equal(
        kernels.quantize_dynamic_outlier(*on(device, *args)), quantize_dynamic_outlier_ref(*args)
    )


def test_quantize_rows_of_a_wider_tensor(device: str) -> None:
    """As x_proj's B and C: rows are slices, neither contiguous nor aligned."""
    whole = randn(5, 2, 11, 44)
    x = whole[:, :, 12:28]
    scale, threshold = torch.full((11,), 0.2), torch.full((11,), 2.0)
    args = (scale, None, threshold, 4, 8, 10, True)
    moved = whole.to(device)[:, :, 12:28]
    assert not moved.is_contiguous()
    assert_equal(
        kernels.quantize_dynamic_outlier(moved, *on(device, *args)),
        quantize_dynamic_outlier_ref(x, *args),
    )


def test_windows_longer_than_a_byte_holds(device: str) -> None:
    x, scale, threshold = activation(2, (1, 300, 8), 2)
    args = (x, scale, None, threshold, 4, 8, 1000, False)
    expected = quantize_dynamic_outlier_ref(*args)
    assert expected[2].dtype == torch.int32
    found = kernels.quantize_dynamic_outlier(*on(device, *args))
    assert_equal(found, expected)
    ints = args[4:]
    back = kernels.dequantize_dynamic_outlier(
        *found[:1], *on(device, scale, None), *found[1:], None, *ints
    )
    quantized = (expected[0], scale, None, *expected[1:], None, *ints)
    assert_equal((back,), (dequantize_dynamic_outlier_ref(*quantized),))


@pytest.mark.parametrize("value", [0.5, 1.5, 2.5, -0.5, -2.5, 1e30, -1e30, 1e-30, 0.0])
def test_rounding_of_ties_and_extremes(value: float, device: str) -> None:
    x = torch.full((1, 2, 8), value)
    args = (x, torch.ones(2), None, torch.full((2,), 1e32), 8, 8, 10, False)
    assert_equal(
        kernels.quantize_dynamic_outlier(*on(device, *args)), quantize_dynamic_outlier_ref(*args)
    )


@pytest.mark.parametrize("index", range(1, len(SHAPES), 2))
def test_dequantize(index: int, device: str) -> None:
    *shape, outliers = SHAPES[index]
    bits, outlier_bits, period, reverse = static(index)
    x, scale, threshold = activation(index, tuple(shape), outliers, bits)  # type: ignore[arg-type]
    zero = None
    if index % 4 == 1:
        zero = torch.randint(0, 2**bits, (shape[1],), generator=generator(index)).to(torch.uint8)
    ints = (bits, outlier_bits, period, reverse)
    quantized = quantize_dynamic_outlier_ref(x, scale, zero, threshold, *ints)
    kept = x.half() if outlier_bits == 16 else None
    args = (quantized[0], scale, zero, *quantized[1:], kept, *ints)
    assert_equal(
        (kernels.dequantize_dynamic_outlier(*on(device, *args)),),
        (dequantize_dynamic_outlier_ref(*args),),
    )


# --- fused: the values by tolerance, the codes exactly those of the values


def assert_fused(
    found: tuple[Tensor, ...],
    expected: tuple[Tensor, ...],
    tokens: Tensor,
    scale: Tensor,
    threshold: Tensor,
    ints: tuple[int, int, int, bool],
) -> None:
    """codes, scales and lists of `tokens` (B, L, K), the values that the kernel emitted."""
    codes = quantize_dynamic_outlier_ref(tokens.cpu(), scale, None, threshold, *ints)
    assert_equal(found[:3], codes)
    for ours, theirs in zip(found[3:], expected[3:], strict=True):
        if min(theirs.shape) > 1:  # the stride of one element is free
            assert ours.stride() == theirs.stride()
        assert_close(ours.cpu(), theirs.to(ours.dtype), ROUNDING[ours.dtype])


def in_channels_first(tokens: Tensor) -> Tensor:
    """The same (B, L, K), as a flattened map (B, K, H, W) is seen."""
    return tokens.mT.contiguous().mT


@pytest.mark.parametrize("index", range(0, len(SHAPES), 3))
def test_add_norm(index: int, device: str) -> None:
    """Rows as vectors, tokens and maps, of any strides."""
    *shape, _ = SHAPES[index]
    x, residual = randn(index, *shape).to(DTYPES[index % 2]), randn(index + 1, *shape)
    weight, bias = randn(1, shape[2]), randn(2, shape[2]) if index % 2 else None
    front = [x, residual if index % 4 else None]
    if index % 6 == 0:
        front = [None if one is None else in_channels_first(one) for one in front]
    elif index == 9:
        front = [None if one is None else one.unflatten(1, (5, 2)) for one in front]
    args = (*front, weight, bias, 1e-5, index % 2 == 1, index % 4 < 2)
    for ours, theirs in zip(norm.add_norm(*on(device, *args)), add_norm_ref(*args), strict=True):
        assert ours.is_contiguous()
        assert_close(ours.cpu(), theirs, ROUNDING[theirs.dtype])


@pytest.mark.parametrize("index", FUSED)
def test_add_norm_quantize(index: int, device: str) -> None:
    *shape, outliers = SHAPES[index]
    ints = static(index)
    x, scale, threshold = activation(index, tuple(shape), outliers, ints[0])  # type: ignore[arg-type]
    x = x.to(DTYPES[index % 3])
    residual = randn(index + 100, *shape) if index % 3 else None
    rms = index % 2 == 0
    weight, bias = randn(1, shape[2]), None if rms else randn(2, shape[2])
    x = in_channels_first(x) if index % 5 == 1 else x
    if residual is not None and index % 5 == 2:
        residual = in_channels_first(residual)
    front = (x, residual, weight, bias, 1e-5, rms, index % 4 < 2)
    args = (*front, scale, threshold, *ints, True)
    found = kernels.add_norm_quantize(*on(device, *args))
    assert_fused(found, fused.add_norm_quantize_ref(*args), found[3], scale, threshold, ints)


@pytest.mark.parametrize("index", FUSED)
def test_causal_conv1d_quantize(index: int, device: str) -> None:
    *shape, outliers = SHAPES[index]
    ints = static(index)
    x, scale, threshold = activation(index, tuple(shape), outliers, ints[0])  # type: ignore[arg-type]
    x = x.to(DTYPES[index % 3]).transpose(1, 2)
    if index % 4 == 3:
        x = x.contiguous()
    weight = randn(3, shape[2], 4 if index % 5 else 2)
    bias = randn(4, shape[2]) if index % 2 else None
    args = (x, weight, bias, index % 3 != 1, scale, threshold, *ints)
    found = kernels.causal_conv1d_quantize(*on(device, *args))
    assert found[3].dtype == x.dtype
    expected = fused.causal_conv1d_quantize_ref(x.float(), *args[1:])  # rounded once, as here
    assert_fused(found, expected, found[3].transpose(1, 2), scale, threshold, ints)


@pytest.mark.parametrize("index", FUSED)
def test_gate_sum_quantize(index: int, device: str) -> None:
    *shape, outliers = SHAPES[index]
    ints = static(index)
    tokens, scale, threshold = activation(index, tuple(shape), outliers, ints[0])  # type: ignore[arg-type]
    dtype = DTYPES[index % 3]
    y = tokens.to(dtype).transpose(1, 2)
    other = randn(index + 1, *y.shape).to(dtype) if index % 3 else None
    z = randn(index + 2, *shape).to(dtype).transpose(1, 2) if index % 4 else None
    args = (y, other, z, 0.5, scale, threshold, *ints, True)
    found = kernels.gate_sum_quantize(*on(device, *args))
    expected = fused.gate_sum_quantize_ref(*args)
    assert_fused(found, expected, found[3], scale, threshold, ints)


def test_values_are_emitted_only_when_asked_for(device: str) -> None:
    x, scale, threshold = activation(3, (2, 11, 24), 1)
    ints = (4, 8, 10, False)
    args = (x, None, torch.ones(24), None, 1e-5, True, True, scale, threshold, *ints)
    silent, loud = (kernels.add_norm_quantize(*on(device, *args), emit) for emit in (False, True))
    assert silent[3].shape == (0,)
    assert_equal(silent[:3], tuple(t.cpu() for t in loud[:3]))
    y = x.transpose(1, 2)
    args = (y, y * 0.5, y, 0.5, scale, threshold, *ints)
    silent, loud = (kernels.gate_sum_quantize(*on(device, *args), emit) for emit in (False, True))
    assert silent[3].shape == (0,)
    assert_equal(silent[:3], tuple(t.cpu() for t in loud[:3]))


def test_batch_invariance(device: str) -> None:
    x, scale, threshold = activation(8, (3, 23, 40), 2)
    ints = (4, 8, 10, False)
    vectors = on(device, scale, None, threshold)
    together = kernels.quantize_dynamic_outlier(x.to(device), *vectors, *ints)
    for sample in range(3):
        alone = kernels.quantize_dynamic_outlier(x[sample : sample + 1].to(device), *vectors, *ints)
        assert_equal(tuple(t[sample : sample + 1] for t in together), tuple(t.cpu() for t in alone))
