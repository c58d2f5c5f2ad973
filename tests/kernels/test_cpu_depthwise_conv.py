"""The depthwise convolution in generated C++ against its reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ouro_compiler.kernels.cpp.depthwise_conv import depthwise_conv, refuse_depthwise_conv
from ouro_compiler.kernels.launch import record_launches
from ouro_compiler.ops.depthwise_conv import depthwise_conv_ref
from tests.helpers import assert_batch_invariant, assert_close, randn

pytestmark = pytest.mark.usefixtures("poisoned")
ROUNDING = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# Rows of 1 to 35 pixels: tiles and groups of pixels that are not full; maps lower than the filter.
SHAPES = [(1, 5, 1), (2, 16, 7), (1, 40, 35), (2, 7, 1, 6), (1, 37, 9, 5), (3, 8, 6, 18)]


def token_major(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("silu", [False, True])
def test_equals_the_reference(shape: tuple[int, ...], dtype: torch.dtype, silu: bool) -> None:
    taps = (3,) * (len(shape) - 2) if dtype != torch.float16 else (5, 2)[4 - len(shape) :]
    x = randn(1, *shape).to(dtype)
    weight = randn(2, shape[1], 1, *taps).to(dtype)
    bias = randn(3, shape[1]).half() if shape[0] > 1 else None
    expected = depthwise_conv_ref(x, weight, bias, silu)
    for given in (x, token_major(x)):
        found = depthwise_conv(given, weight, bias, silu)
        assert found.movedim(1, -1).is_contiguous()
        assert_close(found, expected, ROUNDING[dtype])


def test_slices_of_tokens_are_read_where_they_lie() -> None:
    """As MambaVision's halves: channels next to each other, tokens further apart."""
    whole = randn(1, 2, 30, 64)
    for x in whole[..., 32:].mT, whole.unflatten(1, (5, 6))[..., :32].permute(0, 3, 1, 2):
        weight = randn(2, 32, 1, *(3,) * (x.dim() - 2))
        with record_launches() as recording:
            depthwise_conv(x, weight)
        assert recording.copies == []
        assert_close(depthwise_conv(x, weight), depthwise_conv_ref(x, weight), 2e-6)
    with record_launches() as recording:
        depthwise_conv(randn(1, 2, 32, 30), randn(2, 32, 1, 3))
    assert recording.copies == ["x is copied: its channels are not next to each other in memory"]


def test_does_not_depend_on_threads_or_on_the_batch() -> None:
    x, weight, bias = randn(1, 5, 96, 14, 14), randn(2, 96, 1, 3, 3), randn(3, 96)
    threads, found = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(depthwise_conv(x, weight, bias, True))
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert_batch_invariant(lambda one: depthwise_conv(one, weight, bias, True), x)


def test_long_filters_are_refused() -> None:
    assert refuse_depthwise_conv(randn(1, 1, 6, 5), randn(2, 6, 1, 16)) is None
    assert "17" in str(refuse_depthwise_conv(randn(1, 1, 6, 5), randn(2, 6, 1, 17)))
    assert "float64" in str(refuse_depthwise_conv(randn(1, 1, 6, 5).double(), randn(2, 6, 1, 3)))
