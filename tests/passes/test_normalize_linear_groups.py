"""normalize_linear on grouped convolutions over one position: a linear a group."""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from ouro_compiler.graph import value_of
from ouro_compiler.passes.normalize_linear import normalize_linear
from tests.helpers import randn
from tests.passes.graphs import Written, assert_pass, aten, calls

LINEAR = aten.linear.default
TOLERANCE = 1e-6
CHANNELS_FIRST = randn(1, 2, 8, 9)


def _weight(*shape: int) -> Tensor:
    return randn(3, *shape) * 0.3


@pytest.mark.parametrize("bias", [True, False])
def test_grouped_conv1d_is_one_linear_a_group(bias: bool) -> None:
    gm = assert_pass(
        normalize_linear,
        Written(lambda m, x: m.x_proj(x), x_proj=nn.Conv1d(8, 6, 1, groups=2, bias=bias)),
        CHANNELS_FIRST,
        before={aten.conv1d.default: 1},
        after={aten.conv1d.default: 0, LINEAR: 2, aten.cat.default: 1},
        tolerance=TOLERANCE,
    )
    names = [linear.args[1].target for linear in calls(gm, LINEAR)]
    assert names == ["x_proj.weight_0", "x_proj.weight_1"]
    assert [value_of(one.args[0]).shape[1:] for one in calls(gm, LINEAR)] == [(9, 4), (9, 4)]


@pytest.mark.parametrize(("inputs", "results"), [(1, 3), (4, 1)])
def test_groups_of_one_channel_in_or_out(inputs: int, results: int) -> None:
    """VMamba's dt_proj of rank 1 is no depthwise convolution, nor are projections to one value."""
    gm = assert_pass(
        normalize_linear,
        Written(lambda m, x: m.c(x), c=nn.Conv1d(2 * inputs, 2 * results, 1, groups=2)),
        CHANNELS_FIRST[:, : 2 * inputs],
        before={aten.conv1d.default: 1},
        after={aten.conv1d.default: 0, LINEAR: 2},
        tolerance=TOLERANCE,
    )
    shapes = [value_of(one.args[1]).shape for one in calls(gm, LINEAR)]
    assert shapes == [(results, inputs)] * 2


def test_parts_of_one_parameter_are_weights() -> None:
    """VMamba's cascade: two of four directions at a time, and one alone."""
    gm = assert_pass(
        normalize_linear,
        Written(
            lambda m, x: (
                F.conv1d(x, m.w[2:].contiguous().view(6, 4, 1), groups=2),
                m.w[0] @ x[:, :4],
            ),
            w=_weight(4, 3, 4),
        ),
        CHANNELS_FIRST,
        before={aten.conv1d.default: 1, aten.matmul.default: 1},
        after={aten.conv1d.default: 0, aten.matmul.default: 0, LINEAR: 3},
        tolerance=TOLERANCE,
    )
    assert [one.args[1].target for one in calls(gm, LINEAR)] == ["w_0", "w_1", "w_2d"]


def test_grouped_conv1d_over_directions() -> None:
    """VMamba: (B, K, D, L) through a bare parameter (K, c, D) of all directions."""
    gm = assert_pass(
        normalize_linear,
        Written(
            lambda m, x: F.conv1d(
                x.view(x.shape[0], 8, 9), m.x_proj_weight.view(6, 4, 1), groups=2
            ).view(x.shape[0], 2, 3, 9),
            x_proj_weight=_weight(2, 3, 4),
        ),
        CHANNELS_FIRST.reshape(2, 2, 4, 9),
        before={aten.conv1d.default: 1},
        after={aten.conv1d.default: 0, LINEAR: 2},
        tolerance=TOLERANCE,
    )
    names = [linear.args[1].target for linear in calls(gm, LINEAR)]
    assert names == ["x_proj_weight_0", "x_proj_weight_1"]
