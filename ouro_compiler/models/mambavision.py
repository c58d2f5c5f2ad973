"""MambaVision (arXiv 2407.08083): two convolutional stages, then two of Mamba and attention.

Written from the architecture alone. The state_dict keys are those of the public checkpoints
(`levels.2.blocks.0.mixer.conv1d_x.weight`, ...), so that a public checkpoint loads strictly.

A hybrid stage cuts its map into square windows, which are samples of their own from then on, and
starts with Mamba mixers; from block ceil(depth / 2) on, blocks attend. A mixer scans half of the
channels and leaves the other half to a convolution; its dt bias is added twice, by dt_proj and by
the scan, as pretrained weights expect.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ouro_compiler.ops  # noqa: F401  (registers torch.ops.ouro)
from ouro_compiler.models.layers import Attention, Mlp, fresh_dt_bias

CONV_STAGES = 2


@dataclass(frozen=True, kw_only=True)
class MambaVisionConfig:
    """Everything that fixes a MambaVision's architecture; lengths in pixels, tokens or channels.

    Stage s has embed_dim * 2**s channels, depths[s] blocks, and where it attends heads[s] heads in
    windows of windows[s] x windows[s] tokens. patch_size: 4, or 1 for images that are small
    already. layer_scale: a factor for each channel of each residual branch of the hybrid stages.
    crop: the part of the resized image that is looked at.
    """

    img_size: int = 224
    patch_size: Literal[1, 4] = 4
    in_chans: int = 3
    stem_dim: int = 64
    embed_dim: int = 96
    depths: tuple[int, int, int, int] = (3, 3, 7, 5)
    heads: tuple[int, int, int, int] = (2, 4, 8, 16)
    windows: tuple[int, int, int, int] = (8, 8, 14, 7)
    d_state: int = 8
    d_conv: int = 3
    mlp_ratio: float = 4.0
    layer_scale: bool = False
    num_classes: int = 1000
    crop: float = 1.0

    def dim(self, stage: int) -> int:
        """Channels of a stage."""
        return self.embed_dim * 2**stage

    def attention_starts(self, stage: int) -> int:
        """The first block of a hybrid stage that attends."""
        return (self.depths[stage] + 1) // 2

    def build(self) -> MambaVision:
        """A MambaVision of this architecture with fresh random weights."""
        return MambaVision(self)


class MambaVisionMixer(nn.Module):
    """One scan over half of the channels, a convolution over the other half, and a projection."""

    def __init__(self, config: MambaVisionConfig, dim: int) -> None:
        super().__init__()
        half, rank, states = dim // 2, math.ceil(dim / 16), config.d_state
        self.parts = (rank, states, states)
        self.in_proj = nn.Linear(dim, dim, bias=False)
        self.conv1d_x, self.conv1d_z = (
            nn.Conv1d(half, half, config.d_conv, groups=half, padding="same", bias=False)
            for _ in range(2)
        )
        self.x_proj = nn.Linear(half, sum(self.parts), bias=False)
        self.dt_proj = nn.Linear(rank, half)
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        with torch.no_grad():
            self.dt_proj.bias.copy_(fresh_dt_bias(half))
        self.A_log = nn.Parameter(torch.arange(1, states + 1).float().log().repeat(half, 1))
        self.D = nn.Parameter(torch.ones(half))
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D), B counting windows."""
        x, z = self.in_proj(hidden).transpose(1, 2).chunk(2, dim=1)
        x, z = F.silu(self.conv1d_x(x)), F.silu(self.conv1d_z(z))
        delta, B, C = self.x_proj(x.transpose(1, 2)).split(self.parts, dim=-1)
        y = torch.ops.ouro.selective_scan(
            x,
            self.dt_proj(delta).transpose(1, 2),
            -torch.exp(self.A_log),
            B.transpose(1, 2),
            C.transpose(1, 2),
            self.D,
            None,
            self.dt_proj.bias,
            True,
        )
        return self.out_proj(torch.cat((y, z), dim=1).transpose(1, 2))


class HybridBlock(nn.Module):
    """Residual branches: norm -> mixer or attention, and norm -> MLP."""

    gamma_1: nn.Parameter | None
    gamma_2: nn.Parameter | None

    def __init__(self, config: MambaVisionConfig, stage: int, *, attends: bool) -> None:
        super().__init__()
        dim = config.dim(stage)
        self.norm1 = nn.LayerNorm(dim)
        self.mixer: nn.Module
        self.mixer = (
            Attention(dim, config.heads[stage]) if attends else MambaVisionMixer(config, dim)
        )
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, round(config.mlp_ratio * dim))
        for name in ("gamma_1", "gamma_2"):
            scale = nn.Parameter(torch.full((dim,), 1e-5)) if config.layer_scale else None
            self.register_parameter(name, scale)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        x = x + _scaled(self.mixer(self.norm1(x)), self.gamma_1)
        return x + _scaled(self.mlp(self.norm2(x)), self.gamma_2)


def _scaled(x: Tensor, factor: nn.Parameter | None) -> Tensor:
    return x if factor is None else factor * x


class ConvBlock(nn.Module):
    """Two 3x3 convolutions with batch norms and a GELU (tanh form), and the residual."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        hidden = F.gelu(self.norm1(self.conv1(x)), approximate="tanh")
        return x + self.norm2(self.conv2(hidden))


class _Reduction(nn.Module):
    """Halves each side of the map; the name of its member is that of public checkpoints."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        conv = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False)
        self.reduction = nn.ModuleList([conv])

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction[0](x)


class Stage(nn.Module):
    """Blocks of one resolution, then the reduction to the next (all stages but the last)."""

    def __init__(self, config: MambaVisionConfig, stage: int) -> None:
        super().__init__()
        self.window = config.windows[stage] if stage >= CONV_STAGES else None
        starts = config.attention_starts(stage)
        self.blocks = nn.ModuleList(
            ConvBlock(config.dim(stage))
            if self.window is None
            else HybridBlock(config, stage, attends=block >= starts)
            for block in range(config.depths[stage])
        )
        last = stage == len(config.depths) - 1
        self.downsample = None if last else _Reduction(config.dim(stage))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 2C, H/2, W/2), or (B, C, H, W) in the last stage."""
        if self.window is None:
            for block in self.blocks:
                x = block(x)
        else:
            x = self._in_windows(x, self.window)
        return x if self.downsample is None else self.downsample(x)

    def _in_windows(self, x: Tensor, window: int) -> Tensor:
        """The blocks on the windows of a map (B, C, H, W), zeros added at its far sides."""
        height, width = x.shape[2], x.shape[3]
        rows, columns = -(-height // window), -(-width // window)
        right, bottom = columns * window - width, rows * window - height
        if right or bottom:
            x = F.pad(x, (0, right, 0, bottom))
        # (B, C, rows, w, columns, w) -> (B * rows * columns, w * w, C)
        x = x.unflatten(3, (columns, window)).unflatten(2, (rows, window))
        tokens = x.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(0, 2)
        for block in self.blocks:
            tokens = block(tokens)
        x = tokens.unflatten(1, (window, window)).unflatten(0, (-1, rows, columns))
        x = x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
        return x[:, :, :height, :width] if right or bottom else x


class PatchEmbed(nn.Module):
    """Two convolutions, strided alike; members are numbered as in public checkpoints."""

    def __init__(self, config: MambaVisionConfig) -> None:
        super().__init__()
        stem, dim = config.stem_dim, config.embed_dim
        stride = math.isqrt(config.patch_size)
        self.conv_down = nn.Sequential(
            nn.Conv2d(config.in_chans, stem, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(stem, eps=1e-4),
            nn.ReLU(),
            nn.Conv2d(stem, dim, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(dim, eps=1e-4),
            nn.ReLU(),
        )

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, H/P, W/P)."""
        return self.conv_down(images)


class MambaVision(nn.Module):
    """MambaVision classifier: images (B, C, H, W) -> logits (B, num_classes). No size is fixed."""

    def __init__(self, config: MambaVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.levels = nn.ModuleList(Stage(config, stage) for stage in range(len(config.depths)))
        width = config.dim(len(config.depths) - 1)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, config.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes)."""
        x = self.patch_embed(images)
        for level in self.levels:
            x = level(x)
        return self.head(self.norm(x).mean((2, 3)))


_LARGE = MambaVisionConfig(
    embed_dim=196, depths=(3, 3, 10, 5), heads=(4, 8, 16, 32), layer_scale=True
)
_LARGE3 = replace(_LARGE, embed_dim=256, depths=(3, 3, 20, 10))
_AT_512 = {"img_size": 512, "windows": (8, 8, 32, 16), "crop": 0.93}

# What `examples/mambavision_digits.safetensors` is: 28x28 grey images, scans at 7x7 and 4x4.
MAMBAVISION_MICRO = MambaVisionConfig(
    img_size=28, patch_size=1, in_chans=1, stem_dim=8, embed_dim=8, depths=(1, 1, 2, 2),
    heads=(1, 1, 2, 4), windows=(7, 7, 7, 4), num_classes=10,
)  # fmt: skip

# large2 and large3 come in two resolutions, whose weights have the same shapes.
ARCHITECTURES: dict[str, MambaVisionConfig] = {
    "mambavision_micro": MAMBAVISION_MICRO,
    "mambavision_tiny": MambaVisionConfig(stem_dim=32, embed_dim=80, depths=(1, 3, 8, 4)),
    "mambavision_tiny2": MambaVisionConfig(
        stem_dim=32, embed_dim=80, depths=(1, 3, 11, 4), crop=0.98
    ),
    "mambavision_small": MambaVisionConfig(crop=0.93),
    "mambavision_base": MambaVisionConfig(embed_dim=128, depths=(3, 3, 10, 5), layer_scale=True),
    "mambavision_large": _LARGE,
    "mambavision_large2": replace(_LARGE, depths=(3, 3, 12, 5)),
    "mambavision_large2_512": replace(_LARGE, depths=(3, 3, 12, 5), **_AT_512),  # type: ignore[arg-type]
    "mambavision_large3_256": replace(_LARGE3, img_size=256, windows=(8, 8, 16, 8)),
    "mambavision_large3_512": replace(_LARGE3, **_AT_512),  # type: ignore[arg-type]
}


def _factory(name: str) -> Callable[..., MambaVision]:
    def build(**overrides: object) -> MambaVision:
        return replace(ARCHITECTURES[name], **overrides).build()  # type: ignore[arg-type]

    build.__name__ = name
    build.__doc__ = f"A `{name}` with random weights; keywords override MambaVisionConfig fields."
    return build


mambavision_micro = _factory("mambavision_micro")
mambavision_tiny = _factory("mambavision_tiny")
mambavision_small = _factory("mambavision_small")
mambavision_base = _factory("mambavision_base")
