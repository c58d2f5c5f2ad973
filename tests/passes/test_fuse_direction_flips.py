"""fuse_direction_flips: flip, conv and scan, flip becomes `reverse`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ouro_compiler.graph import argument
from ouro_compiler.passes.fuse_direction_flips import fuse_direction_flips
from tests.helpers import randn
from tests.passes.graphs import Written, assert_leaves_alone, assert_pass, aten, calls, ouro

FLIP = aten.flip.default
CONV = ouro.causal_conv1d.default
SCAN = ouro.selective_scan.default
X = randn(0, 2, 6, 9)  # (B, D, L)
TOLERANCE = 1e-5


def _members() -> dict[str, Any]:
    return {
        "taps": randn(1, 6, 4),
        "A": -randn(2, 6, 3).abs(),
        "D": randn(3, 6),
        "proj": nn.Linear(6, 6 + 2 * 3),
        "norm": nn.LayerNorm(6),
        "mix": nn.Linear(6, 6),
        "gain": randn(4, 6, 1),
        "positions": randn(5, 6, 9),
    }


def _direction(m: Any, xz: Tensor) -> Tensor:
    """conv, projections and scan of (B, 2 D, L)."""
    x, z = xz.chunk(2, dim=1)
    u = ouro.causal_conv1d(x, m.taps, None, True, False)
    delta, B, C = m.proj(u.permute(0, 2, 1)).split([6, 3, 3], dim=-1)
    return ouro.selective_scan(
        u,
        F.softplus(delta.transpose(1, 2)),
        m.A,
        B.transpose(1, 2).unsqueeze(1).contiguous(),
        C.transpose(1, 2),
        m.D,
        z,
    )


def _both(m: Any, x: Tensor) -> Tensor:
    xz = torch.cat([x, x * 0.5], dim=1)
    return _direction(m, xz) + _direction(m, xz.flip([-1])).flip([-1])


def test_a_scan_of_the_flipped_tokens_is_a_reversed_scan() -> None:
    gm = assert_pass(
        fuse_direction_flips,
        Written(_both, **_members()),
        X,
        before={FLIP: 2, CONV: 2, SCAN: 2},
        after={FLIP: 0, CONV: 2, SCAN: 2},
        tolerance=TOLERANCE,
    )
    for target in (CONV, SCAN):
        assert [argument(op, "reverse") for op in calls(gm, target)] == [False, True]


MOVES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "two flips": lambda m, x: x.flip(2).flip(-1),
    "transposed": lambda m, x: x.flip(2).transpose(1, 2).flip(1),
    "reshaped": lambda m, x: x.flip(2).reshape(-1, 2, 3, 9).flip(3),
    "unsqueezed and selected": lambda m, x: x.flip(2)[:, None].select(1, 0).flip(2),
    "part of the channels": lambda m, x: x.flip(2)[:, 1:4].flip(2),
    "concatenated": lambda m, x: torch.cat([x.flip(2), x.flip(2) * 2], 1).flip(2),
    "per channel": lambda m, x: (F.silu(x.flip(2)) * m.gain + 1.0).flip(2),
    "two flipped operands": lambda m, x: (x.flip(2) + (x * 2).flip(2)).flip(2),
    "linear": lambda m, x: m.mix(x.transpose(1, 2).flip(1)).flip(1),
    "norm": lambda m, x: m.norm(x.transpose(1, 2).flip(1)).flip(1),
    "size read": lambda m, x: (lambda y: y.reshape(y.shape[0], 6, 9))(x.flip(2)).flip(2),
}


@pytest.mark.parametrize("name", MOVES)
def test_flips_cancel_through_what_acts_per_token(name: str) -> None:
    members = {} if name not in ("per channel", "linear", "norm") else _members()
    assert_pass(
        fuse_direction_flips,
        Written(MOVES[name], **members),
        X,
        before={},
        after={FLIP: 0},
        tolerance=0.0 if not members else TOLERANCE,
    )


def test_residual_blocks_on_flipped_tokens() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        tokens = x.transpose(1, 2).flip(1)
        y, residual = ouro.add_norm(tokens, None, m.norm.weight, m.norm.bias, 1e-5, False, True)
        y = ouro.causal_conv1d(m.mix(y).transpose(1, 2), m.taps, None, False, True).transpose(1, 2)
        y, _ = ouro.add_norm(y, residual, m.norm.weight, m.norm.bias, 1e-5, False, True)
        return y.flip(1)

    gm = assert_pass(
        fuse_direction_flips,
        Written(forward, **_members()),
        X,
        before={FLIP: 2},
        after={FLIP: 0},
        tolerance=TOLERANCE,
    )
    assert calls(gm, CONV)[0].args[4] is False  # reverse of reverse


def test_a_region_that_cannot_be_rewritten_does_not_keep_another() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return _both(m, x), F.silu(x.flip(2))

    assert_pass(
        fuse_direction_flips,
        Written(forward, **_members()),
        X,
        before={FLIP: 3},
        after={FLIP: 1},
        tolerance=TOLERANCE,
    )


def _scan(m: Any, u: Tensor, other: Tensor) -> Tensor:
    return ouro.selective_scan(u, other, m.A, u[:, :3], u[:, 3:], m.D)


NEAR_MISSES: dict[str, Callable[[Any, Tensor], Any]] = {
    "not flipped back": lambda m, x: ouro.causal_conv1d(x.flip(2), m.taps),
    "flipped back and read": lambda m, x: (lambda y: (y.flip(2), y * 2))(
        ouro.causal_conv1d(x.flip(2), m.taps)
    ),
    "another axis back": lambda m, x: x.flip(2).flip(1),
    "channels": lambda m, x: ouro.causal_conv1d(x.flip(1), m.taps).flip(1),
    "two axes": lambda m, x: F.silu(x.flip(1, 2)).flip(1, 2),
    "one operand": lambda m, x: (x.flip(2) + x).flip(2),
    "positions": lambda m, x: (x.flip(2) + m.positions).flip(2),
    "delta not flipped": lambda m, x: _scan(m, x.flip(2), x * 2).flip(2),
    "linear over time": lambda m, x: F.linear(x.flip(2), m.positions).flip(2),
    "split over time": lambda m, x: x.flip(2)[..., :5].flip(2),
    "summed over time": lambda m, x: x.flip(2).sum(2, keepdim=True).flip(2),
    "flattened": lambda m, x: x.flip(2).reshape(-1, 54).flip(1),
    "in place": lambda m, x: x.flip(2).mul_(2.0).flip(2),
    "looks ahead and back": lambda m, x: F.avg_pool1d(x.flip(2), 3, 1, 1).flip(2),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_stay(name: str) -> None:
    assert_leaves_alone(fuse_direction_flips, Written(NEAR_MISSES[name], **_members()), X)
