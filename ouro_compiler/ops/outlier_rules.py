"""`ouro::quantize_dynamic_outlier_variant`: other rules for the outlier list (METHODS 3.4).

`quantize_dynamic_outlier` with other thresholds and triggers, and the same three results.

rule "static": channels join at or over `threshold` (L,).
rule "dynamic_full": over mean + kappa standard deviations (unbiased, over the channels) of the
token itself, so `threshold` is None; "dynamic_residual": of the token with the channels that are
listed already counted as 0, as in the published code. Statistics are those of magnitudes; at
asymmetric sites of distances from the middle of the interval, with their signs, and the bound is
|mean| + kappa deviations, as in calibration. One channel stands out of nothing.
trigger "gated": at steps where an unlisted channel of the (sample, window) leaves the inlier range;
"always": at all steps; "global_any": where any sample's or window's does. The last is the published
code's: what becomes of a sample then depends on its batch. It exists to reproduce that release.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ouro_compiler.ops.library import define_op, reject
from ouro_compiler.ops.quantize import (
    TRIGGERS,
    as_windows,
    check,
    encode,
    fake_quantizer,
    grow_lists,
    inlier_interval,
    listed_mask,
    outlier_start_ref,
    window_length,
)

NAME = "quantize_dynamic_outlier_variant"
RULES = ("static", "dynamic_full", "dynamic_residual")


def quantize_dynamic_outlier_variant_ref(
    x: Tensor,
    inlier_scale: Tensor,
    zero_point: Tensor | None,
    threshold: Tensor | None,
    inlier_bits: int,
    outlier_bits: int,
    refresh_period: int,
    reverse: bool,
    rule: str,
    trigger: str,
    kappa: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, outlier_scale, outlier_start) as `quantize_dynamic_outlier` gives them."""
    if rule not in RULES:
        reject(NAME, f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    if trigger not in TRIGGERS:
        reject(NAME, f"trigger must be one of {', '.join(TRIGGERS)}, got {trigger!r}")
    if (threshold is None) == (rule == "static"):
        reject(NAME, "the static rule, and no other, takes a threshold")
    per_token = (inlier_scale, zero_point, threshold)
    check(NAME, x, per_token, inlier_bits, outlier_bits, refresh_period)
    x = x.float()
    zero = None if zero_point is None else zero_point.float()
    middle, limit = inlier_interval(inlier_scale.float(), zero, inlier_bits)
    distance = x if middle is None else x - middle[:, None]
    if threshold is not None:
        start = outlier_start_ref(
            distance.abs(), limit, threshold.float(), refresh_period, reverse, trigger
        )
    else:
        values = distance.abs() if middle is None else distance
        residual = rule == "dynamic_residual"
        start = _dynamic_start(values, limit, refresh_period, reverse, trigger, kappa, residual)
    listed = listed_mask(start, x.shape[1], refresh_period, reverse)
    codes, outlier_scale = encode(x, listed, inlier_scale, zero, inlier_bits, outlier_bits)
    return codes, outlier_scale, start


def _dynamic_start(
    values: Tensor,
    limit: Tensor,
    refresh_period: int,
    reverse: bool,
    trigger: str,
    kappa: float,
    residual: bool,
) -> Tensor:
    """outlier_start (B, J, K) of magnitudes or signed distances (B, L, K)."""
    if reverse:
        values, limit = values.flip(1), limit.flip(0)
    window = window_length(refresh_period, values.shape[1])
    # Contiguous rows: the order of a row's sums must not depend on the batch.
    tokens = as_windows(values.contiguous(), window, 0.0)

    def reaches(position: int, cell: Tensor, unlisted: Tensor) -> Tensor:
        token = tokens[:, :, position]
        if token.shape[-1] < 2:  # no deviation
            return torch.zeros_like(unlisted)
        if residual:
            token = token * unlisted
        deviation, mean = torch.std_mean(token, dim=-1, keepdim=True)
        return cell > mean.abs() + kappa * deviation

    magnitudes = as_windows(values.abs(), window, -1.0)
    limits = as_windows(limit[None, :, None], window, float("inf"))
    return grow_lists(magnitudes, limits, reaches, trigger)


def _fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return fake_quantizer(x, *args[:7])


define_op(
    f"{NAME}(Tensor x, Tensor inlier_scale, Tensor? zero_point, Tensor? threshold, "
    "int inlier_bits, int outlier_bits, int refresh_period, bool reverse, str rule, str trigger, "
    "float kappa) -> (Tensor, Tensor, Tensor)",
    implementation=quantize_dynamic_outlier_variant_ref,
    fake=_fake,
)
