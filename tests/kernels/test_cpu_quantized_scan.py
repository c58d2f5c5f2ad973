"""The scan with a quantized recurrence in generated C++: its codes are the definition's.

Read out with a C that is one at one state, y is that state: it must equal the definition's bit for
bit, over whole sequences, since every code feeds back.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given as examples
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

import ouro_compiler.kernels.cpu  # noqa: F401  (registers the kernels)
from ouro_compiler.kernels.cpp.quantized_scan import quantized_selective_scan
from ouro_compiler.kernels.dispatch import ReferenceWarning
from ouro_compiler.kernels.launch import record_launches
from ouro_compiler.ops import elementary
from ouro_compiler.ops.quantized_scan import quantized_selective_scan_ref
from tests.helpers import REPEATABLE, assert_batch_invariant, assert_close
from tests.scan_inputs import FORMS, quantized_operands, read_state

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def assert_codes_equal(given: dict[str, Any], *states: int) -> None:
    for n in states:
        read = read_state(given, n)
        found, expected = quantized_selective_scan(**read), quantized_selective_scan_ref(**read)
        assert torch.equal(found, expected), (n, int((found != expected).sum()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("bits", "outlier_bits"), [(4, 8), (8, 16), (6, 8)])
def test_codes_and_sums(form: str, reverse: bool, bits: int, outlier_bits: int) -> None:
    """83 tokens: a tile that is full and one that is not; channels that fill no vector."""
    given = quantized_operands(
        *((2, 21, 83), 8),
        **{"bits": bits, "outlier_bits": outlier_bits, "form": form, "reverse": reverse},
        **{"factor": bits == 6, "before": bits == 6 and reverse},
    )
    assert_codes_equal(given, 0, 5)
    found, expected = quantized_selective_scan(**given), quantized_selective_scan_ref(**given)
    assert found.stride() == expected.stride()
    assert_close(found, expected, 1e-6)


@pytest.mark.parametrize("states", [1, 5, 16])
@pytest.mark.parametrize("factor", [False, True])
def test_numbers_of_states(states: int, factor: bool) -> None:
    for outlier_bits in (8, 16):
        given = quantized_operands(
            *((1, 9, 33), states), outlier_bits=outlier_bits, factor=factor, groups=3
        )
        assert_codes_equal(given, 0, states - 1)


@settings(REPEATABLE, max_examples=20)
@examples(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 40)),
    period=st.integers(1, 50),
    form=st.sampled_from(FORMS),
    absent=st.sampled_from(["", "threshold", "input", "state"]),
    groups=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_examples(
    shape: tuple[int, int, int], period: int, form: str, absent: str, groups: int, seed: int
) -> None:
    batch, width, length = shape
    given = quantized_operands(
        (batch, width * groups, length), 3, form=form, groups=groups, period=period, seed=seed
    )
    if absent:
        given |= dict.fromkeys(name for name in given if name.partition("_")[2] and absent in name)
    assert_codes_equal(given, 2)
    assert_close(quantized_selective_scan(**given), quantized_selective_scan_ref(**given), 1e-6)


@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_dtypes(dtype: torch.dtype) -> None:
    """Of activations, and of the constants that an artefact stores as fp16."""
    given = quantized_operands((2, 19, 30), 4, dtype=dtype)
    for name in ("D", "decay_scale", "input_scale", "input_threshold"):
        given[name] = given[name].half()
    found, expected = quantized_selective_scan(**given), quantized_selective_scan_ref(**given)
    assert found.dtype == dtype
    assert_close(found, expected, ROUNDING[dtype])
    assert_codes_equal(given, 1)


def test_exponentials_are_the_definitions() -> None:
    """Bit for bit: a state that was one decays by 2^x in a step."""
    exponents = torch.cat([torch.linspace(-130, 127.9, 20_001), torch.linspace(-1e-3, 0, 2_000)])
    channels = len(exponents)
    rate = exponents[:, None] / elementary.LOG2E
    u = torch.tensor([1.0, 0.0]).expand(1, channels, 2)
    ones = torch.ones(1, 1, 2)
    nothing = (None,) * 8
    args = (u, torch.ones(1, channels, 2), rate, ones, ones, *nothing, 0.0, 0, 8, 8, 10)
    found = quantized_selective_scan(*args, False, False)[0, :, 1]
    assert torch.equal(found, elementary.exp2(rate[:, 0] * elementary.LOG2E))


@pytest.mark.parametrize("form", FORMS)
def test_values_on_the_middle_of_two_codes(form: str) -> None:
    """Quotients that a product with the reciprocal would round to the other code."""
    given = quantized_operands((1, 64, 50), 4, form=form, outliers=False, factor=False)
    given["input_scale"] = torch.full((50,), 0.3)
    halves = (torch.arange(64) - 31.5).clamp(-7.5, 7.5)
    given["step"] = (halves.abs() * 0.3).float()[None, :, None].expand(1, 64, 50)
    given["B"], given["u"] = torch.ones(1, 1, 4, 50), torch.ones(1, 64, 50)
    assert_codes_equal(given, 0)


def test_does_not_depend_on_threads_or_on_the_batch() -> None:
    given = quantized_operands((3, 100, 60), 5)
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(quantized_selective_scan(**given))
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    names = ("u", "step", "B", "C", "z")

    def run(*tensors: Tensor) -> Tensor:
        return quantized_selective_scan(**{**given, **dict(zip(names, tensors, strict=True))})

    assert_batch_invariant(run, *[given[name] for name in names])


def test_not_a_number_stays() -> None:
    given = read_state(quantized_operands((1, 8, 6), 2, outliers=False), 0)
    given["u"] = given["u"].contiguous()
    given["u"][0, 3, 2] = float("nan")
    found, expected = quantized_selective_scan(**given), quantized_selective_scan_ref(**given)
    assert torch.equal(found.isnan(), expected.isnan())
    assert found[0, 3, 2:].isnan().all()


def test_channels_apart_in_memory_are_copied_and_said() -> None:
    given = quantized_operands((2, 8, 6), 3)
    expected = quantized_selective_scan(**given)
    apart = {**given, "step": given["step"].contiguous()}
    assert torch.equal(quantized_selective_scan(**apart), expected)
    with record_launches() as recording:
        quantized_selective_scan(**apart)
    assert len(recording.copies) == 1


def test_what_it_refuses_runs_the_reference() -> None:
    given = quantized_operands((1, 4, 3), 2)
    double = {**given, "u": given["u"].double(), "z": given["z"].double()}
    with pytest.warns(ReferenceWarning, match=r"quantized_selective_scan .* got torch\.float64"):
        found = torch.ops.ouro.quantized_selective_scan(**double)
    assert_close(found.float(), quantized_selective_scan_ref(**given), 1e-6)
