"""fold_delta_bias: a scan's delta_bias moves into the linear that makes delta."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ouro_compiler.graph import argument, constant_names, get_constant
from ouro_compiler.passes.fold_delta_bias import fold_delta_bias
from tests.helpers import randn
from tests.passes.graphs import Written, assert_leaves_alone, assert_pass, aten, calls, ouro

SCAN = ouro.selective_scan.default
LINEAR = aten.linear.default
X = randn(0, 2, 9, 6)  # (B, L, D)


def _scan(m: Any, x: Tensor, delta: Tensor, bias: Tensor | None) -> Tensor:
    """delta (B, L, D)."""
    u = x.transpose(1, 2)
    return ouro.selective_scan(
        u, delta.transpose(1, 2), m.A, u[:, :3], u[:, 3:], m.D, None, bias, True
    )


def _module(forward: Callable[[Any, Tensor], Any], **members: Any) -> Written:
    members = {"dt_proj": nn.Linear(6, 6), "shift": randn(3, 6), **members}
    return Written(forward, A=-randn(1, 6, 3).abs(), D=randn(2, 6), **members)


def _without_bias(m: Any, x: Tensor) -> Tensor:
    return _scan(m, x, F.linear(x, m.dt_proj.weight), m.dt_proj.bias)


def _with_bias(m: Any, x: Tensor) -> Tensor:
    return _scan(m, x, m.dt_proj(x), m.dt_proj.bias)


@pytest.mark.parametrize("forward", [_without_bias, _with_bias])
def test_the_bias_moves(forward: Callable[[Any, Tensor], Tensor]) -> None:
    module = _module(forward)
    gm = assert_pass(
        fold_delta_bias,
        module,
        X,
        before={SCAN: 1, LINEAR: 1},
        after={SCAN: 1, LINEAR: 1},
        tolerance=1e-5,
    )
    (linear,), (scan,) = calls(gm, LINEAR), calls(gm, SCAN)
    assert argument(scan, "delta_bias") is None
    assert linear.args[2].target == "dt_proj.folded_bias"
    bias = module.dt_proj.bias * (2 if forward is _with_bias else 1)
    assert torch.equal(get_constant(gm, linear.args[2]), bias)


def test_a_bare_parameter_as_weight() -> None:
    gm = assert_pass(
        fold_delta_bias,
        _module(
            lambda m, x: _scan(m, x, F.linear(x, m.dt_weight), m.shift), dt_weight=randn(4, 6, 6)
        ),
        X,
        before={LINEAR: 1},
        after={LINEAR: 1},
        tolerance=1e-5,
    )
    assert "dt_weight_folded_bias" in constant_names(gm)


def _shared(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    delta = F.linear(x, m.dt_proj.weight)
    return _scan(m, x, delta, m.shift), delta


def _two_scans(m: Any, x: Tensor) -> Tensor:
    delta = F.linear(x, m.dt_proj.weight)
    return _scan(m, x, delta, m.shift) + _scan(m, x, delta, m.shift * 2)


NEAR_MISSES: dict[str, Callable[[Any, Tensor], Any]] = {
    "no bias": lambda m, x: _scan(m, x, m.dt_proj(x), None),
    "delta read elsewhere": _shared,
    "two scans": _two_scans,
    "no linear": lambda m, x: _scan(m, x, x * 0.5, m.shift),
    "activation between": lambda m, x: _scan(m, x, F.silu(m.dt_proj(x)), m.shift),
    "bias of the input": lambda m, x: _scan(m, x, m.dt_proj(x), x[0, 0]),
    "linear's bias of the input": lambda m, x: _scan(
        m, x, F.linear(x, m.dt_proj.weight, x[0, 0]), m.shift
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_stay(name: str) -> None:
    assert_leaves_alone(fold_delta_bias, _module(NEAR_MISSES[name]), X)


def test_half_precision_stays() -> None:
    module = _module(_without_bias).to(torch.bfloat16)
    assert_leaves_alone(fold_delta_bias, module, X.to(torch.bfloat16))
