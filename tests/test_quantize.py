"""The quantizers of activations: golden vectors, an independent oracle, and T2-T11."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import ouro_compiler.ops  # noqa: F401  (registers torch.ops.ouro)
from ouro_compiler.ops.quantize import (
    inlier_interval,
    listed_mask,
    outlier_start_ref,
    quantize_asymmetric,
    quantize_symmetric,
)
from tests.helpers import (
    REPEATABLE,
    Quantized,
    assert_batch_invariant,
    assert_opcheck,
    generator,
    quantizer_oracle,
    randn,
    shares_memory,
)

quantize = torch.ops.ouro.quantize_dynamic_outlier
quantize_static = torch.ops.ouro.quantize_static_outlier
dequantize = torch.ops.ouro.dequantize_dynamic_outlier

INT32_NEVER = 2**31 - 1


def _q(bits: int) -> int:
    """Largest symmetric code, spelled out: 7, 31, 127."""
    return {4: 7, 6: 31, 8: 127}[bits]


def _heavy(seed: int, *shape: int) -> Tensor:
    """Activations with rare large values, some 3 % of them."""
    x = randn(seed, *shape)
    large = torch.rand(shape, generator=generator(seed + 1)) < 0.03
    return torch.where(large, 8 * x, x)


def _scales(seed: int, length: int, bits: int = 4) -> Tensor:
    """Per-token scales whose largest code is about 2."""
    return (1.5 + torch.rand(length, generator=generator(seed))) / _q(bits)


def _assert_equal(name: str, actual: Tensor, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(actual.numpy(), expected, err_msg=name)


def _assert_matches(
    outputs: tuple[Tensor, Tensor, Tensor], dequantized: Tensor, expected: Quantized
) -> None:
    """Codes, scales, starts and values, bit for bit."""
    codes, outlier_scale, start = outputs
    assert codes.dtype == torch.int8
    assert outlier_scale.dtype == dequantized.dtype == torch.float32
    _assert_equal("codes", codes, expected.codes)
    _assert_equal("outlier_scale", outlier_scale, expected.outlier_scale)
    _assert_equal("outlier_start", start, expected.outlier_start)
    _assert_equal("dequantized", dequantized, expected.dequantized)


# --- golden vectors (METHODS 3.5)

GOLDEN_X = torch.tensor(
    [
        [0.5, -1.0, 0.25, 2.0],
        [0.4, -0.6, 3.0, -0.2],
        [1.5, 0.3, -0.7, 0.1],
        [0.9, -2.5, 0.2, 0.6],
        [0.1, 0.2, -0.3, 0.4],
    ]
)[None]
GOLDEN_SCALE = torch.tensor([0.1, 0.1, 0.1, 0.2, 0.1])
HIGH_THRESHOLD = torch.tensor([0.9, 0.9, 0.9, 1.8, 0.9])
LOW_THRESHOLD = torch.tensor([0.5, 0.5, 0.5, 1.0, 0.5])


def _lists(start: Tensor, length: int, window: int, reverse: bool = False) -> list[str]:
    mask = listed_mask(start, length, window, reverse)
    return ["".join(str(int(member)) for member in row) for row in mask[0]]


def test_golden_vector() -> None:
    codes, outlier_scale, start = quantize(
        GOLDEN_X, GOLDEN_SCALE, None, HIGH_THRESHOLD, 4, 8, 3, False
    )
    assert _lists(start, 5, 3) == ["0101", "0111", "1111", "0100", "0100"]
    assert start.dtype == torch.uint8
    assert start.tolist() == [[[2, 0, 1, 0], [255, 0, 255, 255]]]
    assert codes[0].tolist() == [
        [5, -64, 2, 127],
        [4, -25, 127, -8],
        [127, 25, -59, 8],
        [4, -127, 1, 3],
        [1, 127, -3, 4],
    ]
    peaks = torch.tensor([[2.0, 3.0, 1.5, 2.5, 0.2]])
    assert torch.equal(outlier_scale, peaks / 127)
    assert outlier_scale[0].tolist() == pytest.approx(
        [0.015748, 0.023622, 0.011811, 0.019685, 0.001575], abs=5e-7
    )
    values = dequantize(codes, GOLDEN_SCALE, None, outlier_scale, start, None, 4, 8, 3, False)
    printed = [
        [0.5, -1.0079, 0.2, 2.0],
        [0.4, -0.5906, 3.0, -0.189],
        [1.5, 0.2953, -0.6969, 0.0945],
        [0.8, -2.5, 0.2, 0.6],
        [0.1, 0.2, -0.3, 0.4],
    ]
    torch.testing.assert_close(values[0], torch.tensor(printed), rtol=0, atol=5e-5)


def test_golden_vector_with_thresholds_inside_the_inlier_range() -> None:
    """With theta < T the gate matters: it stays shut at tokens 2 and 4."""
    _, _, start = quantize(GOLDEN_X, GOLDEN_SCALE, None, LOW_THRESHOLD, 4, 8, 3, False)
    assert _lists(start, 5, 3) == ["1101", "1111", "1111", "0100", "0100"]


@pytest.mark.parametrize(
    ("threshold", "fired"),
    [(HIGH_THRESHOLD, [1, 1, 1, 1, 0]), (LOW_THRESHOLD, [1, 1, 0, 1, 0])],
)
def test_the_oracle_fires_as_the_golden_vector_does(threshold: Tensor, fired: list[int]) -> None:
    """Guards the oracle that the rest is compared with, and ties it to the op."""
    expected = quantizer_oracle(
        GOLDEN_X.numpy(), GOLDEN_SCALE.numpy(), None, threshold.numpy(), 4, 8, 3, False
    )
    assert expected.fired[0].astype(int).tolist() == fired
    outputs = quantize(GOLDEN_X, GOLDEN_SCALE, None, threshold, 4, 8, 3, False)
    values = dequantize(outputs[0], GOLDEN_SCALE, None, *outputs[1:], None, 4, 8, 3, False)
    _assert_matches(outputs, values, expected)


# --- against the oracle


@st.composite
def _problems(draw: st.DrawFn) -> dict[str, Any]:
    """Shapes, windows and numbers; on a grid of powers of two, ties and equalities are common."""
    batch, length, channels = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 14)),
        draw(st.integers(1, 7)),
    )
    seed, bits = draw(st.integers(0, 9999)), draw(st.sampled_from([4, 6, 8]))
    rng = np.random.default_rng(seed)
    asymmetric = draw(st.booleans())
    top = 2**bits - 1 if asymmetric else _q(bits)
    if draw(st.booleans()):
        scale = rng.choice([0.25, 0.5], length)
        x = rng.integers(-3 * top, 3 * top + 1, (batch, length, channels)) * 0.125
    else:
        scale = rng.uniform(0.5, 2, length) / top
        x = rng.standard_t(3, (batch, length, channels))
    limit = scale * top / (2 if asymmetric else 1)
    # At, inside and outside the edge of the inlier range, and everything in between.
    threshold = limit * rng.choice(draw(st.sampled_from([[1.0], [1.25], [0.5], [0, 0.5, 1, 2]])))
    return {
        "x": x.astype(np.float32),
        "inlier_scale": scale.astype(np.float32),
        "zero_point": rng.integers(0, top + 1, length).astype(np.float32) if asymmetric else None,
        "threshold": threshold.astype(np.float32),
        "inlier_bits": bits,
        "outlier_bits": draw(st.sampled_from([8, 16, 4])),
        "refresh_period": draw(st.sampled_from([1, 2, 3, 5, length, length + 1, 300])),
        "reverse": draw(st.booleans()),
    }


def _tensors(problem: dict[str, Any]) -> dict[str, Any]:
    return {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in problem.items()}


def _dequantize(given: dict[str, Any], outputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    codes, outlier_scale, start = outputs
    return dequantize(
        codes,
        given["inlier_scale"],
        given["zero_point"],
        outlier_scale,
        start,
        given["x"] if given["outlier_bits"] == 16 else None,
        given["inlier_bits"],
        given["outlier_bits"],
        given["refresh_period"],
        given["reverse"],
    )


@settings(REPEATABLE, max_examples=400)
@given(problem=_problems())
def test_equals_the_oracle(problem: dict[str, Any]) -> None:
    """Codes, scales, starts and dequantized values, for any shape, window, direction and bits."""
    given = _tensors(problem)
    outputs = quantize(**given)
    _assert_matches(outputs, _dequantize(given, outputs), quantizer_oracle(**problem))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(
    ("length", "period"),
    [(12, 4), (13, 4), (15, 4), (3, 4), (9, 1), (9, 9), (9, 10), (9, 10**9), (1, 1), (1, 5)],
)
def test_tails(length: int, period: int, asymmetric: bool, reverse: bool) -> None:
    """L mod w of 0, 1 and w - 1; L < w; w = 1; a list that is never reset (T8)."""
    rng = np.random.default_rng(length * period)
    scale = rng.uniform(0.15, 0.3, length).astype(np.float32)
    problem = {
        "x": _heavy(length, 2, length, 6).numpy(),
        "inlier_scale": scale,
        "zero_point": rng.integers(3, 12, length).astype(np.float32) if asymmetric else None,
        "threshold": scale * np.float32(7.5),
        "inlier_bits": 4,
        "outlier_bits": 8,
        "refresh_period": period,
        "reverse": reverse,
    }
    given, expected = _tensors(problem), quantizer_oracle(**problem)
    outputs = quantize(**given)
    _assert_matches(outputs, _dequantize(given, outputs), expected)
    windows = -(-length // min(period, length))
    assert outputs[2].shape == (2, windows, 6)
    assert outputs[2].dtype == torch.uint8


def test_windows_of_one_token_have_no_memory() -> None:
    """w = 1: O_t = [a_t >= theta_t] where the gate opens, and nothing where it does not."""
    x, scale = _heavy(3, 2, 9, 8), _scales(4, 9)
    limit, threshold = 7 * scale, 4 * scale
    _, _, start = quantize(x, scale, None, threshold, 4, 8, 1, False)
    opened = (x.abs() > limit[:, None]).any(-1, keepdim=True)
    assert opened.any()
    assert not opened.all()
    expected = opened & (x.abs() >= threshold[:, None])
    assert torch.equal(listed_mask(start, 9, 1, False), expected)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("length", "period", "dtype"),
    [
        (255, 255, torch.uint8),
        (300, 255, torch.uint8),
        (256, 256, torch.int32),
        (300, 10**6, torch.int32),
        (520, 260, torch.int32),
    ],
)
def test_long_windows(length: int, period: int, dtype: torch.dtype, reverse: bool) -> None:
    """Positions past 254 need int32, where never is 2**31 - 1; up to 255 tokens fit uint8."""
    x = 0.5 * randn(5, 1, length, 3).clamp(-1, 1)
    for channel, position in ((0, 254), (1, 255)):
        step = min(position, min(period, length) - 1)
        x[0, length - 1 - step if reverse else step, channel] = 9.0
    scale = torch.full((length,), 0.2)
    problem = {
        "x": x,
        "inlier_scale": scale,
        "zero_point": None,
        "threshold": scale * 8,
        "inlier_bits": 4,
        "outlier_bits": 8,
        "refresh_period": period,
        "reverse": reverse,
    }
    outputs = quantize(**problem)
    assert outputs[2].dtype == dtype
    never = 255 if dtype == torch.uint8 else INT32_NEVER
    assert outputs[2][0, 0].tolist() == [254, min(255, min(period, length) - 1), never]
    in_numpy = {k: v.numpy() if isinstance(v, Tensor) else v for k, v in problem.items()}
    expected = quantizer_oracle(**in_numpy)
    _assert_matches(outputs, _dequantize(problem, outputs), expected)


# --- properties of the list


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.2])
def test_lists_only_grow_inside_a_window(factor: float, reverse: bool) -> None:
    """T2: O_t is in O_(t+1), and some list does grow."""
    x, scale = _heavy(7, 3, 20, 16), _scales(8, 20)
    _, _, start = quantize(x, scale, None, 7 * factor * scale, 4, 8, 5, reverse)
    mask = listed_mask(start, 20, 5, reverse)
    if reverse:
        mask = mask.flip(1)
    cells = mask.view(3, 4, 5, 16)
    assert not (cells[:, :, :-1] & ~cells[:, :, 1:]).any()
    assert (~cells[:, :, :-1] & cells[:, :, 1:]).any()


@pytest.mark.parametrize("reverse", [False, True])
def test_a_window_starts_from_its_first_token_alone(reverse: bool) -> None:
    """T2, second half: other tokens may be anything."""
    x, scale = _heavy(9, 2, 20, 16), _scales(10, 20)
    other = _heavy(11, 2, 20, 16)
    first = torch.arange(20).flip(0) % 5 == 0 if reverse else torch.arange(20) % 5 == 0
    other[:, first] = x[:, first]
    masks = [
        listed_mask(quantize(t, scale, None, 7.5 * scale, 4, 8, 5, reverse)[2], 20, 5, reverse)
        for t in (x, other)
    ]
    assert masks[0][:, first].any()
    assert torch.equal(masks[0][:, first], masks[1][:, first])
    assert not torch.equal(*masks)


@pytest.mark.parametrize("reverse", [False, True])
def test_windows_are_independent(reverse: bool) -> None:
    """T6: changing one window's tokens changes no other window's outputs."""
    x, scale = _heavy(12, 2, 13, 8), _scales(13, 13)
    window = torch.arange(13).flip(0) // 4 if reverse else torch.arange(13) // 4
    before = quantize(x, scale, None, 7.5 * scale, 4, 8, 4, reverse)
    for changed in range(4):
        other = torch.where((window == changed)[:, None], 3 * x.roll(1, -1) + 1, x)
        after = quantize(other, scale, None, 7.5 * scale, 4, 8, 4, reverse)
        kept = window != changed
        for old, new in zip(before[:2], after[:2], strict=True):
            assert torch.equal(old[:, kept], new[:, kept])
            assert not torch.equal(old[:, ~kept], new[:, ~kept])
        rest = [j for j in range(4) if j != changed]
        assert torch.equal(before[2][:, rest], after[2][:, rest])


@pytest.mark.parametrize("factor", [1.0 + 1e-3, 1.3])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("period", [3, 10, 50])
def test_above_the_range_the_list_is_a_prefix_or(period: int, reverse: bool, factor: float) -> None:
    """T7, fast path: with theta > T the gate is redundant."""
    x, scale = _heavy(14, 2, 50, 24), _scales(15, 50)
    threshold = 7 * factor * scale
    _, _, start = quantize(x, scale, None, threshold, 4, 8, period, reverse)
    over = x.abs() >= threshold[:, None]
    over = over.flip(1) if reverse else over
    expected = torch.cat([part.cummax(1).values for part in over.int().split(period, 1)], 1) > 0
    expected = expected.flip(1) if reverse else expected
    assert torch.equal(listed_mask(start, 50, period, reverse), expected)
    ungated = outlier_start_ref(x.abs(), 7 * scale, threshold, period, reverse, "always")
    assert torch.equal(start, ungated)


def test_below_the_range_the_gate_only_removes() -> None:
    """T7: gated lists are inside the prefix-OR, strictly for some token."""
    x, scale = _heavy(16, 2, 50, 24), _scales(17, 50)
    threshold = 4 * scale
    gated, always = (
        listed_mask(outlier_start_ref(x.abs(), 7 * scale, threshold, 10, False, t), 50, 10, False)
        for t in ("gated", "always")
    )
    assert not (gated & ~always).any()
    assert (always & ~gated).any()


def test_equality_with_the_range_does_not_open_the_gate_but_lists() -> None:
    """The gate compares with >, the threshold with >=."""
    scale, threshold = torch.tensor([0.5]), torch.tensor([3.5])
    at_the_edge = torch.tensor([[[3.5, -3.5, 0.0]]])
    _, _, start = quantize(at_the_edge, scale, None, threshold, 4, 8, 1, False)
    assert start.tolist() == [[[255, 255, 255]]]
    opened = torch.tensor([[[3.5, -3.5, 3.75]]])
    _, _, start = quantize(opened, scale, None, threshold, 4, 8, 1, False)
    assert start.tolist() == [[[0, 0, 0]]]


def test_listed_channels_do_not_open_the_gate_again() -> None:
    """Only channels not yet listed are judged against the inlier range."""
    x = torch.tensor([[[9.0, 0.0], [9.0, 3.0]]])
    scale, threshold = torch.full((2,), 0.5), torch.full((2,), 2.0)
    _, _, start = quantize(x, scale, None, threshold, 4, 8, 2, False)
    assert start.tolist() == [[[0, 255]]]


def test_listed_mask_by_hand() -> None:
    """Both encodings of never, and the direction."""
    start = torch.tensor([[[0, 1, 255]], [[2, 255, 255]]], dtype=torch.uint8)
    mask = listed_mask(start, 3, 3, False).int().tolist()
    assert mask == [[[1, 0, 0], [1, 1, 0], [1, 1, 0]], [[0, 0, 0], [0, 0, 0], [1, 0, 0]]]
    reverse = listed_mask(start, 3, 3, True).int()
    assert reverse.flip(1).tolist() == mask
    long = torch.tensor([[[258, INT32_NEVER]]], dtype=torch.int32)
    assert listed_mask(long, 260, 260, False).sum(1).tolist() == [[2, 0]]


# --- batch invariance (T5)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("outlier_bits", [8, 16])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_batch_invariance(asymmetric: bool, outlier_bits: int, reverse: bool) -> None:
    """Each sample alone, bit for bit, dequantized values included (T5, T33)."""
    scale = _scales(19, 13)
    zero = torch.full((13,), 7.0) if asymmetric else None

    def both_ways(x: Tensor) -> tuple[Tensor, ...]:
        static = (4, outlier_bits, 5, reverse)
        codes, outlier_scale, start = quantize(x, scale, zero, 6 * scale, *static)
        values = dequantize(codes, scale, zero, outlier_scale, start, x, *static)
        fixed = quantize_static(x, scale, zero, torch.tensor([0, 3]), *static)
        return codes, outlier_scale, start, values, *fixed

    x = _heavy(18, 7, 13, 11)
    x[3] *= 20
    assert_batch_invariant(both_ways, x)


def test_permutation_and_an_outlier_heavy_neighbour() -> None:
    """T5: order and company do not matter."""
    x, scale = _heavy(20, 6, 12, 10), _scales(21, 12)
    args = (scale, None, 5 * scale, 4, 8, 4, False)
    alone = quantize(x, *args)
    order = torch.randperm(6, generator=generator(22))
    permuted = quantize(x[order], *args)
    crowd = quantize(torch.cat([x, 50 * x[:1] + 50]), *args)
    for before, shuffled, with_neighbour in zip(alone, permuted, crowd, strict=True):
        assert torch.equal(before[order], shuffled)
        assert torch.equal(before, with_neighbour[:6])


def _starts_alone_and_in_company(trigger: str) -> tuple[Tensor, Tensor]:
    """Of a quiet sample whose values lie over theta and inside T, beside a loud one."""
    scale = torch.full((4,), 0.5)
    quiet, loud = torch.full((1, 4, 3), 3.0), torch.full((1, 4, 3), 9.0)
    limit, threshold = 7 * scale, 5 * scale
    alone = outlier_start_ref(quiet, limit, threshold, 2, False, trigger)
    together = outlier_start_ref(torch.cat([quiet, loud]), limit, threshold, 2, False, trigger)
    return alone, together[:1]


@pytest.mark.parametrize("trigger", ["gated", "always"])
def test_triggers_that_are_batch_invariant(trigger: str) -> None:
    alone, in_company = _starts_alone_and_in_company(trigger)
    assert torch.equal(alone, in_company)


def test_the_global_trigger_is_not_batch_invariant() -> None:
    """Guards the tests above: a loud neighbour opens the gate of a quiet sample."""
    alone, in_company = _starts_alone_and_in_company("global_any")
    assert alone.tolist() == [[[255] * 3] * 2]
    assert in_company.tolist() == [[[0] * 3] * 2]


def test_the_global_trigger_couples_windows_too() -> None:
    """A loud window opens the gate of a quiet one of the same sample."""
    scale = torch.full((4,), 0.5)
    x = torch.tensor([3.0, 3.0, 9.0, 9.0])[None, :, None]
    starts = {
        trigger: outlier_start_ref(x, 7 * scale, 5 * scale, 2, False, trigger).flatten().tolist()
        for trigger in ("gated", "global_any")
    }
    assert starts == {"gated": [255, 0], "global_any": [0, 0]}


# --- properties of the values


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("reverse", [False, True])
def test_an_infinite_threshold_is_the_static_quantizer(bits: int, reverse: bool) -> None:
    """T3: P2 per time step, bit for bit; the outlier scale is 1 and nothing is NaN."""
    x, scale = _heavy(23, 2, 11, 9), _scales(24, 11, bits)
    infinity = torch.full((11,), float("inf"))
    codes, outlier_scale, start = quantize(x, scale, None, infinity, bits, 8, 4, reverse)
    limit = _q(bits)
    expected = np.clip(np.rint(x.numpy() / scale.numpy()[:, None]), -limit, limit)
    _assert_equal("codes", codes, expected)
    assert (start == 255).all()
    assert torch.equal(outlier_scale, torch.ones(2, 11))
    values = dequantize(codes, scale, None, outlier_scale, start, None, bits, 8, 4, reverse)
    _assert_equal("values", values, expected.astype(np.float32) * scale.numpy()[:, None])


def test_a_gate_that_never_opens_is_the_static_quantizer() -> None:
    """T3: nothing leaves the range, so nothing is listed, however low the threshold."""
    x = randn(25, 2, 11, 9)
    scale = x.abs().amax((0, 2)) / 7 * 1.01
    outputs = quantize(x, scale, None, torch.zeros(11), 4, 8, 4, False)
    static = quantize(x, scale, None, torch.full((11,), float("inf")), 4, 8, 4, False)
    for ours, expected in zip(outputs, static, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("outlier_bits", [8, 16])
def test_with_every_channel_listed(outlier_bits: int) -> None:
    """T4: dynamic per-token 8-bit P2; with 16 bits the input itself."""
    x, scale = _heavy(26, 2, 11, 9), torch.full((11,), 1e-6)
    static = (4, outlier_bits, 4, False)
    outputs = quantize(x, scale, None, torch.zeros(11), *static)
    assert (outputs[2] == 0).all()
    always = outlier_start_ref(x.abs(), 7 * scale, torch.zeros(11), 4, False, "always")
    assert torch.equal(outputs[2], always)
    for same, other in zip(
        outputs, quantize_static(x, scale, None, torch.arange(9), *static), strict=True
    ):
        assert torch.equal(same, other)
    codes, outlier_scale, start = outputs
    values = dequantize(codes, scale, None, outlier_scale, start, x, *static)
    if outlier_bits == 16:
        assert torch.equal(values, x)
        assert not codes.any()
        assert torch.equal(outlier_scale, torch.ones(2, 11))
        return
    dynamic = np.abs(x.numpy()).max(-1, keepdims=True) / np.float32(127)
    expected = np.rint(x.numpy() / dynamic)
    _assert_equal("codes", codes, expected)
    _assert_equal("values", values, expected.astype(np.float32) * dynamic)


def test_sixteen_bit_outliers_are_read_from_x_in_its_precision() -> None:
    """Listed entries come back as they were, fp16 included; unlisted ones as codes."""
    x, scale = _heavy(27, 2, 10, 12).half(), _scales(28, 10)
    static = (4, 16, 5, False)
    codes, outlier_scale, start = quantize(x, scale, None, 8 * scale, *static)
    listed = listed_mask(start, 10, 5, False)
    values = dequantize(codes, scale, None, outlier_scale, start, x, *static)
    assert listed.any()
    assert values.dtype == torch.float32
    assert torch.equal(values[listed], x.float()[listed])
    assert not codes[listed].any()
    inliers = codes.float() * scale[:, None]
    assert torch.equal(values[~listed], inliers[~listed])


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.4])
def test_error_bounds(factor: float) -> None:
    """T10: half a step inside the range, theta - T between the two, half a step of outliers."""
    x, scale = _heavy(29, 3, 20, 16), _scales(30, 20)
    limit, threshold = (7 * scale)[:, None], (7 * factor * scale)[:, None]
    static = (4, 8, 5, False)
    codes, outlier_scale, start = quantize(x, scale, None, threshold[:, 0], *static)
    values = dequantize(codes, scale, None, outlier_scale, start, None, *static)
    listed, error = listed_mask(start, 20, 5, False), (values - x).abs()
    slack = 1e-6 * x.abs().max()
    outlier_error = (error - outlier_scale[..., None] / 2)[listed]
    assert outlier_error.max() <= slack
    inside = ~listed & (x.abs() <= limit)
    assert inside.any()
    assert (error - scale[:, None] / 2)[inside].max() <= slack
    between = ~listed & (x.abs() > limit)
    assert between.any() == (factor > 1)
    if factor > 1:
        assert (x.abs() < threshold)[between].all()
        assert (error - (threshold - limit))[between].max() <= slack


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_idempotence(asymmetric: bool, reverse: bool) -> None:
    """T11: quantizing the values again gives the same inlier codes, with the same list."""
    scale = _scales(32, 12)
    zero = torch.full((12,), 7.0) if asymmetric else None
    static = (4, 8, 4, reverse)
    x = 0.3 * randn(31, 2, 12, 10)
    x[:, ::3, 4] = 40.0  # far over the threshold, so that the second pass lists it as well
    first = quantize(x, scale, zero, 16 * scale, *static)
    values = dequantize(first[0], scale, zero, *first[1:], None, *static)
    second = quantize(values, scale, zero, 16 * scale, *static)
    listed = listed_mask(first[2], 12, 4, reverse)
    assert listed.any()
    assert torch.equal(second[2], first[2])
    assert torch.equal(second[0][~listed], first[0][~listed])


@REPEATABLE
@given(
    seed=st.integers(0, 999),
    bits=st.sampled_from([4, 6, 8]),
    outlier_bits=st.sampled_from([4, 8]),
    asymmetric=st.booleans(),
)
def test_codes_stay_in_range(seed: int, bits: int, outlier_bits: int, asymmetric: bool) -> None:
    """T32: [-Q, Q] for symmetric inliers and outliers, the whole of 2**b codes with a zero."""
    x, scale = 30 * _heavy(seed, 2, 9, 8), _scales(seed, 9, bits)
    zero = torch.full((9,), 2.0 ** (bits - 1)) if asymmetric else None
    codes, _, start = quantize(x, scale, zero, 60 * scale * _q(bits), bits, outlier_bits, 4, False)
    listed = listed_mask(start, 9, 4, False)
    inliers, outliers = codes[~listed].int(), codes[listed].int()
    smallest = -(2 ** (bits - 1)) if asymmetric else -_q(bits)
    assert smallest <= inliers.min()
    assert inliers.max() <= _q(bits)
    assert inliers.max() == _q(bits)  # the range is used to its end
    if outliers.numel():
        assert outliers.abs().max() <= _q(outlier_bits)


@pytest.mark.parametrize("sign", [1, -1])
def test_rounding_is_half_to_even(sign: int) -> None:
    """P1, in both ranges and for outliers."""
    halves = sign * torch.tensor([0.5, 1.5, 2.5, 3.5, 4.5, 5.5])
    even = [sign * v for v in (0, 2, 2, 4, 4, 6)]
    one = torch.ones(1)
    assert quantize_symmetric(halves, one, 4).tolist() == even
    shifted = quantize_asymmetric(halves, one, torch.tensor([8.0]), 4)
    assert shifted.tolist() == even
    codes, _, _ = quantize(halves[None, None], one, None, one * 99, 4, 8, 1, False)
    assert codes.flatten().tolist() == even
    # A listed channel at 127 makes the dynamic scale exactly 1.
    token = torch.cat([halves, torch.tensor([127.0])])[None, None]
    codes, outlier_scale, _ = quantize_static(token, one, None, torch.arange(7), 4, 8, 1, False)
    assert outlier_scale.tolist() == [[1.0]]
    assert codes.flatten().tolist() == [*even, 127]


def test_division_is_in_fp32_and_not_by_a_reciprocal() -> None:
    """P1: x / s and x * (1 / s) round to different codes here."""
    s = np.float32(0.3)
    candidates = (np.arange(1, 255, 2, dtype=np.float32) / 2 * s).astype(np.float32)
    by_division = np.rint(candidates / s)
    by_reciprocal = np.rint(candidates * (np.float32(1) / s))
    assert (by_division != by_reciprocal).any()
    scale = torch.tensor([float(s)])
    codes = quantize_symmetric(torch.from_numpy(candidates), scale, 8)
    _assert_equal("codes", codes, np.clip(by_division, -127, 127))


@REPEATABLE
@given(seed=st.integers(0, 999), bits=st.sampled_from([4, 6, 8]))
@example(seed=0, bits=8)
def test_asymmetric_codes_are_p3_minus_half_the_range(seed: int, bits: int) -> None:
    """Stored code = clip(round(x / s) + z, 0, 2**b - 1) - 2**(b-1); zero is represented exactly."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, 7, 6)).astype(np.float32)
    x[:, :, 0] = 0
    scale = rng.uniform(2, 4, 7).astype(np.float32) / (2**bits - 1)
    zero = rng.integers(0, 2**bits, 7).astype(np.float32)
    infinity = np.full(7, np.inf, np.float32)
    given = _tensors({"x": x, "scale": scale, "zero": zero, "infinity": infinity})
    static = (bits, 8, 3, False)
    codes, outlier_scale, start = quantize(
        given["x"], given["scale"], given["zero"], given["infinity"], *static
    )
    p3 = np.clip(np.rint(x / scale[:, None]) + zero[:, None], 0, 2**bits - 1)
    _assert_equal("codes", codes, p3 - 2 ** (bits - 1))
    values = dequantize(codes, given["scale"], given["zero"], outlier_scale, start, None, *static)
    _assert_equal("values", values, ((p3 - zero[:, None]) * scale[:, None]).astype(np.float32))
    assert not values[:, :, 0].any()


@pytest.mark.parametrize("bits", [4, 8])
def test_the_asymmetric_interval_is_what_codes_represent(bits: int) -> None:
    """Middle and half width, by the values of the smallest and the largest code."""
    scale, zero = torch.tensor([0.5, 2.0]), torch.tensor([3.0, 0.0])
    smallest, largest = (0 - zero) * scale, (2**bits - 1 - zero) * scale
    middle, half_width = inlier_interval(scale, zero, bits)
    assert torch.equal(middle - half_width, smallest)
    assert torch.equal(middle + half_width, largest)
    symmetric_middle, limit = inlier_interval(scale, None, bits)
    assert symmetric_middle is None
    assert torch.equal(limit, _q(bits) * scale)


def test_the_asymmetric_threshold_is_a_distance_from_the_middle() -> None:
    """Codes 0..15 at scale 1 and zero point 0 reach 15: 15 stays, -1 and 16 leave the range."""
    scale, zero, threshold = torch.ones(1), torch.zeros(1), torch.tensor([8.0])
    x = torch.tensor([15.0, 0.0, -0.25, 15.4])[None, None]
    _, _, start = quantize(x, scale, zero, threshold, 4, 8, 1, False)
    assert start.flatten().tolist() == [255] * 4
    x = torch.tensor([15.0, 0.0, -1.0, 16.0])[None, None]
    _, _, start = quantize(x, scale, zero, threshold, 4, 8, 1, False)
    assert start.flatten().tolist() == [255, 255, 0, 0]


def test_no_nan_without_outliers_or_signal() -> None:
    """All zeros, listed or not: finite everywhere, and zero."""
    x, scale = torch.zeros(2, 6, 5), torch.full((6,), 0.1)
    static = (4, 8, 3, False)
    for codes, outlier_scale, start in (
        quantize(x, scale, None, torch.zeros(6), *static),
        quantize_static(x, scale, None, torch.arange(5), *static),
        quantize_static(x, scale, None, torch.arange(0), *static),
    ):
        values = dequantize(codes, scale, None, outlier_scale, start, None, *static)
        assert bool(outlier_scale.isfinite().all())
        assert (outlier_scale > 0).all()
        assert torch.equal(values, x)


def test_a_silent_listed_channel_gets_the_smallest_scale() -> None:
    """A list that is not empty and a token of zeros: 1e-8, not 0 and not 1."""
    x = torch.tensor([[[9.0, 1.0], [0.0, 1.0]]])
    scale = torch.full((2,), 0.2)
    codes, outlier_scale, _ = quantize(x, scale, None, 8 * scale, 4, 8, 2, False)
    assert outlier_scale[0].tolist() == pytest.approx([9 / 127, 1e-8], rel=1e-6)
    assert codes[0].tolist() == [[127, 5], [0, 5]]


# --- purity, dtypes, memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("length", [12, 13])
def test_purity(length: int, dtype: torch.dtype) -> None:
    """T9: the input is unchanged, also where L mod w = 0; no output is an input."""
    x, scale = _heavy(33, 2, length, 6).to(dtype), _scales(34, length)
    threshold, channels = 7.5 * scale, torch.tensor([1, 4])
    for outlier_bits in (8, 16):
        static = (4, outlier_bits, 4, False)
        inputs = [x, scale, threshold, channels]
        before = [t.clone() for t in inputs]
        outputs = quantize(x, scale, None, threshold, *static)
        fixed = quantize_static(x, scale, None, channels, *static)
        kept = [t.clone() for t in outputs]
        values = dequantize(outputs[0], scale, None, *outputs[1:], x, *static)
        for now, then in zip([*inputs, *outputs], [*before, *kept], strict=True):
            assert torch.equal(now, then)
            assert not shares_memory(now, values)
        assert not any(shares_memory(x, t) for t in (*outputs, *fixed))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_read_as_fp32(dtype: torch.dtype) -> None:
    """The same outputs as for the same values in fp32, peaks included."""
    x, scale = _heavy(35, 2, 9, 8).to(dtype), _scales(36, 9)
    for half, full in zip(
        quantize(x, scale, None, 7.5 * scale, 4, 8, 3, False),
        quantize(x.float(), scale, None, 7.5 * scale, 4, 8, 3, False),
        strict=True,
    ):
        assert half.dtype == full.dtype
        assert torch.equal(half, full)


def test_a_strided_input_quantizes_like_its_copy() -> None:
    """(B, K, L) seen as (B, L, K): the same values, in contiguous outputs."""
    x, scale = _heavy(37, 2, 8, 9).transpose(1, 2), _scales(38, 9)
    strided = quantize(x, scale, None, 7.5 * scale, 4, 8, 3, False)
    for ours, expected in zip(
        strided, quantize(x.contiguous(), scale, None, 7.5 * scale, 4, 8, 3, False), strict=True
    ):
        assert torch.equal(ours, expected)
        assert ours.is_contiguous()


# --- the static list


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("outlier_bits", [8, 16])
@pytest.mark.parametrize("channels", [[], [2], [5, 0], [0, 1, 2, 3, 4, 5]])
def test_static_list_equals_the_oracle(
    channels: list[int], outlier_bits: int, asymmetric: bool, reverse: bool
) -> None:
    """The named channels are outliers at every token, whatever their values."""
    problem = {
        "x": _heavy(39, 2, 10, 6).numpy(),
        "inlier_scale": _scales(40, 10).numpy(),
        "zero_point": np.full(10, 6, np.float32) if asymmetric else None,
        "inlier_bits": 4,
        "outlier_bits": outlier_bits,
        "refresh_period": 4,
        "reverse": reverse,
    }
    expected = quantizer_oracle(threshold=None, channels=channels, **problem)
    given = _tensors(problem)
    outputs = quantize_static(**given, channels=torch.tensor(channels, dtype=torch.int64))
    _assert_matches(outputs, _dequantize(given, outputs), expected)


def test_a_static_list_in_a_long_window() -> None:
    """int32 starts, as in the dynamic form."""
    x, scale = randn(41, 1, 300, 3), torch.full((300,), 0.2)
    _, _, start = quantize_static(x, scale, None, torch.tensor([1]), 4, 8, 300, False)
    assert start.dtype == torch.int32
    assert start.tolist() == [[[INT32_NEVER, 0, INT32_NEVER]]]


# --- refusals


def _refusal_cases() -> list[tuple[dict[str, Any], str]]:
    return [
        ({"x": torch.zeros(5, 4)}, r"x must be \(B, L, K\).*, got \(5, 4\)"),
        ({"x": torch.zeros(1, 5, 4, 1, 1)}, r"x must be \(B, L, K\)"),
        ({"inlier_scale": torch.ones(4)}, r"scales are per time step: expected \(5,\)"),
        ({"inlier_scale": torch.ones(1)}, r"scales are per time step: expected \(5,\)"),
        ({"inlier_scale": torch.ones(5, 1)}, r"scales are per time step: expected \(5,\)"),
        ({"zero_point": torch.ones(6)}, r"scales are per time step: expected \(5,\)"),
        ({"refresh_period": 0}, "refresh_period must be at least 1, got 0"),
        ({"refresh_period": -3}, "refresh_period must be at least 1, got -3"),
    ]


@pytest.mark.parametrize(("changed", "sentence"), _refusal_cases())
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_refusals(kind: str, changed: dict[str, Any], sentence: str) -> None:
    given: dict[str, Any] = {
        "x": torch.zeros(2, 5, 4),
        "inlier_scale": torch.ones(5),
        "zero_point": None,
        "inlier_bits": 4,
        "outlier_bits": 8,
        "refresh_period": 2,
        "reverse": False,
    }
    if kind == "dynamic":
        given["threshold"] = torch.ones(5)
    else:
        given["channels"] = torch.tensor([0])
    given.update(changed)
    op = quantize if kind == "dynamic" else quantize_static
    with pytest.raises(ValueError, match=f"^ouro::quantize_{kind}_outlier: {sentence}"):
        op(**given)


def test_refuses_another_threshold() -> None:
    with pytest.raises(ValueError, match=r"quantize_dynamic_outlier: scales are per time step"):
        quantize(torch.zeros(2, 5, 4), torch.ones(5), None, torch.ones(1), 4, 8, 2, False)


def test_sixteen_bit_outliers_need_x_to_dequantize() -> None:
    x, scale = _heavy(42, 2, 5, 4), torch.ones(5)
    codes, outlier_scale, start = quantize(x, scale, None, 8 * scale, 4, 16, 2, False)
    with pytest.raises(ValueError, match=r"outlier_bits 16 reads x \(B, L, K\): pass it"):
        dequantize(codes, scale, None, outlier_scale, start, None, 4, 16, 2, False)


# --- registration


@pytest.mark.parametrize(
    ("outlier_bits", "period", "asymmetric", "reverse"),
    [(8, 3, False, False), (16, 4, True, True), (8, 1, True, False)],
)
def test_opcheck(outlier_bits: int, period: int, asymmetric: bool, reverse: bool) -> None:
    """All three ops; lengths that are, and are not, a multiple of the window."""
    x, scale = _heavy(43, 2, 9, 5), _scales(44, 9)
    zero = torch.full((9,), 7.0) if asymmetric else None
    static = (4, outlier_bits, period, reverse)
    assert_opcheck(quantize, (x, scale, zero, 7.5 * scale, *static))
    assert_opcheck(quantize_static, (x, scale, zero, torch.tensor([1, 3]), *static))
    codes, outlier_scale, start = quantize(x, scale, zero, 7.5 * scale, *static)
    given = x if outlier_bits == 16 else None
    assert_opcheck(dequantize, (codes, scale, zero, outlier_scale, start, given, *static))


def test_opcheck_of_a_long_window_and_of_half_precision() -> None:
    """int32 starts; fp16 activations; a strided input."""
    scale = torch.full((300,), 0.2)
    x = randn(45, 1, 2, 300).half().transpose(1, 2)
    static = (4, 8, 300, False)
    assert_opcheck(quantize, (x, scale, None, 8 * scale, *static))
    assert_opcheck(quantize_static, (x, scale, None, torch.tensor([1]), *static))
