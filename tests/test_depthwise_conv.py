"""depthwise_conv against torch's own convolutions with padding "same"."""

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

op = torch.ops.ouro.depthwise_conv
CHANNELS = 6
PLACES = [((9,), (3,)), ((7,), (4,)), ((1,), (3,)), ((5, 8), (3, 3)), ((2, 3), (5, 2))]

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def same(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    convolve = functional.conv1d if x.dim() == 3 else functional.conv2d
    y = convolve(x, weight, bias, padding="same", groups=x.shape[1])
    return functional.silu(y) if silu else y


def inputs(
    places: tuple[int, ...], taps: tuple[int, ...], batch: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    weight = randn(2, CHANNELS, 1, *taps)
    return randn(1, batch, CHANNELS, *places), weight, randn(3, CHANNELS)


def token_major(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


@pytest.mark.parametrize(("places", "taps"), PLACES)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_torchs_convolution(
    places: tuple[int, ...], taps: tuple[int, ...], with_bias: bool, silu: bool
) -> None:
    """Even filters, and maps smaller than the filter, included; memory is token-major always."""
    x, weight, bias = inputs(places, taps)
    args = (weight, bias if with_bias else None, silu)
    for given in (x, token_major(x)):
        y = op(given, *args)
        assert_close(y, same(x, *args), 1e-6)
        assert y.movedim(1, -1).is_contiguous()


def test_an_impulse_shows_which_pixels_are_read() -> None:
    x = torch.zeros(1, 1, 3, 4)
    x[0, 0, 1, 1] = 1.0
    weight = torch.arange(1.0, 10).view(1, 1, 3, 3)
    assert op(x, weight)[0, 0].tolist() == [[9, 8, 7, 0], [6, 5, 4, 0], [3, 2, 1, 0]]
    row = op(x[:, :, 1], torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]))  # one before, two after
    assert row.flatten().tolist() == [3, 2, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    x, weight, bias = (one.to(dtype) for one in inputs((5, 8), (3, 3)))
    exact = same(x.float(), weight.float(), bias.float(), True).to(dtype)
    assert_close(op(x, weight, bias, True), exact, torch.finfo(dtype).eps)


def test_double_stays_double() -> None:
    x, weight, bias = (one.double() for one in inputs((9,), (3,)))
    assert_close(op(x, weight, bias, True), same(x, weight, bias, True), 1e-14)


def test_output_is_fresh_memory() -> None:
    x = token_major(randn(1, 2, CHANNELS, 3, 4))
    kept = x.clone()
    y = op(x, torch.ones(CHANNELS, 1, 1, 1))
    assert torch.equal(y, x)
    assert not shares_memory(y, x)
    assert torch.equal(x, kept)


@pytest.mark.parametrize(("places", "taps"), PLACES[2:4])
@pytest.mark.parametrize("silu", [False, True])
def test_gradients(places: tuple[int, ...], taps: tuple[int, ...], silu: bool) -> None:
    leaves = [[one.requires_grad_() for one in inputs(places, taps)] for _ in range(2)]
    cotangent = randn(9, 2, CHANNELS, *places)
    (op(*leaves[0], silu) * cotangent).sum().backward()
    (same(*leaves[1], silu) * cotangent).sum().backward()
    for ours, theirs in zip(*leaves, strict=True):
        assert_close(ours.grad, theirs.grad, 1e-5)


@pytest.mark.parametrize(("places", "taps"), [((9,), (3,)), ((14, 14), (3, 3))])
@pytest.mark.parametrize("silu", [False, True])
def test_batch_invariance(places: tuple[int, ...], taps: tuple[int, ...], silu: bool) -> None:
    """Bit for bit, in both memory formats."""
    x, weight, bias = inputs(places, taps, batch=7)
    for given in (x, token_major(x)):
        assert_batch_invariant(lambda one: op(one, weight, bias, silu), given)


@pytest.mark.parametrize(
    ("x_shape", "weight_shape"),
    [
        ((6, 9), (6, 1, 3)),
        ((2, 6, 9), (5, 1, 3)),
        ((2, 6, 9), (6, 3)),
        ((2, 6, 9), (6, 2, 3)),
        ((2, 6, 9, 9), (6, 1, 3)),
    ],
)
def test_refuses_other_shapes(x_shape: tuple[int, ...], weight_shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"depthwise_conv: needs x \(B, C, L\) and weight"):
        op(torch.zeros(x_shape), torch.zeros(weight_shape))


def test_refuses_a_bias_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"depthwise_conv: bias must have shape \(6,\)"):
        op(torch.zeros(2, 6, 9), torch.zeros(6, 1, 3), torch.zeros(5))


@pytest.mark.parametrize(("places", "taps"), PLACES[2:4])
@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck(places: tuple[int, ...], taps: tuple[int, ...], with_bias: bool) -> None:
    x, weight, bias = inputs(places, taps)
    for given in (x, token_major(x)):
        args = (given.requires_grad_(), weight.requires_grad_(), bias if with_bias else None, True)
        assert_opcheck(op, args)
