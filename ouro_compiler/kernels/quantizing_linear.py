"""Two launches as one: a quantizer of few columns and the product that alone reads its codes.

dt_proj reads 3 to 48 features a token: every program that multiplies rows quantizes them again, in
registers. No operator: `runtime/chains.py` finds pairs among recorded launches.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ouro_compiler.kernels.blocks import linear_blocks, linear_warps, next_power_of_2
from ouro_compiler.kernels.launch import Launch
from ouro_compiler.kernels.spec import Template, make_spec
from ouro_compiler.ops.quantize import KEEP_FLOAT_BITS

_MOST_COLUMNS = 64  # of a row in registers, and one step of the product


def quantizing_linear(
    quantize: Launch, product: Launch, same: Callable[[Tensor, Tensor], bool]
) -> Launch | None:
    """One launch that computes what the two do but for codes and scales; None if there is none.

    same: whether two tensors are one piece of memory, of one shape.
    """
    if (quantize.spec.template, product.spec.template) != (Template.QUANTIZE, Template.LINEAR):
        return None
    x, scale, _, threshold, codes, outlier_scale, start, *places = quantize.args
    given = (codes, scale, outlier_scale, start)
    if not all(same(one, other) for one, other in zip(given, product.args[:4], strict=True)):
        return None
    made, reads = quantize.spec, product.spec
    if any(made[name] != reads[name] for name in ("LENGTH", "COLUMNS", "WINDOW", "REVERSE")):
        return None
    window, columns, outputs = made["WINDOW"], made["COLUMNS"], reads["OUTPUTS"]
    if made["MAP_WIDTH"] or made["ASYMMETRIC"] or made["OUTLIER_BITS"] == KEEP_FLOAT_BITS:
        return None
    qweight, weight_scale, bias, residual, y = product.args[6:11]
    blocks = linear_blocks(outputs, qweight.shape[1], fp32_outliers=False)
    rows, block_n = blocks["BLOCK_M"], blocks["BLOCK_N"]
    if columns > _MOST_COLUMNS or window > rows:
        return None
    tile = rows // window * window
    spec = make_spec(
        Template.QUANTIZING_LINEAR,
        {
            **{name: made[name] for name in ("LENGTH", "COLUMNS", "WINDOW", "REVERSE", "NEVER")},
            **{name: made[name] for name in ("INLIER_BITS", "OUTLIER_BITS")},
            **{name: reads[name] for name in ("OUTPUTS", "PACKED", "SCALE_PER_OUTPUT")},
            "TILE": tile,
            "BLOCK_N": block_n,
            "BLOCK_M": rows,
            "BLOCK_K": max(32, next_power_of_2(columns)),  # of an int8 matrix instruction
            "BLOCK_W": next_power_of_2(tile // window),
        },
        epilogue=reads.epilogue,
        num_warps=linear_warps(block_n),
    )
    tiles = -(-made["LENGTH"] // tile) * codes.shape[0]
    grid = (tiles * -(-outputs // block_n), 1, 1)
    sample, _, token, channel = places
    strides = (sample, token, channel)
    args = (x, scale, threshold, start, qweight, weight_scale, bias, residual, y, *strides)
    return Launch(spec=spec, grid=grid, args=args)
