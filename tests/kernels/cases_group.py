"""Grouped launches: what the members give by themselves, bit for bit."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import ouro_compiler as ouro
from ouro_compiler.evaluation import snr_db
from ouro_compiler.kernels import launch as launches
from ouro_compiler.kernels.grouping import join, written
from ouro_compiler.kernels.launch import Launch, record_launches
from ouro_compiler.kernels.linear import linear_dynamic_outlier
from ouro_compiler.kernels.quantize import causal_conv1d_quantize, quantize_dynamic_outlier
from ouro_compiler.kernels.scan import selective_scan
from ouro_compiler.models.vim import vim_micro
from ouro_compiler.ops.quantize import quantize_dynamic_outlier_ref
from ouro_compiler.runtime.folding import fold_constants
from ouro_compiler.runtime.schedule import Schedule
from tests.helpers import generator, randn
from tests.kernels.inputs import activation, assert_equal, on

pytestmark = pytest.mark.usefixtures("poisoned")
Case = Callable[[str, bool], list[Launch]]


def quantized(device: str, reverse: bool, channels: int, seed: int) -> list[Launch]:
    x, scale, threshold = on(device, *activation(seed, (2, 9, channels), 1))
    zero = torch.full_like(scale, 7) if channels == 5 else None
    return recorded(lambda: quantize_dynamic_outlier(x, scale, zero, threshold, 4, 8, 4, reverse))


def convolved(device: str, reverse: bool) -> list[Launch]:
    x, scale, threshold = on(device, *activation(3, (2, 9, 20), 1))
    weight, bias = on(device, randn(1, 20, 4), randn(2, 20) if reverse else randn(3, 20))
    return recorded(
        lambda: causal_conv1d_quantize(
            x.transpose(1, 2), weight, bias, True, scale, threshold, 4, 8, 4, reverse
        )
    )


def scanned(device: str, reverse: bool) -> list[Launch]:
    u, delta = randn(1 + reverse, 2, 9, 6).transpose(1, 2), randn(3, 2, 9, 6).transpose(1, 2)
    B, C = randn(4 + reverse, 2, 3, 9), randn(6, 2, 9, 3).transpose(1, 2)
    args = on(device, u, delta, -torch.rand(6, 3, generator=generator(1)), B, C, randn(7, 6))
    return recorded(lambda: selective_scan(*args, None, None, True, reverse))


def multiplied(outlier_bits: int, device: str, reverse: bool) -> list[Launch]:
    x, scale, threshold = activation(5 + reverse, (2, 9, 33), 2)
    ints = (4, outlier_bits, 4, reverse)
    codes, outlier_scale, start = quantize_dynamic_outlier_ref(x, scale, None, threshold, *ints)
    weight = torch.randint(-7, 8, (20, 33), generator=generator(1)).to(torch.int8)
    args = (codes, scale, outlier_scale, start, x if outlier_bits == 16 else None, weight)
    vectors = (torch.rand(20, generator=generator(2)), randn(8, 20))
    given = on(device, *args, *vectors)
    return recorded(lambda: linear_dynamic_outlier(*given, None, "none", *ints))


def recorded(call: Callable[[], Any]) -> list[Launch]:
    with record_launches() as recording:
        call()
    return recording.launches


def run(one: Launch) -> None:
    launches.launch(one.spec, one.grid, *one.args)


def outputs(one: Launch) -> list[Tensor]:
    pairs = zip(one.args, written(one), strict=True)
    return [arg for arg, is_written in pairs if is_written and isinstance(arg, Tensor)]


def check(members: list[Launch]) -> None:
    expected = []
    for member in members:
        run(member)
        expected.append([one.clone() for one in outputs(member)])
        for one in outputs(member):  # what a launch leaves unwritten stays so
            one.copy_(torch.empty_like(one))
    run(join(members))
    for member, theirs in zip(members, expected, strict=True):
        for found, wanted in zip(outputs(member), theirs, strict=True):
            assert_equal((found,), (wanted.cpu(),))
        assert theirs[-1].isfinite().all(), "poison was left"


@pytest.mark.parametrize(
    "case",
    [
        convolved,
        scanned,
        lambda *args: multiplied(8, *args),
        lambda *args: multiplied(16, *args),
    ],
    ids=["convolution", "scan", "product", "product with fp outliers"],
)
def test_both_directions(case: Case, device: str) -> None:
    check([*case(device, False), *case(device, True)])


def test_quantizers_of_several_widths(device: str) -> None:
    """As the features of x_proj are: dt, B and C of two directions, one with zero points."""
    members = [
        launch
        for reverse in (False, True)
        for seed, channels in ((1, 12), (2, 16), (3, 16), (4, 5))
        for launch in quantized(device, reverse, channels, seed)
    ]
    assert len(members) == 8
    check(members)


@functools.cache
def tiny() -> fx.GraphModule:
    """A Vim of one layer on five tokens, compiled, its constants folded."""
    torch.manual_seed(3)
    model = vim_micro(depth=1, img_size=8, patch_size=4, embed_dim=16, d_state=4).eval()
    x = torch.randn(4, 1, 8, 8, generator=generator(1))
    compiled = ouro.compile(model.requires_grad_(False), x[:1], ouro.W4A4, calibration=x)
    return fold_constants(compiled.graph_module)


def test_schedule_of_a_model(device: str) -> None:
    gm = copy.deepcopy(tiny()).to(device)
    x = torch.randn(2, 1, 8, 8, generator=generator(2)).to(device)
    single, grouped = Schedule(gm, x[:1], group=False), Schedule(gm, x[:1])
    assert len(grouped.steps) <= len(single.steps) - 13
    expected = single(x[:1])
    assert expected.isfinite().all()
    if device == "cpu":
        assert torch.equal(grouped(x[:1]), expected)
    else:
        assert snr_db(expected, grouped(x[:1])) > 30
    found = grouped(x[1:])  # a view that does not start where its memory does
    assert torch.equal(found, grouped(x[1:].clone()))
    assert not torch.equal(found, expected), "memory of an earlier run is not what is returned"
    with pytest.raises(ValueError, match="this schedule is of images"):
        grouped(x)
