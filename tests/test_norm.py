"""add_norm against F.rms_norm and F.layer_norm of the sum."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import ouro_compiler.ops  # noqa: F401  (registers torch.ops.ouro)
from tests.helpers import (
    assert_batch_invariant,
    assert_close,
    assert_opcheck,
    randn,
    shares_memory,
)

op = torch.ops.ouro.add_norm
SHAPE, K, EPS = (2, 5, 12), 12, 1e-3


def _torch_form(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, rms: bool
) -> tuple[Tensor, Tensor]:
    """(fp32 normalised, fp32 sum) through torch's own functions."""
    total = x.float() if residual is None else x.float() + residual.float()
    if not rms:
        return functional.layer_norm(total, (x.shape[-1],), weight, bias, eps), total
    y = functional.rms_norm(total, (x.shape[-1],), weight, eps)
    return (y if bias is None else y + bias), total


def _inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        randn(seed, *SHAPE),
        randn(seed + 1, *SHAPE) + 0.5,
        randn(seed + 2, K) + 1,
        randn(seed + 3, K),
    )


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_torchs_norm(rms: bool, with_residual: bool, with_bias: bool) -> None:
    """Values of both outputs; eps is large enough for its place in the formula to show."""
    x, residual, weight, bias = _inputs()
    x, residual = x * 0.05, residual * 0.05
    args = (x, residual if with_residual else None, weight, bias if with_bias else None)
    y, kept = op(*args, EPS, rms, True)
    expected_y, expected_kept = _torch_form(*args, EPS, rms)
    assert_close(y, expected_y, 1e-6)
    assert torch.equal(kept, expected_kept)
    assert y.is_contiguous()
    assert kept.is_contiguous()


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 4, 7)])
@pytest.mark.parametrize("rms", [False, True])
def test_any_leading_dimensions(shape: tuple[int, ...], rms: bool) -> None:
    x, residual, weight = randn(0, *shape), randn(1, *shape), randn(2, 7)
    y, kept = op(x, residual, weight, None, EPS, rms, True)
    expected_y, expected_kept = _torch_form(x, residual, weight, None, EPS, rms)
    assert_close(y, expected_y, 1e-6)
    assert torch.equal(kept, expected_kept)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("residual_fp32", [False, True])
@pytest.mark.parametrize("residual_dtype", [None, torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(
    dtype: torch.dtype, residual_dtype: torch.dtype | None, residual_fp32: bool, rms: bool
) -> None:
    """y has x's dtype; the sum fp32, or the residual's dtype, or x's without a residual.

    Both are rounded once, from fp32.
    """
    x, residual, weight, bias = _inputs()
    x = x.to(dtype)
    residual = None if residual_dtype is None else residual.to(residual_dtype)
    y, kept = op(x, residual, weight, bias, EPS, rms, residual_fp32)
    expected_y, expected_kept = _torch_form(x, residual, weight, bias, EPS, rms)
    kept_dtype = torch.float32 if residual_fp32 else (residual_dtype or dtype)
    assert_close(y, expected_y.to(dtype), max(torch.finfo(dtype).eps, 1e-6))
    assert kept.dtype == kept_dtype
    assert torch.equal(kept, expected_kept.to(kept_dtype))


def test_half_precision_parameters() -> None:
    """Weight and bias in half precision are read as fp32."""
    x, residual, weight, bias = (t.half() for t in _inputs())
    for rms in (False, True):
        y, _ = op(x, residual, weight, bias, EPS, rms, True)
        expected, _ = _torch_form(x, residual, weight.float(), bias.float(), EPS, rms)
        assert_close(y, expected.half(), torch.finfo(torch.float16).eps)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("residual_fp32", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_outputs_are_fresh_memory(
    dtype: torch.dtype, with_residual: bool, residual_fp32: bool, rms: bool
) -> None:
    """Neither output is an input or the other output, and inputs keep their values."""
    x, residual, weight, _ = _inputs()
    x, residual = x.to(dtype), residual.to(dtype) if with_residual else None
    kept_inputs = [t if t is None else t.clone() for t in (x, residual)]
    y, kept = op(x, residual, weight, None, EPS, rms, residual_fp32)
    assert not shares_memory(y, kept)
    for given, before in zip((x, residual), kept_inputs, strict=True):
        if given is not None:
            assert not shares_memory(y, given)
            assert not shares_memory(kept, given)
            assert torch.equal(given, before)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_gradients(rms: bool, with_residual: bool) -> None:
    """Through both outputs, against autograd through torch's functions."""
    gradients = []
    for function in (
        lambda *args: op(*args, EPS, rms, True),
        lambda *args: _torch_form(*args, EPS, rms),
    ):
        x, residual, weight, bias = (t.requires_grad_() for t in _inputs())
        given = residual if with_residual else None
        y, kept = function(x, given, weight, bias)
        ((y * randn(8, *SHAPE)).sum() + (kept * randn(9, *SHAPE)).sum()).backward()
        leaves = (x, residual, weight, bias) if with_residual else (x, weight, bias)
        gradients.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*gradients, strict=True):
        assert_close(ours, theirs, 1e-5)


def test_gradient_through_one_output_alone() -> None:
    """A caller may drop either output."""
    x, residual, weight, _ = _inputs()
    for index in (0, 1):
        leaf = x.clone().requires_grad_()
        outputs = op(leaf, residual, weight, None, EPS, True, True)
        (outputs[index] * randn(8, *SHAPE)).sum().backward()
        other = x.clone().requires_grad_()
        expected = _torch_form(other, residual, weight, None, EPS, True)
        (expected[index] * randn(8, *SHAPE)).sum().backward()
        assert_close(leaf.grad, other.grad, 1e-5)


@pytest.mark.parametrize("rms", [False, True])
def test_batch_invariance(rms: bool) -> None:
    """Bit for bit, at a K that is no multiple of a vector."""
    weight, bias = randn(2, 13), randn(3, 13)
    assert_batch_invariant(
        lambda x, residual: op(x, residual, weight, bias, EPS, rms, True),
        randn(0, 5, 9, 13),
        randn(1, 5, 9, 13),
    )


@pytest.mark.parametrize("weight_shape", [(11,), (1,), (1, 12)])
def test_refuses_another_weight(weight_shape: tuple[int, ...]) -> None:
    x = randn(0, *SHAPE)
    with pytest.raises(ValueError, match=r"add_norm: weight must have shape \(12,\)"):
        op(x, None, torch.ones(weight_shape), None, EPS, True, True)


@pytest.mark.parametrize(
    ("residual_shape", "bias_shape"),
    [((4, 5, 12), (12,)), ((1, 5, 12), (12,)), ((2, 5, 12), (1,))],
)
def test_refuses_another_residual_or_bias(
    residual_shape: tuple[int, ...], bias_shape: tuple[int, ...]
) -> None:
    """x is (1, 5, 12) in the first case: the sum would have more samples than the fake says."""
    x = randn(0, 1 if residual_shape[0] == 4 else 2, 5, 12)
    with pytest.raises(ValueError, match="add_norm: "):
        op(x, torch.ones(residual_shape), torch.ones(12), torch.ones(bias_shape), EPS, True, True)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize(("with_residual", "transposed"), [(True, False), (False, True)])
def test_opcheck(with_residual: bool, transposed: bool, rms: bool) -> None:
    """The sum is kept in half precision in one case, in fp32 in the other."""
    x, residual, weight, bias = _inputs()
    if transposed:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    x.requires_grad_()
    given = residual.half() if with_residual else None
    assert_opcheck(op, (x, given, weight.requires_grad_(), bias, EPS, rms, not with_residual))
