"""The formulas of gradients in double: gradcheck of the operators, autograd of the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ouro_compiler.ops  # noqa: F401  (registers torch.ops.ouro)
from ouro_compiler.ops.chunked_scan import selective_scan_backward
from ouro_compiler.ops.selective_scan import selective_scan_ref
from tests.helpers import assert_close, randn

scan, conv = torch.ops.ouro.selective_scan, torch.ops.ouro.causal_conv1d
DIRECTIONS = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
# Kernels, where another test registered them, leave double to the references.
pytestmark = pytest.mark.filterwarnings("ignore::ouro_compiler.kernels.dispatch.ReferenceWarning")


def _leaf(seed: int, *shape: int) -> Tensor:
    return randn(seed, *shape).double().requires_grad_()


def _scan_args(
    groups: int | None, softplus: bool, reverse: bool, absent: tuple[str, ...] = (), length: int = 5
) -> list[Any]:
    """u, delta, A, B, C, D, z, delta_bias, flags: two samples of four channels."""
    grouped = () if groups is None else (groups,)
    args: list[Any] = [_leaf(seed, 2, 4, length) for seed in (1, 2)]
    args += [(-_leaf(3, 4, 3).detach().abs()).requires_grad_()]
    args += [_leaf(seed, 2, *grouped, 3, length) for seed in (4, 5)]
    args += [_leaf(6, 4), _leaf(7, 2, 4, length), _leaf(8, 4)]
    args = [None if name in absent else a for name, a in zip(NAMES, args, strict=True)]
    return [*args, softplus, reverse]


@DIRECTIONS
@pytest.mark.parametrize(
    ("groups", "absent", "softplus"),
    [(None, (), True), (2, ("z",), False), (1, ("D", "z", "delta_bias"), True)],
)
def test_gradcheck_of_the_scan(
    groups: int | None, absent: tuple[str, ...], softplus: bool, reverse: bool
) -> None:
    """The formula of the backward against differences of the operator."""
    assert torch.autograd.gradcheck(scan, _scan_args(groups, softplus, reverse, absent))


@DIRECTIONS
@pytest.mark.parametrize(("silu", "with_bias"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(("length", "taps"), [(5, 4), (2, 4), (3, 1)])
def test_gradcheck_of_the_convolution(
    length: int, taps: int, silu: bool, with_bias: bool, reverse: bool
) -> None:
    bias = _leaf(2, 3) if with_bias else None
    args = (_leaf(0, 2, 3, length), _leaf(1, 3, taps), bias, silu, reverse)
    assert torch.autograd.gradcheck(conv, args)


@DIRECTIONS
def test_the_definition_and_the_formula_agree_to_the_rounding_of_double(reverse: bool) -> None:
    args = _scan_args(2, True, reverse, length=9)
    grad = randn(0, 2, 4, 9).double()
    y = selective_scan_ref(*args)
    assert y.dtype == torch.float64
    expected = torch.autograd.grad(y, args[:8], grad)
    with torch.no_grad():
        found = selective_scan_backward(grad, *args)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, 1e-12)
