"""Unmodified public models, from import to a loaded artefact."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from typing import Any

import pytest
import torch

import ouro_compiler as ouro
from tests.helpers import MAMBA_MISSING, randn
from tests.isolated import run_isolated
from tests.public_code import examine, randomise
from tests.torchvision_stub import install_torchvision_stub

MAMBAVISION_MISSING = (
    "mambavision cannot be imported, and these tests compile it unmodified. Install it with:"
    " pip install --no-deps mambavision==1.2.0 timm==1.0.31"
)


def _mambavision() -> dict[str, Any]:
    install_torchvision_stub()
    ouro.install_standins()
    vision = importlib.import_module("mambavision.models.mamba_vision")
    interface = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    torch.manual_seed(0)
    model = vision.MambaVision(
        dim=16,
        in_dim=8,
        depths=[1, 1, 2, 2],
        num_heads=[1, 1, 2, 4],
        window_size=[8, 8, 2, 2],  # four windows an image, then one
        mlp_ratio=2,
        num_classes=10,
        resolution=64,
        drop_path_rate=0.1,
    )
    randomise(model)
    images = randn(0, 4, 3, 64, 64)
    fast = vision.selective_scan_fn
    vision.selective_scan_fn = interface.selective_scan_ref  # mamba's own loop
    with torch.no_grad():
        eager = model(images)
    vision.selective_scan_fn = fast
    return dataclasses.asdict(examine(model, images, eager))


def test_mambavision() -> None:
    if importlib.util.find_spec("mamba_ssm") is None:
        pytest.fail(MAMBA_MISSING, pytrace=False)
    if any(importlib.util.find_spec(name) is None for name in ("mambavision", "timm")):
        pytest.fail(MAMBAVISION_MISSING, pytrace=False)
    found = run_isolated(_mambavision)
    assert found["dynamic"]
    assert found["scans"] == 2
    assert found["difference"] <= 1e-5
    assert (found["quantized"], found["linears"]) == (20, 21), found["floating"]
    assert found["floating"][0].startswith("head: ")
    assert found["snr_db"] > 10
    assert found["reload_difference"] <= 1e-5
