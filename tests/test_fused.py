"""Fused quantizing ops equal the ops that they fuse, bit for bit; fakes, refusals, invariance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ouro_compiler.ops.fused import gate_sum_quantize_ref
from tests.helpers import assert_batch_invariant, assert_close, assert_opcheck, randn

ouro = torch.ops.ouro
BATCH, LENGTH, CHANNELS = 3, 7, 6
SCALE, THRESHOLD = torch.linspace(0.1, 0.3, LENGTH), torch.linspace(1.0, 2.5, LENGTH)
STATICS = [(4, 8, 3, False), (4, 16, 3, True), (8, 8, 10, True)]


def tokens(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, L, K) with an outlier channel."""
    x = randn(seed, BATCH, LENGTH, CHANNELS)
    x[..., 1] *= 8
    return x.to(dtype)


def norm_args(dtype: torch.dtype = torch.float32, residual: bool = True) -> tuple[Any, ...]:
    other = tokens(1) if residual else None
    return tokens(0, dtype), other, randn(2, CHANNELS), None, 1e-5, True, True


def conv_args(dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    return tokens(0, dtype).transpose(1, 2), randn(1, CHANNELS, 4), randn(2, CHANNELS), True


def gate_args(dtype: torch.dtype = torch.float32, other: bool = True) -> tuple[Any, ...]:
    y, second, z = (tokens(seed, dtype).transpose(1, 2) for seed in (1, 2, 3))
    return y, second if other else None, z, 0.5


def quantized(x: Tensor, static: tuple[Any, ...]) -> tuple[Tensor, ...]:
    return ouro.quantize_dynamic_outlier(x, SCALE, None, THRESHOLD, *static)


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.stride() == theirs.stride()
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("static", STATICS)
def test_norm_is_add_norm_and_quantize(static: tuple[Any, ...], dtype: torch.dtype) -> None:
    args = norm_args(dtype)
    y, total = ouro.add_norm(*args)
    found = ouro.add_norm_quantize(*args, SCALE, THRESHOLD, *static, True)
    same(found, (*quantized(y, static), y, total))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("static", STATICS)
def test_conv_is_causal_conv1d_and_quantize(static: tuple[Any, ...], dtype: torch.dtype) -> None:
    u = ouro.causal_conv1d(*conv_args(dtype), static[3])
    found = ouro.causal_conv1d_quantize(*conv_args(dtype), SCALE, THRESHOLD, *static)
    same(found, (*quantized(u.transpose(1, 2), static), u))


@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("static", STATICS)
def test_gate_is_product_sum_and_quantize(static: tuple[Any, ...], other: bool) -> None:
    y, second, z, factor = gate_args(other=other)
    gate = z / (1 + torch.exp(-z))
    value = y * gate if second is None else y * gate + second * gate
    value = (value * factor).transpose(1, 2).contiguous()
    args = (y, second, z, factor, SCALE, THRESHOLD, *static, True)
    same(gate_sum_quantize_ref(*args), (*quantized(value, static), value))
    # A kernel's SiLU rounds elsewhere; its codes are those of the values that it emits.
    found = ouro.gate_sum_quantize(*args)
    same(found, (*quantized(found[3], static), found[3]))
    assert_close(found[3], value, 2e-6)


def test_gate_without_z_is_a_sum() -> None:
    y, second, _, factor = gate_args()
    value = ((y + second) * factor).transpose(1, 2).contiguous()
    args = (y, second, None, factor, SCALE, THRESHOLD, *STATICS[0])
    same(ouro.gate_sum_quantize(*args, True), (*quantized(value, STATICS[0]), value))


def test_values_are_empty_unless_asked_for() -> None:
    norm = (*norm_args(), SCALE, THRESHOLD, *STATICS[0])
    gate = (*gate_args(), SCALE, THRESHOLD, *STATICS[0])
    for op, args in ((ouro.add_norm_quantize, norm), (ouro.gate_sum_quantize, gate)):
        silent, loud = op(*args, False), op(*args, True)
        assert silent[3].shape == (0,)
        assert loud[3].shape == (BATCH, LENGTH, CHANNELS)
        same(silent[:3], loud[:3])


@pytest.mark.parametrize("emit", [False, True])
def test_opcheck(emit: bool) -> None:
    vectors = (SCALE, THRESHOLD, *STATICS[0])
    assert_opcheck(ouro.add_norm_quantize.default, (*norm_args(), *vectors, emit))
    assert_opcheck(ouro.add_norm_quantize.default, (*norm_args(residual=False), *vectors, emit))
    assert_opcheck(ouro.causal_conv1d_quantize.default, (*conv_args(), *vectors))
    assert_opcheck(ouro.gate_sum_quantize.default, (*gate_args(), *vectors, emit))


def test_batch_invariance() -> None:
    x, residual, *rest = norm_args()
    vectors = (SCALE, THRESHOLD, *STATICS[0])
    assert_batch_invariant(
        lambda x, r: ouro.add_norm_quantize(x, r, *rest, *vectors, True), x, residual
    )
    y, second, z, factor = gate_args()
    assert_batch_invariant(
        lambda y, o, z: ouro.gate_sum_quantize(y, o, z, factor, *vectors, True), y, second, z
    )


def test_refusals() -> None:
    vectors = (SCALE, THRESHOLD, *STATICS[0])
    x, residual, *rest = norm_args()
    with pytest.raises(ValueError, match=r"add_norm: residual must have x's shape"):
        ouro.add_norm_quantize(x, residual[:1], *rest, *vectors, True)
    y, second, z, factor = gate_args()
    with pytest.raises(ValueError, match=r"gate_sum_quantize: y, other and z must share one"):
        ouro.gate_sum_quantize(y, second[:, :1], z, factor, *vectors, True)
    with pytest.raises(ValueError, match=r"scales are per time step: expected \(7,\)"):
        ouro.gate_sum_quantize(y, second, z, factor, SCALE[:3], THRESHOLD, *STATICS[0], True)
