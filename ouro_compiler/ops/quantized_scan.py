"""`ouro::quantized_selective_scan`: the recurrence of Mamba-1 on quantized operands (METHODS 3.6).

    a_t = exp(step_t A)                                 quantized: decay
    x_t = Q(step_t B_t) u_t                             quantized: input
    h_t = Q(a_t * h_{t-1} + x_t)                        quantized: state
    y_t = (C_t . h_t + D u_t) * silu(z_t)

Shapes are `ouro::selective_scan`'s; `step` is Delta after softplus. Each quantizer may be absent.
Vectors over time are (L,), indexed by token whatever the direction. Everything is computed in fp32,
each operation rounded once, and returned in u's dtype in memory laid out as (B, L, D).

decay: with `decay_scale` (L,) uniform, codes 0 .. 2^bits - 1. With `decay_steps` r > 0 logarithmic
    (METHODS 7.2): 1 - a has codes q of s 2^(-q/r), s = `decay_limit`, and the recurrence carries
    1 - a, since a itself rounds to 1 for many of them: h - (1 - a) h.
input, state: symmetric with `*_scale` (L,). A channel e whose largest magnitude over its N states
    reaches `*_threshold` (L,) is an outlier from that step to the end of its window of
    `refresh_period` steps, counted in scan order. That is METHODS 3.5's list without the gate,
    which calibrated thresholds, above every inlier, make superfluous. Outliers have a dynamic scale
    a (sample, step, channel), the largest magnitude over the states / Q: unlike one for all listed
    channels it leaves channels independent of each other, so that a kernel may walk through time
    with some of them. With 16 outlier bits they stay in floating point.
state: it is h / `state_factor` (D, N) that is quantized, if there is a factor, and multiplied back.
    The next step always reads the quantized state; y does too, unless `output_before_rounding`.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import torch
from torch import Tensor

from ouro_compiler.ops.activations import silu
from ouro_compiler.ops.elementary import LOG2E, exp2, log2
from ouro_compiler.ops.library import (
    as_token_major,
    define_op,
    differentiate_by_reference,
    empty_token_major,
    reject,
)
from ouro_compiler.ops.quantize import KEEP_FLOAT_BITS, MIN_SCALE, symmetric_max
from ouro_compiler.ops.selective_scan import check as check_scan
from ouro_compiler.ops.selective_scan import per_channel

NAME = "quantized_selective_scan"


def log2_offset(limit: float, steps: int) -> float:
    """r log2(s), as the fp32 number that codes of a logarithmic decay are counted from."""
    if not steps:
        return 0.0
    (rounded,) = struct.unpack("f", struct.pack("f", steps * math.log2(limit)))
    return float(rounded)


def quantized_selective_scan_ref(
    u: Tensor,
    step: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    decay_scale: Tensor | None,
    input_scale: Tensor | None,
    input_threshold: Tensor | None,
    state_scale: Tensor | None,
    state_threshold: Tensor | None,
    state_factor: Tensor | None,
    decay_limit: float,
    decay_steps: int,
    bits: int,
    outlier_bits: int,
    refresh_period: int,
    output_before_rounding: bool,
    reverse: bool,
) -> Tensor:
    """The definition: one step of time after another. Arguments as in the module docstring.

    Differentiable: rounding passes gradients on, clipping only those inside the range, so that a
    scale's gradient is that of learned step sizes (METHODS P6).
    """
    check(
        *(u, step, A, B, C, D, z, decay_scale, input_scale, input_threshold, state_scale),
        *(state_threshold, state_factor, decay_limit, decay_steps, bits, outlier_bits),
        refresh_period,
    )
    channels, length = u.shape[1:]
    x, moves, rate = u.float(), step.float(), A.float() * LOG2E
    b, c = (per_channel(matrix.float(), channels) for matrix in (B, C))
    factor = None if state_factor is None else state_factor.float()
    arriving = _Operand(input_scale, input_threshold, bits, outlier_bits, None)
    state = _Operand(state_scale, state_threshold, bits, outlier_bits, factor)
    h = x.new_zeros(u.shape[0], channels, A.shape[1])
    rows: list[Tensor] = [x.new_empty(0)] * length
    for count, t in enumerate(reversed(range(length)) if reverse else range(length)):
        fresh = count % refresh_period == 0
        decay = exp2(moves[:, :, t, None] * rate)
        if decay_steps:
            h = h - _log2_quantized(1 - decay, decay_limit, decay_steps, bits) * h
        else:
            h = _uniform(decay, decay_scale, t, bits) * h
        new = arriving.quantized(moves[:, :, t, None] * b[..., t], t, fresh)
        h = h + new * x[:, :, t, None]
        before, h = h, state.quantized(h, t, fresh)
        rows[t] = _dot(before if output_before_rounding else h, c[..., t])
    y = torch.stack(rows, -1)
    if D is not None:
        y = y + x * D.float()[:, None]
    if z is not None:
        y = y * silu(z.float())
    return as_token_major(y.to(u.dtype))


class _Operand:
    """The symmetric quantizer of (B, D, N) values a step, and its list of outlier channels."""

    def __init__(
        self,
        scale: Tensor | None,
        threshold: Tensor | None,
        bits: int,
        outlier_bits: int,
        factor: Tensor | None,
    ) -> None:
        self.scale = None if scale is None else scale.float()
        self.threshold = None if threshold is None else threshold.float()
        self.bits, self.outlier_bits, self.factor = bits, outlier_bits, factor
        self.listed: Tensor | None = None  # (B, D, 1)

    def quantized(self, values: Tensor, t: int, fresh: bool) -> Tensor:
        """Values (B, D, N) of token t, quantized and dequantized; `fresh` empties the list."""
        if self.scale is None:
            return values
        x = values if self.factor is None else values / self.factor
        found = _rounded(x, self.scale[t], symmetric_max(self.bits))
        if self.threshold is not None:
            peak = x.detach().abs().amax(-1, keepdim=True)
            joins = peak >= self.threshold[t]
            self.listed = joins if fresh or self.listed is None else self.listed | joins
            if self.outlier_bits == KEEP_FLOAT_BITS:
                outliers = x
            else:
                most = symmetric_max(self.outlier_bits)
                outliers = _rounded(x, (peak / most).clamp(min=MIN_SCALE), most)
            found = torch.where(self.listed, outliers, found)
        if self.factor is None:
            return found
        found = found * self.factor
        if self.listed is not None and self.outlier_bits == KEEP_FLOAT_BITS:
            found = torch.where(self.listed, values, found)
        return found


def _rounded(x: Tensor, scale: Tensor, most: int, least: int | None = None) -> Tensor:
    """scale * clip(round(x / scale)): to [-most, most], or from `least` on; straight through."""
    return _round((x / scale).clamp(-most if least is None else least, most)) * scale


def _round(x: Tensor) -> Tensor:
    """Half to even, with the gradient of x. The sum is exact: so is the difference it adds."""
    return x + (torch.round(x) - x).detach()


def _uniform(decay: Tensor, scale: Tensor | None, t: int, bits: int) -> Tensor:
    return decay if scale is None else _rounded(decay, scale[t].float(), 2**bits - 1, 0)


def _log2_quantized(delta: Tensor, limit: float, steps: int, bits: int) -> Tensor:
    """1 - a to the nearest s 2^(-q/r), nearest in the exponent."""
    offset = log2_offset(limit, steps)
    code = _round((offset - steps * log2(delta)).clamp(0, 2**bits - 1))
    return exp2((offset - code) / steps)


def _dot(h: Tensor, c: Tensor) -> Tensor:
    """(B, D): products summed over the states, the first one first."""
    total = h[..., 0] * c[..., 0]
    for n in range(1, h.shape[-1]):
        total = total + h[..., n] * c[..., n]
    return total


def check(
    u: Tensor,
    step: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    decay_scale: Tensor | None,
    input_scale: Tensor | None,
    input_threshold: Tensor | None,
    state_scale: Tensor | None,
    state_threshold: Tensor | None,
    state_factor: Tensor | None,
    decay_limit: float,
    decay_steps: int,
    bits: int,
    outlier_bits: int,
    refresh_period: int,
) -> None:
    """Raise ValueError for operands that do not fit each other."""
    check_scan(u, step, A, B, C, D, z, None)
    if A.shape[1] < 1:
        reject(NAME, "A needs a state a channel at least")
    if not 2 <= bits <= 8 or not (2 <= outlier_bits <= 8 or outlier_bits == KEEP_FLOAT_BITS):
        reject(NAME, f"{bits} bits with outliers of {outlier_bits} are not what it quantizes to")
    if refresh_period < 1:
        reject(NAME, f"refresh_period must be at least 1, got {refresh_period}")
    for vector in (decay_scale, input_scale, input_threshold, state_scale, state_threshold):
        if vector is not None and vector.shape != u.shape[2:]:
            expected = tuple(u.shape[2:])
            reject(NAME, f"scales are per time step: expected {expected}, got {vector.shape}")
    if state_factor is not None and state_factor.shape != A.shape:
        reject(NAME, f"state_factor must be as A, {tuple(A.shape)}, got {state_factor.shape}")
    if (input_scale is None and input_threshold is not None) or (
        state_scale is None and (state_threshold is not None or state_factor is not None)
    ):
        reject(NAME, "a threshold or factor belongs to a scale, which is missing")
    if decay_steps < 0 or (decay_steps > 0 and (decay_scale is not None or decay_limit <= 0)):
        reject(
            NAME,
            "a logarithmic decay takes decay_steps > 0, decay_limit > 0 and no decay_scale, "
            f"got {decay_steps} and {decay_limit}",
        )


def _fake(u: Tensor, *_args: Any) -> Tensor:
    return empty_token_major(u)


define_op(
    f"{NAME}(Tensor u, Tensor step, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? decay_scale, Tensor? input_scale, Tensor? input_threshold, Tensor? state_scale, "
    "Tensor? state_threshold, Tensor? state_factor, float decay_limit, int decay_steps, int bits, "
    "int outlier_bits, int refresh_period, bool output_before_rounding, bool reverse) -> Tensor",
    implementation=quantized_selective_scan_ref,
    fake=_fake,
)
differentiate_by_reference(NAME, quantized_selective_scan_ref)
