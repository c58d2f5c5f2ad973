"""The product with two scales in C++: its arguments, and a test of exactness on this machine."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ouro_compiler.kernels.cpp.launch import (
    DTYPES,
    check_at_first_use,
    dtype_code,
    launch,
    refuse_dtypes,
    spec_of,
)
from ouro_compiler.kernels.cpp.toolchain import BuildError, cpu_features
from ouro_compiler.kernels.launch import contiguous
from ouro_compiler.kernels.spec import KernelSpec, Template
from ouro_compiler.ops.linear import check, linear_dynamic_outlier_ref
from ouro_compiler.ops.packing import pack_int4_ref
from ouro_compiler.ops.quantize import KEEP_FLOAT_BITS, listed_mask, window_length

_WORDS, _BYTES, _QUADS = range(3)  # KIND in templates/products.h
_ACTIVATIONS = {"none": 0, "silu": 1, "softplus": 2, "gelu": 3, "gelu_tanh": 4}


def refuse_linear(
    codes: Tensor,
    inlier_scale: Tensor,
    outlier_scale: Tensor,
    outlier_start: Tensor,
    x: Tensor | None,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    *_static: object,
    dtype: torch.dtype | None = None,
) -> str | None:
    """Why no kernel computes this product; None if one does."""
    if codes.dtype != torch.int8 or qweight.dtype not in (torch.int8, torch.uint8):
        return f"kernels take int8 codes and int8 or packed weights, got {qweight.dtype}"
    if dtype is not None and dtype not in DTYPES:
        return f"kernels return fp32, bf16 and fp16, got {dtype}"
    return refuse_dtypes(inlier_scale, x, weight_scale, bias, residual)


def linear_dynamic_outlier(
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
    """`linear_dynamic_outlier_ref` in C++; shapes as there."""
    del inlier_bits  # codes are codes
    check(codes, inlier_scale, x, qweight, weight_scale, bias, residual, activation, outlier_bits)
    batch, length, columns = codes.shape
    outputs = qweight.shape[0]
    codes, qweight = contiguous(codes, "codes"), contiguous(qweight, "qweight")
    outlier_start = contiguous(outlier_start, "outlier_start")
    residual = None if residual is None else contiguous(residual, "residual")
    y = codes.new_empty((batch, length, outputs), dtype=dtype or torch.float32)
    spec = linear_spec(qweight.dtype, outlier_bits, y.dtype)
    launch(
        spec,
        *(codes, inlier_scale.contiguous(), dtype_code(inlier_scale), outlier_scale.contiguous()),
        *(outlier_start, outlier_start.element_size()),
        *((None, 0, 0, 0, 0) if x is None else (x, dtype_code(x), *x.stride())),
        *(qweight, weight_scale.contiguous(), dtype_code(weight_scale), weight_scale.numel()),
        *(None if bias is None else bias.contiguous(), dtype_code(bias)),
        *(residual, dtype_code(residual), _ACTIVATIONS[activation], y),
        *(batch, length, columns, outputs, window_length(refresh_period, length), reverse),
    )
    return y


def _check_exactness(spec: KernelSpec) -> None:
    """Compare a kernel with the reference on extreme codes, at its first use in a process.

    Raises BuildError if they differ: instructions that saturate would go unnoticed otherwise.
    """
    packed, outlier_bits = bool(spec["PACKED"]), spec["OUTLIER_BITS"]
    length, columns, outputs = 7, 67, 37
    codes = torch.tensor([-127, 127, 127, -127, 127], dtype=torch.int8).repeat(94)[
        : length * columns
    ]
    codes = codes.view(1, length, columns)
    start = torch.full((1, 2, columns), 255, dtype=torch.uint8)
    start[..., ::5] = 2  # codes 127, listed from the third token of a window on
    x = codes.float()
    if outlier_bits == KEEP_FLOAT_BITS:
        codes = torch.where(listed_mask(start, length, 5, False), 0, codes)
    most = 7 if packed else 127
    weight = torch.tensor([-most, most], dtype=torch.int8).repeat_interleave(19)[:outputs, None]
    weight = weight.repeat(1, columns)
    weight[:, ::7] = -weight[:, ::7]
    ones = torch.ones(length)
    given: dict[str, Any] = {
        "codes": codes,
        "inlier_scale": ones,
        "outlier_scale": ones[None] * 2,
        "outlier_start": start,
        "x": x,
        "qweight": pack_int4_ref(weight) if packed else weight,
        "weight_scale": ones[:1],
        **{"bias": None, "residual": None, "activation": "none", "inlier_bits": 8},
        **{"outlier_bits": outlier_bits, "refresh_period": 5, "reverse": False},
        "dtype": next(dtype for dtype, code in DTYPES.items() if code == spec["DTYPE_Y"]),
    }
    if not torch.equal(linear_dynamic_outlier(**given), linear_dynamic_outlier_ref(**given)):
        raise BuildError("its integer product is not exact on this machine")


@functools.cache
def linear_spec(
    weights: torch.dtype, outlier_bits: int, dtype: torch.dtype, kind: int | None = None
) -> KernelSpec:
    """The kernel for weights stored as int8 or as packed uint8; `kind` is for tests."""
    packed = weights == torch.uint8
    if kind is None:
        vnni = bool({"avx512_vnni", "avx_vnni"} & cpu_features())
        kind = _QUADS if vnni else _BYTES if packed else _WORDS
    return spec_of(
        Template.LINEAR, KIND=kind, PACKED=packed, OUTLIER_BITS=outlier_bits, DTYPE_Y=DTYPES[dtype]
    )


check_at_first_use(Template.LINEAR, _check_exactness)
