"""Rows and sites of layers whose weight is a bare parameter, as VMamba's projections are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ouro_compiler as ouro
from tests.helpers import randn


class BareParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(randn(0, 8, 6) / 3)
        self.x_proj_weight = nn.Parameter(randn(1, 2, 5, 4) / 3)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.w).transpose(1, 2)
        y = F.conv1d(y, self.x_proj_weight.view(10, 4, 1), groups=2)
        return self.head(y.mean(2))


def test_bare_parameters_are_quantized_under_names_of_their_own() -> None:
    images = randn(2, 6, 7, 6)
    model = BareParameters().eval()
    compiled = ouro.compile(model, images[:1], ouro.W8A8, calibration=images)
    status = {row["name"]: row["status"] for row in compiled.report["layers"]["rows"]}
    assert status == {
        "w_layer": "quantized",
        "x_proj_0": "quantized",
        "x_proj_1": "quantized",
        "head": "skipped",
    }
    sites = compiled.report["sites"]
    assert [site["name"] for site in sites] == [f"{n}.input" for n in list(status)[:3]]
    assert all(site["outlier_share"] is not None for site in sites)
    with torch.no_grad():
        assert F.cosine_similarity(compiled(images), model(images)).min() > 0.999
