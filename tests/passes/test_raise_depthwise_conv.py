"""raise_depthwise_conv and fuse_conv_silu: depthwise convolution (+ silu) becomes one op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ouro_compiler.passes.fuse_conv_silu import fuse_conv_silu
from ouro_compiler.passes.raise_depthwise_conv import raise_depthwise_conv
from tests.helpers import randn
from tests.passes.graphs import Written, assert_leaves_alone, assert_pass, aten, calls, ouro

CONV = ouro.depthwise_conv.default
SILU = aten.silu.default
TOKENS, MAPS = randn(0, 2, 6, 9), randn(1, 2, 6, 5, 4)


def line(width: int = 3, **options: Any) -> nn.Conv1d:
    return nn.Conv1d(6, 6, width, **{"groups": 6, "padding": "same", **options})


def square(size: Any = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(6, 6, size, **{"groups": 6, "padding": "same", **options})


RAISED: dict[str, tuple[nn.Module, Tensor]] = {
    "line": (line(), TOKENS),
    "even line": (line(4), TOKENS),
    "padded line": (line(5, padding=2), TOKENS),
    "map": (square(bias=False), MAPS),
    "padded map": (square(padding=1), MAPS),
    "oblong filter": (square((3, 5), padding=(1, 2)), MAPS),
    "one tap high": (square((1, 3)), MAPS),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", RAISED)
def test_raised(name: str) -> None:
    conv, x = RAISED[name]
    gm = assert_pass(
        raise_depthwise_conv,
        Written(lambda m, x: F.silu(m.conv(x)), conv=conv),
        x,
        before={CONV: 0, SILU: 1},
        after={CONV: 1, SILU: 1},
        tolerance=1e-6,
    )
    (op,) = calls(gm, CONV)
    assert op.args[1].target == "conv.weight"
    assert op.args[3] is False


def test_tokens_behind_it_are_views() -> None:
    """What VMamba reads in raster order: no copy."""
    gm = assert_pass(
        raise_depthwise_conv,
        Written(lambda m, x: m.conv(x).flatten(2).transpose(1, 2) + 0, conv=square()),
        MAPS,
        before={CONV: 0},
        after={CONV: 1},
        tolerance=1e-6,
    )
    (flat,) = calls(gm, aten.flatten.using_ints)
    made = flat.args[0].target(*(torch.zeros(2, 6, 5, 4), torch.zeros(6, 1, 3, 3)))
    assert made.flatten(2).data_ptr() == made.data_ptr()


NEAR_MISSES: dict[str, tuple[nn.Module, Tensor]] = {
    "valid": (line(padding="valid"), TOKENS),
    "padded too little": (line(5, padding=1), TOKENS),
    "padded like an even filter": (line(4, padding=2), TOKENS),
    "padded on one axis": (square(padding=(1, 0)), MAPS),
    "strided": (square(padding=1, stride=2), MAPS),
    "dilated": (square(dilation=2), MAPS),
    "one tap": (square(1), MAPS),
    "two a group": (square(groups=3), MAPS),
    "dense": (square(groups=1), MAPS),
    "two outputs a channel": (nn.Conv2d(6, 12, 3, groups=6, padding=1), MAPS),
    "a single channel": (
        Written(lambda m, x: m.c(x[:, :1]), c=nn.Conv1d(1, 1, 3, padding=1)),
        TOKENS,
    ),
    "no batch": (Written(lambda m, x: m.c(x.sum(0)) * x, c=line()), TOKENS),
    "written in place": (Written(lambda m, x: m.c(x).view(-1, 54).mul_(2.0), c=line()), TOKENS),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_stay(name: str) -> None:
    module, x = NEAR_MISSES[name]
    module = module if isinstance(module, Written) else Written(lambda m, x: m.conv(x), conv=module)
    assert_leaves_alone(raise_depthwise_conv, module, x)


@pytest.mark.parametrize(("conv", "x"), [(line(), TOKENS), (square(bias=False), MAPS)])
def test_silu_is_done_by_the_op(conv: nn.Module, x: Tensor) -> None:
    gm = assert_pass(
        fuse_conv_silu,
        Written(lambda m, x: F.silu(m.conv(x)).flatten(1), conv=conv),
        x,
        before={CONV: 1, SILU: 1},
        after={CONV: 1, SILU: 0},
        tolerance=1e-6,
        prepare=(raise_depthwise_conv,),
    )
    (op,) = calls(gm, CONV)
    assert op.args[3] is True
    assert list(op.users) == calls(gm, aten.flatten.using_ints)


def test_a_convolution_that_is_read_before_silu_too() -> None:
    module = Written(lambda m, x: (lambda y: F.silu(y) + y)(m.conv(x)), conv=line())
    assert_leaves_alone(fuse_conv_silu, module, TOKENS, prepare=(raise_depthwise_conv,))


def test_a_second_silu_stays() -> None:
    gm = assert_pass(
        fuse_conv_silu,
        Written(lambda m, x: F.silu(F.silu(m.conv(x))), conv=line()),
        TOKENS,
        before={SILU: 2},
        after={SILU: 1, CONV: 1},
        tolerance=1e-6,
        prepare=(raise_depthwise_conv,),
    )
    assert calls(gm, CONV)[0].args[3] is True
