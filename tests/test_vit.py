"""ViT and DeiT: keys, sizes, attention, and compilation from end to end."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import pytest
import torch

import ouro_compiler as ouro
from ouro_compiler.compiler import prepare
from ouro_compiler.frontend.capture import capture
from ouro_compiler.graph import value_of
from ouro_compiler.models.layers import Attention
from ouro_compiler.models.vit import ARCHITECTURES, ViT, ViTConfig, deit_tiny
from tests.helpers import assert_close, randn
from tests.passes.graphs import assert_same, outputs

SMALL = ViTConfig(img_size=16, patch_size=4, embed_dim=16, depth=2, heads=2, num_classes=5)
PARAMETERS = {"micro": 205_066, "tiny": 5_717_416, "small": 22_050_664, "base": 86_567_656}
LAYERS = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]


@lru_cache(maxsize=1)
def small() -> ViT:
    torch.manual_seed(0)
    return SMALL.build().eval().requires_grad_(False)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameters_of_the_named_sizes(name: str) -> None:
    with torch.device("meta"):
        model = ARCHITECTURES[name].build()
    size = name.partition("_")[2]
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[size]


def test_keys_and_shapes() -> None:
    block = {
        "norm1.weight": (16,),
        "norm1.bias": (16,),
        "attn.qkv.weight": (48, 16),
        "attn.qkv.bias": (48,),
        "attn.proj.weight": (16, 16),
        "attn.proj.bias": (16,),
        "norm2.weight": (16,),
        "norm2.bias": (16,),
        "mlp.fc1.weight": (64, 16),
        "mlp.fc1.bias": (64,),
        "mlp.fc2.weight": (16, 64),
        "mlp.fc2.bias": (16,),
    }
    assert {key: tuple(value.shape) for key, value in small().state_dict().items()} == {
        "cls_token": (1, 1, 16),
        "pos_embed": (1, 17, 16),
        "patch_embed.proj.weight": (16, 3, 4, 4),
        "patch_embed.proj.bias": (16,),
        **{f"blocks.{n}.{key}": shape for n in range(2) for key, shape in block.items()},
        "norm.weight": (16,),
        "norm.bias": (16,),
        "head.weight": (5, 16),
        "head.bias": (5,),
    }


def test_attention_is_softmax_of_scaled_products_per_head() -> None:
    torch.manual_seed(0)
    attention = Attention(8, 2).requires_grad_(False)
    x = randn(0, 3, 5, 8)
    qkv = attention.qkv(x)
    heads = []
    for head in range(2):
        q, k, v = (qkv[..., 8 * i + 4 * head : 8 * i + 4 * head + 4] for i in range(3))
        heads.append(torch.softmax(q @ k.transpose(1, 2) / math.sqrt(4), -1) @ v)
    assert_close(attention(x), attention.proj(torch.cat(heads, -1)), 1e-5)


def test_another_size_of_image_is_refused() -> None:
    with pytest.raises(ValueError, match="takes 16x16 images"):
        small()(randn(0, 2, 3, 20, 20))


def test_capture_and_sites() -> None:
    x = randn(0, 2, 3, 16, 16)
    gm = capture(small(), x)
    assert_same(outputs(gm, x), outputs(small(), x), 1e-5)
    plan = prepare(gm, ouro.W4A4)
    assert_same(outputs(gm, x), outputs(small(), x), 1e-5)
    quantized = [row.name for row in plan.rows if row.status == "quantized"]
    assert quantized == [f"blocks.{n}.{layer}" for n in range(2) for layer in LAYERS]
    skipped = [row.name for row in plan.rows if row.status == "skipped"]
    assert skipped == ["patch_embed.proj", "head"]
    assert {value_of(site.source).shape[1] for site in plan.sites} == {17}


def test_compiled_saved_and_loaded(tmp_path: Path) -> None:
    images = randn(1, 4, 3, 16, 16)
    compiled = ouro.compile(small(), images[:2], ouro.W4A4, calibration=images)
    expected, found = small()(images), compiled(images)
    assert (expected - found).norm() < 0.5 * expected.norm()
    path = tmp_path / "vit.pt2"
    compiled.save(path)
    assert torch.equal(ouro.load(path)(images), found)


def test_a_factory_takes_changes() -> None:
    with torch.device("meta"):
        assert deit_tiny(num_classes=7).head.out_features == 7
