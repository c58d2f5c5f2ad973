"""`ouro::linear_dynamic_outlier` and `ouro::dequantize_weight`: quantized products (METHODS 4).

With U the channels listed anywhere, `acc = codes @ W` and `acc_o = (codes[:, U] * listed) @ W[U]`
are exact int32 products, and in fp32

    y = ((acc - acc_o) * inlier_scale + acc_o * outlier_scale) * weight_scale + bias
    y = activation(y) + residual

When outlier_bits is 16 the codes of listed channels are 0 and the op also reads x:
    y = acc * inlier_scale * weight_scale + (x[:, U] * listed) @ (weight_scale * W[U]) + bias
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ouro_compiler.ops.activations import gelu, gelu_tanh, silu, softplus
from ouro_compiler.ops.library import define_op, reject
from ouro_compiler.ops.packing import unpack_int4_ref
from ouro_compiler.ops.quantize import KEEP_FLOAT_BITS, dequantize_codes, listed_mask

NAME = "linear_dynamic_outlier"
ACTIVATIONS = {
    "none": lambda y: y,
    "silu": silu,
    "softplus": softplus,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
}


def int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Exact int32 product of int8 matrices (M, K) @ (K, N), for any K >= 0.

    In fp64, which holds every sum of int8 products: torch._int_mm refuses odd shapes on CUDA, is
    wrong for one column on a CPU, and without VNNI slower than this.
    """
    return (a.double() @ b.double()).to(torch.int32)


def unpacked_weight(qweight: Tensor, columns: int, name: str = NAME) -> Tensor:
    """int8 codes (O, K) from int8 codes (O, K) or packed uint8 (O, ceil(K/2))."""
    weight = unpack_int4_ref(qweight, columns) if qweight.dtype == torch.uint8 else qweight
    if weight.shape[1] != columns:
        reject(name, f"qweight has {weight.shape[1]} columns, expected {columns}")
    return weight


def dequantize_weight_ref(
    qweight: Tensor, weight_scale: Tensor, zero_point: Tensor | None, bits: int, columns: int
) -> Tensor:
    """fp32 (O, K) from codes, packed or not; scale and zero point are (O,) or (1,)."""
    check_weight(qweight, weight_scale, zero_point, columns)
    zero = None if zero_point is None else zero_point.float()[:, None]
    codes = unpacked_weight(qweight, columns, "dequantize_weight")
    return dequantize_codes(codes, weight_scale.float()[:, None], zero, bits).contiguous()


def check_weight(
    qweight: Tensor, weight_scale: Tensor, zero_point: Tensor | None, columns: int
) -> None:
    """Raise ValueError for operands of dequantize_weight that do not fit each other."""
    if qweight.dim() != 2:
        reject("dequantize_weight", f"qweight must be (O, K), got {tuple(qweight.shape)}")
    outputs, stored = qweight.shape
    expected = (columns + 1) // 2 if qweight.dtype == torch.uint8 else columns
    if stored != expected:
        has = "bytes of two 4-bit codes" if qweight.dtype == torch.uint8 else "columns"
        reject("dequantize_weight", f"qweight has {stored} {has}, expected {expected}")
    for vector in (weight_scale, zero_point):
        if vector is not None and vector.shape not in ((outputs,), (1,)):
            reject(
                "dequantize_weight",
                f"scale and zero point must be ({outputs},), got {tuple(vector.shape)}",
            )


def check(
    codes: Tensor,
    inlier_scale: Tensor,
    x: Tensor | None,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    outlier_bits: int,
) -> None:
    """Raise ValueError for operands that do not fit each other."""
    if activation not in ACTIVATIONS:
        reject(NAME, f"activation {activation!r} is none of {', '.join(ACTIVATIONS)}")
    if codes.dim() != 3:
        reject(NAME, f"codes must be (B, L, K), got {tuple(codes.shape)}")
    batch, length, columns = codes.shape
    outputs, stored = qweight.shape
    expected = (columns + 1) // 2 if qweight.dtype == torch.uint8 else columns
    if stored != expected:
        reject(NAME, f"qweight has {stored} columns, expected {expected} for {columns} features")
    if inlier_scale.shape != codes.shape[1:2]:
        reject(NAME, f"inlier_scale must be ({length},), got {tuple(inlier_scale.shape)}")
    if weight_scale.shape not in ((outputs,), (1,)):
        reject(NAME, f"weight_scale must be ({outputs},), got {tuple(weight_scale.shape)}")
    if bias is not None and bias.shape != (outputs,):
        reject(NAME, f"bias must be ({outputs},), got {tuple(bias.shape)}")
    if residual is not None and residual.shape != (batch, length, outputs):
        reject(NAME, f"residual must have the result's shape, got {tuple(residual.shape)}")
    if outlier_bits == KEEP_FLOAT_BITS and (x is None or x.shape != codes.shape):
        reject(NAME, "outlier_bits 16 reads x (B, L, K): pass it")


def linear_dynamic_outlier_ref(
    codes: Tensor,
    inlier_scale: Tensor,
    outlier_scale: Tensor,
    outlier_start: Tensor,
    x: Tensor | None,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    inlier_bits: int,
    outlier_bits: int,
    refresh_period: int,
    reverse: bool,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """y (B, L, O) in `dtype` (fp32); the module docstring has the arithmetic."""
    check(codes, inlier_scale, x, qweight, weight_scale, bias, residual, activation, outlier_bits)
    batch, length, columns = codes.shape
    weight = unpacked_weight(qweight, columns)
    rows = codes.reshape(-1, columns)
    acc = int_matmul(rows, weight.t())
    per_row = inlier_scale.float().expand(batch, -1).reshape(-1, 1)
    per_column = weight_scale.float()
    listed = listed_mask(outlier_start, length, refresh_period, reverse).reshape(-1, columns)
    union = listed.any(0).nonzero().squeeze(1)
    if outlier_bits == KEEP_FLOAT_BITS:
        assert x is not None  # checked
        kept = torch.where(listed, x.reshape(-1, columns).float(), 0.0)[:, union]
        y = acc.float() * per_row * per_column
        # In fp64: the order of a sum over the batch's union must not show in a sample's result.
        exact = kept.double() @ weight[:, union].double().t()
        y = y + exact.float() * per_column
    else:
        outliers = torch.where(listed, rows, 0)[:, union]
        acc_o = int_matmul(outliers, weight[:, union].t())
        y = (acc - acc_o).float() * per_row + acc_o.float() * outlier_scale.reshape(-1, 1)
        y = y * per_column
    if bias is not None:
        y = y + bias.float()
    y = ACTIVATIONS[activation](y).view(batch, length, -1)
    if residual is not None:
        y = y + residual.float()
    return y.to(dtype or torch.float32)


def _fake(
    codes: Tensor,
    inlier_scale: Tensor,
    outlier_scale: Tensor,
    outlier_start: Tensor,
    x: Tensor | None,
    qweight: Tensor,
    *_args: Any,
    dtype: torch.dtype | None = None,
    **_kwargs: Any,
) -> Tensor:
    batch, length, _ = codes.shape
    return codes.new_empty((batch, length, qweight.shape[0]), dtype=dtype or torch.float32)


define_op(
    f"{NAME}(Tensor codes, Tensor inlier_scale, Tensor outlier_scale, Tensor outlier_start, "
    "Tensor? x, Tensor qweight, Tensor weight_scale, Tensor? bias, Tensor? residual, "
    "str activation, int inlier_bits, int outlier_bits, int refresh_period, bool reverse, *, "
    "ScalarType? dtype=None) -> Tensor",
    implementation=linear_dynamic_outlier_ref,
    fake=_fake,
)
define_op(
    "dequantize_weight(Tensor qweight, Tensor weight_scale, Tensor? zero_point, int bits, "
    "int columns) -> Tensor",
    implementation=dequantize_weight_ref,
    fake=lambda qweight, weight_scale, zero_point, bits, columns: qweight.new_empty(
        (qweight.shape[0], columns), dtype=torch.float32
    ),
)
