"""`ouro::selective_scan_dynamic_outlier`: the selective scan on quantized delta, B and C.

delta, B and C are what `dequantize_dynamic_outlier` takes, as one list of six each:

    [codes, inlier_scale, zero_point or None, outlier_scale, outlier_start, x or None]

in its shapes (ops/quantize.py), with tokens first: delta (B, L, D), B and C (B, L, G N). All three
have the same bits and windows, and windows run in the scan's direction. The other operands and the
result are those of `ouro::selective_scan`, which reads what is dequantized here; u may be a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ouro_compiler.ops.library import define_op, empty_token_major, reject
from ouro_compiler.ops.maps import sequence_shape
from ouro_compiler.ops.quantize import (
    KEEP_FLOAT_BITS,
    dequantize_dynamic_outlier_ref,
    start_dtype,
    window_length,
)
from ouro_compiler.ops.quantize import check as check_quantize
from ouro_compiler.ops.selective_scan import check as check_scan
from ouro_compiler.ops.selective_scan import selective_scan_implementation, selective_scan_ref

NAME = "selective_scan_dynamic_outlier"


class Quantized(NamedTuple):
    """One operand; x is read where outlier_bits is 16, and None elsewhere."""

    codes: Tensor  # int8 (B, L, K)
    inlier_scale: Tensor  # (L,)
    zero_point: Tensor | None  # (L,)
    outlier_scale: Tensor  # fp32 (B, L)
    outlier_start: Tensor  # (B, J, K)
    x: Tensor | None  # (B, L, K)


Parts = Sequence[Tensor | None]
Static = tuple[int, int, int, bool]  # inlier_bits, outlier_bits, refresh_period, reverse


def check(
    u: Tensor,
    delta: Parts,
    A: Tensor,
    B: Parts,
    C: Parts,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    static: Static,
) -> tuple[Quantized, Quantized, Quantized]:
    """delta, B and C by names. Raises ValueError for operands that do not fit each other."""
    step, b, c = (
        _operand(name, parts, u, static) for name, parts in (("delta", delta), ("B", B), ("C", C))
    )
    matrices = matrix(b.codes, A), matrix(c.codes, A)
    check_scan(u, step.codes.transpose(1, 2), A, *matrices, D, z, delta_bias)
    return step, b, c


def _operand(name: str, parts: Parts, u: Tensor, static: Static) -> Quantized:
    """An operand whose parts fit each other and u (B, D, L)."""
    if len(parts) != len(Quantized._fields) or any(parts[i] is None for i in (0, 1, 3, 4)):
        reject(NAME, f"{name} must be a list of {', '.join(Quantized._fields)}")
    one = Quantized(*parts)  # type: ignore[arg-type]
    inlier_bits, outlier_bits, refresh_period, _ = static
    per_token = (one.inlier_scale, one.zero_point)
    check_quantize(NAME, one.codes, per_token, inlier_bits, outlier_bits, refresh_period)
    batch, length, columns = one.codes.shape
    shape = sequence_shape(u)
    if shape is None or (batch, length) != (shape[0], shape[2]):
        reject(NAME, f"{name}'s codes must be (B, L, K) for u (B, D, L), got {one.codes.shape}")
    if one.outlier_scale.shape != (batch, length):
        reject(NAME, f"{name}'s outlier_scale must be {(batch, length)}")
    window = window_length(refresh_period, length)
    lists = (batch, -(-length // window), columns)
    if one.outlier_start.shape != lists or one.outlier_start.dtype != start_dtype(window):
        reject(NAME, f"{name}'s outlier_start must be {lists} in {start_dtype(window)}")
    if outlier_bits != KEEP_FLOAT_BITS:
        return one._replace(x=None)
    if one.x is None or one.x.shape != one.codes.shape:
        reject(NAME, f"outlier_bits 16 reads x (B, L, K) of {name}: pass it")
    return one


def matrix(tokens: Tensor, A: Tensor) -> Tensor:
    """B or C (B, L, G N) as (B, G, N, L), a view; as one group where that is no multiple of N."""
    turned, states = tokens.transpose(1, 2), A.shape[-1]
    if states == 0 or turned.shape[1] % states:
        return turned[:, None]
    return turned.unflatten(1, (-1, states))


def dequantized(
    u: Tensor,
    delta: Parts,
    A: Tensor,
    B: Parts,
    C: Parts,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    *static: Any,
) -> tuple[Any, ...]:
    """The arguments of `ouro::selective_scan` that compute the same."""
    step, b, c = check(u, delta, A, B, C, D, z, delta_bias, static)
    values = [dequantize_dynamic_outlier_ref(*one, *static) for one in (step, b, c)]
    matrices = [matrix(one, A) for one in values[1:]]
    turned = values[0].transpose(1, 2)
    return u, turned, A, *matrices, D, z, delta_bias, delta_softplus, static[3]


def selective_scan_dynamic_outlier_ref(*args: Any) -> Tensor:
    """The definition: dequantized operands, then the definition of the scan."""
    return selective_scan_ref(*dequantized(*args))


def selective_scan_dynamic_outlier_implementation(*args: Any) -> Tensor:
    """The same with the chunked scan, on every device without a kernel."""
    return selective_scan_implementation(*dequantized(*args))


def _fake(u: Tensor, *_args: Any) -> Tensor:
    return empty_token_major(u)


define_op(
    f"{NAME}(Tensor u, Tensor?[] delta, Tensor A, Tensor?[] B, Tensor?[] C, Tensor? D, Tensor? z, "
    "Tensor? delta_bias, bool delta_softplus, int inlier_bits, int outlier_bits, "
    "int refresh_period, bool reverse) -> Tensor",
    implementation=selective_scan_dynamic_outlier_implementation,
    fake=_fake,
)
