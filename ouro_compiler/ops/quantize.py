"""Dynamic-outlier quantization of activations (METHODS 1, 3.3, 3.5): the definition.

An activation x (B, L, K) is cut along time into windows of `refresh_period` tokens, counted in scan
order (from the last token with `reverse`). Inside a window a list of outlier channels grows: at a
step where some unlisted channel leaves the inlier range, every channel at or over the threshold
is listed. Listed channels are quantized with one dynamic scale a token, all others with the static
scale of their time step. Whatever is decided for a sample depends on that sample alone.

codes          int8 (B, L, K)   one container: steps of inlier_scale where unlisted, of
                                outlier_scale where listed (0 there when outlier_bits is 16)
outlier_scale  fp32 (B, L)      1 where the list is empty or outlier_bits is 16
outlier_start  uint8 (B, J, K)  position inside window j at which channel k was listed, 255 = never
                                (int32 and 2**31 - 1 where windows are longer than 255)

inlier_scale, zero_point and threshold are (L,), indexed by token whatever the direction. Without a
zero point the code is symmetric, in [-Q, Q] with Q = 2**(bits-1) - 1. With one (0 .. 2**bits - 1)
it
is asymmetric, and stored minus 2**(bits-1) so that 8 bits fit int8; the threshold then bounds the
distance from the middle of the representable interval.

`quantize_dynamic_outlier` takes x as a map (B, H, W, K) too, of any strides: its tokens h * W + w.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ouro_compiler.ops.library import define_op, reject
from ouro_compiler.ops.maps import as_tokens, tokens_shape

MIN_SCALE = 1e-8
TRIGGERS = ("gated", "always", "global_any")
KEEP_FLOAT_BITS = 16  # outlier_bits at which outliers stay in floating point


def symmetric_max(bits: int) -> int:
    """Q: the largest code of a symmetric range."""
    return 2 ** (bits - 1) - 1


def quantize_symmetric(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """P2: clip(round(x / scale), -Q, Q) as fp32; half to even; scale broadcasts against x."""
    limit = symmetric_max(bits)
    return torch.round(x / scale).clamp(-limit, limit)


def quantize_asymmetric(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """P3 shifted into int8: clip(round(x / scale) + z, 0, 2**bits - 1) - 2**(bits-1), as fp32."""
    codes = (torch.round(x / scale) + zero_point).clamp(0, 2**bits - 1)
    return codes - 2 ** (bits - 1)


def dequantize_codes(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """Inverse of the two above: codes (any dtype) -> fp32."""
    if zero_point is None:
        return codes.float() * scale
    return (codes.float() + (2 ** (bits - 1) - zero_point)) * scale


def inlier_interval(
    scale: Tensor, zero_point: Tensor | None, bits: int
) -> tuple[Tensor | None, Tensor]:
    """(middle, half width) of what inlier codes can represent; the middle is None where it is 0."""
    if zero_point is None:
        return None, scale * symmetric_max(bits)
    top = 2**bits - 1
    return scale * (top / 2 - zero_point), scale * (top / 2)


def window_length(refresh_period: int, length: int) -> int:
    """Tokens in a window: never more than the sequence has."""
    return min(refresh_period, length)


def start_dtype(window: int) -> torch.dtype:
    """dtype of outlier_start: uint8 unless positions need more than 255 values."""
    return torch.uint8 if window <= 255 else torch.int32


def outlier_start_ref(
    magnitude: Tensor,
    limit: Tensor,
    threshold: Tensor,
    refresh_period: int,
    reverse: bool = False,
    trigger: str = "gated",
) -> Tensor:
    """outlier_start (B, J, K) from magnitudes (B, L, K), inlier limits T and thresholds (L,).

    trigger: "gated" lists only at steps where an unlisted channel exceeds its limit, judged per
    (sample, window); "always" at every step; "global_any" lets any sample or window open the gate
    for all: it breaks batch invariance and exists to reproduce a published release.
    """
    if trigger not in TRIGGERS:
        raise ValueError(f"trigger must be one of {', '.join(TRIGGERS)}, got {trigger!r}")
    length = magnitude.shape[1]
    if reverse:
        magnitude, limit, threshold = magnitude.flip(1), limit.flip(0), threshold.flip(0)
    window = window_length(refresh_period, length)
    infinity = float("inf")
    thresholds = as_windows(threshold[None, :, None], window, infinity)

    def reaches(position: int, cell: Tensor, unlisted: Tensor) -> Tensor:
        del unlisted
        return cell >= thresholds[:, :, position]

    limits = as_windows(limit[None, :, None], window, infinity)
    # A padded token has magnitude -1: it neither opens the gate nor reaches a threshold.
    return grow_lists(as_windows(magnitude, window, -1.0), limits, reaches, trigger)


def as_windows(values: Tensor, window: int, padding: float) -> Tensor:
    """(B, L, K) cut along time: (B, J, window, K), the last window filled up with `padding`."""
    missing = -values.shape[1] % window
    padded = torch.nn.functional.pad(values, (0, 0, 0, missing), value=padding)
    return padded.unflatten(1, (-1, window))


def grow_lists(
    cells: Tensor,
    limits: Tensor,
    reaches: Callable[[int, Tensor, Tensor], Tensor],
    trigger: str,
) -> Tensor:
    """outlier_start (B, J, K) of magnitudes in windows (B, J, w, K), inlier limits (1, J, w, 1).

    reaches(position, cell, unlisted), all (B, J, K): which magnitudes may join the list.
    """
    dtype = start_dtype(cells.shape[2])
    never = torch.iinfo(dtype).max
    batch, windows, window, channels = cells.shape
    start = cells.new_full((batch, windows, channels), never, dtype=dtype)
    for position in range(window):
        cell = cells[:, :, position]
        unlisted = start == never
        joins = unlisted & reaches(position, cell, unlisted)
        if trigger != "always":
            gate = (unlisted & (cell > limits[:, :, position])).any(-1, keepdim=True)
            joins &= gate.any() if trigger == "global_any" else gate
        start.masked_fill_(joins, position)
    return start


def listed_mask(outlier_start: Tensor, length: int, refresh_period: int, reverse: bool) -> Tensor:
    """Bool (B, L, K): is channel k on the list at token t."""
    window = window_length(refresh_period, length)
    token = torch.arange(length, device=outlier_start.device)
    step = length - 1 - token if reverse else token
    return outlier_start.index_select(1, step // window) <= (step % window)[:, None]


def encode(
    x: Tensor,
    listed: Tensor,
    inlier_scale: Tensor,
    zero_point: Tensor | None,
    inlier_bits: int,
    outlier_bits: int,
) -> tuple[Tensor, Tensor]:
    """(codes, outlier_scale) of x (B, L, K) given the list."""
    scale = inlier_scale.float()[:, None]
    if zero_point is None:
        inliers = quantize_symmetric(x, scale, inlier_bits)
    else:
        inliers = quantize_asymmetric(x, scale, zero_point.float()[:, None], inlier_bits)
    if outlier_bits == KEEP_FLOAT_BITS:
        return torch.where(listed, 0.0, inliers).to(torch.int8), x.new_ones(x.shape[:2])
    peak = torch.where(listed, x.abs(), 0.0).amax(-1)
    dynamic = (peak / symmetric_max(outlier_bits)).clamp(min=MIN_SCALE)
    outlier_scale = torch.where(listed.any(-1), dynamic, 1.0)
    outliers = quantize_symmetric(x, outlier_scale[..., None], outlier_bits)
    return torch.where(listed, outliers, inliers).to(torch.int8), outlier_scale


def check(
    name: str,
    x: Tensor,
    per_token: tuple[Tensor | None, ...],
    inlier_bits: int,
    outlier_bits: int,
    refresh_period: int,
    *,
    maps: bool = False,
) -> None:
    """Raise ValueError for operands of `ouro::<name>` that do not fit each other.

    maps: x may be (B, H, W, K).
    """
    if not 2 <= inlier_bits <= 8 or not (2 <= outlier_bits <= 8 or outlier_bits == KEEP_FLOAT_BITS):
        reject(name, f"{inlier_bits} inlier and {outlier_bits} outlier bits do not fit int8 codes")
    shape = tokens_shape(x)
    if shape is None or (x.dim() == 4 and not maps):
        wanted = "(B, L, K) or (B, H, W, K)" if maps else "(B, L, K)"
        reject(name, f"x must be {wanted}, got {tuple(x.shape)}")
    length = shape[1]
    for vector in per_token:
        if vector is not None and tuple(vector.shape) != (length,):
            reject(name, f"scales are per time step: expected ({length},), got {vector.shape}")
    if refresh_period < 1:
        reject(name, f"refresh_period must be at least 1, got {refresh_period}")


def quantize_dynamic_outlier_ref(
    x: Tensor,
    inlier_scale: Tensor,
    zero_point: Tensor | None,
    threshold: Tensor,
    inlier_bits: int,
    outlier_bits: int,
    refresh_period: int,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, outlier_scale, outlier_start); see the module docstring."""
    per_token = (inlier_scale, zero_point, threshold)
    bits = (inlier_bits, outlier_bits)
    check("quantize_dynamic_outlier", x, per_token, *bits, refresh_period, maps=True)
    x = as_tokens(x).float()
    zero = None if zero_point is None else zero_point.float()
    middle, limit = inlier_interval(inlier_scale.float(), zero, inlier_bits)
    magnitude = x.abs() if middle is None else (x - middle[:, None]).abs()
    start = outlier_start_ref(magnitude, limit, threshold.float(), refresh_period, reverse)
    listed = listed_mask(start, x.shape[1], refresh_period, reverse)
    codes, outlier_scale = encode(x, listed, inlier_scale, zero, *bits)
    return codes, outlier_scale, start


def quantize_static_outlier_ref(
    x: Tensor,
    inlier_scale: Tensor,
    zero_point: Tensor | None,
    channels: Tensor,
    inlier_bits: int,
    outlier_bits: int,
    refresh_period: int,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the dynamic form, with a fixed list: channels is int64 (n,) (METHODS 3.4 row 19)."""
    per_token = (inlier_scale, zero_point)
    check("quantize_static_outlier", x, per_token, inlier_bits, outlier_bits, refresh_period)
    x = x.float()
    start = _fake_start(x, refresh_period)
    start.fill_(torch.iinfo(start.dtype).max)
    start[:, :, channels] = 0
    listed = listed_mask(start, x.shape[1], refresh_period, reverse)
    zero = None if zero_point is None else zero_point.float()
    codes, outlier_scale = encode(x, listed, inlier_scale, zero, inlier_bits, outlier_bits)
    return codes, outlier_scale, start


def check_dequantize(
    codes: Tensor, per_token: tuple[Tensor | None, ...], x: Tensor | None, outlier_bits: int
) -> None:
    """Raise ValueError for operands of dequantize_dynamic_outlier that do not fit each other."""
    name = "dequantize_dynamic_outlier"
    check(name, codes, per_token, 8, outlier_bits, 1)
    if outlier_bits == KEEP_FLOAT_BITS and (x is None or x.shape != codes.shape):
        reject(name, "outlier_bits 16 reads x (B, L, K): pass it")


def dequantize_dynamic_outlier_ref(
    codes: Tensor,
    inlier_scale: Tensor,
    zero_point: Tensor | None,
    outlier_scale: Tensor,
    outlier_start: Tensor,
    x: Tensor | None,
    inlier_bits: int,
    outlier_bits: int,
    refresh_period: int,
    reverse: bool,
) -> Tensor:
    """x-hat fp32 (B, L, K). With outlier_bits 16 listed entries are read from x."""
    check_dequantize(codes, (inlier_scale, zero_point), x, outlier_bits)
    listed = listed_mask(outlier_start, codes.shape[1], refresh_period, reverse)
    zero = None if zero_point is None else zero_point.float()[:, None]
    inliers = dequantize_codes(codes, inlier_scale.float()[:, None], zero, inlier_bits)
    if outlier_bits == KEEP_FLOAT_BITS:
        assert x is not None  # checked
        return torch.where(listed, x.float(), inliers)
    return torch.where(listed, codes.float() * outlier_scale[..., None], inliers)


def _fake_start(x: Tensor, refresh_period: int) -> Tensor:
    batch, length, channels = x.shape
    window = window_length(refresh_period, length)
    return x.new_empty((batch, -(-length // window), channels), dtype=start_dtype(window))


def fake_quantizer(
    x: Tensor,
    inlier_scale: Tensor,
    zero_point: Tensor | None,
    threshold: Tensor,
    inlier_bits: int,
    outlier_bits: int,
    refresh_period: int,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = tokens_shape(x)
    assert shape is not None
    codes = x.new_empty(shape, dtype=torch.int8)
    return (
        codes,
        x.new_empty(shape[:2], dtype=torch.float32),
        _fake_start(codes, refresh_period),
    )


def _fake_dequantize(codes: Tensor, *_args: Any) -> Tensor:
    return codes.new_empty(codes.shape, dtype=torch.float32)


_STATIC = "int inlier_bits, int outlier_bits, int refresh_period, bool reverse"
for _kind, _list, _implementation in (
    ("dynamic", "threshold", quantize_dynamic_outlier_ref),
    ("static", "channels", quantize_static_outlier_ref),
):
    define_op(
        f"quantize_{_kind}_outlier(Tensor x, Tensor inlier_scale, Tensor? zero_point, "
        f"Tensor {_list}, {_STATIC}) -> (Tensor, Tensor, Tensor)",
        implementation=_implementation,
        fake=fake_quantizer,
    )
define_op(
    "dequantize_dynamic_outlier(Tensor codes, Tensor inlier_scale, Tensor? zero_point, "
    f"Tensor outlier_scale, Tensor outlier_start, Tensor? x, {_STATIC}) -> Tensor",
    implementation=dequantize_dynamic_outlier_ref,
    fake=_fake_dequantize,
)
