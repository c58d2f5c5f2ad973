"""Integer products in onnxruntime are exact, and weights stored in the bits that they need."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

from ouro_compiler.ops.packing import pack_int4_ref
from ouro_compiler.ops.quantize import symmetric_max
from tests.export.graphs import onnx_of, operators, run
from tests.helpers import assert_close, generator, randn

LENGTH, COLUMNS, OUTPUTS = 12, 33, 21


class Product(nn.Module):
    """A quantizer and a linear on its codes; limits makes every weight as large as it can be."""

    def __init__(
        self,
        weight_bits: int,
        bits: tuple[int, int],
        *,
        limits: bool = False,
        epilogue: bool = True,
    ) -> None:
        super().__init__()
        top = symmetric_max(weight_bits)
        shape = (OUTPUTS, COLUMNS)
        codes = torch.randint(-top, top + 1, shape, generator=generator(0)).to(torch.int8)
        if limits:
            codes = torch.where(torch.rand(shape, generator=generator(0)) < 0.5, -top, top)
            codes = codes.to(torch.int8)
        self.register_buffer("qweight", pack_int4_ref(codes) if weight_bits == 4 else codes)
        self.register_buffer("weight_scale", (torch.rand(OUTPUTS) + 0.5).half())
        self.register_buffer("scale", torch.full((LENGTH,), 0.25).half())
        self.register_buffer("threshold", self.scale * symmetric_max(bits[0]) * 1.5)
        self.register_buffer("bias", randn(2, OUTPUTS).half() if epilogue else None)
        self.static = (*bits, 5, False)

    def forward(self, x: Tensor) -> Tensor:
        codes, dynamic, start = torch.ops.ouro.quantize_dynamic_outlier(
            x, self.scale, None, self.threshold, *self.static
        )
        kept = x if self.static[1] == 16 else None
        return torch.ops.ouro.linear_dynamic_outlier(
            codes, self.scale, dynamic, start, kept, self.qweight, self.weight_scale, self.bias,
            None, "none", *self.static,
        )  # fmt: skip


def _inputs(product: Product) -> Tensor:
    """Codes at both ends of their range, and some outliers."""
    reach = product.scale.float()[:, None] * symmetric_max(product.static[0])
    sign = torch.where(torch.rand(3, LENGTH, COLUMNS, generator=generator(1)) < 0.5, -1.0, 1.0)
    x = sign * reach
    x[:, 3:, 4:7] *= 3.0
    return x


STORED = {4: TensorProto.INT4, 6: TensorProto.INT8, 8: TensorProto.UINT8}


@pytest.mark.parametrize("weight_bits", [4, 6, 8])
@pytest.mark.parametrize("bits", [(4, 8), (8, 8)])
@pytest.mark.parametrize("limits", [False, True])
def test_integer_products_are_exact(weight_bits: int, bits: Any, limits: bool) -> None:
    product = Product(weight_bits, bits, limits=limits)
    x = _inputs(product)
    proto = onnx_of(product, x[:2])
    [found] = run(proto, x)
    np.testing.assert_array_equal(found, product(x).numpy())
    assert operators(proto).count("MatMulInteger") == 2
    assert _weight(proto).data_type == STORED[weight_bits]


@pytest.mark.parametrize("weight_bits", [4, 8])
def test_outliers_in_floating_point(weight_bits: int) -> None:
    product = Product(weight_bits, (8, 16))
    x = _inputs(product) * (1 + 0.01 * randn(3, 3, LENGTH, COLUMNS))
    proto = onnx_of(product, x[:2])
    [found] = run(proto, x)
    assert_close(torch.from_numpy(found), product(x), 1e-6)
    assert operators(proto).count("MatMulInteger") == 1


def test_four_bit_weights_before_opset_21_take_a_byte() -> None:
    product = Product(4, (4, 8))
    x = _inputs(product)
    proto = onnx_of(product, x[:2], opset=20)
    assert _weight(proto).data_type == TensorProto.INT8
    np.testing.assert_array_equal(run(proto, x)[0], product(x).numpy())


def _weight(proto: onnx.ModelProto) -> TensorProto:
    [found] = [one for one in proto.graph.initializer if one.name.startswith("qweight")]
    return found


@pytest.mark.parametrize("activation", ["silu", "softplus", "gelu", "gelu_tanh"])
def test_activation_and_residual(activation: str) -> None:
    class Whole(Product):
        def forward(self, x: Tensor) -> Tensor:
            codes, dynamic, start = torch.ops.ouro.quantize_dynamic_outlier(
                x, self.scale, None, self.threshold, *self.static
            )
            return torch.ops.ouro.linear_dynamic_outlier(
                codes, self.scale, dynamic, start, None, self.qweight, self.weight_scale,
                self.bias, x[..., :OUTPUTS], activation, *self.static,
            )  # fmt: skip

    module = Whole(4, (4, 8))
    x = _inputs(module)
    [found] = run(onnx_of(module, x[:2]), x)
    assert_close(torch.from_numpy(found), module(x), 1e-6)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero", [None, 3.0])
def test_weights_of_scans_are_dequantized(bits: int, zero: float | None) -> None:
    class Weight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            top = 2 ** (bits - 1)
            codes = torch.randint(-top, top, (7, 5), generator=generator(0)).to(torch.int8)
            self.register_buffer("qweight", pack_int4_ref(codes) if bits == 4 else codes)
            self.register_buffer("scale", torch.rand(7).half())
            self.register_buffer("zero", None if zero is None else torch.full((7,), zero).half())

        def forward(self, x: Tensor) -> Tensor:
            weight = torch.ops.ouro.dequantize_weight(self.qweight, self.scale, self.zero, bits, 5)
            return x * weight

    module, x = Weight(), torch.ones(3, 7, 5)
    [found] = run(onnx_of(module, x[:2]), x)
    np.testing.assert_array_equal(found, module(x).numpy())
