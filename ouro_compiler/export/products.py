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
    inlier_scale = emit.op("Unsqueeze", emit.real(argument(node, "inlier_scale")), emit.integers(-1))
    if listed in emit.empty_lists:
        y = _product(emit, codes, weight, weight_zero)
        y = emit.op("Mul", emit.op("Mul", y, inlier_scale), weight_scale)
    else:
        union = _union(emit, listed, columns)
        there = emit.op("Gather", listed, union, axis=2)
        rows = emit.op("Gather", weight, union, axis=0)
        if argument(node, "outlier_bits") == KEEP_FLOAT_BITS:
            y = _product(emit, codes, weight, weight_zero)
            y = emit.op("Mul", emit.op("Mul", y, inlier_scale), weight_scale)
            x = emit.op("Gather", emit.real(argument(node, "x")), union, axis=2)
            kept = emit.op("Where", there, x, emit.number(0.0))
            # In fp64, as the reference: the order of a sum then does not show.
            exact = emit.op(
                "MatMul",
                emit.cast(kept, torch.float64),
                _plain(emit, emit.cast(rows, torch.float64), weight_zero),
            )
            part = emit.op("Mul", emit.cast(exact, torch.float32), weight_scale)
            y = emit.op("Add", y, part)
        else:
            picked = emit.op("Gather", codes, union, axis=2)
            none = emit.number(CODE_ZERO, torch.uint8)
            outliers = emit.op("Where", there, picked, none)
            inliers = emit.op("Where", listed, none, codes)
            y = emit.op("Mul", _product(emit, inliers, weight, weight_zero), inlier_scale)
            dynamic = emit.op(
                "Unsqueeze", emit.get(argument(node, "outlier_scale")), emit.integers(-1)
            )
            part = emit.op("Mul", _product(emit, outliers, rows, weight_zero), dynamic)
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
    elif activation != "none":
        raise ModelError(f"{node.name}: ONNX export has no activation {activation}")
    if residual is not None:
        y = emit.op("Add", y, emit.real(residual))
    dtype = value_of(node).dtype
    return y if dtype == torch.float32 else emit.cast(y, dtype)


def _union(emit: Emitter, listed: str, columns: int) -> str:
    """Indices of the columns that are listed anywhere, and the first column in any case.

    A product over no columns at all is undefined in ONNX Runtime.
    """
    flags = emit.op(
        "ReduceMax", emit.cast(listed, torch.uint8), emit.integers(0, 1), keepdims=0
    )
    first = torch.zeros(columns, dtype=torch.bool)
    first[0] = True
    chosen = emit.op("Or", emit.cast(flags, torch.bool), emit.constant(first))
    return emit.op("Squeeze", emit.op("NonZero", chosen), emit.integers(0))


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
    if -8 <= low and high <= 7 and emit.opset >= INT4_OPSET:
        return emit.cast(emit.four_bit_constant(codes, name), torch.int8), 0
    if -_EXACT_SIGNED <= low and high <= _EXACT_SIGNED:
        return emit.constant(codes, name), 0
    shifted = (codes.to(torch.int16) + CODE_ZERO).to(torch.uint8)
    return emit.constant(shifted, name), CODE_ZERO


def _plain(emit: Emitter, codes: str, added: int) -> str:
    return emit.op("Sub", codes, emit.number(added, torch.float64)) if added else codes


@translates(_OURO.dequantize_weight.default)
def _dequantize_weight(emit: Emitter, node: fx.Node) -> str:
    bits, arg = argument(node, "bits"), argument(node, "qweight")
    codes = _codes(emit, node, argument(node, "columns"))
    low, high = int(codes.min()), int(codes.max())
    if -8 <= low and high <= 7 and emit.opset >= INT4_OPSET:
        name = emit.four_bit_constant(codes, f"{arg.target}.codes")
    else:
        name = emit.constant(codes, f"{arg.target}.codes")
    y, zero = emit.cast(name, torch.float32), argument(node, "zero_point")
    if zero is not None:
        middle = emit.number(float(2 ** (bits - 1)))
        point = emit.op("Unsqueeze", emit.real(zero), emit.integers(-1))
        y = emit.op("Add", y, emit.op("Sub", middle, point))
    scale = emit.op("Unsqueeze", emit.real(argument(node, "weight_scale")), emit.integers(-1))
    return emit.op("Mul", y, scale)
