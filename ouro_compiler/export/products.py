"""Translations of quantized products: weights as INT4 or 8-bit initializers, MatMulInteger.

MatMulInteger of ONNX Runtime multiplies uint8 activations with int8 weights fastest, but where a
processor has no VNNI it adds pairs of products in 16 bits, which saturate. Pairs of uint8 times
codes up to 64 cannot; larger codes are stored as uint8 with 128 added, whose kernel is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ouro_compiler.errors import ModelError
from ouro_compiler.export.emitter import Emitter, translates
from ouro_compiler.export.pointwise import gelu
from ouro_compiler.export.quantizers import CODE_ZERO
from ouro_compiler.graph import argument, value_of
from ouro_compiler.ops.linear import unpacked_weight
from ouro_compiler.ops.quantize import KEEP_FLOAT_BITS

INT4_OPSET = 21
_EXACT_SIGNED = 64  # 2 * 255 * 64 < 2**15
_OURO = torch.ops.ouro


@translates(_OURO.linear_dynamic_outlier.default)
def _linear(emit: Emitter, node: fx.Node) -> str:
    listed = emit.get(argument(node, "outlier_start"))
    codes = emit.get(argument(node, "codes"))
    columns = int(value_of(argument(node, "codes")).shape[2])
    weight, weight_zero = _weight(emit, node, columns)
    weight_scale = emit.real(argument(node, "weight_scale"))
    inlier_scale = emit.column(argument(node, "inlier_scale"))
    if listed in emit.empty_lists:
        y = _product(emit, codes, weight, weight_zero)
        y = emit.op("Mul", emit.op("Mul", y, inlier_scale), weight_scale)
    elif argument(node, "outlier_bits") == KEEP_FLOAT_BITS:
        y = _product(emit, codes, weight, weight_zero)
        y = emit.op("Mul", emit.op("Mul", y, inlier_scale), weight_scale)
        kept = emit.op("Where", listed, emit.real(argument(node, "x")), emit.number(0.0))
        plain = _plain(emit, emit.cast(weight, torch.float32), weight_zero)
        part = emit.op("Mul", emit.op("MatMul", kept, plain), weight_scale)
        y = emit.op("Add", y, part)
    else:
        none = emit.number(CODE_ZERO, torch.uint8)
        inliers = emit.op("Where", listed, none, codes)
        outliers = emit.op("Where", listed, codes, none)
        y = emit.op("Mul", _product(emit, inliers, weight, weight_zero), inlier_scale)
        dynamic = emit.column(argument(node, "outlier_scale"))
        part = emit.op("Mul", _product(emit, outliers, weight, weight_zero), dynamic)
        y = emit.op("Mul", emit.op("Add", y, part), weight_scale)
    return _epilogue(emit, node, y)


def _epilogue(emit: Emitter, node: fx.Node, y: str) -> str:
    bias, residual = argument(node, "bias"), argument(node, "residual")
    if bias is not None:
        y = emit.op("Add", y, emit.real(bias))
    activation = argument(node, "activation")
    if activation == "silu":
        y = emit.op("Mul", y, emit.op("Sigmoid", y))
    elif activation == "softplus":
        y = emit.op("Softplus", y)
    elif activation in ("gelu", "gelu_tanh"):
        y = gelu(emit, y, "tanh" if activation == "gelu_tanh" else "none")
    elif activation != "none":
        raise ModelError(f"{node.name}: ONNX export has no activation {activation}")
    if residual is not None:
        y = emit.op("Add", y, emit.real(residual))
    dtype = value_of(node).dtype
    return y if dtype == torch.float32 else emit.cast(y, dtype)


def _product(emit: Emitter, codes: str, weight: str, weight_zero: int) -> str:
    """fp32 of the exact int32 product of stored codes (B, L, K) and weight codes (K, O)."""
    zeros = [emit.number(CODE_ZERO, torch.uint8)]
    if weight_zero:
        zeros.append(emit.number(weight_zero, torch.uint8))
    return emit.cast(emit.op("MatMulInteger", codes, weight, *zeros), torch.float32)


def _weight(emit: Emitter, node: fx.Node, columns: int) -> tuple[str, int]:
    """(codes (K, O) as int8 or uint8, what is added to them) of a product's weight."""
    arg = argument(node, "qweight")
    codes = _codes(emit, node, columns).t().contiguous()
    return stored_weight(emit, codes, f"{arg.target}.transposed")


def _codes(emit: Emitter, node: fx.Node, columns: int) -> Tensor:
    stored = emit.known(argument(node, "qweight"))
    if stored is None:
        raise ModelError(f"{node.name}: ONNX export needs its quantized weight as a constant")
    return unpacked_weight(stored, columns)


def stored_weight(emit: Emitter, codes: Tensor, name: str) -> tuple[str, int]:
    """(value, what is added to it) of int8 codes: INT4 if they fit, INT8, or UINT8 with 128."""
    low, high = int(codes.min()), int(codes.max())
    if low >= -8 and high <= 7 and emit.opset >= INT4_OPSET:
        return emit.cast(emit.four_bit_constant(codes, name), torch.int8), 0
    if low >= -_EXACT_SIGNED and high <= _EXACT_SIGNED:
        return emit.constant(codes, name), 0
    shifted = (codes.to(torch.int16) + CODE_ZERO).to(torch.uint8)
    return emit.constant(shifted, name), CODE_ZERO


def _plain(emit: Emitter, codes: str, added: int) -> str:
    return emit.op("Sub", codes, emit.number(float(added))) if added else codes


@translates(_OURO.dequantize_weight.default)
def _dequantize_weight(emit: Emitter, node: fx.Node) -> str:
    bits, arg = argument(node, "bits"), argument(node, "qweight")
    codes = _codes(emit, node, argument(node, "columns"))
    low, high = int(codes.min()), int(codes.max())
    if low >= -8 and high <= 7 and emit.opset >= INT4_OPSET:
        name = emit.four_bit_constant(codes, f"{arg.target}.codes")
    else:
        name = emit.constant(codes, f"{arg.target}.codes")
    y, zero = emit.cast(name, torch.float32), argument(node, "zero_point")
    if zero is not None:
        middle = emit.number(float(2 ** (bits - 1)))
        y = emit.op("Add", y, emit.op("Sub", middle, emit.column(zero)))
    return emit.op("Mul", y, emit.column(argument(node, "weight_scale")))
