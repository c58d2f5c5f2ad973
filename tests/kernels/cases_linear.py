"""The two-scale product: accumulators bit for bit, results at the dtype's rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ouro_compiler.kernels.candidates import as_choice, current_choice, free_values
from ouro_compiler.kernels.launch import Launch, launch, record_launches, start
from ouro_compiler.kernels.linear import linear_dynamic_outlier
from ouro_compiler.kernels.retile import retile
from ouro_compiler.ops.linear import linear_dynamic_outlier_ref
from ouro_compiler.ops.packing import pack_int4_ref
from ouro_compiler.ops.quantize import listed_mask, quantize_dynamic_outlier_ref
from tests.helpers import assert_batch_invariant, assert_close, generator, randn
from tests.kernels.inputs import SHAPES, activation, assert_equal, on

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROUNDING = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
ACTIVATIONS = ("none", "silu", "softplus", "gelu", "gelu_tanh")


def problem(
    index: int, outlier_bits: int, packed: bool, outputs: int = 70
) -> tuple[dict[str, Any], torch.dtype]:
    """Arguments of the op for one of SHAPES, with every option in turn."""
    *shape, outliers = SHAPES[index]
    batch, length, channels = shape
    x, scale, threshold = activation(index, tuple(shape), outliers)  # type: ignore[arg-type]
    ints = (4, outlier_bits, (10, 4)[index % 2], index % 3 == 1)
    codes, outlier_scale, start = quantize_dynamic_outlier_ref(x, scale, None, threshold, *ints)
    limit = 7 if packed else 127
    made = generator(index)
    weight = torch.randint(-limit, limit + 1, (outputs, channels), generator=made).to(torch.int8)
    dtype = DTYPES[index % 3]
    return {
        "codes": codes,
        "inlier_scale": scale.half() if index % 2 else scale,
        "outlier_scale": outlier_scale,
        "outlier_start": start,
        "x": x.to(dtype) if outlier_bits == 16 else None,
        "qweight": pack_int4_ref(weight) if packed else weight,
        "weight_scale": torch.rand(outputs if index % 4 else 1, generator=made) * 0.1 + 0.01,
        "bias": randn(index, outputs) if index % 2 else None,
        "residual": randn(index, batch, length, outputs).to(dtype) if index % 3 else None,
        "activation": ACTIVATIONS[index % 5],
        "inlier_bits": ints[0],
        "outlier_bits": ints[1],
        "refresh_period": ints[2],
        "reverse": ints[3],
    }, dtype


def run(device: str, given: dict[str, Any], dtype: torch.dtype | None = None) -> Tensor:
    found = linear_dynamic_outlier(*on(device, *given.values()), dtype=dtype)
    return found.cpu()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("outlier_bits", [8, 16])
@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_linear(index: int, outlier_bits: int, packed: bool, device: str) -> None:
    given, dtype = problem(index, outlier_bits, packed)
    expected = linear_dynamic_outlier_ref(**given, dtype=dtype)
    assert_close(run(device, given, dtype), expected, ROUNDING[dtype])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_accumulators(index: int, packed: bool, device: str) -> None:
    """Scales of 1 and 0 let each int32 accumulator through fp32, exact below 2**24."""
    given, _ = problem(index, 8, packed)
    given.update(bias=None, residual=None, activation="none", weight_scale=torch.ones(1))
    batch, length, channels = given["codes"].shape
    weight = given["qweight"]
    if packed:
        low = ((weight << 4).view(torch.int8)) >> 4
        weight = torch.cat((low, weight.view(torch.int8) >> 4), 1)[:, :channels]
    listed = listed_mask(given["outlier_start"], length, given["refresh_period"], given["reverse"])
    codes = given["codes"].long()
    both = codes @ weight.long().t()
    outliers = torch.where(listed, codes, 0) @ weight.long().t()
    assert int(both.abs().max()) < 2**24
    ones, zeros = torch.ones(length), torch.zeros(length)
    given.update(inlier_scale=ones, outlier_scale=torch.zeros(batch, length))
    assert torch.equal(run(device, given).long(), both - outliers)
    given.update(inlier_scale=zeros, outlier_scale=torch.ones(batch, length))
    assert torch.equal(run(device, given).long(), outliers)


@pytest.mark.parametrize("outputs", [1, 16, 44, 128, 129, 300])
def test_widths_of_the_output(outputs: int, device: str) -> None:
    given, dtype = problem(9, 8, True, outputs)
    expected = linear_dynamic_outlier_ref(**given, dtype=dtype)
    assert_close(run(device, given, dtype), expected, ROUNDING[dtype])


@pytest.mark.parametrize("channels", [1, 3, 12, 31, 64, 129])
@pytest.mark.parametrize("packed", [False, True])
def test_widths_of_the_input(channels: int, packed: bool, device: str) -> None:
    """dt_proj's few features, and odd numbers of nibbles."""
    x, scale, threshold = activation(channels, (2, 7, channels), 1)
    ints = (4, 8, 10, False)
    codes, outlier_scale, start = quantize_dynamic_outlier_ref(x, scale, None, threshold, *ints)
    weight = torch.randint(-7, 8, (20, channels), generator=generator(1)).to(torch.int8)
    stored = pack_int4_ref(weight) if packed else weight
    args = (codes, scale, outlier_scale, start, None, stored, torch.rand(20), None, None, "none")
    found = linear_dynamic_outlier(*on(device, *args), *ints)
    assert_close(found.cpu(), linear_dynamic_outlier_ref(*args, *ints), 3e-6)


def test_windows_of_more_than_255_tokens(device: str) -> None:
    x, scale, threshold = activation(2, (1, 300, 33), 2)
    ints = (4, 8, 1000, True)
    codes, outlier_scale, start = quantize_dynamic_outlier_ref(x, scale, None, threshold, *ints)
    assert start.dtype == torch.int32
    weight = torch.randint(-7, 8, (20, 33), generator=generator(1)).to(torch.int8)
    args = (codes, scale, outlier_scale, start, None, pack_int4_ref(weight), torch.rand(20))
    found = linear_dynamic_outlier(*on(device, *args), None, None, "none", *ints)
    expected = linear_dynamic_outlier_ref(*args, None, None, "none", *ints)
    assert_close(found.cpu(), expected, 3e-6)


@pytest.mark.parametrize("outlier_bits", [8, 16])
def test_linear_batch_invariance(outlier_bits: int, device: str) -> None:
    given, _ = problem(10, outlier_bits, True)
    rest = {key: value for key, value in given.items() if key not in ("codes", "x", "residual")}
    batched = [given["codes"], given["outlier_scale"], given["outlier_start"], given["x"]]

    def function(codes: Tensor, scale: Tensor, start: Tensor, x: Tensor | None) -> Tensor:
        changed = {"outlier_scale": scale, "outlier_start": start, "x": x, "residual": None}
        return run(device, {"codes": codes, **{k: {**rest, **changed}[k] for k in list(given)[1:]}})

    assert_batch_invariant(function, *batched)


@pytest.mark.parametrize("outlier_bits", [8, 16])
@pytest.mark.parametrize("length", [1, 5, 33, 64, 197])
@pytest.mark.parametrize("channels", [24, 33])
def test_lists_of_columns(channels: int, length: int, outlier_bits: int, device: str) -> None:
    """What a window that a tile meets lists, ascending, four columns at a time or one."""
    reverse = bool(length % 2)
    made = generator(length)
    first = torch.randint(0, 4, (3, -(-length // 10), channels), generator=made)
    start = torch.where(torch.rand(first.shape, generator=made) < 0.03, first, 255)
    start = start.to(torch.uint8)
    codes, x = torch.zeros(3, length, channels, dtype=torch.int8), torch.zeros(3, length, channels)
    weight = torch.zeros(4, channels, dtype=torch.int8)
    args = (codes, torch.ones(length), torch.ones(3, length), start, x, weight, torch.ones(1))
    given = on(device, *(None if arg is x and outlier_bits == 8 else arg for arg in args))
    ints = (4, outlier_bits, 10, reverse)
    with record_launches() as recording:
        linear_dynamic_outlier(*given, None, None, "none", *ints)
    (one,) = recording.launches
    launch(one.spec, one.grid, *one.args)
    lists = one.args[4].cpu()
    steps = torch.arange(length).flip(0) if reverse else torch.arange(length)
    listed = (start != 255)[:, steps // 10].reshape(-1, channels)
    rows = listed.split([length] * 3) if outlier_bits == 16 else [listed]
    tiles = [tile for part in rows for tile in part.split(one.spec["BLOCK_M"])]
    assert len(tiles) == len(lists)
    for tile, found in zip(tiles, lists, strict=True):
        wanted = tile.any(0).nonzero().squeeze(1).int()
        assert_equal((found[: len(wanted)],), (wanted,))
        assert bool((found[len(wanted) :] == torch.iinfo(torch.int32).max).all())


def test_refuses_what_the_reference_refuses(device: str) -> None:
    given, _ = problem(0, 16, False)
    with pytest.raises(ValueError, match="outlier_bits 16 reads x"):
        run(device, {**given, "x": None})
    with pytest.raises(ValueError, match="qweight has 95 columns, expected 96"):
        run(device, {**given, "qweight": given["qweight"][:, :95]})


def nibble_form(one: Launch, block_m: int = 32, **blocks: int) -> Launch:
    """A product on INT4 tensor cores, with few rows a tile: sm_90 takes these instructions then."""
    changed = {**dict(current_choice(one.spec)), "MATRIX_BITS": 4, "BLOCK_M": block_m, **blocks}
    return retile(one, as_choice(changed))


def both_forms(device: str, given: dict[str, Any], dtype: torch.dtype, **blocks: int) -> None:
    """A product on nibbles has the bits of the same product on bytes."""
    if device == "cuda" and torch.cuda.get_device_capability()[0] > 9:
        pytest.skip("GPUs after Hopper have other matrix instructions")
    with record_launches() as recording:
        y = linear_dynamic_outlier(*on(device, *given.values()), dtype=dtype)
    (one,) = recording.launches
    start(one)
    expected = y.cpu().clone()
    assert expected.isfinite().all()
    y.fill_(torch.nan)
    start(nibble_form(one, **blocks))
    assert_equal((y,), (expected,))


@pytest.mark.parametrize("index", [0, 1, 2, 4, 5, 8, 9, 11, 13, 14])
def test_nibbles_give_the_bits_of_bytes(index: int, device: str) -> None:
    """None, some and all columns listed; K-halves that are ragged and whole."""
    given, dtype = problem(index, 8, True)
    both_forms(device, given, dtype, BLOCK_K=(32, 64)[index % 2])


@pytest.mark.parametrize("channels", [64, 65, 67, 128, 129])
def test_nibbles_of_every_value(channels: int, device: str) -> None:
    """Inliers from -8 to 7, outliers from -128 to 127, weights from -8 to 7, with 8-bit scales."""
    made = generator(channels)
    start_at = torch.where(torch.rand(3, 4, channels, generator=made) < 0.2, 3, 255)
    listed = listed_mask(start_at.to(torch.uint8), 37, 10, False)
    inliers = torch.randint(-8, 8, listed.shape, generator=made)
    outliers = torch.randint(-128, 128, listed.shape, generator=made)
    weight = torch.randint(-8, 8, (20, channels), generator=made)
    given = {
        "codes": torch.where(listed, outliers, inliers).to(torch.int8),
        "inlier_scale": torch.rand(37, generator=made),
        "outlier_scale": torch.rand(3, 37, generator=made),
        "outlier_start": start_at.to(torch.uint8),
        "x": None,
        "qweight": pack_int4_ref(weight.to(torch.int8)),
        "weight_scale": torch.rand(20, generator=made),
        "bias": None,
        "residual": None,
        "activation": "none",
        "inlier_bits": 4,
        "outlier_bits": 8,
        "refresh_period": 10,
        "reverse": False,
    }
    both_forms(device, given, torch.float32)


def test_inliers_of_more_than_four_bits_are_no_nibbles(device: str) -> None:
    given, _ = problem(0, 8, True)
    for changed in ({"inlier_bits": 6}, {"qweight": problem(0, 8, False)[0]["qweight"]}):
        with record_launches() as recording:
            run(device, {**given, **changed})
        assert "MATRIX_BITS" not in free_values(recording.launches[0].spec)
