"""Norm, convolution and gate in generated C++: values by tolerance, codes exactly those of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ouro_compiler.kernels.cpp import conv, norm
from ouro_compiler.kernels.cpp import quantize as kernels
from ouro_compiler.kernels.launch import record_launches
from ouro_compiler.ops import fused
from ouro_compiler.ops.causal_conv1d import causal_conv1d_ref
from ouro_compiler.ops.norm import add_norm_ref
from ouro_compiler.ops.quantize import quantize_dynamic_outlier_ref
from tests.helpers import REPEATABLE, assert_batch_invariant, assert_close, randn
from tests.kernels.inputs import activation, assert_equal

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = (torch.float32, torch.bfloat16)
# What floats may differ by, as a share of the largest: one rounding of the dtype.
ROUNDING = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

shapes = st.sampled_from([(1, 1, 5), (2, 7, 16), (3, 23, 37), (1, 40, 130)])
dtypes = st.sampled_from(DTYPES)
statics = st.tuples(
    st.sampled_from([4, 8]), st.sampled_from([8, 16]), st.sampled_from([3, 10, 400]), st.booleans()
)
Static = tuple[int, int, int, bool]


def assert_values(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        if min(theirs.shape) > 1:  # the stride of one element is free
            assert ours.stride() == theirs.stride()
        assert_close(ours, theirs.to(ours.dtype), ROUNDING[ours.dtype])


def assert_codes(
    found: tuple[Tensor, ...], values: Tensor, scale: Tensor, threshold: Tensor, static: Static
) -> None:
    """What the reference makes of `values` (B, L, K), which the kernel emitted."""
    expected = quantize_dynamic_outlier_ref(values, scale, None, threshold, *static)
    assert_equal(found[:3], expected)


@REPEATABLE
@given(shapes, dtypes, statics, st.tuples(*[st.booleans()] * 4))
def test_norm(
    shape: tuple[int, int, int], dtype: torch.dtype, static: Static, options: tuple[bool, ...]
) -> None:
    rms, has_residual, has_bias, residual_fp32 = options
    x, scale, threshold = activation(1, shape, 1, static[0])
    x = x.to(dtype)
    residual = randn(2, *shape)
    bias = randn(4, shape[2]).half() if has_bias else None
    weight = randn(3, shape[2]).to(dtype)
    front = (x, residual if has_residual else None, weight, bias, 1e-5, rms, residual_fp32)
    maps = tuple(None if one is None else one.mT.contiguous().mT for one in front[:2])
    plain = norm.add_norm(*front)
    assert plain[0].dtype == dtype
    assert_values(plain, add_norm_ref(*front))
    found = norm.add_norm_quantize(*front, scale.half(), threshold, *static, True)
    assert_equal(found[3:], plain)
    assert_codes(found, found[3], scale.half(), threshold, static)
    assert_equal(norm.add_norm(*maps, *front[2:]), plain)
    strided = norm.add_norm_quantize(*maps, *front[2:], scale.half(), threshold, *static, True)
    assert_equal(strided, found)


def test_no_strides_are_copied() -> None:
    """A map seen as tokens; only what no three strides describe is a copy."""
    x = randn(1, 2, 24, 4, 6)
    for tokens, copies in (
        (x.flatten(2).mT, []),
        (x.permute(0, 2, 3, 1), []),
        (x.permute(0, 2, 3, 1)[:, :3], []),
        (x.permute(0, 2, 3, 1)[:, ::3, :5], ["x is copied: it is not contiguous"]),
    ):
        residual = randn(2, *tokens.shape)
        args = (tokens, residual, randn(3, 24), None, 1e-5, False, True)
        with record_launches() as recording:
            norm.add_norm(*args)
        assert recording.copies == copies
        assert_values(norm.add_norm(*args), add_norm_ref(*args))


def test_norm_of_any_number_of_dimensions() -> None:
    for shape in ((24,), (3, 24), (2, 3, 2, 24), (0, 24)):
        args = (randn(1, *shape), None, randn(2, 24), None, 1e-5, True, True)
        assert_values(norm.add_norm(*args), add_norm_ref(*args))
    turned = randn(1, 24, 5).mT
    args = (turned, turned * 2, randn(2, 24), None, 1e-5, False, True)
    assert_values(norm.add_norm(*args), add_norm_ref(*args))


def test_residual_in_half_precision() -> None:
    x, residual = randn(1, 2, 5, 24).half(), randn(2, 2, 5, 24).half()
    args = (x, residual, randn(3, 24), None, 1e-5, True, False)
    found, expected = norm.add_norm(*args), add_norm_ref(*args)
    assert_values(found, expected)
    assert torch.equal(found[1], expected[1])


def test_layer_norm_far_from_zero() -> None:
    """The variance is that of differences from the mean."""
    x = randn(1, 2, 3, 200) + 1000
    args = (x, None, torch.ones(200), None, 1e-5, False, True)
    exact = torch.nn.functional.layer_norm(x.double(), (200,)).float()
    assert_close(norm.add_norm(*args)[0], exact, 1e-4)


@REPEATABLE
@given(shapes, dtypes, statics, st.tuples(*[st.booleans()] * 3))
def test_convolution(
    shape: tuple[int, int, int], dtype: torch.dtype, static: Static, options: tuple[bool, ...]
) -> None:
    silu, has_bias, contiguous = options
    taps = 4 if dtype == torch.float32 else 2
    tokens, scale, threshold = activation(1, shape, 1, static[0])
    x = tokens.to(dtype).transpose(1, 2)
    x = x.contiguous() if contiguous else x
    bias = randn(2, shape[2]).half() if has_bias else None
    front = (x, randn(3, shape[2], taps).to(dtype), bias, silu)
    expected = causal_conv1d_ref(x.float(), *front[1:], static[3])  # rounded once, as here
    plain = conv.causal_conv1d(*front, static[3])
    assert plain.dtype == dtype
    assert_values((plain,), (expected,))
    found = conv.causal_conv1d_quantize(*front, scale, threshold, *static)
    assert torch.equal(found[3], plain)
    assert found[3].stride() == plain.stride()
    assert_codes(found, plain.transpose(1, 2), scale, threshold, static)


def test_convolution_with_too_many_taps() -> None:
    assert conv.refuse_conv(randn(1, 1, 6, 5), randn(2, 6, 4)) is None
    assert "taps" in str(conv.refuse_conv(randn(1, 1, 6, 5), randn(2, 6, 17)))


@REPEATABLE
@given(shapes, dtypes, statics, st.tuples(*[st.booleans()] * 3))
def test_gate(
    shape: tuple[int, int, int], dtype: torch.dtype, static: Static, options: tuple[bool, ...]
) -> None:
    has_other, has_z, contiguous = options
    tokens, scale, threshold = activation(1, shape, 1, static[0])
    y = tokens.to(dtype).transpose(1, 2)
    other = randn(2, *y.shape).to(dtype) if has_other else None
    z = randn(3, *shape).to(dtype).transpose(1, 2)
    z = (z.contiguous() if contiguous else z) if has_z else None
    args = (y, other, z, 0.5, scale, threshold, *static)
    found = kernels.gate_sum_quantize(*args, True)
    assert_values(found[3:], fused.gate_sum_quantize_ref(*args, True)[3:])
    assert_codes(found, found[3], scale, threshold, static)
    if not has_z:  # nothing but products and sums: rounded as the reference does
        assert_equal(found, fused.gate_sum_quantize_ref(*args, True))
    silent = kernels.gate_sum_quantize(*args, False)
    assert silent[3].shape == (0,)
    assert_equal(silent[:3], found[:3])


def test_silu_far_from_zero() -> None:
    x = torch.tensor([-3e38, -1e4, -89.0, -88.5, -20.0, 0.0, 20.0, 88.5, 1e4, 3e38]).view(1, 1, 10)
    taps = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    expected = torch.nn.functional.silu(x.double()).float()
    found = conv.causal_conv1d(x, taps, None, True)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-35)


def test_operands_of_different_dtypes() -> None:
    y, scale, threshold = activation(1, (2, 7, 16), 1)
    y = y.transpose(1, 2)
    assert kernels.refuse_gate_sum(y, None, y, 1.0, scale, threshold) is None
    assert "share a dtype" in str(kernels.refuse_gate_sum(y, None, y.half(), 1.0, scale, threshold))
    norms = (torch.ones(16), None, 1e-5, True, True)
    assert norm.refuse_norm(y.mT, y.mT.half(), *norms) is None
    assert "float64" in str(norm.refuse_norm(y.mT, y.mT.double(), *norms))


# --- neither threads nor other samples matter


def _operators() -> dict[str, tuple[Callable[..., Any], tuple[Tensor | None, ...]]]:
    """Functions of batched operands with enough work for two threads."""
    x, scale, threshold = activation(8, (3, 60, 384), 2)
    other, turned = randn(1, 3, 60, 384), x.transpose(1, 2)
    weight, taps = randn(2, 384), randn(3, 384, 4)
    vectors = (scale, threshold, 4, 8, 10, True)
    norms = (weight, weight, 1e-5, False, True)
    return {
        "add_norm": (lambda x, r: norm.add_norm(x, r, *norms), (x, other)),
        "add_norm_quantize": (
            lambda x, r: norm.add_norm_quantize(x, r, *norms, *vectors, True),
            (x, other),
        ),
        "causal_conv1d": (
            lambda x: conv.causal_conv1d(x, taps, weight, True, True),
            (turned,),
        ),
        "causal_conv1d_quantize": (
            lambda x: conv.causal_conv1d_quantize(x, taps, weight, True, *vectors),
            (turned,),
        ),
        "gate_sum_quantize": (
            lambda y, o, z: kernels.gate_sum_quantize(y, o, z, 0.5, *vectors, True),
            (turned, other.transpose(1, 2), turned),
        ),
    }


@pytest.mark.parametrize("name", list(_operators()))
def test_neither_threads_nor_other_samples_matter(name: str) -> None:
    function, operands = _operators()[name]
    assert_batch_invariant(function, *operands)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found = function(*operands)
            results.append(found if isinstance(found, tuple) else (found,))
    finally:
        torch.set_num_threads(before)
    assert_equal(*results)


def test_sums_run_over_sixteen_lanes() -> None:
    """What machines of any width must give: sixteen partial sums, then halves added up."""
    x = randn(5, 1, 200)
    found = norm.add_norm(x, None, torch.ones(200), None, 0.0, True, True)[0]
    squares = torch.nn.functional.pad((x * x)[0], (0, 8)).view(13, 16)
    lanes = squares[0]
    for row in squares[1:]:
        lanes = lanes + row
    while len(lanes) > 1:
        lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
    expected = x * (1 / (lanes / 200).sqrt())
    assert torch.equal(found, expected)
