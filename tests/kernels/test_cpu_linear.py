"""The two-scale product in generated C++: the reference's values, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ouro_compiler.kernels.cpu  # noqa: F401  (registers the kernels)
from ouro_compiler.kernels.cpp import launch as cpp_launch
from ouro_compiler.kernels.cpp import linear
from ouro_compiler.kernels.dispatch import ReferenceWarning
from ouro_compiler.kernels.spec import KernelSpec
from ouro_compiler.ops.linear import linear_dynamic_outlier_ref
from ouro_compiler.ops.packing import pack_int4_ref
from ouro_compiler.ops.quantize import quantize_dynamic_outlier_ref
from tests.helpers import assert_batch_invariant, assert_close, generator
from tests.kernels.cases_linear import problem
from tests.kernels.inputs import SHAPES

WORDS, BYTES, QUADS = range(3)
KINDS = [(WORDS, False), (WORDS, True), (BYTES, True), (QUADS, False), (QUADS, True)]
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def force(monkeypatch: pytest.MonkeyPatch, kind: int) -> None:
    """Products of this kind, whatever suits the machine. VNNI is emulated where it is missing."""
    spec = linear.linear_spec

    def chosen(weights: torch.dtype, outlier_bits: int, dtype: torch.dtype) -> KernelSpec:
        return spec(weights, outlier_bits, dtype, kind)

    monkeypatch.setattr(linear, "linear_spec", chosen)


def assert_as_reference(given: dict[str, Any], dtype: torch.dtype | None = None) -> Tensor:
    """Equal, but for elementary functions and sums of outliers in floating point."""
    found = linear.linear_dynamic_outlier(**given, dtype=dtype)
    expected = linear_dynamic_outlier_ref(**given, dtype=dtype)
    assert found.dtype == expected.dtype
    assert found.stride() == expected.stride()
    if given["outlier_bits"] == 8 and given["activation"] == "none":
        assert torch.equal(found, expected)
    else:
        assert_close(found, expected, ROUNDING[dtype or torch.float32])
    return found


@pytest.mark.parametrize("outlier_bits", [8, 16])
@pytest.mark.parametrize(("kind", "packed"), KINDS)
def test_equals_the_reference(
    monkeypatch: pytest.MonkeyPatch, kind: int, packed: bool, outlier_bits: int
) -> None:
    """Every option in turn; shapes with odd K, one row, and outputs that fill no panel."""
    force(monkeypatch, kind)
    for index in range(len(SHAPES)):
        given, dtype = problem(index, outlier_bits, packed)
        assert_as_reference(given, dtype if outlier_bits == 8 else None)


@pytest.mark.parametrize("refresh_period", [1, 3, 10, 500])
@pytest.mark.parametrize("reverse", [False, True])
def test_windows_of_every_length(refresh_period: int, reverse: bool) -> None:
    made = generator(1)
    x = torch.randn(2, 23, 50, generator=made) * (1 + 9 * (torch.rand(50, generator=made) < 0.1))
    scale, threshold = torch.full((23,), 0.5), torch.full((23,), 3.5)
    static = (4, 8, refresh_period, reverse)
    codes, outlier_scale, start = quantize_dynamic_outlier_ref(x, scale, None, threshold, *static)
    assert (start != torch.iinfo(start.dtype).max).any()
    weight = torch.randint(-7, 8, (70, 50), generator=made).to(torch.int8)
    given: dict[str, Any] = {
        "codes": codes,
        "inlier_scale": scale,
        "outlier_scale": outlier_scale,
        "outlier_start": start,
        **{"x": None, "qweight": pack_int4_ref(weight), "weight_scale": torch.rand(70)},
        **{"bias": None, "residual": None, "activation": "none"},
        **dict(
            zip(("inlier_bits", "outlier_bits", "refresh_period", "reverse"), static, strict=True)
        ),
    }
    assert_as_reference(given)


@pytest.mark.parametrize(("kind", "packed"), KINDS)
@pytest.mark.parametrize("columns", [33, 3072])
def test_nothing_saturates(
    monkeypatch: pytest.MonkeyPatch, kind: int, packed: bool, columns: int
) -> None:
    """Every product as large as it gets, listed or not."""
    force(monkeypatch, kind)
    most = 8 if packed else 127
    for code in (-127, 127):
        for weight in (-most, 7 if packed else 127):
            start = torch.full((1, 2, columns), 255, dtype=torch.uint8)
            start[:, 1] = 0
            stored = torch.full((40, columns), weight, dtype=torch.int8)
            found = linear.linear_dynamic_outlier(
                torch.full((1, 12, columns), code, dtype=torch.int8),
                torch.ones(12),
                torch.ones(1, 12),
                start,
                None,
                pack_int4_ref(stored) if packed else stored,
                torch.ones(40),
                *(None, None, "none", 8, 8, 6, False),
            )
            assert (found == code * weight * columns).all()


@pytest.mark.parametrize("outlier_bits", [8, 16])
def test_does_not_depend_on_threads_or_on_the_batch(outlier_bits: int) -> None:
    given, dtype = problem(16, outlier_bits, True, outputs=200)
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(linear.linear_dynamic_outlier(**given, dtype=dtype))
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    names = [
        name
        for name in ("codes", "outlier_scale", "outlier_start", "x", "residual")
        if given[name] is not None
    ]

    def run(*tensors: Tensor) -> Tensor:
        values = {**given, **dict(zip(names, tensors, strict=True))}
        return linear.linear_dynamic_outlier(**values, dtype=dtype)

    assert_batch_invariant(run, *[given[name] for name in names])


def activated(values: Tensor, activation: str) -> Tensor:
    """What the epilogue makes of these values: codes of 0, and the values as a bias."""
    return linear.linear_dynamic_outlier(
        *(torch.zeros(1, 1, 2, dtype=torch.int8), torch.ones(1), torch.ones(1, 1)),
        *(torch.full((1, 1, 2), 255, dtype=torch.uint8), None),
        *(torch.zeros(len(values), 1, dtype=torch.uint8), torch.ones(1), values, None),
        *(activation, 4, 8, 10, False),
    ).flatten()


def test_gelu_in_double_precision() -> None:
    """Its bound, over everything between the values where it is 0 and where it is x."""
    around = torch.linspace(-12, 12, 200_003)
    x = torch.cat([around, around * 1e-4, torch.tensor([-1e30, -80.0, 0.0, 80.0, 1e30])])
    found = activated(x, "gelu").double()
    exact = 0.5 * x.double() * torch.special.erfc(-x.double() / 2**0.5)
    assert bool(((found - exact).abs() <= 2e-7 * x.double().abs()).all())
    assert bool((found[x <= -5.7] == 0).all())
    assert torch.equal(found[x >= 5.7], x[x >= 5.7].double())
    assert_close(found, torch.nn.functional.gelu(x.double()), 2e-7)


def test_gelu_by_tanh_in_double_precision() -> None:
    x = torch.cat([torch.linspace(-12, 12, 200_003), torch.tensor([-1e30, 0.0, 1e30])])
    found = activated(x, "gelu_tanh").double()
    exact = torch.nn.functional.gelu(x.double(), approximate="tanh")
    assert bool(((found - exact).abs() <= 2e-7 * x.double().abs()).all())


@pytest.mark.parametrize("activation", ["silu", "softplus", "gelu", "gelu_tanh"])
def test_activations_do_not_depend_on_the_place_and_keep_nan(activation: str) -> None:
    """Whole panels take another way than what is left of one."""
    values = torch.cat([torch.randn(75, generator=generator(0)) * 4, torch.tensor([torch.nan])])
    together = activated(values, activation)
    assert bool(together[-1].isnan())
    for count in (1, 9, 40):
        assert torch.equal(activated(values[:count], activation), together[:count])


def test_a_product_that_is_not_exact_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check at first use finds it, and the reference runs from then on."""
    monkeypatch.setattr(cpp_launch, "_failures", {})
    monkeypatch.setattr(cpp_launch, "_functions", {})
    monkeypatch.setattr(
        linear,
        "linear_dynamic_outlier_ref",
        lambda **given: linear_dynamic_outlier_ref(**given) + 1,
    )
    given, _ = problem(0, 8, True)
    for _ in range(2):
        with pytest.warns(ReferenceWarning, match="not exact on this machine"):
            found = torch.ops.ouro.linear_dynamic_outlier(*given.values())
        assert torch.equal(found, linear_dynamic_outlier_ref(**given))
