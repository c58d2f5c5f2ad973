"""A quantizer and its product in one kernel: what the two give, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ouro_compiler.kernels.launch import Launch, launch, record_launches
from ouro_compiler.kernels.linear import linear_dynamic_outlier
from ouro_compiler.kernels.quantize import quantize_dynamic_outlier
from ouro_compiler.kernels.quantizing_linear import quantizing_linear
from ouro_compiler.kernels.spec import Template
from ouro_compiler.ops.packing import pack_int4_ref
from ouro_compiler.runtime.chains import chain_launches
from ouro_compiler.runtime.record import Record
from tests.helpers import generator, randn
from tests.kernels.inputs import activation, assert_equal, on

pytestmark = pytest.mark.usefixtures("poisoned")


def pair(
    device: str,
    shape: tuple[int, int, int],
    outputs: int,
    *,
    window: int = 4,
    bits: tuple[int, int] = (4, 8),
    reverse: bool = False,
    packed: bool = True,
    asymmetric: bool = False,
    half: bool = False,
    residual: bool = False,
    activation_name: str = "none",
    low_threshold: bool = False,
) -> list[Launch]:
    """The launches of a quantizer, whose x is a slice of wider rows, and of its product."""
    x, scale, threshold = activation(5, shape, 1, bits[0])
    wide = torch.cat([randn(9, *shape), x], dim=-1)
    x = wide[..., shape[2] :]
    if half:
        x = x.half()
    if low_threshold:  # under the inlier range: not all that reach it may join
        threshold = scale
    ints = (*bits, window, reverse)
    weight = torch.randint(-7, 8, (outputs, shape[2]), generator=generator(1)).to(torch.int8)
    weight = pack_int4_ref(weight) if packed else weight
    vectors = (torch.rand(outputs, generator=generator(2)), randn(8, outputs))
    added = randn(3, *shape[:2], outputs) if residual else None
    zero = torch.full_like(scale, 7) if asymmetric else None
    x, scale, threshold, weight, *vectors = on(device, x, scale, threshold, weight, *vectors)
    added = None if added is None else added.to(device)
    zero = None if zero is None else zero.to(device)
    with record_launches() as recording:
        codes, outlier_scale, start = quantize_dynamic_outlier(x, scale, zero, threshold, *ints)
        given = (codes, scale, outlier_scale, start, x if bits[1] == 16 else None)
        linear_dynamic_outlier(*given, weight, *vectors, added, activation_name, *ints)
    return recording.launches


def same(one: Tensor, other: Tensor) -> bool:
    return one is other


CASES = {
    "as dt_proj of Vim": {"shape": (2, 19, 12), "outputs": 24, "window": 10},
    "fp16, other direction": {
        **{"shape": (2, 19, 12), "outputs": 24, "window": 10},
        **{"half": True, "reverse": True, "activation_name": "softplus"},
    },
    "many tiles": {"shape": (1, 70, 3), "outputs": 5, "window": 7, "reverse": True},
    "odd columns, residual": {
        **{"shape": (2, 9, 5), "outputs": 70, "packed": False},
        **{"residual": True, "activation_name": "silu"},
    },
    "one window, eight bits": {"shape": (2, 6, 48), "outputs": 9, "window": 64, "bits": (8, 8)},
    "a window of one": {"shape": (1, 5, 33), "outputs": 9, "window": 1},
    "low thresholds": {"shape": (2, 19, 12), "outputs": 8, "low_threshold": True},
}


@pytest.mark.parametrize("name", list(CASES))
def test_same_bits(name: str, device: str) -> None:
    quantize, product = pair(device, **CASES[name])  # type: ignore[arg-type]
    chained = quantizing_linear(quantize, product, same)
    assert chained is not None
    for one in (quantize, product):
        launch(one.spec, one.grid, *one.args)
    start, y = quantize.args[6], product.args[10]
    expected = start.clone(), y.clone()
    assert (start != torch.iinfo(start.dtype).max).any(), "nothing was listed"
    start.fill_(9)
    y.fill_(float("nan"))
    launch(chained.spec, chained.grid, *chained.args)
    assert_equal((start, y), tuple(one.cpu() for one in expected))


@pytest.mark.parametrize(
    "options",
    [
        {"shape": (1, 9, 65)},
        {"shape": (1, 90, 5), "window": 65},
        {"shape": (1, 9, 5), "bits": (4, 16)},
        {"shape": (1, 9, 5), "asymmetric": True},
    ],
    ids=["columns", "window", "floating-point outliers", "zero points"],
)
def test_what_stays_two_launches(options: dict[str, object], device: str) -> None:
    launches = pair(device, outputs=8, **options)  # type: ignore[arg-type]
    assert quantizing_linear(*launches, same) is None


def test_codes_that_something_else_reads(device: str) -> None:
    """Only codes and scales that no other step and no output names are left out."""
    quantize, product = pair(device, (1, 9, 5), 8)
    names = ["quantize", "linear"]
    steps, found = chain_launches(Record(steps=[quantize, product], names=names))
    assert [one.spec.template for one in steps] == [Template.QUANTIZING_LINEAR]  # type: ignore[union-attr]
    assert found == ["quantize + linear"]
    codes = quantize.args[4]
    for record in (
        Record(steps=[quantize, product], names=names, outputs=codes),
        Record(steps=[quantize, product, product], names=[*names, "again"]),
    ):
        steps, found = chain_launches(record)
        assert steps == record.steps
        assert found == record.names
