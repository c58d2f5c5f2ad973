"""The kernel of the scan with a quantized recurrence: its codes are the definition's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ouro_compiler.kernels.quantized_scan import quantized_selective_scan
from ouro_compiler.ops import elementary
from ouro_compiler.ops.quantized_scan import quantized_selective_scan_ref
from tests.helpers import assert_close, assert_token_major
from tests.kernels.inputs import on
from tests.scan_inputs import FORMS, quantized_operands, read_state

pytestmark = pytest.mark.usefixtures("poisoned")
ROUNDING = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# (batch, channels, length), states, groups, bits, outlier_bits, factor
CASES = [
    ((1, 33, 12), 16, 1, 4, 8, False),
    ((2, 40, 12), 8, 2, 8, 16, True),
    ((1, 96, 9), 1, 3, 6, 8, True),
    ((2, 24, 21), 5, 1, 4, 16, False),
]


def assert_quantized_states(given: dict[str, Any], device: str, *states: int) -> None:
    for n in states:
        read = read_state(given, n)
        found = quantized_selective_scan(*on(device, *read.values())).cpu()
        expected = quantized_selective_scan_ref(**read)
        assert torch.equal(found, expected), (n, int((found != expected).sum()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("index", range(len(CASES)))
def test_quantized_scan(index: int, form: str, device: str) -> None:
    shape, states, groups, bits, outlier_bits, factor = CASES[index]
    given = quantized_operands(
        *(shape, states),
        **{"groups": groups, "bits": bits, "outlier_bits": outlier_bits, "factor": factor},
        **{"form": form, "reverse": index % 2 == 1, "before": index == 2},
    )
    assert_quantized_states(given, device, states - 1)
    found = quantized_selective_scan(*on(device, *given.values()))
    assert_token_major(found)
    assert_close(found.cpu(), quantized_selective_scan_ref(**given), 1e-5)


@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_quantized_scan_dtypes(dtype: torch.dtype, device: str) -> None:
    """Of activations, and of the constants that an artefact stores as fp16."""
    given = quantized_operands((1, 19, 12), 4, dtype=dtype)
    for name in ("D", "decay_scale", "input_scale", "input_threshold", "state_scale"):
        given[name] = given[name].half()
    found = quantized_selective_scan(*on(device, *given.values())).cpu()
    assert_close(found, quantized_selective_scan_ref(**given), ROUNDING[dtype])
    if dtype is not torch.bfloat16:  # the interpreter rounds results to it by cutting off
        assert_quantized_states(given, device, 2)


@pytest.mark.parametrize("absent", ["threshold", "input", "state", "scale"])
def test_quantized_scan_without_some_quantizers(absent: str, device: str) -> None:
    given = quantized_operands((1, 20, 13), 3, form="none", factor=absent != "scale")
    gone = [name for name in given if "_" in name and absent in name and given[name] is not None]
    gone = [name for name in gone if isinstance(given[name], torch.Tensor)]
    given |= dict.fromkeys([*gone, *(n for n in given if absent == "scale" and "threshold" in n)])
    assert_quantized_states(given, device, 1)


def test_quantized_scan_has_the_definitions_exponentials(device: str) -> None:
    exponents = torch.cat([torch.linspace(-130, 127.9, 1_001), torch.linspace(-1e-3, 0, 200)])
    channels = len(exponents)
    rate = exponents[:, None] / elementary.LOG2E
    u = torch.tensor([1.0, 0.0]).expand(1, channels, 2).contiguous()
    ones = torch.ones(1, 1, 2)
    nothing = (None,) * 8
    args = (u, torch.ones(1, channels, 2), rate, ones, ones, *nothing, 0.0, 0, 8, 8, 10)
    found = quantized_selective_scan(*on(device, *args, False, False))[0, :, 1].cpu()
    assert torch.equal(found, elementary.exp2(rate[:, 0] * elementary.LOG2E))
