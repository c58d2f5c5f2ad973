"""fold_constants: what depends on parameters alone is computed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ouro_compiler.graph import constant_names, get_constant
from ouro_compiler.passes.fold_constants import fold_constants
from tests.helpers import randn
from tests.passes.graphs import (
    Written,
    assert_leaves_alone,
    assert_pass,
    aten,
    capture_small,
    run,
)

X = randn(0, 2, 9, 8)


def test_a_chain_folds_into_one_buffer() -> None:
    module = Written(lambda m, x: x * -torch.exp(m.A_log), A_log=randn(1, 8))
    gm = assert_pass(
        fold_constants,
        module,
        X,
        before={aten.exp.default: 1, aten.neg.default: 1},
        after={aten.exp.default: 0, aten.neg.default: 0, aten.mul.Tensor: 1},
    )
    assert constant_names(gm) == {"A_log_folded"}
    assert dict(gm.named_parameters()) == {}  # what nothing reads is dropped


def test_an_intermediate_value_that_is_read_is_kept() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        scaled = m.w * 2
        return x * scaled + torch.exp(scaled)

    gm = assert_pass(
        fold_constants,
        Written(forward, w=randn(1, 8)),
        X,
        before={aten.mul.Tensor: 2, aten.exp.default: 1},
        after={aten.mul.Tensor: 1, aten.exp.default: 0, aten.add.Tensor: 1},
    )
    assert len(constant_names(gm)) == 2


def test_sums_and_parts_of_parameters() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        first, second = m.w.chunk(2)
        return x * (first + m.b) + second

    assert_pass(
        fold_constants,
        Written(forward, w=randn(1, 16), b=randn(2, 8)),
        X,
        before={aten.chunk.default: 1, aten.add.Tensor: 2},
        after={aten.chunk.default: 0, aten.add.Tensor: 1},
    )


def test_values_are_those_of_the_graph() -> None:
    weight = randn(1, 4, 8)
    module = Written(lambda m, x: x @ m.w.transpose(0, 1).contiguous(), w=weight)
    gm = capture_small(module, X)
    run(gm, fold_constants)
    (name,) = constant_names(gm)
    node = next(node for node in gm.graph.nodes if node.op == "get_attr")
    assert name == "w_folded"
    assert torch.equal(get_constant(gm, node), weight.t())


def test_parts_of_a_stacked_parameter_carry_their_number() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        decay = -torch.exp(m.A_logs.unflatten(0, (2, -1))[1])
        return x @ m.w[0] + x @ m.w[1] + x * decay

    gm = capture_small(Written(forward, w=randn(1, 2, 8, 8), A_logs=randn(2, 2, 8)), X)
    run(gm, fold_constants)
    assert constant_names(gm) == {"w_0", "w_1", "A_logs_1_folded"}


NEAR_MISSES: dict[str, Callable[[Any, Tensor], Any]] = {
    "depends on the input": lambda m, x: torch.exp(x) * m.w,
    "expanded": lambda m, x: x * m.w.expand(9, 8),
    "expanded to the batch": lambda m, x: x + m.w.expand(x.shape[0], 9, 8),
    "random": lambda m, x: x * torch.rand_like(m.w),
    "new tensor": lambda m, x: x + torch.ones(8),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_stay(name: str) -> None:
    assert_leaves_alone(fold_constants, Written(NEAR_MISSES[name], w=randn(1, 8)), X)


def test_quantized_weights_stay_packed() -> None:
    codes = torch.randint(-7, 8, (8, 8), dtype=torch.int8)

    def forward(m: Any, x: Tensor) -> Tensor:
        return x @ torch.ops.ouro.dequantize_weight(m.codes, m.scale, None, 8, 8)

    module = Written(forward, scale=randn(1, 8).abs())
    module.register_buffer("codes", codes)
    assert_leaves_alone(fold_constants, module, X)


def test_a_buffer_that_is_written_to_is_read_each_time() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        before = m.steps * 2
        m.steps.add_(1)
        return x * before

    module = Written(forward)
    module.register_buffer("steps", torch.zeros(8))
    gm = capture_small(module, X)
    run(gm, fold_constants)
    first, second = gm(X), gm(X)
    assert not torch.equal(first, second)
