"""Launch of the two-scale product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ouro_compiler.kernels.blocks import linear_blocks, linear_warps, next_power_of_2
from ouro_compiler.kernels.launch import contiguous, interpreting, launch
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
    check(codes, inlier_scale, x, qweight, weight_scale, bias, residual, activation, outlier_bits)
    batch, length, columns = codes.shape
    outputs, stored = qweight.shape
    codes, qweight = contiguous(codes, "codes"), contiguous(qweight, "qweight")
    outlier_start = contiguous(outlier_start, "outlier_start")
    residual = None if residual is None else contiguous(residual, "residual")
    y = codes.new_empty((batch, length, outputs), dtype=dtype or torch.float32)
    fp32_outliers = x is not None and x.dtype == torch.float32
    blocks = linear_blocks(outputs, stored, fp32_outliers=fp32_outliers)
    constants = {
        "LENGTH": length,
        "COLUMNS": columns,
        "OUTPUTS": outputs,
        "WINDOW": window_length(refresh_period, length),
        "REVERSE": reverse,
        "INLIER_BITS": inlier_bits,
        "OUTLIER_BITS": outlier_bits,
        "PACKED": qweight.dtype == torch.uint8,
        # Floating-point sums must not depend on the other samples: no tile holds rows of two.
        "PER_SAMPLE": outlier_bits == KEEP_FLOAT_BITS,
        "SCALE_PER_OUTPUT": weight_scale.numel() > 1,
        "INLINE_ASM": not interpreting(),
        "BLOCK_O": _COLUMNS_A_STEP,
        "MATRIX_BITS": 8,
        **_reading(outlier_start),
        **blocks,
    }
    tiles = product_tiles(constants, batch)
    rows = batch * length
    lists = codes.new_empty((tiles.rows, columns), dtype=torch.int32)
    spec = make_spec(
        Template.LINEAR,
        {**constants, **tiles.constants},
        epilogue=(
            *((Epilogue.BIAS,) if bias is not None else ()),
            *_ACTIVATIONS[activation],
            *((Epilogue.RESIDUAL,) if residual is not None else ()),
        ),
        num_warps=linear_warps(blocks["BLOCK_N"]),
    )
    activations = (codes, inlier_scale, outlier_scale, outlier_start, lists, x)
    strides = (0, 0, 0) if x is None else x.stride()
    vectors = (weight_scale, bias, residual)
    launch(spec, tiles.grid, *activations, qweight, *vectors, y, rows, *strides)
    return y


@dataclass(frozen=True, kw_only=True)
class ProductTiles:
    """What follows from a product's blocks: tiles of rows, the grid, constants of its list."""

    rows: int
    grid: tuple[int, int, int]
    constants: Mapping[str, int]


def product_tiles(constants: Mapping[str, int], batch: int) -> ProductTiles:
    """The tiles of a product with these constants, its blocks among them, for a batch size.

    The list of columns has room for the windows that a tile of rows can meet.
    """
    length, window, block_m = (constants[name] for name in ("LENGTH", "WINDOW", "BLOCK_M"))
    columns, per_word = constants["COLUMNS"], constants["PER_WORD"]
    if constants["PER_SAMPLE"]:
        samples, rows = 1, _cdiv(length, block_m) * batch
    else:
        samples, rows = _cdiv(block_m - 1, length) + 1, _cdiv(batch * length, block_m)
    windows = min(_cdiv(length, window), _cdiv(block_m - 1, window) + 1)
    stored = _cdiv(columns, 2) if constants["PACKED"] else columns
    whole = stored * (2 if constants["PACKED"] else 1) == columns
    return ProductTiles(
        rows=rows,
        grid=(rows * _cdiv(constants["OUTPUTS"], constants["BLOCK_N"]), 1, 1),
        constants={
            "EVEN_K": whole and stored % constants["BLOCK_K"] == 0,
            "SAMPLE_WINDOWS": windows,
            "BLOCK_R": next_power_of_2(samples * windows),
            "BLOCK_L": min(_WORDS_A_STEP, next_power_of_2(columns // per_word)),
        },
    )


def _reading(start: Tensor) -> dict[str, int]:
    """Constants of how the list of columns reads starts: four bytes at a time, if it may."""
    aligned = start.shape[2] % 4 == 0 and start.storage_offset() % 4 == 0
    per_word = 4 if start.dtype == torch.uint8 and aligned else 1
    return {"NEVER": torch.iinfo(start.dtype).max, "PER_WORD": per_word}


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
