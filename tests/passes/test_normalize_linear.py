"""normalize_linear: every spelling of a linear layer becomes aten.linear on (B, L, K)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ouro_compiler.graph import get_constant, value_of
from ouro_compiler.passes.normalize_linear import normalize_linear
from tests.helpers import randn
from tests.passes.graphs import (
    Written,
    assert_leaves_alone,
    assert_pass,
    aten,
    calls,
)

LINEAR = aten.linear.default
RESHAPE = aten.reshape.default
PERMUTE = aten.permute.default
TOLERANCE = 1e-6
TOKENS = randn(0, 2, 9, 8)
CHANNELS_FIRST = randn(1, 2, 8, 9)
IMAGE = randn(2, 2, 8, 3, 5)


def _weight(*shape: int) -> Tensor:
    return randn(3, *shape) * 0.3


def _in_proj(m: Any, x: Tensor) -> Tensor:
    """W @ (K, B L), as Mamba writes it."""
    batch, length, channels = x.shape
    flat = x.permute(2, 0, 1).reshape(channels, batch * length)
    return (m.proj.weight @ flat).reshape(-1, batch, length).permute(1, 0, 2)


PRODUCTS: dict[str, tuple[Callable[[Any, Tensor], Tensor], Any]] = {
    "W @ flat": (_in_proj, aten.matmul.default),
    "W @ (B, K, L)": (lambda m, x: m.proj.weight @ x.transpose(1, 2), aten.matmul.default),
    "x @ W.t()": (lambda m, x: x @ m.proj.weight.t(), aten.matmul.default),
    "mm": (
        lambda m, x: torch.mm(x.reshape(-1, 8), m.proj.weight.t()).reshape(-1, 9, 6),
        aten.mm.default,
    ),
    "addmm": (
        lambda m, x: torch.addmm(m.proj.bias, x.flatten(0, 1), m.proj.weight.T).view(-1, 9, 6),
        aten.addmm.default,
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_with_a_parameter_become_linears(name: str) -> None:
    function, target = PRODUCTS[name]
    module = Written(function, proj=nn.Linear(8, 6))
    gm = assert_pass(
        normalize_linear,
        module,
        TOKENS,
        before={target: 1, LINEAR: 0},
        after={target: 0, LINEAR: 1, RESHAPE: 0, aten.view.default: 0},
        tolerance=TOLERANCE,
    )
    (linear,) = calls(gm, LINEAR)
    assert value_of(linear.args[0]).shape[1:] == (9, 8)
    assert linear.args[1].target == "proj.weight"  # the parameter itself, not a copy


def test_a_bare_parameter_on_the_right_is_transposed_once() -> None:
    gm = assert_pass(
        normalize_linear,
        Written(lambda m, x: x @ m.w, w=_weight(8, 6)),
        TOKENS,
        before={aten.matmul.default: 1},
        after={aten.matmul.default: 0, LINEAR: 1},
        tolerance=TOLERANCE,
    )
    assert get_constant(gm, calls(gm, LINEAR)[0].args[1]).shape == (6, 8)


def test_conv2d_of_one_pixel() -> None:
    gm = assert_pass(
        normalize_linear,
        Written(lambda m, x: m.proj(x), proj=nn.Conv2d(8, 6, 1)),
        IMAGE,
        before={aten.conv2d.default: 1},
        after={aten.conv2d.default: 0, LINEAR: 1},
        tolerance=TOLERANCE,
    )
    (linear,) = calls(gm, LINEAR)
    assert value_of(linear.args[0]).shape[1:] == (15, 8)
    assert str(linear.args[1].target).startswith("proj.weight")


def test_conv2d_with_a_reshaped_matrix_keeps_the_matrix() -> None:
    """Linear2d: a (O, K) weight made a kernel on the way."""
    gm = assert_pass(
        normalize_linear,
        Written(
            lambda m, x: F.conv2d(x, m.proj.weight[:, :, None, None], m.proj.bias),
            proj=nn.Linear(8, 6),
        ),
        IMAGE,
        before={aten.conv2d.default: 1},
        after={aten.conv2d.default: 0, LINEAR: 1, aten.unsqueeze.default: 0},
        tolerance=TOLERANCE,
    )
    assert calls(gm, LINEAR)[0].args[1].target == "proj.weight"


def test_nothing_is_rearranged_between_two_linears_on_an_image() -> None:
    gm = assert_pass(
        normalize_linear,
        Written(lambda m, x: m.b(F.silu(m.a(x))), a=nn.Conv2d(8, 6, 1), b=nn.Conv2d(6, 4, 1)),
        IMAGE,
        before={aten.conv2d.default: 2},
        after={aten.conv2d.default: 0, LINEAR: 2, aten.silu.default: 1},
        tolerance=TOLERANCE,
    )
    first, second = calls(gm, LINEAR)
    assert value_of(second.args[0]).shape[1:] == (15, 6)
    assert value_of(first).shape[1:] == (15, 6)


def test_conv1d_of_one_token() -> None:
    gm = assert_pass(
        normalize_linear,
        Written(lambda m, x: m.proj(x), proj=nn.Conv1d(8, 6, 1)),
        CHANNELS_FIRST,
        before={aten.conv1d.default: 1},
        after={aten.conv1d.default: 0, LINEAR: 1},
        tolerance=TOLERANCE,
    )
    assert value_of(calls(gm, LINEAR)[0].args[0]).shape[1:] == (9, 8)


EINSUMS = {
    "b k d l, k c d -> b k c l": ((2, 2, 4, 9), (2, 3, 4), 2),
    "bkdl,kcd->bkcl": ((2, 2, 4, 9), (2, 3, 4), 2),
    "x n m t, n m o -> n x t o": ((2, 2, 4, 9), (2, 4, 3), 2),
    "kcd,bkdl->bkcl": ((2, 2, 4, 9), (2, 3, 4), 2),
    "b l d, c d -> b c l": ((2, 9, 4), (3, 4), 1),
}


@pytest.mark.parametrize("equation", EINSUMS)
def test_einsum_is_one_linear_a_group(equation: str) -> None:
    shape, weight, linears = EINSUMS[equation]
    first = equation.startswith("kcd")

    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.einsum(equation, *((m.w, x) if first else (x, m.w)))

    gm = assert_pass(
        normalize_linear,
        Written(forward, w=_weight(*weight)),
        randn(5, *shape),
        before={aten.einsum.default: 1},
        after={aten.einsum.default: 0, LINEAR: linears},
        tolerance=TOLERANCE,
    )
    for linear in calls(gm, LINEAR):
        assert value_of(linear.args[0]).shape[1:] == (9, 4)


def _in_place(m: Any, x: Tensor) -> Tensor:
    y = x * 2
    flat = y.reshape(-1, 8)
    flat.add_(1)
    return m.proj(flat)


def _in_place_through_a_view(m: Any, x: Tensor) -> Tensor:
    y = x * 2
    y.view(-1, 8).add_(1)
    return y


NEAR_MISSES: dict[str, tuple[nn.Module, Tensor]] = {
    "linear on tokens": (Written(lambda m, x: m.proj(x), proj=nn.Linear(8, 6)), TOKENS),
    "head": (Written(lambda m, x: m.proj(x[:, 0]), proj=nn.Linear(8, 6)), TOKENS),
    "head on all": (Written(lambda m, x: m.proj(x.flatten(1)), proj=nn.Linear(72, 6)), TOKENS),
    "windows": (
        Written(lambda m, x: m.proj(x.reshape(-1, 3, 8)), proj=nn.Linear(8, 6)),
        TOKENS,
    ),
    "two activations": (Written(lambda m, x: x @ x.transpose(1, 2)), TOKENS),
    "parameter of rank 3": (Written(lambda m, x: m.w @ x, w=_weight(1, 6, 9)), TOKENS),
    "vector": (Written(lambda m, x: x @ m.w, w=_weight(8)), TOKENS),
    "addmm with alpha": (
        Written(
            lambda m, x: torch.addmm(m.b, x[:, 0], m.w, alpha=2.0), b=_weight(6), w=_weight(8, 6)
        ),
        TOKENS,
    ),
    "depthwise, one tap": (
        Written(lambda m, x: m.c(x), c=nn.Conv1d(8, 8, 1, groups=8)),
        CHANNELS_FIRST,
    ),
    "depthwise, four taps": (
        Written(lambda m, x: m.c(x), c=nn.Conv1d(8, 8, 4, groups=8, padding=3)),
        CHANNELS_FIRST,
    ),
    "one channel a group, three taps": (
        Written(lambda m, x: m.c(x), c=nn.Conv1d(8, 16, 3, groups=8, padding=1)),
        CHANNELS_FIRST,
    ),
    "kernel of three": (Written(lambda m, x: m.c(x), c=nn.Conv2d(8, 6, 3, padding=1)), IMAGE),
    "stride": (Written(lambda m, x: m.c(x), c=nn.Conv2d(8, 6, 1, stride=2)), IMAGE),
    "padding": (Written(lambda m, x: m.c(x), c=nn.Conv2d(8, 6, 1, padding=1)), IMAGE),
    "groups": (Written(lambda m, x: m.c(x), c=nn.Conv2d(8, 6, 1, groups=2)), IMAGE),
    "einsum, two contractions": (
        Written(lambda m, x: torch.einsum("bld,ld->b", x, m.w), w=_weight(9, 8)),
        TOKENS,
    ),
    "einsum, elementwise": (
        Written(lambda m, x: torch.einsum("bld,ld->bld", x, m.w), w=_weight(9, 8)),
        TOKENS,
    ),
    "einsum, broadcast": (
        Written(lambda m, x: torch.einsum("bkl,kcl->bkc", x, m.w), w=_weight(1, 6, 8)),
        TOKENS,
    ),
    "in place through a view": (Written(_in_place_through_a_view), TOKENS),
    "in place": (Written(_in_place, proj=nn.Linear(8, 6)), TOKENS),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_stay(name: str) -> None:
    module, x = NEAR_MISSES[name]
    assert_leaves_alone(normalize_linear, module, x)
