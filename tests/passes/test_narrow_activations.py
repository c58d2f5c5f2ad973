"""narrow_activations: what becomes 16-bit, what may not, and what that changes."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import ouro_compiler
from ouro_compiler.config import QuantConfig
from ouro_compiler.errors import UsageError
from ouro_compiler.evaluation import snr_db
from ouro_compiler.graph import argument, value_of
from ouro_compiler.kernels.dispatch import ReferenceWarning
from ouro_compiler.passes import PIPELINE
from ouro_compiler.passes.base import PassContext, run_passes
from ouro_compiler.passes.narrow_activations import narrow_activations
from tests.helpers import randn
from tests.models import compiled_vim, images
from tests.passes.graphs import Written, aten, calls, capture_small, ouro, outputs

LENGTH, CHANNELS = 13, 8
LINEAR = ouro.linear_dynamic_outlier.default
X = randn(1, 3, LENGTH, CHANNELS)
STATIC = (4, 8, 5, False)
HALF = QuantConfig(activation_dtype="fp16")


def quantize(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    found = ouro.quantize_dynamic_outlier(x, m.scale, None, m.threshold, *STATIC)
    return found[0], found[1], found[2]


def product(m: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
    codes, outlier_scale, start = quantize(m, x)
    operands = (m.codes.to(torch.int8), m.weight_scale, m.bias, residual, "none")
    return ouro.linear_dynamic_outlier(
        codes, m.scale, outlier_scale, start, None, *operands, *STATIC
    )


def scan(m: Any, x: Tensor, u: Tensor, z: Tensor | None) -> Tensor:
    turned = [one.transpose(1, 2) for one in (u, x, x[..., :4], x[..., 4:])]
    gate = None if z is None else z.transpose(1, 2)
    return ouro.selective_scan(
        *turned[:2], m.A, *turned[2:], None, gate, None, True, False
    ).transpose(1, 2)


def narrowed(forward: Any, config: QuantConfig = HALF) -> tuple[list[bool], Any]:
    """Whether each product became 16-bit, and the graph; its outputs stay fp32 and close."""
    module = Written(
        forward,
        scale=torch.full((LENGTH,), 0.25),
        threshold=torch.full((LENGTH,), 2.0),
        codes=randn(2, CHANNELS, CHANNELS).mul(3).round(),
        weight_scale=torch.full((CHANNELS,), 0.1),
        bias=randn(3, CHANNELS),
        A=-randn(4, CHANNELS, 4).abs(),
        weight=torch.ones(CHANNELS),
        taps=randn(5, CHANNELS, 3),
    )
    gm = capture_small(module, X)
    run_passes(gm, (), PassContext())
    expected = outputs(gm, X)
    changed = bool(run_passes(gm, (narrow_activations,), PassContext(config=config)))
    found = [argument(one, "dtype") is not None for one in calls(gm, LINEAR)]
    assert changed == any(found)
    assert not narrow_activations(gm, PassContext(config=config)), "a second run changes something"
    for ours, theirs in zip(outputs(gm, X), expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == b.dtype
            if a.is_floating_point():
                assert snr_db(b, a) > 15 if any(found) else torch.equal(a, b)
    return found, gm


def codes_of(m: Any, x: Tensor) -> Tensor:
    return quantize(m, x)[0]


def test_what_only_quantizers_read() -> None:
    found, gm = narrowed(lambda m, x: product(m, product(m, x).transpose(1, 2).transpose(1, 2)))
    assert found == [True, False], "outputs stay fp32"
    assert value_of(calls(gm, LINEAR)[0]).dtype == torch.float16


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (
            lambda m, x: codes_of(m, torch.cat([product(m, x), product(m, x * 2)], 1)[:, ::2]),
            [1, 1],
        ),
        (lambda m, x: codes_of(m, sum(product(m, x).split([4, 4], -1)).repeat(1, 1, 2)), [0]),
        (lambda m, x: codes_of(m, product(m, x) + x), [1]),
        (lambda m, x: (codes_of(m, product(m, x)), product(m, x).relu()), [1, 0]),
        (lambda m, x: product(m, x, residual=product(m, x)), [1, 0]),
        (lambda m, x: codes_of(m, scan(m, product(m, x), product(m, x), None)), [1, 1]),
        (lambda m, x: codes_of(m, scan(m, x, product(m, x), product(m, -x))), [1, 1]),
        (lambda m, x: codes_of(m, scan(m, x, product(m, x), x)), [0]),
        (lambda m, x: scan(m, product(m, x), x, None), [1]),
        (lambda m, x: scan(m, x, product(m, x), None), [0]),
        (lambda m, x: torch.nn.functional.linear(product(m, x), m.codes), [0]),
        (
            lambda m, x: codes_of(
                m, ouro.add_norm(product(m, x), x, m.weight, None, 1e-5, True, True)[0]
            ),
            [1],
        ),
        (lambda m, x: ouro.add_norm(product(m, x), x, m.weight, None, 1e-5, True, True)[1], [1]),
        (lambda m, x: ouro.add_norm(x, product(m, x), m.weight, None, 1e-5, True, True)[1], [0]),
        (
            lambda m, x: ouro.add_norm(product(m, x), None, m.weight, None, 1e-5, True, False)[1],
            [0],
        ),
        (
            lambda m, x: codes_of(
                m,
                ouro.causal_conv1d(product(m, x).transpose(1, 2), m.taps, None, True).transpose(
                    1, 2
                ),
            ),
            [1],
        ),
    ],
)
def test_readers(forward: Any, expected: list[int]) -> None:
    assert narrowed(forward)[0] == [bool(one) for one in expected]


def test_attention_takes_three_of_one_dtype() -> None:
    def attention(m: Any, x: Tensor, query: Tensor) -> Tensor:
        value = aten.scaled_dot_product_attention(query, product(m, x), product(m, -x))
        return codes_of(m, value)

    assert narrowed(lambda m, x: attention(m, x, product(m, x + 1)))[0] == [True] * 3
    assert narrowed(lambda m, x: attention(m, x, x))[0] == [False] * 2


def test_fp32_leaves_all_alone() -> None:
    for name in ("fp32", "auto"):
        config = QuantConfig(activation_dtype=name)  # type: ignore[arg-type]
        assert narrowed(lambda m, x: product(m, product(m, x)), config)[0] == [False, False]


@pytest.mark.parametrize("preset", ["w4a4", "w8a8"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_compiled_models(preset: str, dtype: str) -> None:
    """On a CPU too kernels take 16-bit values; logits differ as codes flip, fidelity stays."""
    assert PIPELINE[-1] is narrow_activations
    config = ouro_compiler.config.PRESETS[preset]
    wide = compiled_vim(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ReferenceWarning)
        narrow = compiled_vim(config.with_setting(f"activation_dtype={dtype}"))
        batch = images(4, seed=3)
        found = [narrow(batch) for _ in range(3)]
    assert all(torch.equal(one, found[0]) for one in found), "runs of one size differ"
    assert found[0].dtype == torch.float32
    assert snr_db(wide(batch), found[0]) > 15
    assert narrow.full_report["logits_snr_db"] > wide.full_report["logits_snr_db"] - 1
    products = calls(narrow.graph_module, LINEAR)
    assert f"{len(products) - 1} of {len(products)} products give {dtype}" in "".join(
        narrow.full_report["notes"]
    )


def test_the_target_decides() -> None:
    assert QuantConfig().for_target("cuda").activation_dtype == "fp16"
    assert QuantConfig().for_target("cpu").activation_dtype == "fp32"
    assert QuantConfig(activation_dtype="bf16").for_target("cpu").activation_dtype == "bf16"
    with pytest.raises(UsageError, match="activation_dtype must be one of auto, fp32, fp16, bf16"):
        QuantConfig(activation_dtype="half")  # type: ignore[arg-type]
