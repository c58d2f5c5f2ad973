"""causal_conv1d against torch's own conv1d, padded on both sides and cut as Mamba does."""

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
    assert_token_major,
    randn,
    shares_memory,
)

op = torch.ops.ouro.causal_conv1d
BATCH, CHANNELS = 2, 6


def _mamba(
    x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool = False
) -> Tensor:
    """nn.Conv1d(padding=W-1) then [..., :L] then SiLU; a reversed one on flipped time."""
    if reverse:
        return _mamba(x.flip(-1), weight, bias, silu).flip(-1)
    width = weight.shape[-1]
    y = functional.conv1d(x, weight[:, None], bias, padding=width - 1, groups=x.shape[1])
    y = y[..., : x.shape[-1]]
    return functional.silu(y) if silu else y


def _inputs(length: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    x = randn(seed, BATCH, CHANNELS, length)
    return x, randn(seed + 1, CHANNELS, width), randn(seed + 2, CHANNELS)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("length", "width"), [(9, 4), (50, 3), (1, 4), (3, 4), (7, 1)])
def test_equals_mambas_conv(
    length: int, width: int, with_bias: bool, silu: bool, reverse: bool
) -> None:
    """Sequences shorter than the filter, and filters of one tap, included."""
    x, weight, bias = _inputs(length, width)
    given = bias if with_bias else None
    y = op(x, weight, given, silu, reverse)
    assert_close(y, _mamba(x, weight, given, silu, reverse), 1e-6)
    assert_token_major(y)


def test_defaults_are_no_bias_no_silu_forward() -> None:
    x, weight, _ = _inputs(9, 4)
    assert torch.equal(op(x, weight), op(x, weight, None, False, False))
    assert not torch.equal(op(x, weight), op(x, weight, None, False, True))


def test_an_impulse_shows_which_tokens_are_read() -> None:
    """y_t = sum_i w_i x_(t-W+1+i): an impulse leaves the mirrored taps after it, or before."""
    x = torch.zeros(1, 1, 7)
    x[0, 0, 3] = 1.0
    weight = torch.tensor([[1.0, 2.0, 3.0]])
    assert op(x, weight).flatten().tolist() == [0, 0, 0, 3, 2, 1, 0]
    assert op(x, weight, None, False, True).flatten().tolist() == [0, 1, 2, 3, 0, 0, 0]


@pytest.mark.parametrize("silu", [False, True])
def test_reverse_is_flip_conv_flip(silu: bool) -> None:
    x, weight, bias = _inputs(9, 4)
    flipped = op(x.flip(-1), weight, bias, silu, False).flip(-1)
    assert_close(op(x, weight, bias, silu, True), flipped, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reverse", [False, True])
def test_half_precision(dtype: torch.dtype, reverse: bool) -> None:
    """The result has x's dtype and stays within a few roundings of fp32 on the same values."""
    x, weight, bias = (t.to(dtype) for t in _inputs(9, 4))
    y = op(x, weight, bias, True, reverse)
    expected = _mamba(x.float(), weight.float(), bias.float(), True, reverse).to(dtype)
    assert_close(y, expected, 4 * torch.finfo(dtype).eps)
    assert_token_major(y)


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("token_major", [False, True])
def test_output_is_fresh_memory(width: int, token_major: bool) -> None:
    """Even the identity filter copies; the input keeps its values."""
    x = randn(0, BATCH, CHANNELS, 9)
    if token_major:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    weight = torch.zeros(CHANNELS, width)
    weight[:, -1] = 1.0
    kept = x.clone()
    y = op(x, weight)
    assert torch.equal(y, x)
    assert not shares_memory(y, x)
    y.add_(1)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("silu", [False, True])
def test_gradients(silu: bool, reverse: bool) -> None:
    """Of x, weight and bias, against autograd through mamba's form."""
    leaves = [[t.requires_grad_() for t in _inputs(9, 4)] for _ in range(2)]
    cotangent = randn(9, BATCH, CHANNELS, 9)
    (op(*leaves[0], silu, reverse) * cotangent).sum().backward()
    (_mamba(*leaves[1], silu, reverse) * cotangent).sum().backward()
    for ours, theirs in zip(*leaves, strict=True):
        assert_close(ours.grad, theirs.grad, 1e-5)


def test_gradient_of_one_input_alone() -> None:
    """Inputs that need no gradient get none; an absent bias is no obstacle."""
    x, weight, _ = _inputs(9, 4)
    weight.requires_grad_()
    op(x, weight, None, True, False).sum().backward()
    assert x.grad is None
    expected = torch.autograd.grad(_mamba(x, weight, None, True).sum(), weight)[0]
    assert_close(weight.grad, expected, 1e-5)


@pytest.mark.parametrize("reverse", [False, True])
def test_batch_invariance(reverse: bool) -> None:
    """Without SiLU: bit for bit."""
    weight, bias = randn(1, 13, 4), randn(2, 13)
    x = randn(0, 5, 13, 9)
    assert_batch_invariant(lambda x: op(x, weight, bias, False, reverse), x)


def test_batch_invariance_with_silu() -> None:
    weight, bias = randn(1, 13, 4), randn(2, 13)
    x = randn(0, 31, 13, 9)
    assert_batch_invariant(lambda x: op(x, weight, bias, True, False), x)


@pytest.mark.parametrize(
    ("x_shape", "weight_shape"),
    [((6, 9), (6, 4)), ((2, 6, 9), (5, 4)), ((2, 6, 9), (6, 1, 4)), ((2, 6, 9, 1), (6, 4))],
)
def test_refuses_other_shapes(x_shape: tuple[int, ...], weight_shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"causal_conv1d: needs x \(B, D, L\) and weight \(D, W\)"):
        op(torch.zeros(x_shape), torch.zeros(weight_shape))


@pytest.mark.parametrize("token_major", [False, True])
@pytest.mark.parametrize(("with_bias", "reverse"), [(True, False), (False, True)])
def test_opcheck(with_bias: bool, reverse: bool, token_major: bool) -> None:
    x, weight, bias = _inputs(5, 4)
    if token_major:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    x.requires_grad_()
    assert_opcheck(op, (x, weight.requires_grad_(), bias if with_bias else None, True, reverse))
