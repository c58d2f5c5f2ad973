"""ouro::fake_quantize against PyTorch's own fake quantization."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ouro_compiler.ops  # noqa: F401  (registers torch.ops.ouro)
from tests.helpers import REPEATABLE, assert_batch_invariant, assert_opcheck, generator, randn

fake_quantize = torch.ops.ouro.fake_quantize


def _uniform(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator(seed))


def _limits(bits: int, asymmetric: bool) -> tuple[int, int]:
    return (0, 2**bits - 1) if asymmetric else (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)


def _assert_same_codes(found: Tensor, expected: Tensor, x: Tensor, scale: Tensor) -> None:
    """PyTorch multiplies by 1 / scale where METHODS P1 divides: codes differ at ties alone."""
    differs = ((found - expected).abs() > 1e-4 * scale).expand_as(x)
    from_tie = (x / scale - torch.floor(x / scale) - 0.5).abs()
    assert bool((from_tie[differs] < 1e-3).all())
    steps = ((found - expected).abs() / scale).expand_as(x)[differs]
    assert bool((steps < 1.01).all())


@REPEATABLE
@given(seed=st.integers(0, 9999), bits=st.sampled_from([2, 4, 6, 8, 12]), asymmetric=st.booleans())
def test_per_tensor(seed: int, bits: int, asymmetric: bool) -> None:
    """One scale: torch.fake_quantize_per_tensor_affine."""
    x = 5 * randn(seed, 2, 7, 5)
    low, high = _limits(bits, asymmetric)
    scale = (0.5 + _uniform(seed, 1)) * 6 / (high - low)
    zero = torch.randint(low, high + 1, (1,), generator=generator(seed)) if asymmetric else None
    expected = torch.fake_quantize_per_tensor_affine(
        x, float(scale), 0 if zero is None else int(zero), low, high
    )
    found = fake_quantize(x, scale, None if zero is None else zero.float(), bits)
    _assert_same_codes(found, expected, x, scale)


@REPEATABLE
@given(
    seed=st.integers(0, 9999),
    bits=st.sampled_from([4, 8]),
    asymmetric=st.booleans(),
    axis=st.sampled_from([1, 2]),
)
def test_per_channel(seed: int, bits: int, asymmetric: bool, axis: int) -> None:
    """A scale a token (L, 1) or a channel (K,): torch.fake_quantize_per_channel_affine."""
    x = 5 * randn(seed, 3, 7, 5)
    low, high = _limits(bits, asymmetric)
    count = x.shape[axis]
    scale = (0.5 + _uniform(seed, count)) * 6 / (high - low)
    zero = torch.zeros(count, dtype=torch.int32)
    if asymmetric:
        zero = torch.randint(low, high + 1, (count,), generator=generator(seed)).int()
    expected = torch.fake_quantize_per_channel_affine(x, scale, zero, axis, low, high)

    def shaped(vector: Tensor) -> Tensor:
        return vector[:, None] if axis == 1 else vector

    given_zero = shaped(zero.float()) if asymmetric else None
    found = fake_quantize(x, shaped(scale), given_zero, bits)
    _assert_same_codes(found, expected, x, shaped(scale))


def test_ties_go_to_even_and_zero_is_exact() -> None:
    """P1 and P3: rounding before the zero point is added, so an odd one changes nothing."""
    x = torch.tensor([[[-2.5, -1.5, -0.5, 0.0, 0.5, 1.5, 2.5]]])
    even = [-2.0, -2.0, 0.0, 0.0, 0.0, 2.0, 2.0]
    assert fake_quantize(x, torch.ones(1), None, 4).flatten().tolist() == even
    for zero in (7.0, 8.0):
        found = fake_quantize(x, torch.ones(1), torch.tensor([zero]), 4)
        assert found.flatten().tolist() == even


def test_ranges_end_where_they_should() -> None:
    """Symmetric codes leave out -2^(bits-1); asymmetric ones use all 2^bits."""
    x = torch.tensor([[[-99.0, 99.0]]])
    assert fake_quantize(x, torch.ones(1), None, 4).tolist() == [[[-7.0, 7.0]]]
    found = fake_quantize(x, torch.ones(1), torch.tensor([5.0]), 4)
    assert found.tolist() == [[[-5.0, 10.0]]]


@pytest.mark.parametrize("zero", [None, torch.full((9, 1), 20.0)])
def test_idempotent_pure_and_batch_invariant(zero: Tensor | None) -> None:
    """T11, T9 and T5."""
    x, scale = randn(0, 4, 9, 6), 0.05 + _uniform(1, 9, 1)
    before = x.clone()
    once = fake_quantize(x, scale, zero, 6)
    assert torch.equal(fake_quantize(once, scale, zero, 6), once)
    assert torch.equal(x, before)
    assert_batch_invariant(lambda t: fake_quantize(t, scale, zero, 6), x)


def test_sixteen_bits_are_nearly_floating_point() -> None:
    x = randn(2, 2, 5, 4)
    scale = x.abs().amax().reshape(1) / 32767
    assert float((fake_quantize(x, scale, None, 16) - x).abs().max()) <= float(scale) / 2 * 1.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_and_layout_are_kept(dtype: torch.dtype) -> None:
    x = randn(3, 2, 6, 5).to(dtype).transpose(1, 2)
    found = fake_quantize(x, torch.full((5, 1), 0.25), None, 4)
    assert found.dtype == dtype
    expected = (x.float() / 0.25).round().clamp(-7, 7) * 0.25
    assert torch.equal(found, expected.to(dtype))


@pytest.mark.parametrize(
    ("scale", "zero", "bits", "sentence"),
    [
        (torch.ones(4), None, 4, r"scale \(4,\) does not broadcast against x \(2, 3, 5\)"),
        (torch.ones(2, 2, 3, 5), None, 4, r"scale \(2, 2, 3, 5\) does not broadcast"),
        (torch.ones(1), torch.ones(4, 1), 4, r"zero_point \(4, 1\) does not broadcast"),
        (torch.ones(1), None, 1, "bits must be 2 to 16, got 1"),
        (torch.ones(1), None, 17, "bits must be 2 to 16, got 17"),
    ],
)
def test_refusals(scale: Tensor, zero: Tensor | None, bits: int, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^ouro::fake_quantize: {sentence}"):
        fake_quantize(torch.zeros(2, 3, 5), scale, zero, bits)


def test_opcheck() -> None:
    """Asymmetric on a strided input; symmetric in half precision."""
    strided = randn(4, 2, 5, 6).transpose(1, 2)
    per_token = torch.full((6, 1), 0.25), torch.full((6, 1), 3.0)
    assert_opcheck(fake_quantize, (strided, *per_token, 4))
    assert_opcheck(fake_quantize, (randn(4, 2, 6, 5).half(), torch.full((5,), 0.25), None, 8))
