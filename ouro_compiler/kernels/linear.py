"""Launch of the two-scale product."""

from __future__ import annotations

import torch
from torch import Tensor

from ouro_compiler.kernels.launch import (
    contiguous,
    interpreting,
    launch,
    linear_blocks,
    next_power_of_2,
)
from ouro_compiler.kernels.quantize import FLOATS
from ouro_compiler.kernels.spec import Epilogue, Template, make_spec
from ouro_compiler.ops.linear import check
from ouro_compiler.ops.quantize import KEEP_FLOAT_BITS, window_length

_ACTIVATIONS = {
    "none": (),
    "silu": (Epilogue.SILU,),
    "softplus": (Epilogue.SOFTPLUS,),
    "gelu": (Epilogue.GELU,),
    "gelu_tanh": (Epilogue.GELU_TANH,),
}
_COLUMNS_A_STEP = 32  # outlier columns: the smallest K of an int8 matrix instruction
_WORDS_A_STEP = 256  # when listing: up to 1024 columns are one step


def refuse(codes: Tensor, x: Tensor | None, qweight: Tensor, dtype: torch.dtype) -> str | None:
    """Why no kernel computes this product; None if one does."""
    if codes.dtype != torch.int8 or qweight.dtype not in (torch.int8, torch.uint8):
        return f"kernels take int8 codes and int8 or packed weights, got {qweight.dtype}"
    if dtype not in FLOATS or (x is not None and x.dtype not in FLOATS):
        return f"kernels take and return fp16, bf16 and fp32, got {dtype}"
    return None


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
    """`linear_dynamic_outlier_ref` by kernel. x may have any strides, the rest is contiguous."""
    del inlier_bits  # codes are codes
    check(codes, inlier_scale, x, qweight, weight_scale, bias, residual, activation, outlier_bits)
    batch, length, columns = codes.shape
    outputs, stored = qweight.shape
    codes, qweight = contiguous(codes, "codes"), contiguous(qweight, "qweight")
    outlier_start = contiguous(outlier_start, "outlier_start")
    residual = None if residual is None else contiguous(residual, "residual")
    y = codes.new_empty((batch, length, outputs), dtype=dtype or torch.float32)
    fp32_outliers = x is not None and x.dtype == torch.float32
    blocks = linear_blocks(outputs, stored, fp32_outliers=fp32_outliers)
    # Floating-point sums must not depend on the other samples: no tile holds rows of two.
    per_sample = outlier_bits == KEEP_FLOAT_BITS
    tiles = _cdiv(length, blocks["BLOCK_M"]) * batch
    if not per_sample:
        tiles = _cdiv(batch * length, blocks["BLOCK_M"])
    common = {
        "LENGTH": length,
        "COLUMNS": columns,
        "WINDOW": window_length(refresh_period, length),
        "REVERSE": reverse,
        "PER_SAMPLE": per_sample,
        "BLOCK_M": blocks["BLOCK_M"],
    }
    rows = batch * length
    lists = codes.new_empty((tiles, columns), dtype=torch.int32)
    packed = qweight.dtype == torch.uint8
    spec = make_spec(
        Template.LINEAR,
        {
            **common,
            **blocks,
            "OUTPUTS": outputs,
            "OUTLIER_BITS": outlier_bits,
            "PACKED": packed,
            "SCALE_PER_OUTPUT": weight_scale.numel() > 1,
            "INLINE_ASM": not interpreting(),
            "EVEN_K": stored * (2 if packed else 1) == columns and stored % blocks["BLOCK_K"] == 0,
            "BLOCK_O": _COLUMNS_A_STEP,
            **_listing(outlier_start, length, common["WINDOW"], blocks["BLOCK_M"], per_sample),
        },
        epilogue=(
            *((Epilogue.BIAS,) if bias is not None else ()),
            *_ACTIVATIONS[activation],
            *((Epilogue.RESIDUAL,) if residual is not None else ()),
        ),
        num_warps=8 if blocks["BLOCK_N"] >= 64 else 4,
    )
    grid = (tiles * _cdiv(outputs, blocks["BLOCK_N"]), 1, 1)
    activations = (codes, inlier_scale, outlier_scale, outlier_start, lists, x)
    strides = (0, 0, 0) if x is None else x.stride()
    launch(spec, grid, *activations, qweight, weight_scale, bias, residual, y, rows, *strides)
    return y


def _listing(
    start: Tensor, length: int, window: int, block_m: int, per_sample: bool
) -> dict[str, int]:
    """Constants of the list of columns: the windows that a tile of rows can meet, how to read."""
    columns = start.shape[2]
    samples = 1 if per_sample else _cdiv(block_m - 1, length) + 1
    windows = min(_cdiv(length, window), _cdiv(block_m - 1, window) + 1)
    aligned = columns % 4 == 0 and start.storage_offset() % 4 == 0
    per_word = 4 if start.dtype == torch.uint8 and aligned else 1
    return {
        "NEVER": torch.iinfo(start.dtype).max,
        "PER_WORD": per_word,
        "SAMPLE_WINDOWS": windows,
        "BLOCK_R": next_power_of_2(samples * windows),
        "BLOCK_L": min(_WORDS_A_STEP, next_power_of_2(columns // per_word)),
    }


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
