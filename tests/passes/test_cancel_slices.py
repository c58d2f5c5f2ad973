"""cancel_slices: what is taken out of a concatenation is what went into it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ouro_compiler.passes.cancel_slices import cancel_slices
from tests.helpers import randn
from tests.passes.graphs import Written, assert_leaves_alone, assert_pass, aten, count, ouro

X = randn(0, 2, 4, 6)  # (B, C, L)
MAP = randn(1, 2, 4, 3, 5)  # (B, C, H, W)
CAT, STACK, SELECT, SLICE = (
    aten.cat.default,
    aten.stack.default,
    aten.select.int,
    aten.slice.Tensor,
)
JOINS = {CAT: 0, STACK: 0, SELECT: 0, SLICE: 0, aten.chunk.default: 0}


def _two(x: Tensor) -> list[Tensor]:
    return [x.sin(), x.cos()]


def _of_a_cat(m: Any, x: Tensor) -> Tensor:
    return torch.cat(_two(x), 1)[:, 4:]


def _of_a_stack(m: Any, x: Tensor) -> Tensor:
    return torch.stack(_two(x), 2)[:, :, 1]


def _by_chunks(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    first, second = torch.cat(_two(x), -1).chunk(2, -1)
    return second * 2, first


def _by_unbind(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    first, second = torch.stack(_two(x), 1).transpose(2, 3).unbind(1)
    return second * 2, first


def _through_views(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Groups of directions as one channel axis, tokens first, and back."""
    flat = torch.stack(_two(x), 1).reshape(-1, 8, 6).transpose(1, 2)  # (B, L, 2 C)
    back = flat.transpose(1, 2).reshape(-1, 2, 4, 6)
    return flat[..., 4:] * 2, back[:, 0]


def _through_the_rest(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Flips, splits, slices and selections along other axes; slices of slices; sums."""
    ahead = torch.stack(_two(x), 1)
    orders = torch.cat([ahead, ahead.flip(-1)], 1)  # (B, 4, C, L)
    low, high = orders.split([1, 3], dim=2)
    behind = orders[:, 2:].flip(-1)
    total = orders[:, :2] + behind
    return high[:, 3] * 2, low[:, 1], behind[:, 0], orders[:, :, 1:, 2][:, 3], total[:, 1]


@pytest.mark.parametrize(
    "forward",
    [_of_a_cat, _of_a_stack, _by_chunks, _by_unbind, _through_views],
    ids=lambda one: one.__name__.lstrip("_"),
)
def test_the_part_takes_its_place(forward: Callable[..., Any]) -> None:
    assert_pass(cancel_slices, Written(forward), X, before={}, after=JOINS)


def test_steps_on_the_way_are_made_again() -> None:
    gm = assert_pass(
        cancel_slices, Written(_through_the_rest), X, before={STACK: 1}, after={CAT: 0, STACK: 0}
    )
    assert count(gm, aten.split_with_sizes.default) == 2  # of the two orders that are read


def _all_orders(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    orders = ouro.cross_scan(x).reshape(-1, 16, 15).transpose(1, 2)
    return tuple(part * (k + 1) for k, part in enumerate(orders.chunk(4, -1)))


def test_orders_of_a_cross_scan() -> None:
    gm = assert_pass(
        cancel_slices,
        Written(_all_orders),
        MAP,
        before={ouro.cross_scan.default: 1},
        after={ouro.cross_scan.default: 0, aten.flip.default: 2},
    )
    assert count(gm, CAT, STACK, aten.chunk.default) == 0


def _merged(m: Any, x: Tensor) -> Tensor:
    orders = [x.flatten(2) * (k + 1) for k in range(4)]
    return ouro.cross_merge(torch.cat(orders, 1).reshape(-1, 4, 4, 15), 3, 5)


def test_a_merge_of_four_tensors_is_their_sum() -> None:
    gm = assert_pass(
        cancel_slices,
        Written(_merged),
        MAP,
        before={ouro.cross_merge.default: 1, CAT: 1},
        after={ouro.cross_merge.default: 0, CAT: 0},
    )
    assert count(gm, aten.add.Tensor) == 3
    assert count(gm, aten.flip.default) == 2


def _written(m: Any, x: Tensor) -> Tensor:
    both = torch.cat(_two(x), 1)
    part = both[:, 4:] + 1
    both.mul_(2)
    return part + both[:, :4]


LEFT_ALONE: dict[str, Callable[..., Any]] = {
    "no concatenation": lambda m, x: x[:, :2] * 2,
    "two of them": lambda m, x: torch.cat(_two(x), 1)[:, 2:6],
    "a step": lambda m, x: torch.cat(_two(x), 1)[:, ::2],
    "another axis": lambda m, x: torch.cat(_two(x), 1)[:, :, 0],
    "along the flip": lambda m, x: torch.cat(_two(x), 1).flip(1)[:, :4],
    "grouped otherwise": lambda m, x: torch.cat(_two(x), 1).reshape(-1, 4, 2, 6)[:, :, 0],
    "a sum of other things": lambda m, x: (torch.cat(_two(x), 1) + x.repeat(1, 2, 1))[:, :4],
    "a scaled sum": lambda m, x: torch.add(torch.cat(_two(x), 1), torch.cat(_two(x), 1), alpha=2)[
        :, :4
    ],
    "converted": lambda m, x: torch.cat([x.half(), x], 1)[:, :4],
    "written in place": _written,
    "merged otherwise": lambda m, x: ouro.cross_merge(
        x.reshape(-1, 1, 4, 6).repeat(1, 4, 1, 1), 2, 3
    ),
}


@pytest.mark.parametrize("forward", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_near_misses(forward: Callable[..., Any]) -> None:
    assert_leaves_alone(cancel_slices, Written(forward), X)
