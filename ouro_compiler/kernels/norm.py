"""Launch of residual addition and norm."""

from __future__ import annotations

from torch import Tensor

from ouro_compiler.kernels.blocks import next_power_of_2
from ouro_compiler.kernels.launch import as_tokens, launch, row_strides
from ouro_compiler.kernels.spec import Template, make_spec
from ouro_compiler.ops.norm import check, residual_dtype

_ELEMENTS = 2048  # of a program's rows


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    residual_fp32: bool,
) -> tuple[Tensor, Tensor]:
    """`add_norm_ref` by kernel; x and residual (..., K) may have any strides."""
    check(x, residual, weight, bias)
    y = x.new_empty(x.shape)
    total = x.new_empty(x.shape, dtype=residual_dtype(x, residual, residual_fp32))
    x = as_tokens(x, "x")
    residual = None if residual is None else as_tokens(residual, "residual", x)
    batch, length, columns = x.shape
    block_k = next_power_of_2(columns)
    block_m = max(1, _ELEMENTS // block_k)
    spec = make_spec(
        Template.ADD_NORM,
        {
            "LENGTH": length,
            "COLUMNS": columns,
            "RMS": rms,
            "HAS_RESIDUAL": residual is not None,
            "HAS_BIAS": bias is not None,
            "BLOCK_M": block_m,
            "BLOCK_K": block_k,
        },
        num_stages=1,
    )
    grid = (-(-batch * length // block_m), 1, 1)
    strides = (*x.stride(), *row_strides(residual))
    launch(spec, grid, x, residual, weight, bias, y, total, eps, batch * length, *strides)
    return y, total
