"""remove_noops: what does nothing at inference goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ouro_compiler.passes.remove_noops import remove_noops
from tests.helpers import randn
from tests.passes.graphs import (
    Written,
    assert_leaves_alone,
    assert_pass,
    assert_same,
    aten,
    capture_small,
    outputs,
    run,
)

X = randn(0, 2, 9, 8)
NOOPS: dict[str, tuple[Callable[[Any, Tensor], Tensor], Any]] = {
    "cast to its dtype": (lambda m, x: x.to(torch.float32) * 2, aten.to.dtype),
    "float": (lambda m, x: x.float() * 2, aten.to.dtype),
    "eval dropout": (lambda m, x: F.dropout(x, 0.5, training=False) * 2, aten.dropout.default),
    "dropout of nothing": (lambda m, x: F.dropout(x, 0.0, training=True) * 2, aten.dropout.default),
    "full slice": (lambda m, x: x[:, :, :] * 2, aten.slice.Tensor),
    "slice to the length": (lambda m, x: x[:, : x.shape[1]] * 2, aten.slice.Tensor),
    "slice past the length": (lambda m, x: x[:, :100] * 2, aten.slice.Tensor),
    "slice to the batch": (lambda m, x: x[: x.shape[0]] * 2, aten.slice.Tensor),
    "detach": (lambda m, x: x.detach() * 2, aten.detach.default),
    "alias": (lambda m, x: aten.alias(x) * 2, aten.alias.default),
}


@pytest.mark.parametrize("name", NOOPS)
def test_noops_go(name: str) -> None:
    function, target = NOOPS[name]
    assert_pass(
        remove_noops,
        Written(function),
        X,
        before={},
        after={target: 0, aten._assert_tensor_metadata.default: 0, aten.mul.Tensor: 1},
    )


def test_a_chain_of_noops_goes_at_once() -> None:
    assert_pass(
        remove_noops,
        Written(lambda m, x: F.dropout(x.float().detach(), 0.1, training=False)[:, :9] * 2),
        X,
        before={aten.to.dtype: 1, aten.dropout.default: 1},
        after={aten.to.dtype: 0, aten.dropout.default: 0, aten.slice.Tensor: 0},
    )


def _copy_kept_intact(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 2
    kept = y.to(torch.float32, copy=True)
    y.add_(1)
    return kept, y


NEAR_MISSES: dict[str, Callable[[Any, Tensor], Any]] = {
    "slice of all but one": lambda m, x: x[:, :8] * 2,
    "slice of all but the first": lambda m, x: x[:, 1:] * 2,
    "step": lambda m, x: x[:, ::2] * 2,
    "slice of the samples": lambda m, x: x[:1] * 2,
    "nothing to do": lambda m, x: x * 2,
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_stay(name: str) -> None:
    assert_leaves_alone(remove_noops, Written(NEAR_MISSES[name]), X)


def test_a_cast_to_another_dtype_stays() -> None:
    module = Written(lambda m, x: x.to(torch.float64) * 2)
    assert_pass(
        remove_noops,
        module,
        X,
        before={aten.to.dtype: 1, aten._assert_tensor_metadata.default: 1},
        after={aten.to.dtype: 1, aten._assert_tensor_metadata.default: 0},
    )


def test_active_dropout_stays() -> None:
    assert_leaves_alone(remove_noops, Written(lambda m, x: F.dropout(x, 0.5, training=True)), X)


def test_a_copy_of_what_is_overwritten_stays() -> None:
    gm = capture_small(Written(_copy_kept_intact), X)
    expected = outputs(gm, X)
    run(gm, remove_noops)
    assert_same(outputs(gm, X), expected, 0.0)
