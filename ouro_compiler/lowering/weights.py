"""Weights of `linear_dynamic_outlier` and `dequantize_weight`: 4-bit codes go two a byte."""

from __future__ import annotations

import torch
from torch import fx

from ouro_compiler.graph import argument, get_constant, set_constant
from ouro_compiler.lowering.registry import LoweringRule, register
from ouro_compiler.ops.packing import pack_int4_ref

_LINEAR = torch.ops.ouro.linear_dynamic_outlier.default
_WEIGHT = torch.ops.ouro.dequantize_weight.default
# int32 accumulators hold every sum of products of int8 codes up to this many columns.
_MAX_COLUMNS = (2**31 - 1) // (127 * 127)


def _supports(gm: fx.GraphModule, node: fx.Node) -> str | None:
    codes = get_constant(gm, argument(node, "qweight"))
    if codes is None or codes.dtype not in (torch.int8, torch.uint8):
        return "its quantized weight is not a constant of int8 codes"
    if node.target is _LINEAR and codes.shape[1] > _MAX_COLUMNS:
        return f"{codes.shape[1]} input features can overflow an int32 accumulator"
    return None


def stored_bytes(codes: torch.Tensor) -> int:
    """Bytes that int8 codes (O, K) of a weight take once they are packed, if they are."""
    columns = -(-codes.shape[1] // 2) if _fits_four_bits(codes) else codes.shape[1]
    return codes.shape[0] * columns


def _pack(gm: fx.GraphModule, node: fx.Node) -> None:
    """Pack in place whatever fits 4 bits. Codes that are packed already stay as they are."""
    qweight = argument(node, "qweight")
    codes = get_constant(gm, qweight)
    assert codes is not None
    if codes.dtype == torch.int8 and _fits_four_bits(codes):
        set_constant(gm, str(qweight.target), pack_int4_ref(codes))


def _fits_four_bits(codes: torch.Tensor) -> bool:
    return int(codes.min()) >= -8 and int(codes.max()) <= 7


register(LoweringRule(target=_LINEAR, supports=_supports, lower=_pack))
register(LoweringRule(target=_WEIGHT, supports=_supports, lower=_pack))
