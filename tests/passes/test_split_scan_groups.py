"""split_scan_groups: one scan a group, which computes what it did."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from ouro_compiler.graph import argument, value_of
from ouro_compiler.passes.split_scan_groups import split_scan_groups
from tests.helpers import randn
from tests.passes.graphs import Written, assert_leaves_alone, assert_pass, aten, calls, ouro

SCAN = ouro.selective_scan.default
CHANNELS, STATES = 8, 3
X = randn(0, 2, CHANNELS, 10)  # (B, G * E, L)


def _scan(m: Any, x: Tensor, groups: int, **operands: Any) -> Tensor:
    """B and C (B, G, N, L) of one input, whose channels are u."""
    B = x[:, : groups * STATES].unflatten(1, (groups, STATES))
    return ouro.selective_scan(x, x.sigmoid(), m.A, B, B.flip(1), m.D, **operands)


def _module(groups: int, *, everything: bool) -> Written:
    def forward(m: Any, x: Tensor) -> Tensor:
        if not everything:
            return _scan(m, x, groups)
        given = {"z": x.tanh(), "delta_bias": m.bias, "delta_softplus": True, "reverse": True}
        return _scan(m, x, groups, **given)

    members = {"A": -randn(1, CHANNELS, STATES).abs(), "D": randn(2, CHANNELS)}
    return Written(forward, **members, bias=randn(3, CHANNELS))


@pytest.mark.parametrize("everything", [False, True], ids=["least", "every operand"])
def test_one_scan_a_group(everything: bool) -> None:
    gm = assert_pass(
        split_scan_groups,
        _module(2, everything=everything),
        X,
        before={SCAN: 1},
        after={SCAN: 2, aten.cat.default: 1},
    )
    for scan in calls(gm, SCAN):
        assert value_of(scan).shape[1] == CHANNELS // 2
        assert value_of(argument(scan, "B")).shape[1:] == (STATES, 10)
        assert value_of(argument(scan, "A")).shape[0] == CHANNELS // 2
        assert argument(scan, "reverse") == argument(scan, "delta_softplus") == everything
        for name in ("z", "delta_bias"):
            assert (argument(scan, name) is not None) == everything


def test_a_scan_of_one_group_is_left_alone() -> None:
    assert_leaves_alone(split_scan_groups, _module(1, everything=True), X)


def test_a_scan_without_groups_is_left_alone() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return ouro.selective_scan(x, x.sigmoid(), m.A, x[:, :STATES], x[:, -STATES:], m.D)

    module = Written(forward, A=-randn(1, CHANNELS, STATES).abs(), D=randn(2, CHANNELS))
    assert_leaves_alone(split_scan_groups, module, X)
