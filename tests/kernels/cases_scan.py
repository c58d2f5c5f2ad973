"""Scan and convolution kernels against their references, and against mamba_ssm's own scan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ouro_compiler.kernels.blocks import scan_blocks
from ouro_compiler.kernels.depthwise_conv import depthwise_conv
from ouro_compiler.kernels.scan import causal_conv1d, selective_scan
from ouro_compiler.ops.causal_conv1d import causal_conv1d_ref
from ouro_compiler.ops.chunked_scan import groups_of
from ouro_compiler.ops.depthwise_conv import depthwise_conv_ref
from ouro_compiler.ops.selective_scan import selective_scan_ref
from tests.helpers import (
    assert_close,
    assert_token_major,
    mamba_selective_scan_ref,
    randn,
)
from tests.kernels.inputs import on

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROUNDING = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# (batch, channels, length, states, groups)
SHAPES = [
    (1, 40, 1, 16, 1),
    (2, 12, 9, 16, 1),
    (1, 42, 6, 8, 1),
    (1, 16, 5, 1, 4),
    (1, 16, 9, 16, 2),
    (1, 33, 6, 8, 1),
    (1, 8, 31, 16, 1),
    (1, 32, 30, 1, 1),
    (1, 24, 9, 5, 3),
    (2, 6, 3, 2, 1),
]


def operands(index: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Arguments of the op; every option in turn, every layout in turn."""
    batch, channels, length, states, groups = SHAPES[index]

    def tokens(seed: int) -> Tensor:
        made = randn(seed, batch, length, channels).to(dtype).transpose(1, 2)
        return made.contiguous() if index % 2 else made

    def matrix(seed: int) -> Tensor:
        made = randn(seed, batch, length, groups * states + 3)[..., 3:].transpose(1, 2)
        made = made.unflatten(1, (groups, states))
        made = made.contiguous() if index % 3 == 1 else made
        return made[:, 0] if groups == 1 and index % 2 else made

    return {
        "u": tokens(1),
        "delta": tokens(2) * 0.5 if index % 2 else tokens(2).abs() * 0.3,
        "A": -randn(3, channels, states).abs() - 0.1,
        "B": matrix(4),
        "C": matrix(5),
        "D": randn(6, channels) if index % 3 else None,
        "z": tokens(7) if index % 3 != 1 else None,
        "delta_bias": randn(8, channels) - 2 if index % 4 == 1 else None,
        "delta_softplus": index % 2 == 1,
        "reverse": index % 3 == 2,
    }


def forms(given: dict[str, Any]) -> list[dict[str, int]]:
    """Those of a busy GPU and of an idle one, and the first with more tokens held."""
    channels = given["u"].shape[1] // groups_of(given["B"])
    shape = (channels, given["A"].shape[1], given["u"].shape[2])
    busy, idle = (scan_blocks(*shape, 1, count) for count in (0, 1000))
    return [busy, idle, {**busy, "STEPS": min(3, shape[2])}]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_scan(index: int, dtype: torch.dtype, device: str) -> None:
    given = operands(index, dtype)
    form = forms(given)[(index + DTYPES.index(dtype)) % 2]
    found = selective_scan(*on(device, *given.values()), form=form)
    assert_token_major(found)
    assert_close(found.cpu(), selective_scan_ref(**given), ROUNDING[dtype])


@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_forms_of_a_scan_give_the_same_bits(index: int, device: str) -> None:
    args = on(device, *operands(index).values())
    expected, *others = (selective_scan(*args, form=form) for form in forms(operands(index)))
    for found in (*others, selective_scan(*args)):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("states", "groups", "chunk", "steps"), [(1, 2, 4, 2), (3, 1, 6, 3), (2, 1, 2, 2), (4, 1, 3, 1)]
)
def test_chunks_of_a_scan(
    states: int, groups: int, chunk: int, steps: int, reverse: bool, device: str
) -> None:
    """Chunks one after the other or side by side: the same bits, and what the definition gives."""
    channels, length = 5 * groups, 12
    u, delta, z = (randn(seed, 1, channels, length) for seed in (1, 2, 3))
    B, C = (randn(seed, 1, groups, states, length) for seed in (4, 5))
    A, D, bias = -randn(6, channels, states).exp(), randn(7, channels), randn(8, channels)
    given = (u, delta, A, B, C, D, z, bias, True, reverse)
    form = {**scan_blocks(5, states, length, 1, 0), "CHUNK": chunk, "STEPS": steps}
    one, split, whole = (
        selective_scan(*on(device, *given), form={**form, "SHARE": 1, "BLOCK_D": 8, **other})
        for other in ({}, {"SPLIT": 1}, {"CHUNK": length})
    )
    assert torch.equal(one, split)
    assert_close(split.cpu(), selective_scan_ref(*given), 1e-5)
    assert_close(whole.cpu(), selective_scan_ref(*given), 1e-5)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("states", [1, 8, 16])
def test_scan_against_mamba(states: int, reverse: bool, device: str) -> None:
    u, delta, z = (randn(seed, 2, 12, 15) for seed in (1, 2, 3))
    A, D, bias = -randn(4, 12, states).exp(), randn(5, 12), randn(6, 12)
    B, C = randn(7, 2, states, 15), randn(8, 2, states, 15)
    args = on(device, u, delta, A, B, C, D, z, bias, True)
    found = selective_scan(*args, reverse).cpu()
    turned = [t.flip(-1) if reverse else t for t in (u, delta, B, C, z)]
    u, delta, B, C, z = turned
    expected = mamba_selective_scan_ref()(u, delta, A, B, C, D, z, bias, True)
    assert_close(found, expected.flip(-1) if reverse else expected, 1e-5)


def test_scan_of_large_and_tiny_steps(device: str) -> None:
    """softplus where exp overflows and where 1 + exp(x) loses exp(x)."""
    u = torch.ones(1, 32, 4)
    delta = torch.tensor([-30.0, -12.0, 30.0, 90.0]).expand(1, 32, 4).contiguous()
    A, B = -torch.full((32, 1), 1e-3), torch.ones(1, 1, 4)
    args = (u, delta, A, B, B, None, None, None, True)
    found = selective_scan(*on(device, *args)).cpu()
    expected = selective_scan_ref(*args)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0.0)


def test_scan_refuses_operands_that_do_not_fit(device: str) -> None:
    given = operands(4)
    with pytest.raises(ValueError, match="same number of groups"):
        selective_scan(*on(device, *{**given, "C": given["C"][:, 0]}.values()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("batch", "channels", "length", "taps"),
    [(1, 96, 1, 4), (3, 130, 9, 4), (1, 192, 10, 2), (3, 40, 50, 3), (1, 33, 197, 4)],
)
def test_conv(
    batch: int,
    channels: int,
    length: int,
    taps: int,
    reverse: bool,
    dtype: torch.dtype,
    device: str,
) -> None:
    x = randn(1, batch, length, channels).to(dtype).transpose(1, 2)
    x = x.contiguous() if taps == 4 else x
    bias = randn(3, channels) if length % 2 else None
    args = (x, randn(2, channels, taps), bias, channels % 2 == 0, reverse)
    found = causal_conv1d(*on(device, *args))
    assert_token_major(found)
    expected = causal_conv1d_ref(args[0].float(), *args[1:]).to(dtype)
    assert_close(found.cpu(), expected, ROUNDING[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "taps"),
    [((1, 96, 1), (3,)), ((2, 33, 19), (4,)), ((3, 130, 5, 4), (3, 3)), ((1, 8, 2, 9), (2, 5))],
)
def test_depthwise_conv(
    shape: tuple[int, ...], taps: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    x = randn(1, *shape).to(dtype)
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if shape[0] > 1 else x
    bias = randn(3, shape[1]) if shape[0] < 3 else None
    args = (x, randn(2, shape[1], 1, *taps), bias, len(taps) == 2)
    found, expected = depthwise_conv(*on(device, *args)), depthwise_conv_ref(*args)
    assert found.movedim(1, -1).is_contiguous()
    assert_close(found.cpu(), expected, ROUNDING[dtype])
