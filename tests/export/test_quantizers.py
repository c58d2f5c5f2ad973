"""Codes, scales and lists in onnxruntime are bit for bit those of an oracle not written here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ouro_compiler.errors import ModelError
from ouro_compiler.ops.quantize import inlier_interval
from tests.export.graphs import onnx_of, operators, run
from tests.helpers import generator, quantizer_oracle, randn

LENGTH, COLUMNS = 23, 19


class Quantizer(nn.Module):
    """One quantizer with fp16 constants, as artefacts have them."""

    def __init__(self, kind: str, bits: tuple[int, int], period: int, reverse: bool) -> None:
        super().__init__()
        self.kind, self.static = kind, (*bits, period, reverse)
        scale = (torch.rand(LENGTH, generator=generator(1)) * 0.2 + 0.1).half()
        self.register_buffer("scale", scale)
        zero = torch.randint(0, 2 ** bits[0], (LENGTH,), generator=generator(2)).float()
        self.register_buffer("zero", zero.half() if kind == "asymmetric" else None)
        _, limit = inlier_interval(scale.float(), self.zero, bits[0])
        threshold = (limit * 1.05 + 0.01).half()
        self.register_buffer("threshold", threshold)
        self.register_buffer("channels", torch.tensor([3, 11]))

    def forward(self, x: Tensor) -> Any:
        if self.kind == "static":
            return torch.ops.ouro.quantize_static_outlier(
                x, self.scale, None, self.channels, *self.static
            )
        return torch.ops.ouro.quantize_dynamic_outlier(
            x, self.scale, self.zero, self.threshold, *self.static
        )

    def limit(self) -> Tensor:
        """How far inlier codes reach, (L, 1)."""
        return inlier_interval(self.scale.float(), self.zero, self.static[0])[1][:, None]


def _inputs(quantizer: Quantizer, batch: int) -> Tensor:
    """Values around the inlier range: ties, values at the threshold, outliers, empty lists."""
    reach = quantizer.limit()
    x = randn(3, batch, LENGTH, COLUMNS) * reach * 0.4
    steps = torch.randint(-9, 10, x.shape, generator=generator(4)) + 0.5
    ties = steps * quantizer.scale.float()[:, None]
    draw = torch.rand(x.shape, generator=generator(5))
    x = torch.where(draw < 0.2, ties, x)
    x = torch.where(draw > 0.99, x * 20, x)
    x[:, 5, 7] = quantizer.threshold[5].float()
    x[0, 10:20] = 0.0
    return x


CASES = [
    (kind, bits, period, reverse)
    for kind in ("dynamic", "asymmetric", "static")
    for bits in ((4, 8), (8, 16), (8, 8), (4, 16))
    for period, reverse in ((10, False), (10, True))
] + [("dynamic", (4, 8), period, reverse) for period in (1, 3, 23, 99) for reverse in (False, True)]


@pytest.mark.parametrize(("kind", "bits", "period", "reverse"), CASES)
def test_codes_scales_and_lists(kind: str, bits: Any, period: int, reverse: bool) -> None:
    quantizer = Quantizer(kind, bits, period, reverse)
    x = _inputs(quantizer, 3)
    codes, outlier_scale, listed = run(onnx_of(quantizer, x[:2]), x)
    expected = quantizer_oracle(
        x.numpy(),
        quantizer.scale.float().numpy(),
        None if quantizer.zero is None else quantizer.zero.float().numpy(),
        quantizer.threshold.float().numpy(),
        *quantizer.static,
        channels=[3, 11] if kind == "static" else None,
    )
    assert expected.listed.any()
    assert not expected.listed.all()
    np.testing.assert_array_equal(listed, expected.listed)
    np.testing.assert_array_equal(codes.astype(np.int64) - 128, expected.codes)
    np.testing.assert_array_equal(outlier_scale, expected.outlier_scale)


class _There(nn.Module):
    """Quantize and dequantize."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, x: Tensor) -> Tensor:
        q = self.quantizer
        codes, outlier_scale, start = q(x)
        kept = x if q.static[1] == 16 else None
        return torch.ops.ouro.dequantize_dynamic_outlier(
            codes, q.scale, q.zero, outlier_scale, start, kept, *q.static
        )


@pytest.mark.parametrize("kind", ["dynamic", "asymmetric", "static"])
@pytest.mark.parametrize("bits", [(4, 8), (8, 16)])
def test_dequantized_values(kind: str, bits: Any) -> None:
    module = _There(Quantizer(kind, bits, 10, True))
    x = _inputs(module.quantizer, 3)
    [found] = run(onnx_of(module, x[:2]), x)
    np.testing.assert_array_equal(found, module(x).numpy())


def test_a_site_without_outliers_has_no_list() -> None:
    quantizer = Quantizer("dynamic", (8, 8), 10, False)
    module, x = _There(quantizer), _inputs(quantizer, 3)
    quantizer.threshold.fill_(float("inf"))
    proto = onnx_of(module, x[:2])
    [found] = run(proto, x)
    np.testing.assert_array_equal(found, module(x).numpy())
    assert not {"CumSum", "Where", "GreaterOrEqual"} & set(operators(proto))


def test_thresholds_inside_the_inlier_range_are_refused() -> None:
    quantizer = Quantizer("dynamic", (4, 8), 10, False)
    quantizer.threshold[7] = quantizer.limit()[7, 0].half() * 0.9
    with pytest.raises(ModelError, match="gate"):
        onnx_of(quantizer, _inputs(quantizer, 2))


@pytest.mark.parametrize("shape", [(1,), (LENGTH, 1), (COLUMNS,)])
@pytest.mark.parametrize("zero", [None, 5.0])
def test_fake_quantize(shape: tuple[int, ...], zero: float | None) -> None:
    class Fake(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.rand(shape, generator=generator(0)) + 0.1)
            self.register_buffer("zero", None if zero is None else torch.full(shape, zero))

        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.ouro.fake_quantize(x, self.scale, self.zero, 4)

    module, x = Fake(), randn(1, 3, LENGTH, COLUMNS)
    x[:, 0] = (module.scale * 2.5).expand(LENGTH, COLUMNS)[0]  # ties
    [found] = run(onnx_of(module, x[:2]), x)
    np.testing.assert_array_equal(found, module(x).numpy())


class ColumnQuantizer(Quantizer):
    """Quantizes a map (B, C, H, W) column after column."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x.permute(0, 3, 2, 1))


def test_a_map_read_by_index() -> None:
    quantizer = ColumnQuantizer("dynamic", (4, 8), 5, True)
    for name in ("scale", "threshold"):
        quantizer.register_buffer(name, getattr(quantizer, name)[:15])
    x = randn(7, 3, COLUMNS, 5, 3)
    found = run(onnx_of(quantizer, x[:2]), x)
    tokens = x.permute(0, 3, 2, 1).reshape(3, 15, COLUMNS)
    expected = quantizer_oracle(
        tokens.numpy(), quantizer.scale.float().numpy(), None,
        quantizer.threshold.float().numpy(), *quantizer.static,
    )  # fmt: skip
    assert np.array_equal(found[0].astype(np.int64) - 128, expected.codes)
    assert np.array_equal(found[1], expected.outlier_scale)
