"""What compiled models still call on a GPU beside our kernels, recorded on fake tensors."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import ouro_compiler as ouro
from ouro_compiler.kernels.launch import Launch
from ouro_compiler.models.mambavision import MambaVisionConfig
from ouro_compiler.models.vit import ViTConfig
from ouro_compiler.models.vmamba import VMambaConfig
from ouro_compiler.runtime.folding import fold_constants
from ouro_compiler.runtime.schedule import Schedule
from tests.helpers import randn

MODELS = {
    "vmamba": VMambaConfig(img_size=16, embed_dim=32, depths=(1,), mlp_ratio=2.0, num_classes=10),
    "mambavision": MambaVisionConfig(
        img_size=32, stem_dim=4, embed_dim=8, depths=(1, 1, 1, 1), heads=(1, 1, 2, 2),
        windows=(8, 8, 4, 2), d_state=4, num_classes=5,
    ),
    "vit": ViTConfig(img_size=32, patch_size=8, embed_dim=32, depth=1, heads=2, num_classes=5),
}  # fmt: skip
HEAD = {"aten::conv2d", "aten::mean", "aten::linear", "aten::add"}
# VMamba: the orders of pixels; its patch embedding has a GELU. MambaVision: its convolutional
# stages, and the norm behind attention.
LEFT = {
    "vmamba": HEAD | {"aten::gelu", "aten::flatten", "aten::reshape"},
    "mambavision": HEAD
    | {"aten::relu", "aten::gelu", "aten::batch_norm", "aten::cat"}
    | {"aten::reshape", "aten::pad"},
    "vit": HEAD | {"aten::cat", "aten::scaled_dot_product_attention"},
}
RUN = {
    "vmamba": {"add_norm", "depthwise_conv", "linear_dynamic_outlier int4 o8 bias gelu"},
    "mambavision": {"depthwise_conv", "linear_dynamic_outlier int4 o8 bias gelu"},
    "vit": {"add_norm", "linear_dynamic_outlier int4 o8 bias gelu"},
}


@pytest.mark.parametrize("family", MODELS)
def test_calls_beside_kernels(family: str) -> None:
    torch.manual_seed(0)
    config = MODELS[family]
    model = config.build().eval().requires_grad_(False)  # type: ignore[attr-defined]
    images = randn(1, 2, 3, config.img_size, config.img_size)  # type: ignore[attr-defined]
    settings = dataclasses.replace(ouro.W4A4, ssm="none")
    compiled = ouro.compile(model, images, settings, calibration=images, target="cuda")
    steps = Schedule(fold_constants(compiled.graph_module), images).steps
    left = [one.function._schema.name for one in steps if not isinstance(one, Launch)]  # type: ignore[attr-defined]
    assert set(left) <= LEFT[family]
    assert left.count("aten::gelu") == {"vmamba": 1, "mambavision": 2, "vit": 0}[family]
    assert left.count("aten::batch_norm") == (family == "mambavision")
    labels = {one.label for step in steps if isinstance(step, Launch) for one in step.spec.members}
    assert labels >= RUN[family]
