"""The quantizers of a calibration as functions of tensors: what passes will put into a graph.

Their scales are attributes, so that learning can put tensors with gradients in their place.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ouro_compiler.calibration.observers import THRESHOLD_MARGIN
from ouro_compiler.calibration.search import (
    quantize_rows_asymmetric,
    quantize_weight,
    round_to_half,
)
from ouro_compiler.calibration.straight_through import OutlierQuantizer, UniformQuantizer
from ouro_compiler.config import DynamicOutlierSpec
from ouro_compiler.graph import QParams, QWeight, Site, UniformParams
from ouro_compiler.ops.quantize import dequantize_codes, inlier_interval, quantize_symmetric


class SiteQuantizer:
    """One site's round trip: tokens (B, L, K) fp32 to what the quantizer leaves of them.

    scale and smooth start as the calibrated ones. A scale that moved takes its threshold along:
    never nearer to the inlier limit than the margin that calibration keeps.
    """

    def __init__(
        self,
        site: Site,
        params: QParams | UniformParams,
        spec: DynamicOutlierSpec,
        device: torch.device,
    ) -> None:
        moved: dict[str, Any] = {
            field.name: value.to(device) if isinstance(value, Tensor) else value
            for field in dataclasses.fields(params)
            for value in [getattr(params, field.name)]
        }
        self.site, self.spec = site, spec
        self.params: QParams | UniformParams = dataclasses.replace(params, **moved)
        self.scale, self.smooth = self.params.scale, self.params.smooth

    def __call__(self, x: Tensor) -> Tensor:
        if self.smooth is not None:
            x = x / self.smooth
        params, site = self.params, self.site
        if isinstance(params, UniformParams):
            return UniformQuantizer.apply(x, self.scale, params.zero_point, site.bits)
        is_static = params.channels is not None
        rule = params.channels if is_static else self.threshold()
        static = (site.bits, self.spec.outlier_bits, self.spec.refresh_period, site.reverse)
        return OutlierQuantizer.apply(x, self.scale, params.zero_point, rule, is_static, static)

    def threshold(self) -> Tensor:
        """(L,): the calibrated one, raised where a scale that moved has come too near."""
        params = self.params
        assert isinstance(params, QParams)
        with torch.no_grad():
            zero = None if params.zero_point is None else params.zero_point.float()
            _, limit = inlier_interval(self.scale, zero, self.site.bits)
            # fp16 has 11 bits: half of one more keeps the rounded bound above the bound.
            bound = round_to_half(THRESHOLD_MARGIN * (1 + 2**-10) * limit)
            unmoved = self.scale == params.scale
            return torch.where(unmoved, params.threshold, torch.maximum(params.threshold, bound))

    def found(self) -> QParams | UniformParams:
        """The parameters with the scale and smoothing of now, on the CPU."""
        changes: dict[str, Any] = {"scale": self.scale}
        if self.smooth is not None:
            changes["smooth"] = self.smooth
        if isinstance(self.params, QParams):
            changes["threshold"] = self.threshold()
        found = dataclasses.replace(self.params, **changes)
        on_cpu: dict[str, Any] = {
            field.name: value.detach().cpu().clone()
            for field in dataclasses.fields(found)
            if isinstance(value := getattr(found, field.name), Tensor)
        }
        return dataclasses.replace(found, **on_cpu)


class WeightQuantizer:
    """A linear's weight (O, K): `dequantize_weight` of codes that follow the scale.

    given: what calibration found, None for the clipping search. Where the given codes are not the
    rounding of the weight (a recipe rotated it, say) they stay as they are: `fixed`.
    site: whose smoothing the weight takes in.
    """

    def __init__(
        self, weight: Tensor, given: QWeight | None, bits: int, site: SiteQuantizer
    ) -> None:
        self.weight, self.bits, self.site = weight.float(), bits, site
        smoothed = self.smoothed().detach()
        if given is None:
            codes, scale = quantize_weight(smoothed, bits)
            given = QWeight(codes=codes, scale=scale)
        device = weight.device
        self.given = QWeight(
            codes=given.codes.to(device),
            scale=given.scale.to(device),
            zero_point=None if given.zero_point is None else given.zero_point.to(device),
        )
        self.scale = self.given.scale
        self.fixed = self.given.zero_point is not None or not torch.equal(
            self._codes(smoothed), self.given.codes
        )

    def smoothed(self) -> Tensor:
        """The weight as it multiplies a smoothed activation."""
        return self.weight if self.site.smooth is None else self.weight * self.site.smooth

    def __call__(self) -> Tensor:
        if not self.fixed:
            scale = self.scale[:, None]
            return UniformQuantizer.apply(self.smoothed(), scale, None, self.bits)
        zero = self.given.zero_point
        zero = None if zero is None else zero.float()[:, None]
        return dequantize_codes(self.given.codes, self.scale[:, None], zero, self.bits)

    def found(self) -> QWeight:
        """Codes and scale of now, on the CPU."""
        codes = self.given.codes if self.fixed else self._codes(self.smoothed().detach())
        zero = self.given.zero_point
        return QWeight(
            codes=codes.cpu(),
            scale=self.scale.detach().cpu().clone(),
            zero_point=None if zero is None else zero.cpu(),
        )

    def _codes(self, smoothed: Tensor) -> Tensor:
        scale = self.scale.detach()[:, None]
        return quantize_symmetric(smoothed, scale, self.bits).to(torch.int8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScanConstants:
    """A scan's A (E, N) and D (E,) or None as insert_quantize_dequantize leaves them.

    codes: what is stored of them.
    """

    A: Tensor
    D: Tensor | None
    codes: tuple[Tensor, ...]


def scan_constants(A: Tensor, D: Tensor | None, bits: int) -> ScanConstants:
    """Quantized as that pass does: A by its logarithm, a scale and a zero point a channel."""
    codes, scale, zero = quantize_rows_asymmetric(torch.log(-A.float()), bits)
    A = -torch.exp(dequantize_codes(codes, scale[:, None], zero[:, None], bits))
    if D is None:
        return ScanConstants(A=A, D=None, codes=(codes,))
    row, scale = quantize_weight(D.view(1, -1), bits)
    D = dequantize_codes(row, scale[:, None], None, bits)[0]
    return ScanConstants(A=A, D=D, codes=(codes, row))
