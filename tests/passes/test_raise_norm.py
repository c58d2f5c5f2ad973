"""raise_norm: (add +) RMS or layer norm becomes ouro.add_norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ouro_compiler.passes.raise_norm import raise_norm
from tests.helpers import randn
from tests.passes.graphs import Written, assert_leaves_alone, assert_pass, aten, calls, ouro

ADD_NORM = ouro.add_norm.default
ADD = aten.add.Tensor
X = randn(0, 2, 9, 8)
EPS = 1e-5
W = randn(1, 8)


def _rms(m: Any, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * m.w


NORMS: dict[str, tuple[Callable[[Any, Tensor], Tensor], bool]] = {
    "layer_norm": (lambda m, x: F.layer_norm(x, (8,), m.w, m.b, EPS), False),
    "layer_norm without bias": (lambda m, x: F.layer_norm(x, (8,), m.w, None, EPS), False),
    "rms_norm": (lambda m, x: F.rms_norm(x, (8,), m.w, EPS), True),
    "rms_norm, default eps": (lambda m, x: F.rms_norm(x, (8,), m.w), True),
    "x * rsqrt * w": (_rms, True),
    "w * (rsqrt * x)": (
        lambda m, x: m.w * (torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS) * x),
        True,
    ),
    "x / sqrt * w": (
        lambda m, x: x / torch.sqrt(x.square().mean(2, keepdim=True) + EPS) * m.w,
        True,
    ),
}


def _module(forward: Callable[[Any, Tensor], Any]) -> Written:
    return Written(forward, w=W, b=randn(2, 8), proj=nn.Linear(8, 8))


@pytest.mark.parametrize("name", NORMS)
def test_norms_become_add_norm(name: str) -> None:
    function, rms = NORMS[name]
    gm = assert_pass(
        raise_norm,
        _module(function),
        X,
        before={ADD_NORM: 0},
        after={
            ADD_NORM: 1,
            aten.layer_norm.default: 0,
            aten.rms_norm.default: 0,
            aten.mul.Tensor: 0,
        },
        tolerance=1e-6,
    )
    (op,) = calls(gm, ADD_NORM)
    assert op.args[1] is None
    assert op.args[5:] == (rms, True)


@pytest.mark.parametrize("name", NORMS)
def test_the_sum_before_a_norm_is_taken_in(name: str) -> None:
    function, _ = NORMS[name]
    gm = assert_pass(
        raise_norm,
        _module(lambda m, x: function(m, x + m.proj(x))),
        X,
        before={ADD_NORM: 0},
        after={ADD_NORM: 1, ADD: 0},
        tolerance=1e-6,
    )
    (op,) = calls(gm, ADD_NORM)
    assert op.args[0].target is aten.linear.default  # the branch first
    assert op.args[1].op == "placeholder"


@pytest.mark.parametrize("name", ["layer_norm", "x * rsqrt * w"])
def test_other_uses_of_the_sum_read_the_second_output(name: str) -> None:
    function, _ = NORMS[name]

    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        stream = m.proj(x) + x
        early = stream * 2
        return function(m, stream), early, stream

    assert_pass(
        raise_norm,
        _module(forward),
        X,
        before={ADD: 1 if name == "layer_norm" else 2},
        after={ADD_NORM: 1, ADD: 0, aten.mul.Tensor: 1},
        tolerance=1e-6,
    )


def test_two_norms_of_one_sum() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        stream = m.proj(x) + x
        return _rms(m, stream) - F.layer_norm(stream, (8,), m.w, m.b)

    assert_pass(
        raise_norm,
        _module(forward),
        X,
        before={ADD_NORM: 0},
        after={ADD_NORM: 2, ADD: 0},
        tolerance=1e-6,
    )


def test_a_chain_of_blocks_hands_the_stream_on() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + m.proj(_rms(m, x))
        return m.proj(_rms(m, x)[:, 0])

    gm = assert_pass(
        raise_norm, _module(forward), X, before={}, after={ADD_NORM: 4, ADD: 0}, tolerance=1e-5
    )
    assert [op.args[1] is None for op in calls(gm, ADD_NORM)] == [True, False, False, False]


UNFOLDED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "alpha": lambda m, x: F.layer_norm(torch.add(x, m.proj(x), alpha=2), (8,), m.w, m.b),
    "broadcast": lambda m, x: F.layer_norm(x + x[:, :1], (8,), m.w, m.b),
    "position": lambda m, x: F.layer_norm(x + m.b, (8,), m.w, m.b),
    "scalar": lambda m, x: F.layer_norm(x + 1.0, (8,), m.w, m.b),
    "integers": lambda m, x: F.layer_norm(x + (x > 0).to(torch.int32), (8,), m.w, m.b),
}


@pytest.mark.parametrize("name", UNFOLDED)
def test_other_sums_stay_before_the_norm(name: str) -> None:
    gm = assert_pass(
        raise_norm,
        _module(UNFOLDED[name]),
        X,
        before={ADD: 1},
        after={ADD: 1, ADD_NORM: 1},
        tolerance=1e-6,
    )
    assert calls(gm, ADD_NORM)[0].args[1] is None


NEAR_MISSES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "no weight": lambda m, x: F.layer_norm(x, (8,)),
    "two dimensions": lambda m, x: F.layer_norm(x, (9, 8)),
    "weight of the input": lambda m, x: F.layer_norm(x, (8,), x[0, 0]),
    "fp64": lambda m, x: F.layer_norm(x.double(), (8,), m.w.double(), m.b.double()),
    "rms over tokens": lambda m, x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS) * m.w,
    "rms without eps": lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) * m.w,
    "rms of another": lambda m, x: (x + 1) * torch.rsqrt(x.pow(2).mean(-1, True) + EPS) * m.w,
    "cubes": lambda m, x: x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + EPS) * m.w,
    "rms without weight": lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, True) + EPS),
    "sqrt without division": lambda m, x: x * torch.sqrt(x.pow(2).mean(-1, True) + EPS) * m.w,
    "weight of one entry": lambda m, x: (
        x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * m.one
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_stay(name: str) -> None:
    module = Written(NEAR_MISSES[name], w=W, b=randn(2, 8), one=randn(3, 1))
    assert_leaves_alone(raise_norm, module, X)


def test_half_precision_stays() -> None:
    module = _module(lambda m, x: F.layer_norm(x, (8,), m.w, m.b)).to(torch.bfloat16)
    assert_leaves_alone(raise_norm, module, X.to(torch.bfloat16))
