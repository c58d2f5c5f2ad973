"""fuse_quantize_prologue: fires on each pattern, leaves near misses alone, equal, ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ouro_compiler.config import W4A4
from ouro_compiler.graph import argument
from ouro_compiler.passes.base import PassContext
from ouro_compiler.passes.fuse_quantize_prologue import fuse_quantize_prologue
from tests.helpers import randn
from tests.models import compiled_vim
from tests.passes.graphs import (
    Written,
    assert_leaves_alone,
    assert_pass,
    calls,
    count,
    ouro,
)

LENGTH, CHANNELS, STATES = 7, 6, 4
QUANTIZE = ouro.quantize_dynamic_outlier.default
NORM, CONV, GATE = (
    ouro.add_norm_quantize.default,
    ouro.causal_conv1d_quantize.default,
    ouro.gate_sum_quantize.default,
)
STATIC = (4, 8, 3)


def tokens() -> Tensor:
    """(B, L, K) with an outlier channel."""
    x = randn(1, 3, LENGTH, CHANNELS)
    x[..., 2] *= 9
    return x


def module(forward: Callable[[Any, Tensor], Any]) -> Written:
    return Written(
        forward,
        scale=torch.full((LENGTH,), 0.25),
        threshold=torch.full((LENGTH,), 2.0),
        zero=torch.full((LENGTH,), 7.0),
        weight=randn(2, CHANNELS),
        taps=randn(3, CHANNELS, 4),
        A=-randn(4, CHANNELS, STATES).abs(),
        mix=randn(5, STATES, CHANNELS),
    )


def quantize(m: Any, x: Tensor, reverse: bool = False, zero: Tensor | None = None) -> Any:
    return ouro.quantize_dynamic_outlier(x, m.scale, zero, m.threshold, *STATIC, reverse)


def norm(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return ouro.add_norm(x, x * 0.5, m.weight, None, 1e-5, True, True)


def conv(m: Any, x: Tensor, reverse: bool = False) -> Tensor:
    return ouro.causal_conv1d(x.transpose(1, 2), m.taps, None, True, reverse)


def scan(m: Any, x: Tensor, z: Tensor | None, reverse: bool = False) -> Tensor:
    B = (x @ m.mix.t()).transpose(1, 2)
    u = x.transpose(1, 2)
    return ouro.selective_scan(u, u * 0.1, m.A, B, B * 0.5, None, z, None, True, reverse)


# --- fires


def test_norm() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y, total = norm(m, x)
        return (*quantize(m, y), total)

    gm = assert_pass(
        fuse_quantize_prologue,
        module(forward),
        tokens(),
        before={QUANTIZE: 1, ouro.add_norm.default: 1},
        after={QUANTIZE: 0, ouro.add_norm.default: 0, NORM: 1},
    )
    assert argument(calls(gm, NORM)[0], "emit") is False


def test_norm_emits_what_something_else_reads() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y, total = norm(m, x)
        return (*quantize(m, y), total, y * 2)

    gm = assert_pass(
        fuse_quantize_prologue, module(forward), tokens(), before={QUANTIZE: 1}, after={NORM: 1}
    )
    assert argument(calls(gm, NORM)[0], "emit") is True


@pytest.mark.parametrize("emit", [False, True])
def test_norm_of_a_map(emit: bool) -> None:
    """As public VMamba code has it: norms of (B, H, W, K), linears of tokens."""

    def forward(m: Any, x: Tensor) -> Any:
        pixels = torch.cat([x, x[:, :-1]], 1)[:, : LENGTH - 1].unflatten(1, (2, -1))
        y, total = norm(m, pixels)
        scale, threshold = m.scale[1:], m.threshold[1:]
        static = (*STATIC, False)
        codes = ouro.quantize_dynamic_outlier(y.flatten(1, 2), scale, None, threshold, *static)
        return (*codes, total, y * 2) if emit else (*codes, total)

    gm = assert_pass(
        fuse_quantize_prologue,
        module(forward),
        tokens(),
        before={QUANTIZE: 1, ouro.add_norm.default: 1},
        after={QUANTIZE: 0, ouro.add_norm.default: 0, NORM: 1},
    )
    assert argument(calls(gm, NORM)[0], "emit") is emit


def test_the_second_quantizer_of_a_norm_stays() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y, _ = norm(m, x)
        return (*quantize(m, y), *quantize(m, y, True))

    assert_pass(
        fuse_quantize_prologue,
        module(forward),
        tokens(),
        before={QUANTIZE: 2},
        after={NORM: 1, QUANTIZE: 1},
    )


@pytest.mark.parametrize("reverse", [False, True])
def test_convolution(reverse: bool) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        u = conv(m, x, reverse)
        return (*quantize(m, u.transpose(1, 2), reverse), u * 2)

    assert_pass(
        fuse_quantize_prologue,
        module(forward),
        tokens(),
        before={QUANTIZE: 1, ouro.causal_conv1d.default: 1},
        after={QUANTIZE: 0, ouro.causal_conv1d.default: 0, CONV: 1},
    )


def both_directions(m: Any, x: Tensor) -> Tensor:
    z = (x + 1).transpose(1, 2)
    return scan(m, x, z) + scan(m, x, z, True)


@pytest.mark.parametrize("scaled", [lambda y: y, lambda y: y / 2, lambda y: y * 0.3])
def test_gate_and_sum_of_directions(scaled: Callable[[Tensor], Tensor]) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        return quantize(m, scaled(both_directions(m, x)).transpose(1, 2))

    gm = assert_pass(
        fuse_quantize_prologue, module(forward), tokens(), before={QUANTIZE: 1}, after={GATE: 1}
    )
    assert all(argument(node, "z") is None for node in calls(gm, ouro.selective_scan.default))
    assert argument(calls(gm, GATE)[0], "emit") is False


def test_gate_of_one_direction_and_a_reader_of_the_value() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = scan(m, x, (x + 1).transpose(1, 2)).transpose(1, 2)
        return (*quantize(m, y), y * 2)

    gm = assert_pass(
        fuse_quantize_prologue, module(forward), tokens(), before={QUANTIZE: 1}, after={GATE: 1}
    )
    assert argument(calls(gm, GATE)[0], "emit") is True


def test_a_compiled_model_is_fused_and_equal() -> None:
    compiled = compiled_vim(W4A4)
    gm = compiled.graph_module
    assert [count(gm, op) for op in (NORM, CONV, GATE)] == [1, 2, 1]
    assert not fuse_quantize_prologue(gm, PassContext())


# --- leaves alone


def asymmetric(m: Any, x: Tensor) -> Any:
    return quantize(m, norm(m, x)[0], zero=m.zero)


def other_tokens(m: Any, x: Tensor) -> Any:
    """A map whose columns follow each other is no view of the norm's rows."""
    y, _ = norm(m, torch.cat([x, x], 1)[:, : 2 * LENGTH].unflatten(1, (LENGTH, 2)))
    args = (torch.cat([m.scale] * 2), None, torch.cat([m.threshold] * 2), *STATIC, False)
    return ouro.quantize_dynamic_outlier(y.transpose(1, 2).flatten(1, 2), *args)


def other_direction(m: Any, x: Tensor) -> Any:
    return quantize(m, conv(m, x).transpose(1, 2), True)


def untransposed_convolution(m: Any, x: Tensor) -> Any:
    square = x[:, :CHANNELS]
    u = ouro.causal_conv1d(square, m.taps, None, True, False)
    args = (u, m.scale[:CHANNELS], None, m.threshold[:CHANNELS], *STATIC, False)
    return ouro.quantize_dynamic_outlier(*args)


def different_gates(m: Any, x: Tensor) -> Any:
    y = scan(m, x, x.transpose(1, 2)) + scan(m, x, (x + 1).transpose(1, 2), True)
    return quantize(m, y.transpose(1, 2))


def no_gate(m: Any, x: Tensor) -> Any:
    return quantize(m, scan(m, x, None).transpose(1, 2))


def inexact_division(m: Any, x: Tensor) -> Any:
    return quantize(m, (both_directions(m, x) / 3).transpose(1, 2))


def sum_read_elsewhere(m: Any, x: Tensor) -> Any:
    y = both_directions(m, x)
    return (*quantize(m, (y / 2).transpose(1, 2)), y)


def scan_read_elsewhere(m: Any, x: Tensor) -> Any:
    z = x.transpose(1, 2)
    first = scan(m, x, z)
    return (*quantize(m, (first + scan(m, x, z, True)).transpose(1, 2)), first)


def one_scan_twice(m: Any, x: Tensor) -> Any:
    y = scan(m, x, x.transpose(1, 2))
    return quantize(m, (y + y).transpose(1, 2))


@pytest.mark.parametrize(
    "forward",
    [
        asymmetric,
        other_tokens,
        other_direction,
        untransposed_convolution,
        different_gates,
        no_gate,
        inexact_division,
        sum_read_elsewhere,
        scan_read_elsewhere,
        one_scan_twice,
    ],
)
def test_leaves_alone(forward: Callable[[Any, Tensor], Any]) -> None:
    assert_leaves_alone(fuse_quantize_prologue, module(forward), tokens())
