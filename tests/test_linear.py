"""Products of quantized operands: exact integers, then fp64 arithmetic on dequantized values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

import ouro_compiler.ops  # noqa: F401  (registers torch.ops.ouro)
from ouro_compiler.ops.linear import int_matmul
from ouro_compiler.ops.quantize import listed_mask
from tests.helpers import (
    assert_batch_invariant,
    assert_close,
    assert_opcheck,
    generator,
    randn,
    shares_memory,
)

op = torch.ops.ouro.linear_dynamic_outlier
dequantize_weight = torch.ops.ouro.dequantize_weight
pack = torch.ops.ouro.pack_int4
quantize = torch.ops.ouro.quantize_dynamic_outlier
quantize_static = torch.ops.ouro.quantize_static_outlier
dequantize = torch.ops.ouro.dequantize_dynamic_outlier

BATCH, LENGTH, PERIOD = 2, 9, 4
# One column, an odd and a small number of them, no multiple of a vector, a real size, 130.
COLUMNS = [1, 2, 7, 17, 96, 130]
ACTIVATIONS = {
    "none": lambda y: y,
    "silu": functional.silu,
    "softplus": functional.softplus,
    "gelu": functional.gelu,
    "gelu_tanh": lambda y: functional.gelu(y, approximate="tanh"),
}


def _integers(seed: int, low: int, high: int, *shape: int) -> Tensor:
    """int8 values from low to high, both included."""
    return torch.randint(low, high + 1, shape, dtype=torch.int8, generator=generator(seed))


def _problem(
    columns: int = 17,
    outputs: int = 13,
    *,
    inlier_bits: int = 4,
    outlier_bits: int = 8,
    weight_bits: int = 4,
    reverse: bool = False,
    batch: int = BATCH,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of the op for heavy-tailed x; some entries are listed and most are not."""
    x = randn(seed, batch, LENGTH, columns)
    rare = torch.rand(x.shape, generator=generator(seed + 1)) < 0.05
    x = torch.where(rare, 6 * x, x)
    top = 2 ** (inlier_bits - 1) - 1
    scale = (1.5 + torch.rand(LENGTH, generator=generator(seed + 2))) / top
    static = (inlier_bits, outlier_bits, PERIOD, reverse)
    codes, outlier_scale, start = quantize(x, scale, None, 1.1 * top * scale, *static)
    limit = 2 ** (weight_bits - 1) - 1
    return {
        "codes": codes,
        "inlier_scale": scale,
        "outlier_scale": outlier_scale,
        "outlier_start": start,
        "x": x if outlier_bits == 16 else None,
        "qweight": _integers(seed + 3, -limit, limit, outputs, columns),
        "weight_scale": (0.5 + torch.rand(outputs, generator=generator(seed + 4))) / limit,
        "bias": None,
        "residual": None,
        "activation": "none",
        "inlier_bits": inlier_bits,
        "outlier_bits": outlier_bits,
        "refresh_period": PERIOD,
        "reverse": reverse,
    }


def _in_fp64(given: dict[str, Any], weight: Tensor | None = None) -> Tensor:
    """Dequantize both operands, multiply in fp64, then bias, activation and residual."""
    static = [given[k] for k in ("inlier_bits", "outlier_bits", "refresh_period", "reverse")]
    dynamic = [given[k] for k in ("outlier_scale", "outlier_start", "x")]
    values = dequantize(given["codes"], given["inlier_scale"], None, *dynamic, *static).double()
    codes = given["qweight"] if weight is None else weight
    dequantized = codes.double() * given["weight_scale"].double()[:, None]
    bias = None if given["bias"] is None else given["bias"].double()
    y = ACTIVATIONS[given["activation"]](functional.linear(values, dequantized, bias))
    return y if given["residual"] is None else y + given["residual"].double()


def _listed(given: dict[str, Any]) -> Tensor:
    return listed_mask(given["outlier_start"], LENGTH, PERIOD, given["reverse"])


# --- exact integers (T1, T13)


@pytest.mark.parametrize("columns", [0, *COLUMNS, 16, 1536])
@pytest.mark.parametrize(("rows", "outputs"), [(1, 1), (1, 5), (9, 13), (33, 64)])
def test_int_matmul_is_exact(rows: int, columns: int, outputs: int) -> None:
    """Against numpy's int64, with full-range operands and a weight seen transposed."""
    a, weight = _integers(1, -128, 127, rows, columns), _integers(2, -128, 127, outputs, columns)
    expected = a.numpy().astype(np.int64) @ weight.numpy().astype(np.int64).T
    for b in (weight.t(), weight.t().contiguous()):
        product = int_matmul(a, b)
        assert product.dtype == torch.int32
        np.testing.assert_array_equal(product.numpy(), expected)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize(("left", "right"), [(127, 127), (-128, -128), (-128, 127), (127, -128)])
def test_int_matmul_does_not_saturate(left: int, right: int, columns: int) -> None:
    """Every product is as large as it gets: a 16-bit intermediate would overflow."""
    a = torch.full((3, columns), left, dtype=torch.int8)
    b = torch.full((columns, 4), right, dtype=torch.int8)
    assert (int_matmul(a, b) == left * right * columns).all()


def test_int_matmul_takes_strided_operands() -> None:
    a, b = _integers(3, -127, 127, 20, 6).t(), _integers(4, -127, 127, 40, 9)[::2]
    np.testing.assert_array_equal(
        int_matmul(a, b).numpy(), a.numpy().astype(np.int64) @ b.numpy().astype(np.int64)
    )


@pytest.mark.parametrize("reverse", [False, True])
def test_codes_split_into_inliers_and_outliers(reverse: bool) -> None:
    """T1: A = A_I + A_O, disjoint, and the two products add up to the whole."""
    given = _problem(96, reverse=reverse)
    codes, listed = given["codes"].long(), _listed(given)
    inliers, outliers = torch.where(listed, 0, codes), torch.where(listed, codes, 0)
    assert outliers.any()
    assert torch.equal(inliers + outliers, codes)
    assert not (inliers * outliers).any()
    assert inliers.abs().max() <= 7
    weight = given["qweight"].long().t()
    assert torch.equal(inliers @ weight + outliers @ weight, codes @ weight)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("count", [0, 1, 2, None])
@pytest.mark.parametrize("reverse", [False, True])
def test_accumulators_equal_int64(columns: int, count: int | None, reverse: bool) -> None:
    """T13 with 0, 1, 2 and all K channels listed: with powers of two as scales y is an integer."""
    channels = min(columns, columns if count is None else count)
    listed = torch.randperm(columns, generator=generator(5))[:channels]
    x = 3 * randn(6, BATCH, LENGTH, columns)
    given = _problem(columns, reverse=reverse)
    unit = torch.ones(LENGTH)
    codes, outlier_scale, start = quantize_static(x, unit / 4, None, listed, 4, 8, PERIOD, reverse)
    assert bool(_listed({**given, "outlier_start": start}).any()) == (channels > 0)
    given.update(
        codes=codes,
        inlier_scale=unit,
        outlier_scale=torch.full_like(outlier_scale, 4.0),
        outlier_start=start,
        weight_scale=torch.ones(13),
    )
    weight, codes64 = given["qweight"].numpy().astype(np.int64), codes.numpy().astype(np.int64)
    is_outlier = np.isin(np.arange(columns), listed.numpy())
    inlier_sum = (codes64 * ~is_outlier) @ weight.T
    outlier_sum = (codes64 * is_outlier) @ weight.T
    np.testing.assert_array_equal(op(**given).numpy(), inlier_sum + 4 * outlier_sum)


# --- values


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("outlier_bits", [8, 16])
@pytest.mark.parametrize("reverse", [False, True])
def test_equals_dequantize_then_linear(columns: int, outlier_bits: int, reverse: bool) -> None:
    given = _problem(columns, outlier_bits=outlier_bits, reverse=reverse)
    y = op(**given)
    assert y.is_contiguous()
    assert_close(y, _in_fp64(given).float(), 1e-5)


def test_these_problems_have_inliers_and_outliers() -> None:
    """Guards the tests of values: lists differ between rows, windows and samples."""
    for columns in COLUMNS[2:]:
        listed = _listed(_problem(columns))
        assert listed.any()
        assert not listed.all(1).all()
        assert not torch.equal(listed[0], listed[1])


@pytest.mark.parametrize("outlier_bits", [8, 16])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize(
    ("with_bias", "with_residual"), [(True, False), (False, True), (True, True)]
)
def test_epilogue(activation: str, with_bias: bool, with_residual: bool, outlier_bits: int) -> None:
    """Bias, then activation, then residual."""
    given = _problem(outlier_bits=outlier_bits)
    given["activation"] = activation
    if with_bias:
        given["bias"] = 2 * randn(7, 13)
    if with_residual:
        given["residual"] = 3 * randn(8, BATCH, LENGTH, 13)
    y = op(**given)
    assert_close(y, _in_fp64(given).float(), 1e-5)
    if with_residual:
        assert not shares_memory(y, given["residual"])


@pytest.mark.parametrize("outlier_bits", [8, 16])
@pytest.mark.parametrize(("inlier_bits", "weight_bits"), [(4, 4), (6, 6), (8, 8), (8, 4), (4, 8)])
def test_bits(inlier_bits: int, weight_bits: int, outlier_bits: int) -> None:
    """6- and 8-bit codes of activations and weights, stored as int8."""
    given = _problem(
        96, inlier_bits=inlier_bits, weight_bits=weight_bits, outlier_bits=outlier_bits
    )
    assert given["codes"].abs().max() > 2 ** (inlier_bits - 2)
    assert given["qweight"].abs().max() > 2 ** (weight_bits - 2)
    assert_close(op(**given), _in_fp64(given).float(), 1e-5)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("outlier_bits", [8, 16])
def test_packed_weights_give_the_same_bits(columns: int, outlier_bits: int) -> None:
    """uint8 nibbles and int8 codes, bit for bit, odd K included."""
    given = _problem(columns, outlier_bits=outlier_bits)
    packed = {**given, "qweight": pack(given["qweight"])}
    assert packed["qweight"].shape == (13, (columns + 1) // 2)
    assert torch.equal(op(**packed), op(**given))
    assert_close(op(**packed), _in_fp64(packed, given["qweight"]).float(), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_output_dtype(dtype: torch.dtype) -> None:
    """fp32 unless asked otherwise, and rounded once, at the end."""
    given = _problem(96)
    given.update(bias=randn(9, 13), residual=randn(10, BATCH, LENGTH, 13), activation="silu")
    full = op(**given)
    assert full.dtype == torch.float32
    assert torch.equal(op(**given, dtype=None), full)
    y = op(**given, dtype=dtype)
    assert y.dtype == dtype
    assert torch.equal(y, full.to(dtype))


def test_half_precision_operands() -> None:
    """fp16 x, bias, residual and scales are read as fp32."""
    given = _problem(96, outlier_bits=16)
    names = ("x", "bias", "residual", "inlier_scale", "weight_scale")
    given.update(bias=randn(9, 13), residual=randn(10, BATCH, LENGTH, 13))
    given.update({name: given[name].half() for name in names})
    widened = {**given, **{name: given[name].float() for name in names}}
    y = op(**given)
    assert torch.equal(y, op(**widened))
    assert_close(y, _in_fp64(widened).float(), 1e-5)


def test_sixteen_bit_outliers_come_from_x() -> None:
    """Listed entries of x matter and unlisted ones do not."""
    given = _problem(96, outlier_bits=16)
    y, listed = op(**given), _listed(given)
    unlisted_changed = torch.where(listed, given["x"], 1e6)
    assert torch.equal(op(**{**given, "x": unlisted_changed}), y)
    listed_changed = torch.where(listed, 2 * given["x"], given["x"])
    assert not torch.equal(op(**{**given, "x": listed_changed}), y)


def test_eight_bit_outliers_do_not_need_x() -> None:
    """x is ignored there: fused graphs may drop it."""
    given = _problem()
    assert torch.equal(op(**{**given, "x": randn(11, BATCH, LENGTH, 17)}), op(**given))


def test_inputs_in_any_memory_layout() -> None:
    """Strided codes, weights and residuals."""
    given = _problem(17)
    given["residual"] = randn(12, BATCH, LENGTH, 13)
    strided = dict(given)
    for name in ("codes", "residual"):
        strided[name] = given[name].transpose(1, 2).contiguous().transpose(1, 2)
    strided["qweight"] = given["qweight"].t().contiguous().t()
    y = op(**strided)
    assert torch.equal(y, op(**given))
    assert y.is_contiguous()


def test_inputs_are_unchanged() -> None:
    given = _problem(outlier_bits=16)
    given.update(bias=randn(9, 13), residual=randn(10, BATCH, LENGTH, 13), activation="silu")
    before = {k: v.clone() for k, v in given.items() if isinstance(v, Tensor)}
    op(**given)
    assert all(torch.equal(given[name], kept) for name, kept in before.items())


# --- batch invariance (T33)


def _assert_op_is_batch_invariant(given: dict[str, Any]) -> None:
    batched = ("codes", "outlier_scale", "outlier_start", "x", "residual")
    fixed = {k: v for k, v in given.items() if k not in batched}
    assert_batch_invariant(
        lambda *tensors: op(**dict(zip(batched, tensors, strict=True)), **fixed),
        *(given[name] for name in batched),
    )


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("reverse", [False, True])
def test_batch_invariance(columns: int, reverse: bool) -> None:
    """Bit for bit with 8-bit outliers, bias and residual; the union of lists depends on company."""
    given = _problem(columns, batch=7, reverse=reverse)
    given.update(bias=randn(9, 13), residual=randn(10, 7, LENGTH, 13))
    _assert_op_is_batch_invariant(given)


@pytest.mark.parametrize("activation", ["silu", "softplus", "gelu", "gelu_tanh"])
def test_batch_invariance_of_activations(activation: str) -> None:
    _assert_op_is_batch_invariant({**_problem(96, batch=31), "activation": activation})


def test_batch_invariance_of_sixteen_bit_outliers() -> None:
    _assert_op_is_batch_invariant(_problem(384, 96, outlier_bits=16, batch=16))


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("outlier_bits", [8, 16])
def test_samples_alone_agree_within_rounding(outlier_bits: int, activation: str) -> None:
    """What holds in every case: a sample alone is the sample in a batch, up to fp32 rounding."""
    given = {**_problem(48, 51, outlier_bits=outlier_bits, batch=9), "activation": activation}
    y = op(**given)
    for sample in range(9):
        one = slice(sample, sample + 1)
        alone = dict(given)
        for name in ("codes", "outlier_scale", "outlier_start", "x"):
            alone[name] = None if given[name] is None else given[name][one]
        assert_close(op(**alone), y[one], 2e-6)


# --- dequantize_weight


@pytest.mark.parametrize("columns", [1, 2, 7, 96])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_dequantize_weight(columns: int, packed: bool, per_row: bool, asymmetric: bool) -> None:
    """scale * code, or scale * (code + 8 - zero) with a zero point; one scale a row or for all."""
    codes, size = _integers(13, -8, 7, 5, columns), 5 if per_row else 1
    scale = 0.5 + torch.rand(size, generator=generator(14))
    zero = torch.arange(3, 3 + size).float() if asymmetric else None
    given = pack(codes) if packed else codes
    values = dequantize_weight(given, scale, zero, 4, columns)
    shifted = codes.numpy().astype(np.float32)
    if asymmetric:
        shifted = shifted + 8 - zero.numpy()[:, None]
    assert values.dtype == torch.float32
    np.testing.assert_array_equal(values.numpy(), shifted * scale.numpy()[:, None])


@pytest.mark.parametrize("bits", [6, 8])
def test_dequantize_weight_of_wider_codes(bits: int) -> None:
    """The offset of stored asymmetric codes is 2**(bits-1): unsigned code minus zero point."""
    unsigned = torch.arange(2**bits)[None]
    stored = (unsigned - 2 ** (bits - 1)).to(torch.int8)
    zero, scale = torch.tensor([20], dtype=torch.int32), torch.tensor([0.25]).half()
    values = dequantize_weight(stored, scale, zero, bits, 2**bits)
    assert values.dtype == torch.float32
    assert torch.equal(values, 0.25 * (unsigned - 20))
    symmetric = dequantize_weight(stored, scale, None, bits, 2**bits)
    assert torch.equal(symmetric, 0.25 * stored.float())


def test_dequantize_weight_refuses_a_packed_weight_of_another_width() -> None:
    with pytest.raises(ValueError, match="has 4 bytes of two 4-bit codes, expected 5"):
        dequantize_weight(pack(_integers(15, -8, 7, 5, 8)), torch.ones(5), None, 4, 9)


def test_dequantize_weight_refuses_an_int8_weight_of_another_width() -> None:
    """Its fake has `columns` columns and the result would have others."""
    with pytest.raises(ValueError, match="dequantize_weight"):
        dequantize_weight(_integers(15, -8, 7, 5, 8), torch.ones(5), None, 4, 9)


# --- refusals and registration


def test_refuses_an_unknown_activation() -> None:
    with pytest.raises(
        ValueError,
        match=r"linear_dynamic_outlier: activation 'relu' is none of none, silu, softplus, gelu,",
    ):
        op(**{**_problem(), "activation": "relu"})


def test_refuses_a_weight_of_another_width() -> None:
    given = _problem(17)
    with pytest.raises(
        ValueError, match="linear_dynamic_outlier: qweight has 16 columns, expected 17"
    ):
        op(**{**given, "qweight": given["qweight"][:, :16]})
    with pytest.raises(ValueError, match="qweight has 8 columns, expected 9 for 17"):
        op(**{**given, "qweight": pack(given["qweight"][:, :16])})


def test_sixteen_bit_outliers_need_x() -> None:
    with pytest.raises(ValueError, match="linear_dynamic_outlier: outlier_bits 16 reads x"):
        op(**{**_problem(outlier_bits=16), "x": None})


@pytest.mark.parametrize(
    ("outlier_bits", "packed", "reverse", "dtype"),
    [(8, True, False, None), (16, False, True, torch.float16)],
)
def test_opcheck(outlier_bits: int, packed: bool, reverse: bool, dtype: torch.dtype | None) -> None:
    given = _problem(7, 5, outlier_bits=outlier_bits, reverse=reverse)
    given.update(bias=randn(9, 5), residual=randn(10, BATCH, LENGTH, 5), activation="silu")
    if packed:
        given["qweight"] = pack(given["qweight"])
    assert_opcheck(op, tuple(given.values()), {"dtype": dtype})


def test_opcheck_with_nothing_optional() -> None:
    assert_opcheck(op, tuple(_problem(7, 5).values()))


@pytest.mark.parametrize(("packed", "asymmetric"), [(False, True), (True, False)])
def test_opcheck_of_dequantize_weight(packed: bool, asymmetric: bool) -> None:
    codes = _integers(16, -8, 7, 5, 7)
    given = pack(codes) if packed else codes
    zero = torch.full((5,), 4.0) if asymmetric else None
    assert_opcheck(dequantize_weight, (given, torch.rand(5), zero, 4, 7))


def test_opcheck_of_dequantize_weight_transposed() -> None:
    codes = _integers(17, -8, 7, 7, 5).t()
    assert_opcheck(dequantize_weight, (codes, torch.rand(5), None, 4, 7))
