"""The selective scan in generated C++, against its definition and mamba_ssm's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ouro_compiler.kernels.cpp.scan import selective_scan
from ouro_compiler.kernels.launch import record_launches
from ouro_compiler.ops.selective_scan import selective_scan_ref
from tests.helpers import (
    assert_batch_invariant,
    assert_close,
    generator,
    mamba_selective_scan_ref,
)

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def operands(
    shape: tuple[int, int, int], states: int, groups: int, dtype: torch.dtype, seed: int = 0
) -> dict[str, Any]:
    """Every operand, token-major as the projections leave them; B and C are slices."""
    batch, channels, length = shape
    made = generator(seed)

    def tokens(width: int) -> Tensor:
        return torch.randn(batch, length, width, generator=made).to(dtype).transpose(1, 2)

    both = tokens(2 * groups * states).unflatten(1, (2, groups, states))
    return {
        "u": tokens(channels),
        "delta": tokens(channels) - 1,
        "A": -torch.rand(channels, states, generator=made) * 4,
        "B": both[:, 0],
        "C": both[:, 1],
        "D": torch.randn(channels, generator=made).half(),
        "z": tokens(channels),
        "delta_bias": torch.randn(channels, generator=made),
        "delta_softplus": True,
        "reverse": False,
    }


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("reverse", [False, True])
def test_equals_the_definition(dtype: torch.dtype, reverse: bool) -> None:
    """197 tokens: tiles that are full and one that is not; channels that fill no vector."""
    given = {**operands((2, 37, 197), 5, 1, dtype), "reverse": reverse}
    found, expected = selective_scan(**given), selective_scan_ref(**given)
    assert found.dtype == expected.dtype
    assert found.stride() == expected.stride()
    assert_close(found, expected, ROUNDING[dtype])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 130)),
    states=st.sampled_from([1, 5]),
    groups=st.integers(1, 3),
    reverse=st.booleans(),
    absent=st.sets(st.sampled_from(["D", "z", "delta_bias"])),
    softplus=st.booleans(),
)
def test_every_combination_of_options(
    shape: tuple[int, int, int],
    states: int,
    groups: int,
    reverse: bool,
    absent: set[str],
    softplus: bool,
) -> None:
    batch, width, length = shape
    given = operands((batch, width * groups, length), states, groups, torch.float32)
    given |= {"reverse": reverse, "delta_softplus": softplus, **dict.fromkeys(absent)}
    if not softplus:  # a state that grows would drown every difference
        given["delta"] = given["delta"].abs()
        given["delta_bias"] = None
    assert_close(selective_scan(**given), selective_scan_ref(**given), 1e-6)


@pytest.mark.parametrize("states", [1, 8, 16])
def test_equals_mamba_ssm(states: int) -> None:
    reference = mamba_selective_scan_ref()
    given = operands((2, 24, 70), states, 1, torch.float32)
    given["B"], given["C"] = given["B"][:, 0], given["C"][:, 0]
    given["D"] = given["D"].float()
    expected = reference(**{k: v for k, v in given.items() if k != "reverse"})
    assert_close(selective_scan(**given), expected, 1e-6)


def test_exponentials_are_accurate() -> None:
    """One step decays the state of the step before by exp(delta A): against fp64, to 2.5e-7."""
    exponents = torch.cat([torch.linspace(-87, 0, 20001), torch.linspace(0, 88, 5000)])
    channels = len(exponents)
    delta = torch.stack([torch.ones(channels), torch.ones(channels)], -1)[None]
    u = torch.tensor([1.0, 0.0]).expand(1, channels, 2)
    ones = torch.ones(1, 1, 2)
    found = selective_scan(u, delta, exponents[:, None], ones, ones)[0, :, 1].double()
    # The exponent itself is rounded to fp32 after the change of base.
    allowed = 2.5e-7 + exponents.double().abs() * 2**-23
    error = (found / exponents.double().exp() - 1).abs()
    assert (error <= allowed).all()
    assert found[exponents == 0].eq(1).all()


def test_infinity_and_not_a_number_stay() -> None:
    delta = torch.tensor([1.0, 1.0, 1.0]).expand(1, 3, 3).clone()
    delta[0, 1, 1] = float("nan")
    u, ones = torch.ones(1, 3, 3), torch.ones(1, 1, 3)
    given = (u, delta, torch.tensor([[80.0], [-1.0], [-1.0]]), ones, ones)
    found, expected = selective_scan(*given), selective_scan_ref(*given)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf())
    assert found[0, 0, 2].isinf()
    assert found[0, 1, 2].isnan()


@pytest.mark.parametrize("length", [3, 200])
def test_does_not_depend_on_threads_or_on_the_batch(length: int) -> None:
    given = operands((3, 100, length), 5, 1, torch.float32)
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(selective_scan(**given))
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    names = ("u", "delta", "B", "C", "z")

    def run(*tensors: Tensor) -> Tensor:
        return selective_scan(**{**given, **dict(zip(names, tensors, strict=True))})

    assert_batch_invariant(run, *[given[name] for name in names])


def test_channels_apart_in_memory_are_copied_and_said() -> None:
    given = operands((2, 8, 6), 5, 1, torch.float32)
    expected = selective_scan(**given)
    apart = {**given, "u": given["u"].contiguous(), "z": given["z"].contiguous()}
    assert torch.equal(selective_scan(**apart), expected)
    with record_launches() as recording:
        selective_scan(**apart)
    reason = "is copied: its channels are not next to each other in memory"
    assert recording.copies == [f"u {reason}", f"z {reason}"]
