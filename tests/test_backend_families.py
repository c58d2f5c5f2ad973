"""torch.compile(backend="ouro") on a small model of every family: whole graphs, any batch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ouro_compiler as ouro
from tests.helpers import randn
from tests.test_mambavision import SMALL as MAMBAVISION
from tests.test_vit import SMALL as VIT
from tests.test_vmamba import SMALL as VMAMBA

CONFIGS: dict[str, Any] = {"vmamba": VMAMBA, "mambavision": MAMBAVISION, "vit": VIT}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@cache
def model_of(family: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A small model, eight images for it, and what its artefact gives for them."""
    torch.manual_seed(0)
    config = CONFIGS[family]
    images = randn(1, 8, config.in_chans, config.img_size, config.img_size)
    model = config.build().eval().requires_grad_(False)
    compiled = ouro.compile(model, images[:2], ouro.W8A8, calibration=images)
    return model, images, compiled(images)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("family", CONFIGS)
def test_equals_the_artefact(family: str, dynamic: bool) -> None:
    model, images, expected = model_of(family)
    compiled = torch.compile(
        model,
        backend="ouro",
        fullgraph=True,
        options={"config": "w8a8", "calibration": images, "inner": "eager"},
    )
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # such as: returned as it was
        first = images[:3].clone()
        if dynamic:
            torch._dynamo.mark_dynamic(first, 0)
        assert torch.equal(compiled(first), expected[:3])
        if dynamic:
            # Not more images: PyTorch's own convolutions guard on a CPU for fewer than 16 rows.
            with torch.compiler.set_stance("fail_on_recompile"):
                assert torch.equal(compiled(images[:2]), expected[:2])


@pytest.mark.parametrize("family", CONFIGS)
def test_autocast_is_refused(family: str) -> None:
    model, images, _ = model_of(family)
    compiled = torch.compile(
        model, backend="ouro", options={"calibration": images, "inner": "eager"}
    )
    with (
        torch.no_grad(),
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(Exception, match="autocast is on"),
    ):
        compiled(images[:2])
