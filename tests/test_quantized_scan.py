"""quantized_selective_scan: its definition against an oracle of scalars, and its contracts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given as examples
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

import ouro_compiler.ops  # noqa: F401  (registers torch.ops.ouro)
from ouro_compiler.ops import elementary
from ouro_compiler.ops.quantize import (
    dequantize_dynamic_outlier_ref,
    quantize_dynamic_outlier_ref,
)
from ouro_compiler.ops.quantized_scan import log2_offset, quantized_selective_scan_ref
from ouro_compiler.ops.selective_scan import selective_scan_ref
from tests.helpers import (
    REPEATABLE,
    assert_batch_invariant,
    assert_close,
    assert_opcheck,
    assert_token_major,
    generator,
    randn,
)
from tests.scan_inputs import FORMS, quantized_operands, read_state

op = torch.ops.ouro.quantized_selective_scan
reference = quantized_selective_scan_ref
QUANTIZERS = (
    *("decay_scale", "input_scale", "input_threshold"),
    *("state_scale", "state_threshold", "state_factor"),
)
DIRECTIONS = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


def without(given: dict[str, Any], *names: str) -> dict[str, Any]:
    return {**given, **dict.fromkeys(names)}


# --- 2^x and log2(x)


def test_exp2_is_accurate() -> None:
    x = torch.cat([torch.linspace(-126, 127.99, 400_001), torch.linspace(-1e-3, 1e-3, 10_001)])
    exact = x.double().exp2()
    assert ((elementary.exp2(x) - exact) / exact).abs().max() < 2e-7


def test_exp2_at_the_ends() -> None:
    x = torch.tensor([-float("inf"), -200.0, -126.0, 0.0, 1.0, 127.0, 128.0, float("inf")])
    least = 2.0**-126
    expected = [least, least, least, 1.0, 2.0, 2.0**127, float("inf"), float("inf")]
    assert elementary.exp2(x).tolist() == expected
    assert elementary.exp2(torch.tensor([float("nan")])).isnan().all()


def test_log2_is_accurate() -> None:
    x = torch.cat([torch.linspace(0.4, 2.5, 400_001), torch.logspace(-37, 38, 100_001)])
    exact = x.double().log2()
    error = (elementary.log2(x) - exact).abs()
    assert (error < 1e-7 + exact.abs() * 2**-24).all()


def test_log2_at_the_ends() -> None:
    x = torch.tensor([0.0, -1.0, 2.0**-127, 2.0**-126, 0.25, 1.0, 2.0**100, float("nan")])
    minus = -float("inf")
    expected = [minus, minus, minus, -126.0, -2.0, 0.0, 100.0, minus]
    assert elementary.log2(x).tolist() == expected


def test_gradients_of_exp2_and_log2() -> None:
    x = torch.linspace(0.1, 3, 50).requires_grad_()
    for ours, theirs in ((elementary.exp2, torch.exp2), (elementary.log2, torch.log2)):
        (found,) = torch.autograd.grad(ours(x).sum(), x)
        (expected,) = torch.autograd.grad(theirs(x).sum(), x)
        assert_close(found, expected, 1e-6)


# --- values


@DIRECTIONS
@pytest.mark.parametrize("groups", [None, 1, 3])
def test_without_quantizers_it_is_the_scan(groups: int | None, reverse: bool) -> None:
    made = quantized_operands((2, 12, 23), 8, groups=groups, form="none", reverse=reverse)
    found = op(**without(made, *QUANTIZERS))
    names = ("u", "step", "A", "B", "C", "D", "z")
    plain = selective_scan_ref(*(made[name] for name in names), None, False, reverse)
    assert_close(found, plain, 1e-5)


@pytest.mark.parametrize("bits", [4, 6, 8])
@DIRECTIONS
def test_the_input_is_quantized_as_any_activation(bits: int, reverse: bool) -> None:
    """One state that forgets everything, B = u = C = 1: y is the quantizer of ops/quantize.py."""
    x = randn(1, 3, 37, 9).abs() * torch.tensor([1.0, 1, 1, 5, 1, 1, 9, 1, 1])
    scale = torch.rand(37, generator=generator(2)) * 0.5 + 0.1
    threshold = scale * (2 ** (bits - 1) - 1) * 1.5
    static = (bits, 16, 10, reverse)
    codes, outlier_scale, start = quantize_dynamic_outlier_ref(x, scale, None, threshold, *static)
    expected = dequantize_dynamic_outlier_ref(codes, scale, None, outlier_scale, start, x, *static)
    ones = torch.ones(3, 1, 37)
    found = op(
        *(torch.ones(3, 9, 37), x.transpose(1, 2), torch.full((9, 1), -1e9), ones, ones),
        *(None, None, None, scale, threshold, None, None, None, 0.0, 0, bits, 16, 10),
        *(False, reverse),
    )
    found = torch.where(found < 1e-30, 0.0, found)  # 2^-126 of the state before is left
    assert torch.equal(found, expected.transpose(1, 2))


def oracle(given: dict[str, Any], n_of_e: int) -> np.ndarray:
    """State `n_of_e` (B, D, L) of a scan with a quantized state, one number after the other."""
    f32 = np.float32
    u, step, A, B = (given[name].numpy() for name in ("u", "step", "A", "B"))
    batch, channels, length = u.shape
    states, bits, most = A.shape[1], given["bits"], f32(2 ** (given["bits"] - 1) - 1)
    top, outlier_bits = f32(2**bits - 1), given["outlier_bits"]
    exponents = given["step"][..., None] * (given["A"] * elementary.LOG2E)[:, None]
    decays = elementary.exp2(exponents).numpy()  # (B, D, L, N)
    levels, logs = None, None
    if given["decay_steps"]:
        offset = f32(log2_offset(given["decay_limit"], given["decay_steps"]))
        logs = elementary.log2(torch.from_numpy(f32(1) - decays)).numpy()
        codes = torch.arange(2**bits, dtype=torch.float32)
        levels = elementary.exp2((float(offset) - codes) / given["decay_steps"]).numpy()

    def quantizer(name: str) -> Any:
        scale = None if given[f"{name}_scale"] is None else given[f"{name}_scale"].numpy()
        threshold = given[f"{name}_threshold"]
        factor = given["state_factor"] if name == "state" else None
        members: set[tuple[int, int]] = set()

        def run(row: list[Any], b: int, e: int, t: int, fresh: bool) -> list[Any]:
            if scale is None:
                return row
            f = [f32(1)] * states if factor is None else [f32(v) for v in factor[e]]
            x = [v / w for v, w in zip(row, f, strict=True)]
            peak = max(abs(v) for v in x)
            if fresh:
                members.discard((b, e))
            if threshold is not None and peak >= f32(threshold[t]):
                members.add((b, e))
            if (b, e) not in members:
                s, limit = f32(scale[t]), most
            elif outlier_bits == 16:
                return row
            else:
                limit = f32(2 ** (outlier_bits - 1) - 1)
                s = max(peak / limit, f32(1e-8))
            codes = [min(max(np.rint(v / s), -limit), limit) for v in x]
            return [f32(code) * s * w for code, w in zip(codes, f, strict=True)]

        return run

    result = np.zeros(u.shape, f32)
    arriving, kept = quantizer("input"), quantizer("state")
    for b in range(batch):
        for e in range(channels):
            h = [f32(0)] * states
            for count in range(length):
                t = length - 1 - count if given["reverse"] else count
                fresh = count % given["refresh_period"] == 0
                row = [f32(step[b, e, t]) * f32(B[b, n, t]) for n in range(states)]
                row = arriving(row, b, e, t, fresh)
                for n in range(states):
                    a = decays[b, e, t, n]
                    if levels is not None and logs is not None:
                        code = np.rint(offset - f32(given["decay_steps"]) * logs[b, e, t, n])
                        h[n] = h[n] - levels[int(min(max(code, 0), top))] * h[n]
                    else:
                        if given["decay_scale"] is not None:
                            s = f32(given["decay_scale"][t])
                            a = f32(min(max(np.rint(a / s), f32(0)), top)) * s
                        h[n] = a * h[n]
                    h[n] = h[n] + row[n] * f32(u[b, e, t])
                before, h = h, kept(h, b, e, t, fresh)
                result[b, e, t] = (before if given["output_before_rounding"] else h)[n_of_e]
    return result


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("outlier_bits", [8, 16])
def test_equals_the_oracle(form: str, bits: int, outlier_bits: int) -> None:
    for seed, before in ((0, False), (1, True)):
        made = quantized_operands(
            *((2, 4, 13), 2),
            **{"groups": None, "bits": bits, "outlier_bits": outlier_bits, "form": form},
            **{"reverse": seed == 1, "before": before, "seed": seed, "factor": before, "period": 5},
        )
        for n in range(2):
            found = reference(**read_state(made, n))
            assert np.array_equal(found.numpy(), oracle(made, n)), (seed, n)


@settings(REPEATABLE, max_examples=25)
@examples(
    length=st.integers(1, 12),
    period=st.integers(1, 14),
    bits=st.sampled_from([2, 4, 6, 8]),
    form=st.sampled_from(FORMS),
    absent=st.sets(st.sampled_from(["input", "state", "threshold"])),
    reverse=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_the_oracle_on_examples(
    length: int, period: int, bits: int, form: str, absent: set[str], reverse: bool, seed: int
) -> None:
    """Windows that end anywhere, and every set of quantizers."""
    made = quantized_operands(
        *((1, 3, length), 2),
        **{"groups": None, "bits": bits, "form": form, "period": period},
        **{"reverse": reverse, "seed": seed},
    )
    gone = {name for name in QUANTIZERS for part in absent if part in name}
    made = without(made, *gone)
    assert np.array_equal(reference(**read_state(made, 1)).numpy(), oracle(made, 1))


# --- the logarithmic decay (METHODS T14)


def decays(a: Tensor, limit: float, steps: int, bits: int) -> Tensor:
    """1 - a-hat of decays a (K,), read out of a state that was 1 and receives nothing."""
    count = len(a)
    u = torch.tensor([1.0, 0.0]).expand(1, count, 2)
    step = torch.stack([torch.ones(count), -a.log2() / elementary.LOG2E], -1)[None]
    ones = torch.ones(1, 1, 2)
    y = op(
        *(u, step, -torch.ones(count, 1), ones, ones),
        *(None,) * 8,
        *(limit, steps, bits, 8, 10, False, False),
    )
    return 1 - y[0, :, 1].double()


def test_a_plain_logarithmic_decay_is_half_an_octave_off_at_most() -> None:
    for bits, least in ((4, 2.0**-15), (8, 2.0**-18)):
        delta = torch.logspace(np.log10(least), 0, 3001)[:-1]
        a = 1 - delta
        found = decays(a, 1.0, 1, bits)
        octaves = (found / (1 - a.double())).log2()
        assert octaves.abs().max() <= 0.5 + 1e-2  # y is rounded to fp32: 1 - y has few digits
        assert bool((found.diff() >= 0).all())


def test_a_decay_of_one_still_forgets_and_one_of_zero_forgets_all() -> None:
    assert decays(torch.ones(1), 1.0, 1, 4).item() == 2.0**-15
    assert decays(torch.full((1,), 2.0**-30), 1.0, 1, 4).item() == 1.0


def test_a_fine_logarithmic_decay_is_finer() -> None:
    a = torch.linspace(0.9, 0.999, 200)
    coarse, fine = (decays(a, 0.1, steps, 4) + a.double() - 1 for steps in (1, 2))
    assert fine.square().mean() < coarse.square().mean()


# --- contracts


def test_opcheck() -> None:
    """Two steps: the backward is traced as well, step by step."""
    made = quantized_operands((2, 4, 2), 2, groups=2)
    plain = without(quantized_operands((1, 3, 2), 1, form="log2"), "D", "z", *QUANTIZERS)
    for given in (made, plain):
        for name in ("u", "step", "A", "B", "C"):
            given[name] = given[name].detach().requires_grad_()
        assert_opcheck(op, tuple(given.values()))


@DIRECTIONS
def test_gradients_are_near_those_of_the_scan(reverse: bool) -> None:
    """Eight bits, straight through: within some percent."""
    made = quantized_operands((2, 6, 20), 4, bits=8, outlier_bits=16, reverse=reverse)
    for name in ("input", "state"):  # nothing is clipped
        made[f"{name}_threshold"] = made[f"{name}_scale"] * 127
    names = ("u", "step", "A", "B", "C", "D", "z")
    weight = randn(9, 2, 6, 20)

    def gradients(run: Any) -> list[Tensor]:
        leaves = [made[name].detach().requires_grad_() for name in names]
        return list(torch.autograd.grad((run(*leaves) * weight).sum(), leaves))

    rest = [made[name] for name in list(made)[7:]]
    rest[0] = torch.full((20,), 1 / 255)
    ours = gradients(lambda *leaves: op(*leaves, *rest))
    theirs = gradients(lambda *leaves: torch.ops.ouro.selective_scan(*leaves, None, False, reverse))
    for name, found, expected in zip(names, ours, theirs, strict=True):
        assert (found - expected).norm() < 0.1 * expected.norm(), name


@pytest.mark.parametrize("form", FORMS)
def test_batch_invariance(form: str) -> None:
    made = quantized_operands((4, 13, 23), 5, groups=None, form=form)
    names = ("u", "step", "B", "C", "z")
    for run in (op, reference):
        assert_batch_invariant(
            lambda *tensors, run=run: run(**{**made, **dict(zip(names, tensors, strict=True))}),
            *(made[name] for name in names),
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    made = quantized_operands((2, 8, 11), 4, dtype=dtype)
    whole = {k: v.float() if isinstance(v, Tensor) else v for k, v in made.items()}
    assert torch.equal(reference(**made), reference(**whole).to(dtype))


def test_memory_is_token_major() -> None:
    made = quantized_operands((2, 6, 5), 3)
    before = {k: v.clone() for k, v in made.items() if isinstance(v, Tensor)}
    assert_token_major(op(**made))
    assert all(torch.equal(made[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"step": torch.zeros(2, 6, 4)}, "must share one shape"),
        ({"bits": 9}, "9 bits with outliers of 8"),
        ({"outlier_bits": 9}, "outliers of 9"),
        ({"refresh_period": 0}, "refresh_period must be at least 1, got 0"),
        ({"state_scale": torch.ones(6)}, r"per time step: expected \(5,\)"),
        ({"state_factor": torch.ones(6, 2)}, r"state_factor must be as A, \(6, 3\)"),
        ({"input_scale": None}, "a threshold or factor belongs to a scale"),
        ({"decay_steps": 2, "decay_limit": 0.5}, "no decay_scale"),
        ({"decay_steps": 2, "decay_scale": None}, "got 2 and 0.0"),
    ],
)
def test_refuses(changes: dict[str, Any], sentence: str) -> None:
    made = {**quantized_operands((2, 6, 5), 3), **changes}
    with pytest.raises(ValueError, match=sentence):
        reference(**made)
