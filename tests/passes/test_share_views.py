"""share_views: equal views of one tensor are one node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from ouro_compiler.passes.share_views import share_views
from tests.helpers import randn
from tests.passes.graphs import Written, assert_leaves_alone, assert_pass, aten

X = randn(0, 2, 4, 3, 5)  # (B, C, H, W)
VIEWS = (
    aten.flatten.using_ints,
    aten.transpose.int,
    aten.permute.default,
    aten.reshape.default,
)


def _columns(m: Any, x: Tensor) -> Tensor:
    """Spelled in two ways."""
    return x.transpose(2, 3).flatten(2).sin() + x.permute(0, 1, 3, 2).reshape(-1, 4, 15).cos()


def _chains(m: Any, x: Tensor) -> Tensor:
    """(B, L, C) in two ways, one of them longer than need be."""
    longer = x.flatten(2).unsqueeze(1).squeeze(1).transpose(1, 2)
    return longer.sin() + x.flatten(2).transpose(1, 2).cos()


@pytest.mark.parametrize("forward", [_columns, _chains], ids=["spellings", "chains"])
def test_equal_views_are_one(forward: Callable[..., Tensor]) -> None:
    gm = assert_pass(share_views, Written(forward), X, before={}, after={})
    assert sum(node.target in VIEWS for node in gm.graph.nodes) == 2


def _written(m: Any, x: Tensor) -> Tensor:
    y = x + 1
    before = y.flatten(2).clone()
    y.mul_(2)
    return before + y.flatten(2)


LEFT_ALONE: dict[str, Callable[..., Any]] = {
    "other orders": lambda m, x: x.transpose(2, 3).sin().sum() + x.transpose(1, 2).cos().sum(),
    "other shapes": lambda m, x: x.flatten(2).sin().sum() + x.flatten(1).cos().sum(),
    "other tensors": lambda m, x: x.sin().flatten(2) + x.cos().flatten(2),
    "written in place": _written,
}


@pytest.mark.parametrize("forward", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_near_misses(forward: Callable[..., Any]) -> None:
    assert_leaves_alone(share_views, Written(forward), X)
