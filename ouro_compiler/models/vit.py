"""ViT (arXiv 2010.11929) and DeiT (arXiv 2012.12877): the transformers that papers compare with.

The state_dict keys are those of timm (`blocks.0.attn.qkv.weight`, ...), so that a public checkpoint
loads strictly. ViT and DeiT are one architecture; they differ in how images are normalised. Not
here: distilled DeiT (two heads), models without a class token, layer scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ouro_compiler.models.layers import Attention, Mlp

HEAD_DIM = 64  # channels of a head in every public size


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Everything that fixes a ViT's architecture; lengths in pixels or channels.

    mean, std and crop (the part of the resized image that is looked at) say which images the
    weights expect.
    """

    img_size: int = 224
    patch_size: int = 16
    in_chans: int = 3
    embed_dim: int = 192
    depth: int = 12
    heads: int = 3
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    norm_eps: float = 1e-6
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    crop: float = 0.9

    @property
    def num_tokens(self) -> int:
        """Patches plus the class token."""
        return (self.img_size // self.patch_size) ** 2 + 1

    def build(self) -> ViT:
        """A ViT of this architecture with fresh random weights."""
        return ViT(self)


class Block(nn.Module):
    """Residual branches: norm -> attention, and norm -> MLP."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.norm1 = nn.LayerNorm(dim, eps=config.norm_eps)
        self.attn = Attention(dim, config.heads)
        self.norm2 = nn.LayerNorm(dim, eps=config.norm_eps)
        self.mlp = Mlp(dim, round(config.mlp_ratio * dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _PatchEmbed(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        size = config.patch_size
        self.proj = nn.Conv2d(config.in_chans, config.embed_dim, size, stride=size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class ViT(nn.Module):
    """ViT classifier: images (B, C, H, W) -> logits (B, num_classes) from the class token."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = _PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, config.num_tokens, config.embed_dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.head = nn.Linear(config.embed_dim, config.num_classes)
        for parameter in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes)."""
        size = self.config.img_size
        if images.shape[-2:] != (size, size):
            height, width = images.shape[-2:]
            raise ValueError(f"this ViT takes {size}x{size} images, got {height}x{width}")
        x = self.patch_embed(images)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


_SIZES = {"tiny": 192, "small": 384, "base": 768}
_HALF = (0.5, 0.5, 0.5)


def vit_config(embed_dim: int, *, deit: bool) -> ViTConfig:
    """Architecture of the public models of 16x16 patches."""
    config = ViTConfig(embed_dim=embed_dim, heads=embed_dim // HEAD_DIM)
    return config if deit else replace(config, mean=_HALF, std=_HALF)


# `examples/train_digits.py --model vit`: 28x28 grey images, 7x7 patches of 4x4 pixels.
VIT_MICRO = ViTConfig(
    img_size=28, patch_size=4, in_chans=1, embed_dim=64, depth=4, heads=4, num_classes=10,
    mean=(0.1307,), std=(0.3081,), crop=1.0,
)  # fmt: skip

ARCHITECTURES: dict[str, ViTConfig] = {
    "vit_micro": VIT_MICRO,
    **{
        f"{family}_{size}": vit_config(dim, deit=family == "deit")
        for family in ("vit", "deit")
        for size, dim in _SIZES.items()
    },
}


def _factory(name: str) -> Callable[..., ViT]:
    def build(**overrides: object) -> ViT:
        return replace(ARCHITECTURES[name], **overrides).build()  # type: ignore[arg-type]

    build.__name__ = name
    build.__doc__ = f"A `{name}` with random weights; keyword arguments override ViTConfig fields."
    return build


vit_micro = _factory("vit_micro")
vit_tiny, vit_small, vit_base = (_factory(f"vit_{size}") for size in _SIZES)
deit_tiny, deit_small, deit_base = (_factory(f"deit_{size}") for size in _SIZES)
