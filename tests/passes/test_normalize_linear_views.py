"""normalize_linear: what it does to views, before, between and behind linears."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ouro_compiler.errors import ModelError
from ouro_compiler.graph import value_of
from ouro_compiler.passes.base import PassContext
from ouro_compiler.passes.normalize_linear import normalize_linear
from ouro_compiler.passes.raise_causal_conv1d import raise_causal_conv1d
from tests.helpers import REPEATABLE, randn
from tests.passes.graphs import (
    Written,
    assert_pass,
    assert_same,
    aten,
    calls,
    capture_small,
    count,
    ouro,
    outputs,
    run,
)

LINEAR = aten.linear.default
RESHAPE = aten.reshape.default
PERMUTE = aten.permute.default
TOLERANCE = 1e-6
TOKENS = randn(0, 2, 9, 8)
CHANNELS_FIRST = randn(1, 2, 8, 9)
IMAGE = randn(2, 2, 8, 3, 5)


FLATTENINGS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "reshape": lambda m, x: m.proj(x.reshape(-1, 8)).reshape(-1, 9, 6),
    "flatten": lambda m, x: m.proj(x.flatten(0, 1)).unflatten(0, (-1, 9)),
    "from channels first": lambda m, x: m.proj(
        x.transpose(1, 2).contiguous().transpose(1, 2).reshape(-1, 8)
    ).view(-1, 9, 6),
    "tokens before samples": lambda m, x: (
        m.proj(x.transpose(0, 1).reshape(-1, 8)).reshape(9, -1, 6).transpose(0, 1)
    ),
    "tokens outermost": lambda m, x: m.proj(x.transpose(0, 1)).transpose(0, 1),
    "unit dimension": lambda m, x: m.proj(x.reshape(-1, 8)[None]).squeeze(0).reshape(-1, 9, 6),
}


@pytest.mark.parametrize("name", FLATTENINGS)
def test_a_flattened_linear_moves_in_front_of_the_flattening(name: str) -> None:
    gm = assert_pass(
        normalize_linear,
        Written(FLATTENINGS[name], proj=nn.Linear(8, 6)),
        TOKENS,
        before={LINEAR: 1},
        after={LINEAR: 1, RESHAPE: 0, PERMUTE: 0, aten.view.default: 0, aten.flatten.using_ints: 0},
        tolerance=TOLERANCE,
    )
    (linear,) = calls(gm, LINEAR)
    assert linear.args[0].op == "placeholder"


def test_splits_slices_and_activations_between_flattened_linears_move_along() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        length = x.shape[2]
        wide = m.x_proj(x.permute(0, 2, 1).reshape(-1, 8))
        dt = m.dt_proj.weight @ F.silu(wide[:, :2]).t()
        B, C = wide[:, 2:].split([3, 3], dim=-1)
        return (
            dt.reshape(5, -1, length).permute(1, 0, 2),
            B.reshape(-1, length, 3).permute(0, 2, 1).contiguous(),
            C.reshape(-1, length, 3).permute(0, 2, 1).contiguous(),
        )

    gm = assert_pass(
        normalize_linear,
        Written(forward, x_proj=nn.Linear(8, 8), dt_proj=nn.Linear(2, 5)),
        CHANNELS_FIRST,
        before={LINEAR: 1, aten.matmul.default: 1},
        after={
            LINEAR: 2,
            aten.matmul.default: 0,
            RESHAPE: 0,
            aten.contiguous.default: 0,
            aten.t.default: 0,
            PERMUTE: 4,
        },
        tolerance=TOLERANCE,
    )
    assert all(value_of(linear.args[0]).dim() == 3 for linear in calls(gm, LINEAR))


def test_a_linear_on_four_dimensions_becomes_one_on_tokens() -> None:
    gm = assert_pass(
        normalize_linear,
        Written(lambda m, x: m.proj(x.permute(0, 2, 3, 1)), proj=nn.Linear(8, 6)),
        IMAGE,
        before={LINEAR: 1},
        after={LINEAR: 1},
        tolerance=TOLERANCE,
    )
    assert value_of(calls(gm, LINEAR)[0].args[0]).shape[1:] == (15, 8)


CHAINS: dict[str, tuple[Callable[[Any, Tensor], Tensor], int, int]] = {
    "round trip": (
        lambda m, x: x.permute(2, 0, 1).reshape(8, -1).reshape(8, -1, 9).permute(1, 2, 0) * 2,
        0,
        0,
    ),
    "one transpose": (
        lambda m, x: x.permute(2, 0, 1).reshape(8, -1).reshape(8, -1, 9).permute(1, 0, 2) * 2,
        1,
        0,
    ),
    "split in one way and then another": (
        lambda m, x: (
            x[:, :6]
            .transpose(1, 2)
            .reshape(-1, 6)
            .reshape(-1, 2, 3)
            .reshape(-1, 6)
            .reshape(-1, 3, 2)
            .reshape(-1, 2)
            * 2
        ),
        1,
        2,
    ),
    "a split axis": (
        lambda m, x: x.reshape(-1, 3, 3, 8).permute(0, 3, 1, 2).flatten(2).transpose(1, 2) * 2,
        0,
        0,
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_of_views_is_as_short_as_it_can_be(name: str) -> None:
    function, permutes, reshapes = CHAINS[name]
    assert_pass(
        normalize_linear,
        Written(function),
        TOKENS,
        before={},
        after={PERMUTE: permutes, RESHAPE: reshapes, aten.transpose.int: 0},
    )


def test_view_becomes_reshape() -> None:
    assert_pass(
        normalize_linear,
        Written(lambda m, x: x.view(x.shape[0], 3, 24) * 2),
        TOKENS,
        before={aten.view.default: 1},
        after={aten.view.default: 0, RESHAPE: 1},
    )


def test_tokens_of_windows_stay_tokens_of_windows() -> None:
    """The dynamic axis counts windows: a source does not say what its axes are made of."""

    def forward(m: Any, x: Tensor) -> Tensor:
        windows = x.reshape(-1, 4, 8) * 2
        return m.dt(F.silu(m.proj(windows.reshape(-1, 8)))[:, :2]).reshape(-1, 4, 3)

    gm = assert_pass(
        normalize_linear,
        Written(forward, proj=nn.Linear(8, 6), dt=nn.Linear(2, 3)),
        randn(3, 2, 16, 8),
        before={LINEAR: 2},
        after={LINEAR: 2, RESHAPE: 1},
        tolerance=TOLERANCE,
    )
    assert [value_of(linear.args[0]).shape[1] for linear in calls(gm, LINEAR)] == [4, 4]


class Rearranged(nn.Module):
    """Views and linears in an order drawn from numbers; any list of numbers is a program."""

    def __init__(self, numbers: list[int]) -> None:
        super().__init__()
        self.numbers = numbers
        self.layers = nn.ModuleList(nn.Linear(k, o) for k, o in ((8, 6), (6, 8), (4, 6), (2, 4)))

    def forward(self, x: Tensor) -> Tensor:
        for number in self.numbers:
            kind, choice = number % 6, number // 6
            static = [axis for axis, size in enumerate(x.shape) if isinstance(size, int)]
            if kind == 0:
                x = x.transpose(choice % x.dim(), (choice // x.dim()) % x.dim())
            elif kind == 1 and x.dim() > 2:
                axis = choice % (x.dim() - 1)
                x = x.flatten(axis, axis + 1)
            elif kind == 2 and static and x.dim() < 6:
                axis = static[choice % len(static)]
                if x.shape[axis] % 2 == 0:
                    x = x.unflatten(axis, (2, -1) if choice % 2 else (-1, 2))
            elif kind == 3:
                fitting = [one for one in self.layers if one.in_features == x.shape[-1]]
                x = fitting[0](x) if fitting else x.contiguous()
            elif kind == 4 and static:
                axis = static[choice % len(static)]
                x = x.narrow(axis, 0, max(1, x.shape[axis] - 1)) if choice % 3 == 0 else x
            else:
                x = F.silu(x) if choice % 2 else x.unsqueeze(choice % (x.dim() + 1))
        return x


@settings(REPEATABLE, max_examples=40)
@given(numbers=st.lists(st.integers(0, 120), min_size=2, max_size=9))
def test_any_arrangement_computes_the_same(numbers: list[int]) -> None:
    torch.manual_seed(0)
    x = randn(4, 2, 6, 8)
    try:
        gm = capture_small(Rearranged(numbers), x)
    except ModelError as error:  # some arrangements fix the batch while torch traces them
        if "Constraints violated (batch)" not in str(error):
            raise
        reject()
    expected = outputs(gm, x)
    run(gm, normalize_linear)
    assert_same(outputs(gm, x), expected, 1e-5)
    assert not normalize_linear(gm, PassContext())


def test_views_that_only_look_like_the_layout_are_not_taken_for_it() -> None:
    """(B L) read as (L B): sizes multiply to the same, tokens would be mixed up."""
    module = Written(
        lambda m, x: m.proj(x.reshape(-1, 8)).reshape(9, x.shape[0], 6).permute(1, 0, 2) * 1,
        proj=nn.Linear(8, 6),
    )
    gm = capture_small(module, TOKENS)
    batch = randn(7, 5, 9, 8)
    expected = gm(batch)
    run(gm, normalize_linear)
    assert count(gm, RESHAPE) >= 1
    torch.testing.assert_close(gm(batch), expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_reshape_that_mixes_axes_is_a_source_of_its_own() -> None:
    """(6, 9) read as (27, 2) has no whole axis in common with it."""
    gm = assert_pass(
        normalize_linear,
        Written(lambda m, x: m.proj(x.reshape(-1, 27, 2).flatten(0, 1)), proj=nn.Linear(2, 3)),
        randn(6, 2, 6, 9),
        before={LINEAR: 1},
        after={LINEAR: 1, RESHAPE: 2},
        tolerance=TOLERANCE,
    )
    assert value_of(calls(gm, LINEAR)[0].args[0]).shape[1:] == (27, 2)


def test_views_survive_the_layouts_that_later_passes_choose() -> None:
    """silu is laid out as (B, D, L), the op that replaces it as (B, L, D)."""
    module = Written(
        lambda m, x: F.silu(m.conv1d(x)[..., :9]).view(x.shape[0], 2, 4, 9) * 2,
        conv1d=nn.Conv1d(8, 8, 4, groups=8, padding=3),
    )
    gm = capture_small(module, CHANNELS_FIRST)
    expected = outputs(gm, CHANNELS_FIRST)
    run(gm, normalize_linear, raise_causal_conv1d)
    assert count(gm, ouro.causal_conv1d.default) == 1
    assert_same(outputs(gm, CHANNELS_FIRST), expected, TOLERANCE)
