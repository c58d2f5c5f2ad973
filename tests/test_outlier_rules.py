"""ouro::quantize_dynamic_outlier_variant: an oracle, batch invariance and its guard, properties."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import ouro_compiler.ops  # noqa: F401  (registers torch.ops.ouro)
from ouro_compiler.ops.quantize import inlier_interval, listed_mask
from tests.helpers import REPEATABLE, assert_batch_invariant, assert_opcheck, generator, randn

variant = torch.ops.ouro.quantize_dynamic_outlier_variant
plain = torch.ops.ouro.quantize_dynamic_outlier
static_list = torch.ops.ouro.quantize_static_outlier
dequantize = torch.ops.ouro.dequantize_dynamic_outlier

RULES = ("static", "dynamic_full", "dynamic_residual")
DYNAMIC = RULES[1:]


def _heavy(seed: int, *shape: int) -> Tensor:
    """Activations with rare large values, some 5 % of them."""
    x = randn(seed, *shape)
    large = torch.rand(shape, generator=generator(seed + 1)) < 0.05
    return torch.where(large, 8 * x, x)


def _run(
    x: Tensor,
    rule: str,
    trigger: str,
    *,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    kappa: float = 1.5,
    period: int = 4,
    reverse: bool = False,
    bits: int = 4,
    outlier_bits: int = 8,
) -> tuple[Tensor, Tensor, Tensor]:
    scale = torch.full((x.shape[1],), 0.25) if scale is None else scale
    threshold = 5 * scale if rule == "static" else None
    static = (bits, outlier_bits, period, reverse, rule, trigger, kappa)
    return variant(x, scale, zero, threshold, *static)


# --- an oracle: sets and loops, in fp64


def _oracle(
    x: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray | None,
    rule: str,
    trigger: str,
    kappa: float,
    period: int,
    reverse: bool,
) -> tuple[np.ndarray, float]:
    """Listed (B, L, K) at 4 bits, and how close any comparison came to equality."""
    batch, length, width = x.shape
    order = range(length - 1, -1, -1) if reverse else range(length)
    window = min(period, length)
    middle = np.zeros(length) if zero is None else scale * (7.5 - zero)
    limit = scale * (7 if zero is None else 7.5)
    listed = np.zeros(x.shape, bool)
    windows = -(-length // window)
    members = [[set() for _ in range(windows)] for _ in range(batch)]
    closest = np.inf
    for position in range(window):  # every window of every sample takes this step together
        cells = {}
        for b in range(batch):
            for j in range(windows):
                if j * window + position < length:
                    cells[b, j] = order[j * window + position]
        fired, joins = {}, {}
        for (b, j), t in cells.items():
            value = x[b, t] - middle[t]
            distance = np.abs(value)
            basis = distance if zero is None else value
            if rule == "dynamic_residual":
                basis = np.where([c in members[b][j] for c in range(width)], 0.0, basis)
            if rule == "static":
                bound, over = 5 * scale[t], distance >= 5 * scale[t]
            else:
                bound = abs(basis.mean()) + kappa * basis.std(ddof=1)
                over = distance > bound
            closest = min(
                closest, np.abs(distance - bound).min(), np.abs(distance - limit[t]).min()
            )
            free = [c for c in range(width) if c not in members[b][j]]
            fired[b, j] = any(distance[c] > limit[t] for c in free)
            joins[b, j] = {c for c in free if over[c]}
        anyone = any(fired.values())
        for (b, j), t in cells.items():
            if trigger == "always" or (anyone if trigger == "global_any" else fired[b, j]):
                members[b][j] |= joins[b, j]
            listed[b, t, sorted(members[b][j])] = True
    return listed, float(closest)


@settings(REPEATABLE, max_examples=80)
@given(
    seed=st.integers(0, 9999),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 13), st.integers(2, 7)),
    rule=st.sampled_from(RULES),
    trigger=st.sampled_from(["gated", "always", "global_any"]),
    kappa=st.sampled_from([0.0, 0.7, 1.5]),
    period=st.sampled_from([1, 2, 3, 5, 300]),
    reverse=st.booleans(),
    asymmetric=st.booleans(),
)
def test_equals_the_oracle(
    seed: int,
    shape: tuple[int, int, int],
    rule: str,
    trigger: str,
    kappa: float,
    period: int,
    reverse: bool,
    asymmetric: bool,
) -> None:
    x = _heavy(seed, *shape)
    scale = 0.15 + 0.2 * torch.rand(shape[1], generator=generator(seed))
    zero = torch.full((shape[1],), 6.0) if asymmetric else None
    given_ = {"scale": scale, "zero": zero, "kappa": kappa, "period": period, "reverse": reverse}
    codes, outlier_scale, start = _run(x, rule, trigger, **given_)
    expected, closest = _oracle(
        x.double().numpy(),
        scale.double().numpy(),
        None if zero is None else zero.double().numpy(),
        *(rule, trigger, kappa, period, reverse),
    )
    assume(closest > 1e-5)  # the oracle has no fp32 rounding
    listed = listed_mask(start, shape[1], period, reverse)
    np.testing.assert_array_equal(listed.numpy(), expected)
    # What becomes of values, given the list, is the plain quantizer's arithmetic.
    peak = torch.where(listed, x.abs(), 0.0).amax(-1)
    wanted = torch.where(listed.any(-1), (peak / 127).clamp(min=1e-8), 1.0)
    assert torch.equal(outlier_scale, wanted)
    outliers = (x / outlier_scale[..., None]).round().clamp(-127, 127)
    if zero is None:
        inliers = (x / scale[:, None]).round().clamp(-7, 7)
    else:
        inliers = ((x / scale[:, None]).round() + 6).clamp(0, 15) - 8
    assert torch.equal(codes.float(), torch.where(listed, outliers, inliers))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("outlier_bits", [8, 16])
def test_the_static_gated_rule_is_the_plain_quantizer(
    outlier_bits: int, asymmetric: bool, reverse: bool
) -> None:
    x, scale = _heavy(1, 3, 13, 9), torch.full((13,), 0.25)
    zero = torch.full((13,), 7.0) if asymmetric else None
    found = _run(
        x, "static", "gated", zero=zero, reverse=reverse, outlier_bits=outlier_bits, period=5
    )
    expected = plain(x, scale, zero, 5 * scale, 4, outlier_bits, 5, reverse)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# --- batch invariance (T5)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("trigger", ["gated", "always"])
@pytest.mark.parametrize("rule", RULES)
def test_batch_invariance(rule: str, trigger: str, asymmetric: bool, reverse: bool) -> None:
    """T5: alone, permuted and beside an outlier-heavy neighbour, bit for bit."""
    zero = torch.full((13,), 7.0) if asymmetric else None

    def quantized(x: Tensor) -> tuple[Tensor, ...]:
        return _run(x, rule, trigger, zero=zero, reverse=reverse)

    for width in (2, 33, 384):
        x = _heavy(width, 6, 13, width)
        x[3] *= 20
        assert_batch_invariant(quantized, x)
        order = torch.randperm(6, generator=generator(2))
        crowd = quantized(torch.cat([x, 50 * x[:1] + 50]))
        for alone, shuffled, crowded in zip(quantized(x), quantized(x[order]), crowd, strict=True):
            assert torch.equal(alone[order], shuffled)
            assert torch.equal(alone, crowded[:6])
        strided = quantized(x.transpose(1, 2).contiguous().transpose(1, 2))
        assert all(torch.equal(a, b) for a, b in zip(quantized(x), strided, strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_batch_invariance_fails_for_the_global_trigger(rule: str) -> None:
    """Guards the test above: the same check, on the same kind of data, must not pass."""
    x = _heavy(3, 6, 13, 8) * 0.3  # mostly inside the range: gates of quiet windows stay shut
    x[3] *= 20
    assert_batch_invariant(lambda t: _run(t, rule, "gated"), x)
    with pytest.raises(AssertionError, match=r"output \d of sample \d differs"):
        assert_batch_invariant(lambda t: _run(t, rule, "global_any"), x)


# --- properties


@pytest.mark.parametrize("rule", DYNAMIC)
@pytest.mark.parametrize("reverse", [False, True])
def test_lists_grow_and_windows_are_independent(rule: str, reverse: bool) -> None:
    """T2 and T6."""
    x = _heavy(4, 3, 20, 16)
    outputs = _run(x, rule, "always", period=5, reverse=reverse)
    mask = listed_mask(outputs[2], 20, 5, reverse)
    cells = (mask.flip(1) if reverse else mask).view(3, 4, 5, 16)
    assert not (cells[:, :, :-1] & ~cells[:, :, 1:]).any()
    assert (~cells[:, :, :-1] & cells[:, :, 1:]).any()
    window = torch.arange(20).flip(0) // 5 if reverse else torch.arange(20) // 5
    other = torch.where((window == 2)[:, None], 3 * x.roll(1, -1) + 1, x)
    after = _run(other, rule, "always", period=5, reverse=reverse)
    kept = window != 2
    assert torch.equal(outputs[0][:, kept], after[0][:, kept])
    assert not torch.equal(outputs[0][:, ~kept], after[0][:, ~kept])


def test_full_statistics_without_a_gate_are_a_prefix_or() -> None:
    """T7: what calibration's mask is, up to >= for >."""
    from ouro_compiler.calibration.observers import windowed_or

    x = _heavy(5, 2, 23, 12)
    deviation, mean = torch.std_mean(x.abs(), dim=-1, keepdim=True)
    expected = windowed_or(x.abs() > mean + 1.5 * deviation, 4, False)
    _, _, start = _run(x, "dynamic_full", "always")
    assert expected.any()
    assert torch.equal(listed_mask(start, 23, 4, False), expected)


def test_listed_channels_count_as_zeros() -> None:
    """By hand: once 9 is listed, 3 stands out of (0, 3, 1, 1, 1, 1), not out of (9, 3, 1, ...)."""
    token = torch.tensor([9.0, 3.0, 1.0, 1.0, 1.0, 1.0])
    x = torch.stack([torch.tensor([9.0, 1.0, 1.0, 1.0, 1.0, 1.0]), token])[None]
    lists = {
        rule: _run(x, rule, "always", kappa=1.5, period=2)[2].flatten().tolist() for rule in DYNAMIC
    }
    assert lists["dynamic_full"] == [0, 255, 255, 255, 255, 255]
    assert lists["dynamic_residual"] == [0, 1, 255, 255, 255, 255]


def test_dynamic_rules_compare_with_greater() -> None:
    """A token of equal magnitudes has no deviation, and nothing is over its mean."""
    x = torch.full((1, 3, 4), 5.0)
    for rule in DYNAMIC:
        assert (_run(x, rule, "always")[2] == 255).all()


@pytest.mark.parametrize("rule", DYNAMIC)
def test_one_channel_stands_out_of_nothing(rule: str) -> None:
    codes, outlier_scale, start = _run(_heavy(6, 2, 5, 1), rule, "always", kappa=0.0)
    assert (start == 255).all()
    assert torch.equal(outlier_scale, torch.ones(2, 5))
    assert codes.abs().max() <= 7


@pytest.mark.parametrize("rule", RULES)
def test_the_gate_only_removes(rule: str) -> None:
    x = _heavy(7, 2, 24, 16) * 0.4
    gated, always = (
        listed_mask(_run(x, rule, trigger)[2], 24, 4, False) for trigger in ("gated", "always")
    )
    assert not (gated & ~always).any()
    assert (always & ~gated).any()


@pytest.mark.parametrize("rule", RULES)
def test_error_bounds(rule: str) -> None:
    """T10: half a step of inliers inside the range, half a step of outliers."""
    x, scale = _heavy(8, 3, 20, 16), torch.full((20,), 0.25)
    codes, outlier_scale, start = _run(x, rule, "always")
    values = dequantize(codes, scale, None, outlier_scale, start, None, 4, 8, 4, False)
    listed, error = listed_mask(start, 20, 4, False), (values - x).abs()
    limit = inlier_interval(scale, None, 4)[1][:, None]
    slack = 1e-6 * float(x.abs().max())
    inside = ~listed & (x.abs() <= limit)
    assert inside.any()
    assert listed.any()
    assert float(error[inside].max()) <= 0.125 + slack
    assert float((error - outlier_scale[..., None] / 2)[listed].max()) <= slack


@pytest.mark.parametrize("rule", DYNAMIC)
def test_every_channel_that_joins_at_once(rule: str) -> None:
    """T4: kappa 0 over signed values of mean 0 lists all, and equals the fixed list of all."""
    x = torch.tensor([[[3.0, -3.0], [5.0, -5.0]]]) + 3.75  # middle of codes 0..15 at scale 0.5
    scale, zero = torch.full((2,), 0.5), torch.zeros(2)
    found = _run(x, rule, "always", scale=scale, zero=zero, kappa=0.0)
    expected = static_list(x, scale, zero, torch.arange(2), 4, 8, 4, False)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("length", [12, 13])
def test_purity_and_half_precision(rule: str, length: int) -> None:
    """T9: the input is unchanged; fp16 is read as the fp32 it holds."""
    x = _heavy(9, 2, length, 6).half()
    before = x.clone()
    half, full = _run(x, rule, "always"), _run(x.float(), rule, "always")
    assert torch.equal(x, before)
    assert all(torch.equal(a, b) for a, b in zip(half, full, strict=True))


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"rule": "median"}, "rule must be one of static, dynamic_full, dynamic_residual"),
        ({"trigger": "never"}, "trigger must be one of gated, always, global_any"),
        ({"rule": "static"}, "the static rule, and no other, takes a threshold"),
        ({"threshold": torch.ones(5)}, "the static rule, and no other, takes a threshold"),
        ({"x": torch.zeros(5, 4)}, r"x must be \(B, L, K\)"),
        ({"scale": torch.ones(4)}, r"scales are per time step: expected \(5,\)"),
        ({"period": 0}, "refresh_period must be at least 1"),
    ],
)
def test_refusals(changed: dict[str, Any], sentence: str) -> None:
    values: dict[str, Any] = {"x": torch.zeros(2, 5, 4), "scale": torch.ones(5), "threshold": None}
    values |= {"period": 2, "rule": "dynamic_full", "trigger": "gated"} | changed
    args = (values["x"], values["scale"], None, values["threshold"], 4, 8, values["period"], False)
    with pytest.raises(ValueError, match=f"^ouro::quantize_dynamic_outlier_variant: {sentence}"):
        variant(*args, values["rule"], values["trigger"], 3.0)


@pytest.mark.parametrize(
    ("rule", "period"), [("static", 300), ("dynamic_full", 3), ("dynamic_residual", 3)]
)
def test_opcheck(rule: str, period: int) -> None:
    x = _heavy(10, 2, 260 if period == 300 else 9, 5)
    scale = torch.full((x.shape[1],), 0.25)
    threshold = 5 * scale if rule == "static" else None
    static = (4, 8, period, True, rule, "always", 3.0)
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    zero = torch.full_like(scale, 7.0) if rule == "static" else None
    assert_opcheck(variant, (strided, scale, zero, threshold, *static))
