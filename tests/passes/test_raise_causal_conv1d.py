"""raise_causal_conv1d: depthwise conv + slice (+ silu) becomes one op."""

from __future__ import annotations

from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from ouro_compiler.graph import get_constant
from ouro_compiler.passes.raise_causal_conv1d import raise_causal_conv1d
from tests.helpers import randn
from tests.passes.graphs import (
    Written,
    assert_leaves_alone,
    assert_pass,
    aten,
    calls,
    ouro,
)

CONV = aten.conv1d.default
CAUSAL = ouro.causal_conv1d.default
SILU = aten.silu.default
X = randn(0, 2, 6, 9)


def _depthwise(bias: bool = True, width: int = 4, **options: Any) -> nn.Conv1d:
    options = {"groups": 6, "padding": width - 1, **options}
    return nn.Conv1d(6, 6, width, bias=bias, **options)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("silu", [True, False])
def test_conv_slice_silu(bias: bool, silu: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv1d(x)[..., : x.shape[-1]]
        return F.silu(y) if silu else y

    gm = assert_pass(
        raise_causal_conv1d,
        Written(forward, conv1d=_depthwise(bias)),
        X,
        before={CONV: 1, aten.slice.Tensor: 1, CAUSAL: 0},
        after={CONV: 0, aten.slice.Tensor: 0, SILU: 0, CAUSAL: 1},
        tolerance=1e-6,
    )
    (op,) = calls(gm, CAUSAL)
    assert op.args[1].target == "conv1d.weight_folded"
    assert get_constant(gm, op.args[1]).shape == (6, 4)
    assert op.args[3:] == (silu, False)


def test_an_end_counted_from_the_back() -> None:
    assert_pass(
        raise_causal_conv1d,
        Written(lambda m, x: m.conv1d(x)[..., :-3], conv1d=_depthwise()),
        X,
        before={CONV: 1},
        after={CONV: 0, CAUSAL: 1},
        tolerance=1e-6,
    )


def test_a_conv_that_is_read_before_silu_too() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv1d(x)[..., : x.shape[-1]]
        return F.silu(y) + y

    gm = assert_pass(
        raise_causal_conv1d,
        Written(forward, conv1d=_depthwise()),
        X,
        before={CONV: 1, SILU: 1},
        after={CONV: 0, SILU: 1, CAUSAL: 1},
        tolerance=1e-6,
    )
    assert calls(gm, CAUSAL)[0].args[3] is False


@pytest.mark.parametrize("padding", [0, "valid"])
def test_padding_on_the_left(padding: Any) -> None:
    assert_pass(
        raise_causal_conv1d,
        Written(
            lambda m, x: F.silu(m.conv1d(F.pad(x, (3, 0)))), conv1d=_depthwise(padding=padding)
        ),
        X,
        before={aten.pad.default: 1, SILU: 1},
        after={aten.pad.default: 0, SILU: 0, CAUSAL: 1},
        tolerance=1e-6,
    )


NEAR_MISSES: dict[str, nn.Module] = {
    "same": Written(lambda m, x: F.silu(m.c(x)), c=_depthwise(width=3, padding="same")),
    "padded too much": Written(lambda m, x: m.c(x)[..., :9], c=_depthwise(padding=5)),
    "padded left, dilated": Written(
        lambda m, x: m.c(F.pad(x, (3, 0))), c=_depthwise(padding=0, dilation=2)
    ),
    "padded left, strided": Written(
        lambda m, x: m.c(F.pad(x, (3, 0))), c=_depthwise(padding=0, stride=2)
    ),
    "symmetric": Written(lambda m, x: m.c(x)[..., :9], c=_depthwise(width=3, padding=1)),
    "too little kept": Written(lambda m, x: m.c(x)[..., :8], c=_depthwise()),
    "too much kept": Written(lambda m, x: m.c(x)[..., :10], c=_depthwise()),
    "the last positions": Written(lambda m, x: m.c(x)[..., 3:], c=_depthwise()),
    "every second": Written(lambda m, x: m.c(x)[..., :9:2], c=_depthwise()),
    "all read": Written(lambda m, x: (lambda y: (y[..., :9], y.sum(-1)))(m.c(x)), c=_depthwise()),
    "one tap": Written(lambda m, x: F.silu(m.c(x)), c=_depthwise(width=1)),
    "dilated": Written(lambda m, x: m.c(x)[..., :9], c=_depthwise(padding=6, dilation=2)),
    "strided": Written(lambda m, x: m.c(x)[..., :9], c=_depthwise(width=2, stride=2, padding=9)),
    "two a group": Written(lambda m, x: m.c(x)[..., :9], c=_depthwise(groups=3)),
    "two outputs a channel": Written(
        lambda m, x: m.c(x)[..., :9], c=nn.Conv1d(6, 12, 4, groups=6, padding=3)
    ),
    "weight of the input": Written(
        lambda m, x: F.conv1d(x, x[:1, :, None, :4].reshape(6, 1, 4), padding=3, groups=6)[..., :9]
    ),
    "pad on both sides": Written(lambda m, x: m.c(F.pad(x, (2, 1))), c=_depthwise(padding=0)),
    "pad with ones": Written(
        lambda m, x: m.c(F.pad(x, (3, 0), value=1.0)), c=_depthwise(padding=0)
    ),
    "reflected": Written(
        lambda m, x: m.c(F.pad(x, (3, 0), mode="reflect")), c=_depthwise(padding=0)
    ),
    "written in place": Written(lambda m, x: m.c(x)[..., :9].mul_(2.0), c=_depthwise()),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_stay(name: str) -> None:
    assert_leaves_alone(raise_causal_conv1d, NEAR_MISSES[name], X)
